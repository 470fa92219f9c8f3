"""What waits for all clients together: its limits, and the memory it takes."""

from __future__ import annotations

from collections import deque
from typing import Final, TypeAlias

import trio

from realtimed.hub.history import History, Retention
from realtimed.hub.replays import Pieces, Replays
from realtimed.net.fifo import Fifo

__all__ = ["CHUNK_COST", "ENTRY_BYTES", "SHARED_BYTES", "Backlogs", "Data", "Entry", "Later"]

ENTRY_BYTES: Final = 120
"""Memory of an entry beside its bytes, in CPython on a 64-bit machine: a tuple, a float, a place in a queue."""

SHARED_BYTES: Final = 160
"""Memory of a frame that several clients may wait for, beside its bytes: their object, and its item in `_shared`."""

CHUNK_COST: Final = 72
"""Memory of a `bytearray` beside its bytes and its entry."""

_ASKED_COST: Final = 40
"""Memory of a bytes object that a client has asked for, beside its bytes and its entry."""

_ENDINGS: Final = 16
"""Publishers that may be found slow in one turn of the event loop."""

_SHORT: Final = 50
"""Entries of a discarded queue that are dropped at once."""

_DISCARDED_AT_ONCE: Final = 500
"""Discarded entries dropped before other tasks get their turn. They take half a millisecond."""

Data: TypeAlias = bytes | bytearray | memoryview
"""Whole frames: `bytes` that several clients may wait for, a `bytearray` for one client alone, or a `memoryview` that
replays share. But `bytes` that a client has asked for are for it alone."""

Entry: TypeAlias = tuple[float, Data, bool]
"""When it began to wait, the frames, and whether the client has asked for them."""

Later: TypeAlias = tuple[float, Data | Pieces, bool]
"""An entry, or a replay with pieces that are not made yet."""

_Queue: TypeAlias = Fifo[Entry] | Fifo[Later]


class Backlogs:
    """The limits on what waits for clients, and the memory in bytes that it takes for all streams.

    Frames that several clients wait for count once. `total` is what streams have for themselves, `held` is everything.
    """

    # Invariants: `total` is the sum of all backlogs' `cost` and of the changes given to `count`; `asked` is the part of
    # it that clients have asked for. `_shared` counts the entries that refer to a bytes object, by its identity;
    # `shared` is the memory of these objects. `_discarded` has queues that no client waits for and that still count;
    # none of them is empty.

    def __init__(self, *, limit: int, timeout: float, total_limit: int, replays: Replays | None = None) -> None:
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.total = 0
        self.asked = 0
        self.shared = 0
        self.streams = 0
        self.endings = trio.Semaphore(_ENDINGS)
        """Held while a publisher is found slow, which takes some work. See `realtimed.net.drains` for clients."""
        self._discarded: deque[_Queue] = deque()
        self._shared: dict[int, int] = {}
        self._replays = replays or Replays(History(limit=0, clock=float, default=Retention(0, 0)))
        self._replays.freed = self.freed
        self._waiting = trio.lowlevel.ParkingLot()
        self._attendant = trio.lowlevel.ParkingLot()
        self._turns = trio.StrictFIFOLock()

    def configure(self, limit: int, timeout: float, total_limit: int) -> None:
        """Set the limits: bytes a client, seconds, and bytes in all. They also apply to what already waits."""
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.check()
        self.freed()  # publishers may wait for memory that is free now

    @property
    def held(self) -> int:
        """Bytes of memory for everything that waits."""
        return self.total + self.shared + self._replays.bytes

    @property
    def replaying(self) -> int:
        """Bytes of memory for pieces of replays that wait for clients to read them."""
        return self.asked + self._replays.shared

    @property
    def may_replay(self) -> bool:
        """Whether there is memory for another piece of a replay."""
        return self.replaying <= self.total_limit // 2

    @property
    def pace(self) -> float:
        """Seconds that a client may take for each byte that it has asked for."""
        return self.timeout / self.limit

    # Accounting.

    def share(self, data: bytes) -> None:
        """Account for another entry that refers to `data`."""
        key = id(data)
        count = self._shared.get(key, 0)
        self._shared[key] = count + 1
        if not count:
            self.shared += len(data) + SHARED_BYTES

    def unshare(self, data: bytes) -> None:
        """Account for the removal of an entry that refers to `data`. The caller must still refer to it."""
        key = id(data)
        count = self._shared[key] - 1
        if count:
            self._shared[key] = count
        else:
            del self._shared[key]
            self.shared -= len(data) + SHARED_BYTES

    def charge(self, data: Data, asked: bool) -> int:
        """Account for a new entry; return the memory that it takes for its client alone."""
        if not asked and isinstance(data, bytes):
            self.share(data)
        cost = _cost(data, asked)
        self.total += cost
        if asked:
            self.asked += cost
        return cost

    def discharge(self, data: Data, asked: bool) -> int:
        """Account for the removal of an entry; return the memory that it took for its client alone."""
        if not asked and isinstance(data, bytes):
            self.unshare(data)
        cost = _cost(data, asked)
        self.total -= cost
        if asked:
            self.asked -= cost
        return cost

    def count(self, change: int) -> None:
        """Add `change`, which may be negative, to the bytes of memory that are held outside of backlogs."""
        self.total += change
        if change > 0:
            self.check()
        elif change < 0:
            self.freed()

    def check(self) -> None:
        """Wake the task in `exceeded` if too much is held. Call this after adding something."""
        if self.held > self.total_limit:
            self._attendant.unpark_all()

    def freed(self) -> None:
        """Wake the tasks that wait for memory, if some is free. Call this after dropping something."""
        if self._waiting and self.held <= self.total_limit:
            self._waiting.unpark_all()

    # Dropping, a part at a time.

    def discard(self, queue: _Queue) -> None:
        """Drop the entries of a queue: at once if they are few, else in `let_go`. The caller must forget it."""
        self._drop_entries(queue, _SHORT)
        if queue:
            self._discarded.append(queue)
            self._attendant.unpark_all()

    def let_go(self) -> bool:
        """Drop some of the discarded entries; return whether there are more."""
        budget = _DISCARDED_AT_ONCE
        while self._discarded and budget:
            budget -= self._drop_entries(self._discarded[0], budget)
            if not self._discarded[0]:
                self._discarded.popleft()
        self.freed()
        return bool(self._discarded)

    def _drop_entries(self, queue: _Queue, most: int) -> int:
        """Drop at most `most` entries; return how many were dropped."""
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
        """Wait until the next piece of a replay may be made. Streams get their turns in the order of their calls.

        Each turn of the event loop makes one piece, so others are served in between, however many clients come back.
        It makes none while replays take half of the memory allowed for everything that waits.
        """
        async with self._turns:
            await trio.lowlevel.checkpoint()
            while not self.may_replay:
                await self._waiting.park()

    async def exceeded(self) -> None:
        """Wait until more is held than the limit; drop discarded entries meanwhile. Only one task may call this."""
        while True:
            while self.let_go():
                await trio.lowlevel.checkpoint()
            if self.held > self.total_limit:
                return
            await self._attendant.park()

    async def room(self) -> None:
        """Wait until there is room for more to be published: `held` is within its limit."""
        while self.held > self.total_limit:
            await self._waiting.park()


def _cost(data: Data, asked: bool) -> int:
    """Return the memory that an entry takes for its client alone."""
    if isinstance(data, bytearray):
        return ENTRY_BYTES + CHUNK_COST + len(data)
    return ENTRY_BYTES + _ASKED_COST + len(data) if asked and isinstance(data, bytes) else ENTRY_BYTES
