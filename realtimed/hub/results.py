"""What the hub answers, beside receipts."""

from __future__ import annotations

from typing import NamedTuple

from realtimed.hub.replays import Excerpt

__all__ = ["Counts", "Joined"]


class Joined(NamedTuple):
    """The result of a subscription: where the channel is, and what the subscriber has missed of it.

    `recovered` is None if nothing was asked for; True if `missed` is all that was published since then, in order; False
    if not all of that is known any more, and then `missed` is empty. If the last publications were asked for, they are
    `missed`, and `last` is their number.
    """

    epoch: str
    offset: int
    recovered: bool | None
    missed: Excerpt
    last: int | None = None


class Counts(NamedTuple):
    """What a hub counts from its start; see `Hub`."""

    publications: int
    skipped: int
    deliveries: int
    sends: int
    sent_bytes: int
    rounds: int
