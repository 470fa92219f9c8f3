"""Where a publication stands, for the hub and for the clients of the control socket."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Position", "Receipt"]


class Position(NamedTuple):
    """A place in a channel's sequence of publications: behind the one with this offset.

    `epoch` is different for every time that the channel's offsets began at 1.
    """

    epoch: str
    offset: int


class Receipt(NamedTuple):
    """What a publisher learns: how many subscribers the message was queued for, and its place in the channel.

    That does not say that it was read. With `repeated`, the message had been published before, with the same
    idempotency key, and the receipt is that of the first time.
    """

    recipients: int
    epoch: str
    offset: int
    repeated: bool = False
