"""What was published recently, for clients that come back: bounded in number and age a channel, and in bytes in all.

A publication that is kept costs one slot in its channel's ring and one pair in the queue of all channels with the same
age. The queue is in the order of time. So what has expired, or has to go because the bytes are used up, is at its
head, without a timer for each channel and without a search.

Nothing here makes an object for each publication that Python's garbage collector knows: it would have to walk over
hundreds of thousands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Final, NamedTuple

from realtimed.hub.names import Pattern
from realtimed.hub.ring import NOTHING_EVICTED, ExpiryQueue, Kept, Ring

__all__ = ["ENTRY_BYTES", "EVICTED_BYTES", "RING_BYTES", "Aged", "History", "KeptOne", "Retention"]

ENTRY_BYTES: Final = 168
"""What one kept publication counts beside its payload: about what its objects take in CPython on a 64-bit machine."""

EVICTED_BYTES: Final = 88
"""What a dropped publication that is retained for readers counts beyond that: it is in no column any more."""

RING_BYTES: Final = 1024
"""What one channel with a history counts: its name, its entry in the hub, its ring."""

_DROPPED_ALLOWED: Final = 16
"""Dropped slots tolerated before compaction, beyond as many as there are publications."""

_HOLDER: Final = object()
"""Reads for those readers from another process that have not come yet."""

_DROPPED: Final[Kept] = bytearray()
"""What a dropped slot has in place of a payload."""


class Retention(NamedTuple):
    """How much of a channel's history is kept: the last `size` publications, each for `age` seconds."""

    size: int
    age: float


class Aged(NamedTuple):
    """A publication that is kept: its age in seconds, and when it was published, in milliseconds since 1970."""

    age: float
    payload: Kept
    published: int


class KeptOne(NamedTuple):
    """A publication that is kept: its offset, its time by the history's clock, and when it was published."""

    offset: int
    time: float
    payload: Kept
    published: int


class History:
    """The history of all channels, at most `limit` bytes; `clock` returns seconds.

    `rules` are pairs of a pattern for channel names, in which ``*`` stands for any characters, and a retention. The
    first that matches counts, and `default` where none does.
    """

    # Invariants:
    # - `emptied` is called with the name of a channel of which nothing is kept any more: no publication, and no vacancy
    #   (see `vacated`).
    # - `bytes` is the sum of the payloads kept, plus ENTRY_BYTES for each, plus RING_BYTES for each ring that is not
    #   empty and once more for each that is vacant. `publications` and `channels` are the numbers of the publications
    #   and of the rings that are not empty. `retained` is the sum of that of all rings.

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
        self._queues: dict[float, ExpiryQueue] = {}

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
        queue = self._queues.get(retention.age)
        if queue is None:
            queue = self._queues[retention.age] = ExpiryQueue(retention.age)
        return Ring(name, retention.size, queue)

    def keep(self, ring: Ring, offset: int, payload: Kept, published: int, time: float | None = None) -> None:
        """Keep a publication of now or of another `time`; `offset` follows that of the one before, and `time` too.

        `published` is the time that clients see, in milliseconds since 1970: 64 bits with a sign.
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
        queue = ring.queue
        queue.live += 1
        queue.rings.append(ring)
        queue.offsets.append(offset)
        self.publications += 1
        self.bytes += len(payload) + ENTRY_BYTES
        if ring.count > ring.size:
            self._drop(ring)
            queue.tidy()
        if self.bytes > self.limit:
            self._shrink()

    def vacated(self, ring: Ring) -> None:
        """Record that a channel's last subscriber has left: the channel is kept for its age, even without publications.

        Otherwise a channel on which little is published would be forgotten each time that its only client loses the
        connection. What is published until the client is back would be in a new epoch, and lost to the client.
        """
        ring.queue.vacant[ring] = self._clock()
        self.bytes += RING_BYTES
        if self.bytes > self.limit:
            self._shrink()

    def occupied(self, ring: Ring) -> None:
        """Record that a channel has a subscriber, or is of no use any more."""
        if ring.queue.vacant.pop(ring, None) is not None:
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
            self._read_no_more(ring)

    def _read_no_more(self, ring: Ring) -> None:
        ring.readers = None
        ring.evicted = NOTHING_EVICTED
        self.retained -= ring.retained
        ring.retained = 0

    def discard(self, ring: Ring) -> None:
        """Drop all of a ring that its channel gives up, without calling `emptied`. Its readers may go on."""
        self.occupied(ring)
        while ring.count:
            self._drop(ring)

    # For another process, which goes on with all of this: see `realtimed.hub.transfer`.

    def now(self) -> float:
        """Return the time of the history's clock."""
        return self._clock()

    def kept(self, ring: Ring, after: int, until: int, most: int) -> list[KeptOne]:
        """Return a ring's publications with offsets above `after` up to `until`, oldest first; about `most` bytes."""
        found: list[KeptOne] = []
        for offset in range(max(ring.first, after + 1), min(ring.first + ring.count - 1, until) + 1):
            slot = offset - ring.first + ring.dropped
            payload = ring.payloads[slot]
            found.append(KeptOne(offset, ring.times[slot], payload, ring.published[slot]))
            most -= len(payload) + ENTRY_BYTES
            if most <= 0:
                break
        return found

    def vacancies(self) -> Iterator[tuple[Ring, float]]:
        """Yield the rings of channels without subscribers, and since when they have none."""
        for queue in self._queues.values():
            yield from queue.vacant.items()

    def is_vacant(self, ring: Ring) -> bool:
        """Return whether a channel is kept because it had a subscriber a moment ago."""
        return ring in ring.queue.vacant

    def resume_vacancy(self, ring: Ring, age: float) -> None:
        """Record that a channel has had no subscriber for `age` seconds. Those that have had none longer come first."""
        if ring not in ring.queue.vacant:
            ring.queue.vacant[ring] = self._clock() - age
            self.bytes += RING_BYTES

    def retain(self, ring: Ring, entries: Iterable[tuple[int, Kept, int]]) -> None:
        """Retain publications, each with offset and time, that readers from another process need.

        Call this before `resume_reading` and, when all of them read, `readers_resumed`.
        """
        ring.evicted = {}
        for offset, payload, published in entries:
            ring.evicted[offset] = payload, published
            ring.retained += len(payload) + ENTRY_BYTES + EVICTED_BYTES
        self.retained += ring.retained
        ring.readers = OrderedDict({_HOLDER: next(iter(ring.evicted), ring.first)})

    def resume_reading(self, ring: Ring, reader: object, offset: int, end: int) -> bool:
        """Retain what is between two offsets, as `begin_reading` does. Return False if something of it is gone."""
        newest = ring.first + ring.count - 1
        if ring.readers is None or end - 1 > newest or (offset < ring.first and offset not in ring.evicted):
            return False
        ring.readers[reader] = offset
        ring.needed_to = newest
        return True

    def readers_resumed(self, ring: Ring) -> None:
        """Drop what no reader from another process needs after all, and put the readers into order."""
        if ring.readers is not None:
            ring.readers.pop(_HOLDER, None)
        if ring.readers:
            ring.readers = OrderedDict(sorted(ring.readers.items(), key=itemgetter(1)))
            self._release(ring)
        elif ring.readers is not None:
            self._read_no_more(ring)

    def aged(self, ring: Ring) -> list[Aged]:
        """Return a ring's publications, oldest first."""
        self._expire(ring)
        now = self._clock()
        columns = ring.times[ring.dropped :], ring.payloads[ring.dropped :], ring.published[ring.dropped :]
        return [Aged(now - time, payload, published) for time, payload, published in zip(*columns, strict=True)]

    def restore(self, rings: Iterable[tuple[Ring, int, list[Aged]]], later: float) -> None:
        """Fill empty rings with what `aged` returned `later` seconds ago; each ring comes with its newest offset.

        May call `emptied` for rings of which nothing can be kept.
        """
        now = self._clock() - later
        everything = [
            (now - age, offset, payload, published, ring)
            for ring, newest, entries in rings
            for offset, (age, payload, published) in enumerate(entries, newest - len(entries) + 1)
        ]
        everything.sort(key=itemgetter(0, 1))
        # A ring may be emptied, to make room, and then get more. So channels are reported at the end.
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
        for queue in self._queues.values():
            while queue.skip() or self._drop_one(queue, now - queue.age):
                budget -= 1
                if budget <= 0:
                    return True
        return False

    def _drop_one(self, queue: ExpiryQueue, until: float) -> bool:
        """Drop a publication, or end a vacancy, that began by the time `until`; return whether there was one."""
        oldest = queue.oldest()
        if oldest is not None and oldest.oldest_time <= until:
            self._drop(oldest)
            if not oldest.count:
                self._report_empty(oldest)
            queue.skip()
            return True
        if queue.vacant and queue.first_vacant[0] <= until:
            self._end_vacancy(queue.first_vacant[1])
            return True
        return False

    def _expire(self, ring: Ring) -> None:
        """Drop what is too old of one channel, without waiting for the next `expire`."""
        oldest = self._clock() - ring.queue.age
        if not ring.count or ring.oldest_time > oldest:
            return
        while ring.count and ring.oldest_time <= oldest:
            self._drop(ring)
        if not ring.count:
            self._report_empty(ring)

    def _shrink(self) -> None:
        """Drop the oldest until the rest is within the limit: vacancies first, then publications."""
        # By hand, as every publication passes here once the limit has been reached.
        queues = self._queues.values()
        while self.bytes > self.limit:
            longest_vacant: ExpiryQueue | None = None
            oldest: Ring | None = None
            for queue in queues:
                if queue.vacant:
                    if longest_vacant is None or queue.first_vacant[0] < longest_vacant.first_vacant[0]:
                        longest_vacant = queue
                elif longest_vacant is None:
                    ring = queue.oldest()
                    if oldest is None or (ring is not None and ring.oldest_time < oldest.oldest_time):
                        oldest = ring
            if longest_vacant is not None:
                # Vacancies first: a client that subscribes to one channel after the other must not clear the history.
                self._end_vacancy(longest_vacant.first_vacant[1])
            elif oldest is not None:
                self._drop(oldest)
                if not oldest.count:
                    self._report_empty(oldest)

    def _drop(self, ring: Ring) -> None:
        """Drop a ring's oldest publication."""
        slot, payloads = ring.dropped, ring.payloads
        size = len(payloads[slot]) + ENTRY_BYTES
        self.bytes -= size
        if ring.readers and ring.first <= ring.needed_to:
            ring.evicted[ring.first] = payloads[slot], ring.published[slot]
            ring.retained += size + EVICTED_BYTES
            self.retained += size + EVICTED_BYTES
        payloads[slot] = _DROPPED
        ring.dropped = dropped = slot + 1
        ring.first += 1
        ring.count -= 1
        ring.queue.live -= 1
        self.publications -= 1
        if dropped > ring.count + _DROPPED_ALLOWED:  # seldom, as it moves all the others
            del payloads[:dropped], ring.times[:dropped], ring.published[:dropped]
            ring.dropped = 0
        if not ring.count:
            self.bytes -= RING_BYTES
            self.channels -= 1

    def _report_empty(self, ring: Ring) -> None:
        """Call `emptied` for a ring of which the last publication was dropped, unless its channel is vacant."""
        if ring not in ring.queue.vacant:
            self.emptied(ring.name)

    def _release(self, ring: Ring) -> None:
        """Drop what was retained and no reader of a ring needs any more."""
        before = ring.retained
        needed = ring.needed_from
        while ring.evicted and (offset := next(iter(ring.evicted))) < needed:
            ring.retained -= len(ring.evicted.pop(offset)[0]) + ENTRY_BYTES + EVICTED_BYTES
        self.retained -= before - ring.retained

    def _end_vacancy(self, ring: Ring) -> None:
        """Keep a channel without subscribers no longer than its publications."""
        self.occupied(ring)
        if not ring.count:
            self.emptied(ring.name)
