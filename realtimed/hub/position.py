"""Positions of publications, for the hub and for the clients of the control socket."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Position", "Receipt"]


class Position(NamedTuple):
    """A position in a channel: behind the publication with this offset.

    `epoch` changes whenever offsets begin at 1 again.
    """

    epoch: str
    offset: int


class Receipt(NamedTuple):
    """The answer to a publisher: how many subscribers the message was queued for, and its position in the channel.

    It does not say that they have read the message. If `repeated`, the message had been published before with the same
    idempotency key, and this is the receipt of that time.
    """

    recipients: int
    epoch: str
    offset: int
    repeated: bool = False
