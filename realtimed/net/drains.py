"""What drains the backlogs of many streams without a task for each: turns, and deadlines.

A client that reads too slowly costs its backlog and nothing else. The watcher says when its socket takes more.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from typing import Final, Protocol

import trio

from realtimed.net.backlogs import Backlogs

__all__ = ["Drains"]

_SENDS_A_TURN: Final = 16
"""Streams that send in one turn of the event loop because the kernel took all that they sent before."""

_ENDINGS_A_TURN: Final = 16
"""Streams found too slow in one turn of the event loop. Each takes some work."""


class _Stream(Protocol):
    """A stream with a backlog."""

    def send_more(self) -> None:
        """Send what the kernel takes now."""

    def next_piece(self, waited: float) -> None:
        """Make the next piece of a replay, for whose turn it has `waited` seconds, and send what the kernel takes."""

    def time_is_up(self, timer: float) -> None:
        """Look whether the peer is too slow. `timer` is the time that `Drains.set_timer` got."""


class Drains:
    """Turns and deadlines of streams. `run` has to run."""

    # Invariants: `_sending` has the streams whose sockets take more, and `_replaying` those that wait for the next
    # piece of a replay, and since when; first come, first served. `_timers` is a heap of when to call streams; the
    # numbers keep it from comparing them. It has few for each stream, since a stream sets one only when it is earlier
    # than all that it has.

    def __init__(self, backlogs: Backlogs) -> None:
        self._backlogs = backlogs
        self._sending: OrderedDict[_Stream, None] = OrderedDict()
        self._replaying: OrderedDict[_Stream, float] = OrderedDict()
        self._timers: list[tuple[float, int, _Stream]] = []
        self._numbers = itertools.count()
        self._more = trio.lowlevel.ParkingLot()
        self._asked = trio.lowlevel.ParkingLot()
        self._changed = trio.lowlevel.ParkingLot()

    def send_soon(self, stream: _Stream) -> None:
        """Let a stream send more in a later turn."""
        self._sending[stream] = None
        self._more.unpark_all()

    def replay_soon(self, stream: _Stream) -> None:
        """Let a stream make the next piece of a replay when it is its turn."""
        self._replaying.setdefault(stream, trio.current_time())
        self._asked.unpark_all()

    def set_timer(self, stream: _Stream, time: float) -> None:
        """Call `time_is_up` of a stream at `time`, on trio's clock."""
        if not self._timers or time < self._timers[0][0]:
            self._changed.unpark_all()
        heapq.heappush(self._timers, (time, next(self._numbers), stream))

    async def run(self) -> None:
        """Serve the streams, forever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._replay)
            nursery.start_soon(self._watch_deadlines)

    async def _send(self) -> None:
        while True:
            if not self._sending:
                await self._more.park()
            for _ in range(min(_SENDS_A_TURN, len(self._sending))):
                self._sending.popitem(last=False)[0].send_more()
            await trio.lowlevel.checkpoint()

    async def _replay(self) -> None:
        while True:
            while not self._replaying:
                await self._asked.park()
            await self._backlogs.turn()
            stream, asked_at = self._replaying.popitem(last=False)
            stream.next_piece(trio.current_time() - asked_at)
            del stream  # or this task would keep it until the next replay

    async def _watch_deadlines(self) -> None:
        while True:
            for _ in range(_ENDINGS_A_TURN):
                time = self._timers[0][0] if self._timers else math.inf
                if time > trio.current_time():
                    with trio.move_on_at(time):
                        await self._changed.park()
                    break
                heapq.heappop(self._timers)[2].time_is_up(time)
            await trio.lowlevel.checkpoint()
