"""The one task that carries publications from the hub to the subscribers' sockets."""

from __future__ import annotations

import time
from typing import Final

import trio

from realtimed.histogram import Histogram
from realtimed.hub import Hub

__all__ = ["FanOut"]

_SLICE: Final = 512
"""Small sends made in one go: half a millisecond or a whole one, after which every other task may run."""

_LOG_LIMIT: Final = 4 * 2**20
"""Bytes of publications that may wait for the fan-out before publishers wait too."""


class FanOut:
    """Runs the hub's rounds, and holds publishers back when they are faster.

    `round_times` has the seconds each round took, from when it was put together until its last send.
    """

    def __init__(self, hub: Hub) -> None:
        self.round_times = Histogram()
        self._hub = hub
        self._work = trio.Event()
        self._through = trio.lowlevel.ParkingLot()
        hub.wake = self._wake

    async def run(self) -> None:
        """Fan out for ever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            began = time.perf_counter()
            while (turn := self._hub.next_round()) is not None:
                while turn.step(_SLICE):
                    await trio.lowlevel.checkpoint()
                self.round_times.observe(time.perf_counter() - began)
                self._through.unpark_all()
                if not self._hub.idle:
                    await trio.lowlevel.checkpoint()
                began = time.perf_counter()

    async def room(self) -> None:
        """Wait until the fan-out has caught up enough for more to be published."""
        while self._hub.log_bytes > _LOG_LIMIT:
            await self._through.park()

    async def settle(self) -> None:
        """Wait until everything published so far has been handed to the sockets or to their backlogs."""
        while not self._hub.idle:
            await self._through.park()

    def _wake(self) -> None:
        self._work.set()
