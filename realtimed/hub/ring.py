"""Where the history is kept: a ring for each channel, and for each age a queue of what expires next."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from typing import Final, TypeAlias

__all__ = ["NOTHING_EVICTED", "ExpiryQueue", "Kept", "Ring"]

Kept: TypeAlias = bytes | bytearray
"""A payload that is kept: `bytes` for text, `bytearray` for binary. Python's garbage collector knows neither."""

NOTHING_EVICTED: Final[dict[int, tuple[Kept, int]]] = {}
"""`Ring.evicted` of most rings. Nobody writes to it."""

_STALE_ALLOWED: Final = 64
"""Stale pairs that a queue may have beyond those it has for what is kept, before it is tidied."""

_TIDIED_AT_ONCE: Final = 4
"""Pairs that are looked at each time that one becomes stale: more than come in."""


class Ring:
    """One channel's recent publications. `History` fills and empties it."""

    __slots__ = (
        "count", "dropped", "evicted", "first", "name", "needed_to", "payloads", "published", "queue", "readers",
        "retained", "size", "times",
    )  # fmt: skip

    # Invariants:
    # - There are `count` publications, at most `size`, with consecutive offsets from `first` to that of the newest
    #   that was kept. In an empty ring `first` is beyond that.
    # - `payloads`, `times` and `published` are columns: `dropped` empty slots, then one slot for each publication. The
    #   slot of an offset is offset - `first` + `dropped`.
    # - `times` are seconds of the history's own clock, which never runs backwards, and decide what is too old.
    #   `published` are milliseconds since 1970 by the wall clock, which somebody may set, and decide nothing.
    # - `readers` read at their own pace. Each has the `first` of when it began; they are in the order of beginning, and
    #   so of offsets. A reader needs nothing before its own `first`, and none needs an offset above `needed_to`.
    # - While there are readers, `evicted` has what was dropped of the offsets that they need: payload and time of
    #   publication, in the order of offsets. `retained` is the memory that this takes.

    def __init__(self, name: str, size: int, queue: ExpiryQueue) -> None:
        self.name = name
        self.size = size
        self.queue = queue
        self.first = 1
        self.count = 0
        self.payloads: list[Kept] = []
        self.times = array("d")
        self.published = array("q")
        self.dropped = 0
        self.readers: OrderedDict[object, int] | None = None
        self.needed_to = 0
        self.evicted: dict[int, tuple[Kept, int]] = NOTHING_EVICTED
        self.retained = 0

    @property
    def oldest_time(self) -> float:
        """The time of the oldest publication, by the history's clock. Raises `IndexError` if there is none."""
        return self.times[self.dropped]

    @property
    def needed_from(self) -> int:
        """The offset of the oldest publication that a reader may need."""
        return next(iter(self.readers.values())) if self.readers else self.first

    def last_before(self, time: float) -> int:
        """Return the newest publication's offset up to `time`; one below `first` if there is none."""
        return self.first + bisect_right(self.times, time, self.dropped) - self.dropped - 1

    def evicted_entries(self) -> list[tuple[int, bytes, bool, int]]:
        """Return what is retained for readers alone: offset, payload, whether it is text, time of publication."""
        return [(offset, bytes(data), type(data) is bytes, time) for offset, (data, time) in self.evicted.items()]

    def at(self, offset: int) -> tuple[Kept, int]:
        """Return payload and time of publication of what is kept, or retained for a reader."""
        if offset < self.first:
            return self.evicted[offset]
        slot = offset - self.first + self.dropped
        return self.payloads[slot], self.published[slot]


class ExpiryQueue:
    """All rings whose publications are kept for `age` seconds, and the order in which these expire.

    `live` is the number of their publications. `vacant` has the rings of channels without subscribers, each with the
    time at which its last subscriber left, in this order.
    """

    # `History` appends to `rings` and `offsets` and counts `live`: a method would cost each publication a call.
    #
    # Invariants: the queue is made of pairs of a ring and an offset, in the order of time, one for every publication of
    # these rings, and stale ones: pairs whose offset is below their ring's `first`. It begins with `_tidied_rings` and
    # `_tidied_offsets`, which are empty unless `_tidying`, and goes on with `rings` and `offsets`.

    def __init__(self, age: float) -> None:
        self.age = age
        self.live = 0
        self.vacant: OrderedDict[Ring, float] = OrderedDict()
        self.rings: deque[Ring] = deque()
        self.offsets: deque[int] = deque()
        self._tidied_rings: deque[Ring] = deque()
        self._tidied_offsets: deque[int] = deque()
        self._tidying = False

    def __len__(self) -> int:
        """Return the length of the queue, stale pairs included."""
        return len(self._tidied_rings) + len(self.rings)

    @property
    def first_vacant(self) -> tuple[float, Ring]:
        """The first item of `vacant`: the time, and the ring. There has to be one."""
        ring, time = next(iter(self.vacant.items()))
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
        """Remove the first pair if it is stale; return whether it was."""
        rings, offsets = self._tidied_rings or self.rings, self._tidied_offsets or self.offsets
        if rings and offsets[0] < rings[0].first:
            rings.popleft()
            offsets.popleft()
            return True
        return False

    def tidy(self) -> None:
        """Remove stale pairs once they are the majority, so that the queue is in proportion to what is kept.

        Call this whenever a pair has become stale. Each call does a little, as a queue may be long.
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
