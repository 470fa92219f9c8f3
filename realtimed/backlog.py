"""What waits for clients that do not read fast enough: of each of them in order, and in sum."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain, islice
from typing import Final

import trio

from realtimed.frames import Frame, frame_boundary
from realtimed.replays import Pieces, Replays

__all__ = ["Backlog", "Backlogs"]

_BUFFERS_PER_SEND: Final = 64


class Backlogs:
    """What waits for clients that do not read fast enough: the limits, and the sum over all streams in bytes.

    What replays share counts once, however many wait for it: `total` is without it, `held` is all.
    """

    def __init__(self, *, limit: int, timeout: float, total_limit: int, replays: Replays | None = None) -> None:
        self.limit = limit
        self.timeout = timeout
        self.total_limit = total_limit
        self.total = 0
        self.streams = 0
        self._replays = replays or Replays()
        self._waiting = trio.lowlevel.ParkingLot()
        self._turns = trio.StrictFIFOLock()

    @property
    def held(self) -> int:
        """How many bytes of memory are taken by what waits."""
        return self.total + self._replays.bytes

    @property
    def pace(self) -> float:
        """How many seconds a byte a client may take for what it has asked for."""
        return self.timeout / self.limit

    def remove(self, size: int) -> None:
        """Take note of `size` bytes less, and let waiting publishers go on when there is room again."""
        self.total -= size
        if self.held <= self.total_limit:
            self._waiting.unpark_all()

    async def turn(self) -> None:
        """Wait until the next piece of a replay may be made, first come, first served.

        There is one in each turn of the event loop, so everyone else is served in between, however many come back.
        """
        async with self._turns:
            await trio.lowlevel.checkpoint()

    async def room(self) -> None:
        """Wait until the sum is within its limit."""
        while self.held > self.total_limit:
            await self._waiting.park()


class Backlog:
    """What one client has not taken yet, in the order written."""

    __slots__ = ("behind", "drained", "entries", "replay", "replayed", "rest", "sent", "shared", "size", "time")

    # Invariants: `entries` holds (time from which it has been waiting, bytes, whether the client has asked for them),
    # in the order of time; the first `sent` bytes of its head are gone already. While `rest` is there, more of what the
    # client has asked for follows them, and only then come the entries in `behind`. `size` is the number of bytes that
    # wait in both, `replay` of those that the client has asked for, and `shared` of those in frames that replays share.
    # `time` is that of the last entry, or later. `replayed` is set unless `replay` is above 0 or `rest` is there;
    # `drained` when the stream has let go of this backlog.

    def __init__(self) -> None:
        self.entries: deque[tuple[float, Frame, bool]] = deque()
        self.rest: Pieces | None = None
        self.behind: deque[tuple[float, Frame, bool]] = deque()
        self.time = -math.inf
        self.sent = 0
        self.size = 0
        self.replay = 0
        self.shared = 0
        self.replayed = trio.Event()
        self.replayed.set()
        self.drained = trio.Event()

    @property
    def own(self) -> int:
        """How many of the bytes count as this client's."""
        return self.size - self.shared

    def add(self, data: bytes, sent: int) -> None:
        """Append `data`, of which the first `sent` bytes are gone; they may be if nothing else waits."""
        time = trio.current_time()
        self.size += len(data) - sent
        if self.rest is not None:
            self.behind.append((time, data, False))
            return
        if not self.entries:
            self.sent = sent
        # Behind a replay, which has time of its own, it is not waiting for the client, but for that.
        self.time = max(self.time, time)
        self.entries.append((self.time, data, False))

    def add_replay(self, piece: Sequence[Frame], sent: int, rest: Pieces, pace: float) -> None:
        """Append what the client has asked for: `piece`, of which the first `sent` bytes are gone, and then the rest.

        The client gets `pace` seconds a byte for it, beside the time that every message has.
        """
        if self.rest is not None:
            self.rest.extend(chain(piece, rest))
            return
        self.time = max(self.time, trio.current_time())
        self.replayed = trio.Event()
        self.rest = rest
        if not self.entries:
            self.sent = sent
        self._add_piece(piece, sent, pace)

    def next_piece(self, waited: float, pace: float) -> None:
        """Append the next piece of the replay; it was not for the client that this has `waited` so many seconds."""
        if self.rest is not None:
            self.time += waited
            self._add_piece(self.rest.take(), 0, pace)

    def _add_piece(self, piece: Sequence[Frame], sent: int, pace: float) -> None:
        """Append a piece of the replay, and behind the last one what has come behind the replay."""
        for data in piece:
            self.time += len(data) * pace
            self.entries.append((self.time, data, True))
            size = len(data) - sent
            sent = 0
            self.size += size
            self.replay += size
            if isinstance(data, memoryview):
                self.shared += size
        if self.rest is not None and not self.rest.more():
            self.rest = None
            for time, data, asked in self.behind:
                self.time = max(self.time, time)
                self.entries.append((self.time, data, asked))
            self.behind.clear()

    def buffers(self) -> list[Frame]:
        """Return what to send next."""
        buffers: list[Frame] = [data for _, data, _ in islice(self.entries, _BUFFERS_PER_SEND)]
        buffers[0] = memoryview(buffers[0])[self.sent :]
        return buffers

    def took(self, count: int) -> None:
        """Take note that the first `count` bytes of `buffers` are gone."""
        while self.entries:
            _, data, asked = self.entries[0]
            part = min(count, len(data) - self.sent)
            count -= part
            self.sent += part
            self.size -= part
            if isinstance(data, memoryview):
                self.shared -= part
            if asked:
                self.replay -= part
                if not self.replay and self.rest is None:
                    self.replayed.set()
            if self.sent < len(data):
                break
            self.entries.popleft()
            self.sent = 0

    def drop_unsent_frames(self) -> None:
        """Keep only the rest of the frame that is partly sent."""
        begun = self.entries[0] if self.entries else None
        self.clear()
        if begun is not None:
            time, data, _ = begun
            end = frame_boundary(data, self.sent)
            self.size = end - self.sent
            if self.size:
                self.entries.append((time, bytes(data[:end]), False))

    def clear(self) -> None:
        """Drop everything."""
        self.entries.clear()
        self.behind.clear()
        self.rest = None
        self.size = self.shared = self.replay = 0
        self.replayed.set()
