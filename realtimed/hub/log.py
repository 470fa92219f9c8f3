"""The log of publications: what has been published and is in no round yet. Pure and synchronous."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final, TypeAlias

from realtimed.hub.channel import Channel, Subscriber
from realtimed.hub.publication import Publication

__all__ = ["PUBLICATION_BYTES", "Entry", "Log"]

PUBLICATION_BYTES: Final = 288
"""Memory of a publication in the log beside its message: the publication, its entry, the objects of its bytes."""

_ROUND_PUBLICATIONS: Final = 512
"""Publications that one round takes at most: their channels are looked at before other tasks get their turn."""

_ROUND_BYTES: Final = 256 * 1024
"""Bytes that one round sends a subscriber of all its channels at most, unless one publication is larger.

So clients can read one round before the next fills their backlog.
"""

_ROUND_MEMBERS: Final = 50_000
"""Subscriptions that the channels of one round have together at most: looking at them takes some milliseconds."""

_LARGEST_GROWTH: Final = 6
"""How many times longer a message may become in the most verbose format, beside its frame.

That is JSON, where ``\\u0001`` stands for one byte. A log whose messages have room for this needs no look at what each
publication becomes.
"""

Entry: TypeAlias = tuple[Channel, Publication]
"""A publication, and the channel it was published on."""


class Log:
    """Publications in the order published, and which subscribers have some of them already.

    Each publication of a hub has a number; the first entry's is `first`. `bytes` is the memory that the entries take.
    A subscriber in `caught_up` has every publication on its channels below the number given there. What no longer
    matters goes with the next `take`.
    """

    # Only `Hub.publish` and `Hub.apply` append to `entries` and add to `bytes`: a method of the log would cost each
    # publication one more call.
    #
    # Invariants: `_indices` has, by channel, the indices of those publications that are among the first `_indexed`
    # entries, in ascending order. `_last_joined` is what `catch_up` last made of them, and its
    # key: format, index of the first entry, number of entries, channels.

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.first = 0
        self.bytes = 0
        self.caught_up: dict[Subscriber, int] = {}
        self._indices: dict[Channel, list[int]] = {}
        self._indexed = 0
        self._last_joined: tuple[object, bytes] = None, b""

    def catch_up(self, subscriber: Subscriber) -> bytes:
        """Return the frames that a subscriber has not had, and record that it has them.

        All who call this share one index of the log, so its length does not matter to each; and those who miss the same
        get the same bytes.
        """
        entries = self.entries
        seen = max(self.caught_up.get(subscriber, 0) - self.first, 0)
        self.caught_up[subscriber] = self.first + len(entries)
        for index in range(self._indexed, len(entries)):
            self._indices.setdefault(entries[index][0], []).append(index)
        self._indexed = len(entries)
        channels = frozenset(subscriber.channels & self._indices.keys())
        key = subscriber.form, seen, self._indexed, channels
        if self._last_joined[0] != key:
            missing: list[int] = []
            for channel in channels:
                indices = self._indices[channel]
                missing += indices[bisect_left(indices, seen) :] if seen else indices
            missing.sort()
            self._last_joined = key, b"".join([entries[index][1].encoded(subscriber.form) for index in missing])
        return self._last_joined[1]

    def take(self, subscriptions: int) -> tuple[list[Entry], int, dict[Subscriber, int]]:
        """Remove and return what one round may hold: at least one publication, if there is one.

        Returns the entries, the number of the first, and of the subscribers that have some of them already the number
        up to which they do. `subscriptions` is how many there are in the hub.
        """
        if self._indexed:
            self._indices.clear()
            self._indexed = 0
            self._last_joined = None, b""
        first = self.first
        entries = self.entries
        if (
            len(entries) <= _ROUND_PUBLICATIONS
            and self.bytes - PUBLICATION_BYTES * len(entries) <= _ROUND_BYTES // _LARGEST_GROWTH
            and subscriptions <= _ROUND_MEMBERS  # at least as many as those of all channels in the log
        ):
            self.entries = []
            self.bytes = 0
        else:
            entries = self._cut(entries)
        self.first = end = first + len(entries)
        if not self.caught_up:
            return entries, first, {}
        caught_up = {each: seen for each, seen in self.caught_up.items() if seen > first}
        self.caught_up = {each: seen for each, seen in caught_up.items() if seen > end}
        return entries, first, caught_up

    def _cut(self, entries: list[Entry]) -> list[Entry]:
        """Remove from the beginning of `entries` as many as one round may hold, and return them."""
        count = size = members = 0
        channels: set[Channel] = set()
        for channel, publication in entries[:_ROUND_PUBLICATIONS]:
            size += max([len(publication.encoded(form)) for form in channel.subscribers], default=0)
            if channel not in channels:
                channels.add(channel)
                members += channel.count
            if count and (size > _ROUND_BYTES or members > _ROUND_MEMBERS):
                break
            count += 1
        taken = entries[:count]
        del entries[:count]
        self.bytes -= sum(len(publication.payload) + PUBLICATION_BYTES for _, publication in taken)
        return taken
