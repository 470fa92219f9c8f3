"""What was published recently, for those who come back: bounded in number and age a channel, and in bytes in all.

A publication that is kept costs one entry in its channel's ring and one in the queue of its *shelf*, on which all
channels with the same age lie. The queue's order is that of time, so what has expired, or has to go because the bytes
are used up, is found at its head: no timer for each channel, and no search.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias

__all__ = ["ENTRY_BYTES", "RING_BYTES", "Entry", "History", "Retention", "Ring"]

Entry: TypeAlias = tuple[float, bytes, bool]
"""A publication that is kept: when it was published, its payload, and whether that is text."""

ENTRY_BYTES: Final = 256
"""What one kept publication counts beside its payload: about what its objects take in CPython on a 64-bit machine."""

RING_BYTES: Final = 1024
"""What one channel counts that has a history: its name, its entry in the hub, its ring."""

_STALE_ALLOWED: Final = 64


class Retention(NamedTuple):
    """How much of a channel's history is kept: the last `size` publications, each for `age` seconds."""

    size: int
    age: float


class Ring:
    """One channel's recent publications."""

    __slots__ = ("entries", "first", "name", "shelf", "size")

    # Invariants: `entries` holds consecutive publications, the first of which has the offset `first`; at most `size`,
    # and always up to the newest that was kept. When the last has gone, `first` is beyond it.

    def __init__(self, name: str, size: int, shelf: Shelf) -> None:
        self.name = name
        self.size = size
        self.shelf = shelf
        self.entries: list[Entry] = []
        self.first = 1


class Shelf:
    """All rings with the same age."""

    __slots__ = ("age", "left", "live", "queue")

    # Invariants: `queue` holds (time, offset, ring) in the order of time, at least for every entry of these rings. One
    # with an offset below its ring's `first` is stale. `live` is the number of those that are not. `left` says of
    # channels without subscribers when the last one left, in the order of time.

    def __init__(self, age: float) -> None:
        self.age = age
        self.live = 0
        self.queue: deque[tuple[float, int, Ring]] = deque()
        self.left: OrderedDict[Ring, float] = OrderedDict()

    def oldest(self) -> tuple[float, int, Ring] | None:
        """Return the oldest entry that is not stale."""
        while self.queue:
            entry = self.queue[0]
            if entry[1] >= entry[2].first:
                return entry
            self.queue.popleft()
        return None

    def tidy(self) -> None:
        """Drop stale entries once they are the majority, so that the queue is in proportion to what is kept."""
        if len(self.queue) > 2 * self.live + _STALE_ALLOWED:
            self.queue = deque(entry for entry in self.queue if entry[1] >= entry[2].first)


class History:
    """The history of all channels, at most `limit` bytes; `clock` returns seconds.

    `rules` are pairs of a pattern for channel names, in which ``*`` stands for any characters, and a retention. The
    first that matches counts, and `default` where none does.
    """

    # `emptied` is called with the name of a channel of which nothing is kept any more: no publication, and not when its
    # last subscriber left.
    #
    # Invariant: `bytes` is the sum of the payloads kept, plus ENTRY_BYTES for each, plus RING_BYTES for each ring that
    # is not empty and once more for each whose subscribers have left; `publications` and `channels` are the numbers of
    # the publications and of the rings that are not empty.

    def __init__(
        self,
        *,
        limit: int,
        clock: Callable[[], float],
        default: Retention,
        rules: Iterable[tuple[str, Retention]] = (),
    ) -> None:
        self.limit = limit
        self.bytes = 0
        self.publications = 0
        self.channels = 0
        self.emptied: Callable[[str], object] = len
        self._clock = clock
        self._default = default
        self._rules = [(_compile(pattern), retention) for pattern, retention in rules]
        self._shelves: dict[float, Shelf] = {}

    def retention(self, name: str) -> Retention:
        """Return how much is kept of the channel `name`."""
        for matches, retention in self._rules:
            if matches(name):
                return retention
        return self._default

    def ring(self, name: str) -> Ring | None:
        """Return a new, empty ring for a channel, or None if nothing is kept of it."""
        retention = self.retention(name)
        if not retention.size or not self.limit:
            return None
        shelf = self._shelves.get(retention.age)
        if shelf is None:
            shelf = self._shelves[retention.age] = Shelf(retention.age)
        return Ring(name, retention.size, shelf)

    def keep(self, ring: Ring, offset: int, payload: bytes, text: bool) -> None:
        """Keep a publication; `offset` follows that of the one before."""
        self._append(ring, self._clock(), offset, payload, text)

    def _append(self, ring: Ring, now: float, offset: int, payload: bytes, text: bool) -> None:
        entries, shelf = ring.entries, ring.shelf
        if not entries:
            ring.first = offset
            self.bytes += RING_BYTES
            self.channels += 1
        entries.append((now, payload, text))
        shelf.queue.append((now, offset, ring))
        shelf.live += 1
        self.publications += 1
        self.bytes += len(payload) + ENTRY_BYTES
        if len(entries) > ring.size:
            self._drop(ring)
            shelf.tidy()
        if self.bytes > self.limit:
            self._shrink()

    def left(self, ring: Ring) -> None:
        """Take note that the channel's last subscriber has left: the channel is kept for its age, even without history.

        Otherwise a channel on which little is published would be forgotten each time that its only client loses the
        connection, and what is published until the client is back would be in a new epoch, and lost to it.
        """
        ring.shelf.left[ring] = self._clock()
        self.bytes += RING_BYTES
        if self.bytes > self.limit:
            self._shrink()

    def joined(self, ring: Ring) -> None:
        """Take note that the channel has a subscriber."""
        if ring.shelf.left.pop(ring, None) is not None:
            self.bytes -= RING_BYTES

    def after(self, ring: Ring, offset: int) -> list[Entry] | None:
        """Return everything kept that came after `offset`, or None if something that came after it is gone."""
        self._expire(ring)
        skip = offset + 1 - ring.first
        if skip < 0 or not ring.entries:
            return None
        return ring.entries[skip:]

    def latest(self, ring: Ring, count: int) -> list[Entry]:
        """Return the last `count` publications that are kept, oldest first."""
        self._expire(ring)
        return ring.entries[-count:] if count > 0 else []

    def ages(self, ring: Ring) -> list[tuple[float, bytes, bool]]:
        """Return a ring's entries with their ages, in seconds, in place of their times."""
        self._expire(ring)
        now = self._clock()
        return [(now - time, payload, text) for time, payload, text in ring.entries]

    def restore(self, rings: Iterable[tuple[Ring, int, list[tuple[float, bytes, bool]]]], later: float) -> None:
        """Fill empty rings with entries as `ages` gave them `later` seconds ago; with a ring comes its newest offset.

        May call `emptied` for rings of which nothing can be kept.
        """
        now = self._clock() - later
        everything = [
            (now - age, offset, payload, text, ring)
            for ring, newest, entries in rings
            for offset, (age, payload, text) in enumerate(entries, newest - len(entries) + 1)
        ]
        everything.sort(key=itemgetter(0, 1))
        for time, offset, payload, text, ring in everything:
            self._append(ring, time, offset, payload, text)
        while self.expire(len(everything)):
            pass

    def expire(self, budget: int) -> bool:
        """Drop up to `budget` publications that are too old; return whether there may be more."""
        now = self._clock()
        for shelf in self._shelves.values():
            while (entry := shelf.oldest()) is not None and entry[0] <= now - shelf.age:
                if not budget:
                    return True
                budget -= 1
                self._drop(entry[2])
            while (ring := next(iter(shelf.left), None)) is not None and shelf.left[ring] <= now - shelf.age:
                if not budget:
                    return True
                budget -= 1
                self._forget_leaving(ring)
        return False

    def _expire(self, ring: Ring) -> None:
        """Drop what is too old of one channel, without waiting for `expire` to come by."""
        oldest = self._clock() - ring.shelf.age
        while ring.entries and ring.entries[0][0] <= oldest:
            self._drop(ring)

    def _shrink(self) -> None:
        """Drop the oldest of all until the rest is within the limit, empty channels before publications."""
        # By hand, as every publication passes here once the limit has been reached.
        shelves = self._shelves.values()
        while self.bytes > self.limit:
            leaving: tuple[float, Ring] | None = None
            oldest: tuple[float, Ring] | None = None
            for shelf in shelves:
                if shelf.left:
                    ring, time = next(iter(shelf.left.items()))
                    if leaving is None or time < leaving[0]:
                        leaving = time, ring
                elif leaving is None and (entry := shelf.oldest()) is not None:
                    time, _, ring = entry
                    if oldest is None or time < oldest[0]:
                        oldest = time, ring
            if leaving is not None:
                # Who subscribes to one channel after the other must not be able to clear the history with that.
                self._forget_leaving(leaving[1])
            elif oldest is not None:
                self._drop(oldest[1])

    def _drop(self, ring: Ring) -> None:
        """Drop a ring's oldest publication."""
        _, payload, _ = ring.entries.pop(0)
        ring.first += 1
        ring.shelf.live -= 1
        self.publications -= 1
        self.bytes -= len(payload) + ENTRY_BYTES
        if not ring.entries:
            self.bytes -= RING_BYTES
            self.channels -= 1
            if ring not in ring.shelf.left:
                self.emptied(ring.name)

    def _forget_leaving(self, ring: Ring) -> None:
        self.joined(ring)
        if not ring.entries:
            self.emptied(ring.name)


def _compile(pattern: str) -> Callable[[str], object]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL).fullmatch
