"""What waits for all clients together: the limits, and the memory that it takes."""

from __future__ import annotations

from collections import deque
from typing import Final, TypeAlias

import trio

from realtimed.hub.history import History, Retention
from realtimed.hub.replays import Pieces, Replays

__all__ = ["CHUNK_COST", "ENTRY_BYTES", "SHARED_BYTES", "Backlogs", "Data", "Entry", "Later"]

ENTRY_BYTES: Final = 120
"""Memory of an entry beside its bytes, in CPython on a 64-bit machine: a tuple, a float, a place in a deque."""

SHARED_BYTES: Final = 160
"""Memory of a frame that several clients may wait for, beside its bytes: their object, and its place in the count."""

CHUNK_COST: Final = 72
"""Memory of a `bytearray` beside its bytes and its entry."""

_ASKED_COST: Final = 40
"""Memory of bytes that a client has asked for, beside them and their entry."""

_ENDINGS: Final = 16
"""Slow clients that are found to be slow in one turn of the event loop."""

_SHORT: Final = 50
"""Entries of a discarded queue that are dropped at once."""

_DISCARDED_AT_ONCE: Final = 500
"""Discarded entries that are dropped before other tasks get their turn: half a millisecond."""

Data: TypeAlias = bytes | bytearray | memoryview
"""Whole frames: `bytes` that several clients may wait for, a `bytearray` for one client alone, or a `memoryview` that
replays share. `bytes` that a client has asked for are for it alone."""

Entry: TypeAlias = tuple[float, Data, bool]
"""Since when it waits, the frames, and whether the client has asked for them."""

Later: TypeAlias = tuple[float, Data | Pieces, bool]
"""An entry, or a replay of which pieces are still to be made."""

_Queue: TypeAlias = deque[Entry] | deque[Later]


class Backlogs:
    """The limits on what waits for clients, and the sum over all streams in bytes of memory.

    Frames that several clients wait for count once: `total` is what each stream has for itself, `held` is everything.
    """

    # Invariants: `total` is the sum of all backlogs' `cost` and of the changes given to `count`; `asked` is the part of
    # it that clients have asked for. `_shared` counts, for every object of bytes that backlogs refer to, the entries
    # that do; `shared` is the memory of these objects. `_discarded` has queues that nobody waits for and that still
    # count; none of them is empty.

    def __init__(self, *, limit: int, timeout: float, total_limit: int, replays: Replays | None = None) -> None:
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.total = 0
        self.asked = 0
        self.shared = 0
        self.streams = 0
        self.endings = trio.Semaphore(_ENDINGS)
        """Held while a client is found to be slow: thousands may be at the same time, and each is some work."""
        self._discarded: deque[_Queue] = deque()
        self._shared: dict[int, int] = {}
        self._replays = replays or Replays(History(limit=0, clock=float, default=Retention(0, 0)))
        self._replays.freed = self.freed
        self._waiting = trio.lowlevel.ParkingLot()
        self._attendant = trio.lowlevel.ParkingLot()
        self._turns = trio.StrictFIFOLock()

    def configure(self, limit: int, timeout: float, total_limit: int) -> None:
        """Set the limits: bytes a client, seconds, and bytes in all. They hold for what waits already, too."""
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.check()
        self.freed()  # publishers may be waiting for memory that there is now

    @property
    def held(self) -> int:
        """Bytes of memory that everything takes which waits."""
        return self.total + self.shared + self._replays.bytes

    @property
    def replaying(self) -> int:
        """Bytes of memory that pieces of replays take which wait for clients to read them."""
        return self.asked + self._replays.shared

    @property
    def may_replay(self) -> bool:
        """Whether there is memory for another piece of a replay."""
        return self.replaying <= self.total_limit // 2

    @property
    def pace(self) -> float:
        """Seconds a byte that a client may take for what it has asked for."""
        return self.timeout / self.limit

    # Accounting.

    def share(self, data: bytes) -> None:
        """Account for one more entry that refers to `data`."""
        key = id(data)
        count = self._shared.get(key, 0)
        self._shared[key] = count + 1
        if not count:
            self.shared += len(data) + SHARED_BYTES

    def unshare(self, data: bytes) -> None:
        """Account for one entry less that refers to `data`; the caller still does."""
        key = id(data)
        count = self._shared[key] - 1
        if count:
            self._shared[key] = count
        else:
            del self._shared[key]
            self.shared -= len(data) + SHARED_BYTES

    def charge(self, data: Data, asked: bool) -> int:
        """Account for one entry more; return the memory that it takes for its client alone."""
        if not asked and isinstance(data, bytes):
            self.share(data)
        cost = _cost(data, asked)
        self.total += cost
        if asked:
            self.asked += cost
        return cost

    def discharge(self, data: Data, asked: bool) -> int:
        """Account for one entry less; return the memory that it took for its client alone."""
        if not asked and isinstance(data, bytes):
            self.unshare(data)
        cost = _cost(data, asked)
        self.total -= cost
        if asked:
            self.asked -= cost
        return cost

    def count(self, change: int) -> None:
        """Account for `change` bytes more, or fewer if it is negative, that are held outside of backlogs."""
        self.total += change
        if change > 0:
            self.check()
        elif change < 0:
            self.freed()

    def check(self) -> None:
        """Wake the task in `exceeded` if too much is held. To be called after something was added."""
        if self.held > self.total_limit:
            self._attendant.unpark_all()

    def freed(self) -> None:
        """Wake the tasks that wait for memory, if there is some. To be called after something was dropped."""
        if self._waiting and self.held <= self.total_limit:
            self._waiting.unpark_all()

    # Dropping, a part at a time.

    def discard(self, queue: _Queue) -> None:
        """Drop the entries of a queue: at once if they are few, otherwise with `let_go`. The caller keeps no queue."""
        self._drop_entries(queue, _SHORT)
        if queue:
            self._discarded.append(queue)
            self._attendant.unpark_all()

    def let_go(self) -> bool:
        """Drop a part of what has been discarded; return whether there is more."""
        budget = _DISCARDED_AT_ONCE
        while self._discarded and budget:
            budget -= self._drop_entries(self._discarded[0], budget)
            if not self._discarded[0]:
                self._discarded.popleft()
        self.freed()
        return bool(self._discarded)

    def _drop_entries(self, queue: _Queue, most: int) -> int:
        """Drop `most` entries, or all there are; return how many they were."""
        count = min(most, len(queue))
        for _ in range(count):
            _, data, asked = queue.popleft()
            if isinstance(data, Pieces):
                data.close()
            else:
                self.discharge(data, asked)
        return count

    # Waiting.

    async def turn(self) -> None:
        """Wait until the next piece of a replay may be made, first come, first served.

        One is made in each turn of the event loop, so all others are served in between, however many clients come
        back; and none while replays take half of the memory that there is for everything that waits.
        """
        async with self._turns:
            await trio.lowlevel.checkpoint()
            while not self.may_replay:
                await self._waiting.park()

    async def exceeded(self) -> None:
        """Wait until more is held than the limit, and drop meanwhile what has been discarded. For one task."""
        while True:
            while self.let_go():
                await trio.lowlevel.checkpoint()
            if self.held > self.total_limit:
                return
            await self._attendant.park()

    async def room(self) -> None:
        """Wait until the sum is within its limit."""
        while self.held > self.total_limit:
            await self._waiting.park()


def _cost(data: Data, asked: bool) -> int:
    """Return the memory that an entry takes for its client alone."""
    if isinstance(data, bytearray):
        return ENTRY_BYTES + CHUNK_COST + len(data)
    return ENTRY_BYTES + _ASKED_COST + len(data) if asked and isinstance(data, bytes) else ENTRY_BYTES
