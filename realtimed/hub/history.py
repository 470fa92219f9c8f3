"""What was published recently, for those who come back: bounded in number and age a channel, and in bytes in all.

A publication that is kept costs one entry in its channel's ring and one in the queue of its *shelf*, on which all
channels with the same age lie. The queue's order is that of time, so what has expired, or has to go because the bytes
are used up, is found at its head: no timer for each channel, and no search.

Nothing here makes an object for each publication that Python's garbage collector knows: there would be hundreds of
thousands for it to walk over.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias

from realtimed.hub.names import Pattern

__all__ = ["ENTRY_BYTES", "EVICTED_BYTES", "RING_BYTES", "Aged", "History", "Kept", "Retention", "Ring", "Shelf"]

Kept: TypeAlias = bytes | bytearray
"""A payload that is kept: `bytes` for text, and `bytearray` for what is not. The garbage collector knows neither."""

ENTRY_BYTES: Final = 168
"""What one kept publication counts beside its payload: about what its objects take in CPython on a 64-bit machine."""

EVICTED_BYTES: Final = 88
"""What one counts beyond that which was dropped and is retained for readers: it lies in no column any more."""

RING_BYTES: Final = 1024
"""What one channel counts that has a history: its name, its entry in the hub, its ring."""

_STALE_ALLOWED: Final = 64

_TIDIED_AT_ONCE: Final = 4
"""Entries of a shelf's queue that are looked at each time that one becomes stale: more than come in."""

_GONE_ALLOWED: Final = 16
"""Places of what was dropped that a ring has before it closes up; of a large ring, as many as are left."""

_GONE: Final[Kept] = bytearray()
"""What stands in the place of a payload that was dropped."""

_NOTHING: Final[dict[int, tuple[Kept, int]]] = {}
"""What is evicted of most rings: nobody writes to it."""


class Retention(NamedTuple):
    """How much of a channel's history is kept: the last `size` publications, each for `age` seconds."""

    size: int
    age: float


class Aged(NamedTuple):
    """A publication that is kept: its age in seconds, and when it was published, in milliseconds since 1970."""

    age: float
    payload: Kept
    published: int


class Ring:
    """One channel's recent publications."""

    __slots__ = (
        "count", "evicted", "first", "gone", "name", "needed_to", "payloads", "published", "readers", "retained",
        "shelf", "size", "times",
    )  # fmt: skip

    # Invariants: there are `count` publications, consecutive ones, the first of which has the offset `first`; at most
    # `size`, and always up to the newest that was kept. When the last has gone, `first` is beyond it. `payloads`,
    # `times` and `published` are columns: first `gone` places of what was dropped, then one for each publication. So a
    # place's offset is its index + `first` - `gone`. `times` are seconds of the history's own clock, which never runs
    # backwards and decides what is too old. `published` are milliseconds since 1970 by the wall clock, which somebody
    # may set: they are only told.
    #
    # `readers` are those that read at their own pace, each with `first` as it was when the reader began, in the order
    # of beginning, so in that of offsets: no reader needs anything before its own. None needs anything behind the
    # offset `needed_to`. What was dropped of that between is in `evicted`, payload and time of publication, by
    # offset and in that order, as long as there are readers; `retained` is what it costs.

    def __init__(self, name: str, size: int, shelf: Shelf) -> None:
        self.name = name
        self.size = size
        self.shelf = shelf
        self.first = 1
        self.count = 0
        self.payloads: list[Kept] = []
        self.times = array("d")
        self.published = array("q")
        self.gone = 0
        self.readers: OrderedDict[object, int] | None = None
        self.needed_to = 0
        self.evicted: dict[int, tuple[Kept, int]] = _NOTHING
        self.retained = 0

    @property
    def began(self) -> float:
        """When the oldest publication was published. Raises `IndexError` if there is none."""
        return self.times[self.gone]

    @property
    def needed_from(self) -> int:
        """The offset of the oldest publication that a reader may need."""
        return next(iter(self.readers.values())) if self.readers else self.first

    def at(self, offset: int) -> tuple[Kept, int]:
        """Return payload and time of publication of what is kept, or retained for a reader."""
        if offset < self.first:
            return self.evicted[offset]
        place = offset - self.first + self.gone
        return self.payloads[place], self.published[place]


class Shelf:
    """All rings with the same age."""

    __slots__ = ("_tidied_offsets", "_tidied_rings", "_tidying", "age", "left", "live", "offsets", "rings")

    # Invariants: the queue, in the order of time, is made of pairs of a ring and an offset, at least one for every
    # publication of these rings; first those in `_tidied_rings` and `_tidied_offsets`, then those in `rings` and
    # `offsets`. A pair with an offset below its ring's `first` is stale; `live` is the number of those that are not.
    # Nothing is tidied unless `_tidying`. `left` says of channels without subscribers when the last one left, in the
    # order of time.

    def __init__(self, age: float) -> None:
        self.age = age
        self.live = 0
        self.left: OrderedDict[Ring, float] = OrderedDict()
        self.rings: deque[Ring] = deque()
        self.offsets: deque[int] = deque()
        self._tidied_rings: deque[Ring] = deque()
        self._tidied_offsets: deque[int] = deque()
        self._tidying = False

    def __len__(self) -> int:
        """Return how long the queue is, with what is stale."""
        return len(self._tidied_rings) + len(self.rings)

    @property
    def first_left(self) -> tuple[float, Ring]:
        """When the first of the channels without subscribers was left, and its ring. Needs one in `left`."""
        ring, time = next(iter(self.left.items()))
        return time, ring

    def oldest(self) -> Ring | None:
        """Return the ring with the oldest publication of all."""
        while rings := self._tidied_rings or self.rings:
            ring = rings[0]
            offsets = self._tidied_offsets or self.offsets
            if offsets[0] >= ring.first:
                return ring
            rings.popleft()
            offsets.popleft()
        return None

    def skip(self) -> bool:
        """Drop the queue's head if it is stale; return whether it was."""
        rings, offsets = self._tidied_rings or self.rings, self._tidied_offsets or self.offsets
        if rings and offsets[0] < rings[0].first:
            rings.popleft()
            offsets.popleft()
            return True
        return False

    def tidy(self) -> None:
        """Drop stale pairs once they are the majority, so that the queue is in proportion to what is kept.

        To be called whenever one has become stale. It does not do all at once, as a queue may be long.
        """
        if not self._tidying:
            if len(self.rings) <= 2 * self.live + _STALE_ALLOWED:
                return
            self._tidying = True
        for _ in range(_TIDIED_AT_ONCE):
            if not self.rings:
                self.rings, self._tidied_rings = self._tidied_rings, self.rings
                self.offsets, self._tidied_offsets = self._tidied_offsets, self.offsets
                self._tidying = False
                return
            ring, offset = self.rings.popleft(), self.offsets.popleft()
            if offset >= ring.first:
                self._tidied_rings.append(ring)
                self._tidied_offsets.append(offset)


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
    # the publications and of the rings that are not empty. `retained` is the sum of that of all rings.

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
        self.retained = 0
        self.publications = 0
        self.channels = 0
        self.emptied: Callable[[str], object] = len
        self._clock = clock
        self._default = default
        self._rules = [(Pattern(pattern).matches, retention) for pattern, retention in rules]
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

    def keep(self, ring: Ring, offset: int, payload: Kept, published: int, time: float | None = None) -> None:
        """Keep a publication of now or of another `time`; `offset` follows that of the one before, and `time` too.

        `published` is the time that is told of it, in milliseconds since 1970: 64 bits with a sign.
        """
        # All by hand, as every publication passes here.
        if not ring.count:
            ring.first = offset
            self.bytes += RING_BYTES
            self.channels += 1
        ring.count += 1
        ring.times.append(self._clock() if time is None else time)
        ring.published.append(published)
        ring.payloads.append(payload)
        shelf = ring.shelf
        shelf.live += 1
        shelf.rings.append(ring)
        shelf.offsets.append(offset)
        self.publications += 1
        self.bytes += len(payload) + ENTRY_BYTES
        if ring.count > ring.size:
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

    def after(self, ring: Ring, offset: int) -> int | None:
        """Return how many publications came after `offset`, or None if something that came after it is gone."""
        self._expire(ring)
        count = ring.first + ring.count - (offset + 1)
        return count if 0 <= count <= ring.count > 0 else None

    def latest(self, ring: Ring, count: int) -> int:
        """Return how many of the last `count` publications are kept."""
        self._expire(ring)
        return max(min(count, ring.count), 0)

    def begin_reading(self, ring: Ring, reader: object) -> None:
        """Retain what is kept now, whatever is dropped, until `reader` has ended. Each reader begins once."""
        if ring.readers is None:
            ring.readers = OrderedDict()
            ring.evicted = {}
        ring.readers[reader] = ring.first
        ring.needed_to = ring.first + ring.count - 1

    def end_reading(self, ring: Ring, reader: object) -> None:
        """Drop what was retained for `reader` alone."""
        if ring.readers is None or ring.readers.pop(reader, None) is None:
            return
        if ring.readers:
            self._release(ring)
        else:
            ring.readers = None
            ring.evicted = _NOTHING
            self.retained -= ring.retained
            ring.retained = 0

    def discard(self, ring: Ring) -> None:
        """Drop all of a ring that its channel no longer has, without calling `emptied`. Readers may go on."""
        self.joined(ring)
        while ring.count:
            self._drop(ring)

    def aged(self, ring: Ring) -> list[Aged]:
        """Return a ring's publications, oldest first."""
        self._expire(ring)
        now = self._clock()
        kept = zip(ring.times[ring.gone :], ring.payloads[ring.gone :], ring.published[ring.gone :], strict=True)
        return [Aged(now - time, payload, published) for time, payload, published in kept]

    def restore(self, rings: Iterable[tuple[Ring, int, list[Aged]]], later: float) -> None:
        """Fill empty rings with entries as `aged` gave them `later` seconds ago; with a ring comes its newest offset.

        May call `emptied` for rings of which nothing can be kept.
        """
        now = self._clock() - later
        everything = [
            (now - age, offset, payload, published, ring)
            for ring, newest, entries in rings
            for offset, (age, payload, published) in enumerate(entries, newest - len(entries) + 1)
        ]
        everything.sort(key=itemgetter(0, 1))
        # A ring may be emptied, to make room, and then get more: what becomes of its channel shows at the end.
        emptied, self.emptied = self.emptied, len
        try:
            for time, offset, payload, published, ring in everything:
                self.keep(ring, offset, payload, published, time)
            while self.expire(len(everything)):
                pass
        finally:
            self.emptied = emptied
        for ring in {ring for *_, ring in everything}:
            if not ring.count:
                emptied(ring.name)

    def expire(self, budget: int) -> bool:
        """Drop up to `budget` publications that are too old; return whether there may be more."""
        now = self._clock()
        for shelf in self._shelves.values():
            while shelf.skip() or self._drop_one(shelf, now - shelf.age):
                budget -= 1
                if budget <= 0:
                    return True
        return False

    def _drop_one(self, shelf: Shelf, until: float) -> bool:
        """Drop a publication or a channel without subscribers that is that old; return whether there was one."""
        oldest = shelf.oldest()
        if oldest is not None and oldest.began <= until:
            self._drop(oldest)
            if not oldest.count:
                self._report_empty(oldest)
            shelf.skip()
            return True
        if shelf.left and shelf.first_left[0] <= until:
            self._forget_leaving(shelf.first_left[1])
            return True
        return False

    def _expire(self, ring: Ring) -> None:
        """Drop what is too old of one channel, without waiting for `expire` to come by."""
        oldest = self._clock() - ring.shelf.age
        if not ring.count or ring.began > oldest:
            return
        while ring.count and ring.began <= oldest:
            self._drop(ring)
        if not ring.count:
            self._report_empty(ring)

    def _shrink(self) -> None:
        """Drop the oldest of all until the rest is within the limit, empty channels before publications."""
        # By hand, as every publication passes here once the limit has been reached.
        shelves = self._shelves.values()
        while self.bytes > self.limit:
            leaving: Shelf | None = None
            oldest: Ring | None = None
            for shelf in shelves:
                if shelf.left:
                    if leaving is None or shelf.first_left[0] < leaving.first_left[0]:
                        leaving = shelf
                elif leaving is None:
                    ring = shelf.oldest()
                    if oldest is None or (ring is not None and ring.began < oldest.began):
                        oldest = ring
            if leaving is not None:
                # Who subscribes to one channel after the other must not be able to clear the history with that.
                self._forget_leaving(leaving.first_left[1])
            elif oldest is not None:
                self._drop(oldest)
                if not oldest.count:
                    self._report_empty(oldest)

    def _drop(self, ring: Ring) -> None:
        """Drop a ring's oldest publication."""
        gone, payloads = ring.gone, ring.payloads
        size = len(payloads[gone]) + ENTRY_BYTES
        self.bytes -= size
        if ring.readers and ring.first <= ring.needed_to:
            ring.evicted[ring.first] = payloads[gone], ring.published[gone]
            ring.retained += size + EVICTED_BYTES
            self.retained += size + EVICTED_BYTES
        payloads[gone] = _GONE
        ring.gone = gone = gone + 1
        ring.first += 1
        ring.count -= 1
        ring.shelf.live -= 1
        self.publications -= 1
        if gone > ring.count + _GONE_ALLOWED:  # seldom, as all that is left has to move
            del payloads[:gone], ring.times[:gone], ring.published[:gone]
            ring.gone = 0
        if not ring.count:
            self.bytes -= RING_BYTES
            self.channels -= 1

    def _report_empty(self, ring: Ring) -> None:
        if ring not in ring.shelf.left:
            self.emptied(ring.name)

    def _release(self, ring: Ring) -> None:
        """Let go of what no reader of a ring needs any more."""
        before = ring.retained
        needed = ring.needed_from
        while ring.evicted and (offset := next(iter(ring.evicted))) < needed:
            ring.retained -= len(ring.evicted.pop(offset)[0]) + ENTRY_BYTES + EVICTED_BYTES
        self.retained -= before - ring.retained

    def _forget_leaving(self, ring: Ring) -> None:
        self.joined(ring)
        if not ring.count:
            self.emptied(ring.name)
