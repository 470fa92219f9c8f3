"""What waits for clients that do not read fast enough: of each of them in order, and in sum."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final, TypeAlias

import trio

from realtimed.hub.history import History, Retention
from realtimed.hub.publication import Frame
from realtimed.hub.replays import Pieces, Replays

__all__ = ["ENTRY_BYTES", "FAR_OVER", "OVER_SECONDS", "SHARED_BYTES", "Backlog", "Backlogs"]

_BUFFERS_PER_SEND: Final = 64

ENTRY_BYTES: Final = 120
"""What an entry takes beside its bytes in CPython on a 64-bit machine: a tuple, a float, a place in a deque."""

SHARED_BYTES: Final = 160
"""What a frame takes that several clients may wait for, beside its bytes: their object, and its place in the count."""

_SMALL: Final = 256
"""Bytes up to which a frame is copied behind the one before: cheaper than an entry that refers to it."""

OVER_SECONDS: Final = 0.5
"""How long more than `max-backlog` may wait for a client. A burst that is larger, and a client that reads as fast as it
can, is no reason to disconnect it: it takes a few milliseconds."""

FAR_OVER: Final = 4
"""How many times `max-backlog` may wait for a client even so, unless it is one write to a client that has read all."""

_CHUNK_BYTES: Final = 4096
_CHUNK_COST: Final = 72
"""Where small frames are gathered: up to how many bytes, and what such a chunk takes beside them and its entry."""

_CHUNK_SECONDS: Final = 0.1
"""How much later than the first of a chunk its last frame may have come: so exact is the deadline of each."""

_ENDINGS: Final = 16
"""Slow clients that are told so in one turn of the event loop."""

_SHORT: Final = 50
"""Entries of a queue that is let go of at once."""

_DISCARDED_AT_ONCE: Final = 500
"""Entries that are let go of before other tasks get their turn: half a millisecond."""

_ASKED_COST: Final = 40
"""What bytes that a client has asked for take beside them and their entry."""

_Data: TypeAlias = bytes | bytearray | memoryview
"""Whole frames: `bytes` that several clients may wait for, a `bytearray` for this client alone, or a `memoryview` that
replays share. What a client has asked for is its own, if it is `bytes`."""

_Entry: TypeAlias = tuple[float, _Data, bool]
"""Since when it waits, what, and whether the client has asked for it."""

_Later: TypeAlias = tuple[float, _Data | Pieces, bool]

_Queue: TypeAlias = deque[_Entry] | deque[_Later]


class Backlogs:
    """What waits for clients that do not read fast enough: the limits, and the sum over all streams in bytes of memory.

    What several wait for counts once: `total` is what each stream has for itself, `held` is all.
    """

    # Invariants: `total` is the sum of all backlogs' `cost` and of what was counted with `count`, `asked` the part of
    # it that clients have asked for. `_shared` counts, for every object of bytes that backlogs refer to, how many
    # entries do; `shared` is what these objects take. `_discarded` has what is counted still, and nobody waits for:
    # none of the queues in it is empty.

    def __init__(self, *, limit: int, timeout: float, total_limit: int, replays: Replays | None = None) -> None:
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.total = 0
        self.asked = 0
        self.shared = 0
        self.streams = 0
        self.endings = trio.Semaphore(_ENDINGS)
        """For those who are found to be slow: thousands may be at the same time, and each is some work."""
        self._discarded: deque[_Queue] = deque()
        self._shared: dict[int, int] = {}
        self._replays = replays or Replays(History(limit=0, clock=float, default=Retention(0, 0)))
        self._replays.freed = self.freed
        self._waiting = trio.lowlevel.ParkingLot()
        self._attendant = trio.lowlevel.ParkingLot()
        self._turns = trio.StrictFIFOLock()

    def configure(self, limit: int, timeout: float, total_limit: int) -> None:
        """Set the limits; see the settings. They hold for what waits already, too."""
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.check()
        self.freed()  # publishers may be waiting for what there is now room for

    @property
    def held(self) -> int:
        """How many bytes of memory are taken by what waits."""
        return self.total + self.shared + self._replays.bytes

    @property
    def replaying(self) -> int:
        """How many bytes of memory are taken by the pieces of replays that wait for clients to read them."""
        return self.asked + self._replays.shared

    @property
    def pace(self) -> float:
        """How many seconds a byte a client may take for what it has asked for."""
        return self.timeout / self.limit

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

    def count(self, change: int) -> None:
        """Account for so many bytes more, or fewer if below 0, that are held otherwise than by backlogs."""
        self.total += change
        if change > 0:
            self.check()
        elif change < 0:
            self.freed()

    def check(self) -> None:
        """To be called after something has been added, or the limit been lowered."""
        if self.held > self.total_limit:
            self._attendant.unpark_all()

    def charge(self, data: _Data, asked: bool) -> int:
        """Account for one entry more; return what it takes for its client alone."""
        if not asked and isinstance(data, bytes):
            self.share(data)
        cost = _cost(data, asked)
        self.total += cost
        if asked:
            self.asked += cost
        return cost

    def discharge(self, data: _Data, asked: bool) -> int:
        """Account for one entry less; return what it took for its client alone."""
        if not asked and isinstance(data, bytes):
            self.unshare(data)
        cost = _cost(data, asked)
        self.total -= cost
        if asked:
            self.asked -= cost
        return cost

    def discard(self, queue: _Queue) -> None:
        """Let go of a queue of entries: at once if it is short, or else with `let_go`. It is no longer the caller's."""
        self._let_go_of(queue, _SHORT)
        if queue:
            self._discarded.append(queue)
            self._attendant.unpark_all()

    def let_go(self) -> bool:
        """Let go of a part of what has been discarded, which may be a lot; return whether there is more."""
        budget = _DISCARDED_AT_ONCE
        while self._discarded and budget:
            budget -= self._let_go_of(self._discarded[0], budget)
            if not self._discarded[0]:
                self._discarded.popleft()
        self.freed()
        return bool(self._discarded)

    def _let_go_of(self, queue: _Queue, most: int) -> int:
        """Let go of `most` entries, or all; return how many these were."""
        count = min(most, len(queue))
        for _ in range(count):
            _, data, asked = queue.popleft()
            if isinstance(data, Pieces):
                data.close()
            else:
                self.discharge(data, asked)
        return count

    def freed(self) -> None:
        """To be called after something has been taken away, or the limit been raised: let those go on who wait."""
        if self._waiting and self.held <= self.total_limit:
            self._waiting.unpark_all()

    async def turn(self) -> None:
        """Wait until the next piece of a replay may be made, first come, first served.

        There is one in each turn of the event loop, so everyone else is served in between, however many come back; and
        none while replays take half of the memory that there is for all that waits.
        """
        async with self._turns:
            await trio.lowlevel.checkpoint()
            while not self.may_replay:
                await self._waiting.park()

    @property
    def may_replay(self) -> bool:
        """Whether there is memory for another piece of a replay."""
        return self.replaying <= self.total_limit // 2

    async def exceeded(self) -> None:
        """Wait until more is held than there may be, and let go meanwhile of what has been discarded. For one task."""
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


class Backlog:
    """What one client has not taken yet, in the order written."""

    __slots__ = (
        "_backlogs", "_later", "_replays", "asked", "cost", "drained", "entries", "over_since", "patience", "replayed",
        "sent", "size", "time",
    )  # fmt: skip

    # Invariants: `entries` is in the order of time; the first `sent` bytes of its head are gone already. What follows
    # them is in `_later`, with `_replays` of which pieces are still to be made; unless it is empty, one of these is the
    # first. `size` is the number of bytes that wait, as far as they are made, `asked` that of those that the client has
    # asked for, and `cost` the memory that all of it takes for this client alone. `time` is that of the last of the
    # `entries`, or later. `over_since` is when more than the limit began to wait, infinite while no more does;
    # `patience` is within what its stream waits for the peer, and has the deadline of that. `replayed` is set unless
    # `asked` is above 0 or there are `_replays`; `drained` when the stream has let go of this backlog.

    def __init__(self, backlogs: Backlogs) -> None:
        self._backlogs = backlogs
        self.entries: deque[_Entry] = deque()
        self.time = -math.inf
        self.sent = 0
        self.size = 0
        self.asked = 0
        self.cost = 0
        self.over_since = math.inf
        self.patience = trio.CancelScope()
        self.replayed = trio.Event()
        self.replayed.set()
        self.drained = trio.Event()
        self._later: deque[_Later] = deque()
        self._replays = 0

    @property
    def live(self) -> int:
        """How many bytes wait that the client has not asked for."""
        return self.size - self.asked

    @property
    def more(self) -> bool:
        """Whether something follows the `entries`."""
        return bool(self._later)

    @property
    def retained(self) -> int:
        """How many bytes of history may be retained for this client alone."""
        return sum(data.retained for _, data, _ in self._later if isinstance(data, Pieces)) if self._replays else 0

    def add(self, data: bytes, sent: int) -> None:
        """Append `data`, of which the first `sent` bytes are gone; they may be if nothing else waits."""
        time = trio.current_time()
        self.size += len(data) - sent
        queue = self._later or self.entries
        if len(data) <= _SMALL:
            if queue and not sent and self._gathered(queue[-1], data, time):
                return
            own: _Data = bytearray(data)
        else:
            own = data
        if queue is self.entries:
            if not queue:
                self.sent = sent
            # Behind a replay, which has time of its own, it is not waiting for the client, but for that.
            time = self.time = max(self.time, time)
        self.cost += self._backlogs.charge(own, False)
        queue.append((time, own, False))

    def _gathered(self, last: _Later, data: bytes, time: float) -> bool:
        """Copy `data` behind what is in the last entry, if that is a chunk with room for it; return whether it was."""
        since, chunk, asked = last
        if type(chunk) is not bytearray or asked or len(chunk) + len(data) > _CHUNK_BYTES:
            return False
        if time - since > _CHUNK_SECONDS:
            return False
        chunk += data
        self.cost += len(data)
        self._backlogs.total += len(data)
        return True

    def add_replay(self, begun: bytes, sent: int, rest: Pieces, pace: float) -> None:
        """Append what the client has asked for: `begun`, of which the first `sent` bytes are gone, and then the rest.

        Nothing may be waiting if something is begun. The client gets `pace` seconds a byte for all of it, beside the
        time that every message has.
        """
        time = trio.current_time()
        if self.replayed.is_set():
            self.replayed = trio.Event()
        if begun:
            self.time = max(self.time, time)
            self.sent = sent
            self._append_asked(begun, sent, pace)
        if rest.more():
            self._later.append((time, rest, True))
            self._replays += 1

    def next_piece(self, waited: float, pace: float) -> None:
        """Make the next piece of what is first in turn; it has `waited` so many seconds for us, not for the client."""
        if not self._later:
            return
        time, pieces, _ = self._later[0]
        assert isinstance(pieces, Pieces), "a replay is first of what is to come"
        self.time = max(self.time, time) + waited
        run: list[Frame] = []
        for frame in pieces.take():
            if isinstance(frame, memoryview):
                self._append_run(run, pace)
                self._append_asked(frame, 0, pace)
            else:
                run.append(frame)
        self._append_run(run, pace)
        if not pieces.more():
            self._later.popleft()
            self._replays -= 1
            self._advance()

    def _append_run(self, run: list[Frame], pace: float) -> None:
        if run:
            self._append_asked(b"".join(run), 0, pace)
            run.clear()

    def _append_asked(self, data: bytes | memoryview, sent: int, pace: float) -> None:
        self.time += len(data) * pace
        self.size += len(data) - sent
        self.asked += len(data) - sent
        self.cost += self._backlogs.charge(data, True)
        self.entries.append((self.time, data, True))

    def _advance(self) -> None:
        """Let what is there already follow what has been made, up to the next replay."""
        while self._later:
            time, data, asked = self._later[0]
            if isinstance(data, Pieces):
                return
            self._later.popleft()
            self.time = max(self.time, time)
            self.entries.append((self.time, data, asked))

    def buffers(self) -> list[_Data]:
        """Return what to send next. Nothing may be added as long as they are there."""
        buffers = [data for _, data, _ in islice(self.entries, _BUFFERS_PER_SEND)]
        buffers[0] = memoryview(buffers[0])[self.sent :]
        return buffers

    def took(self, count: int) -> None:
        """Take the first `count` bytes of `buffers` away, which are gone."""
        while self.entries:
            _, data, asked = self.entries[0]
            part = min(count, len(data) - self.sent)
            count -= part
            self.sent += part
            self.size -= part
            if asked:
                self.asked -= part
            if self.sent < len(data):
                break
            self.entries.popleft()
            self.sent = 0
            self.cost -= self._backlogs.discharge(data, asked)
        if self.live <= self._backlogs.limit:
            self.over_since = math.inf
        if not self.asked and not self._replays:
            self.replayed.set()

    @property
    def deadline(self) -> float:
        """When the client is slow unless it has read some of this by then."""
        waiting = self.entries[0][0] + self._backlogs.timeout if self.entries else math.inf
        return min(waiting, self.over_since + OVER_SECONDS)

    def is_far_over(self) -> bool:
        """Return whether far more waits than the limit allows; note when it begins to be more."""
        limit = self._backlogs.limit
        if self.live <= limit:
            return False
        if self.over_since == math.inf:
            self.over_since = trio.current_time()
            self.patience.deadline = min(self.patience.deadline, self.deadline)
        return self.live > FAR_OVER * limit

    def limits_changed(self) -> None:
        """See that the client is slow as soon as the limits say so that there are now."""
        self.is_far_over()
        self.patience.deadline = min(self.patience.deadline, self.deadline)

    def drop_unsent(self, boundary: Callable[[_Data, int], int]) -> None:
        """Keep only the rest of the frame that is partly sent.

        `boundary` returns the first place between two frames at or behind an offset.
        """
        sent = self.sent
        begun = self.entries[0] if self.entries and sent else None
        self.clear()
        if begun is not None:
            time, data, _ = begun
            end = boundary(data, sent)
            if end > sent:
                rest = bytearray(data[sent:end])
                self.size = len(rest)
                self.cost += self._backlogs.charge(rest, False)
                self.entries.append((time, rest, False))

    def clear(self) -> None:
        """Drop everything."""
        self._backlogs.discard(self.entries)
        self._backlogs.discard(self._later)
        self.entries, self._later = deque(), deque()
        self._replays = 0
        self.size = self.asked = self.cost = self.sent = 0
        self.over_since = math.inf
        self.replayed.set()


def _cost(data: _Data, asked: bool) -> int:
    """Return what an entry takes for its client alone."""
    if isinstance(data, bytearray):
        return ENTRY_BYTES + _CHUNK_COST + len(data)
    return ENTRY_BYTES + _ASKED_COST + len(data) if asked and isinstance(data, bytes) else ENTRY_BYTES
