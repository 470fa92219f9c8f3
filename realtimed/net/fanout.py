"""The one task that carries publications from the hub to the subscribers' sockets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Final

import trio

from realtimed.hub.channel import Subscriber
from realtimed.hub.hub import Hub
from realtimed.hub.rounds import Round
from realtimed.hub.watch import Watcher
from realtimed.process.histogram import Histogram
from realtimed.process.logs import Event

__all__ = ["MISSED", "FanOut"]

_SLICE: Final = 512
"""Small sends made in one go: half a millisecond or a whole one, after which every other task may run."""

_LOG_LIMIT: Final = 4 * 2**20
"""Bytes of memory for publications that wait for the fan-out; beyond it publishers wait too."""

MISSED: Final = "an internal error: messages may have been missed"
"""The reason for which connections are given up after a fault."""

log = logging.getLogger(__name__)


class FanOut:
    """Runs the hub's rounds, and holds publishers back when they are faster.

    After a fault, `give_up` ends the connections that may have missed something.

    `round_times` has the seconds each round took, from when it was put together until its last send.
    """

    # `_round` is the round that is under way; it began at `_began` on the clock of `time.perf_counter`. While
    # `_attended`, the task need not be woken: `publish_now` sends what is published.

    def __init__(self, hub: Hub, give_up: Callable[[Collection[Subscriber | Watcher]], None]) -> None:
        self.round_times = Histogram()
        self._hub = hub
        self._give_up = give_up
        self._round: Round | None = None
        self._began = 0.0
        self._attended = False
        self._work = trio.Event()
        self._through = trio.lowlevel.ParkingLot()
        hub.wake = self._wake

    async def run(self) -> None:
        """Fan out forever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._step():
                await trio.lowlevel.checkpoint()

    def publish_now(self, publish: Callable[[], None]) -> None:
        """Call `publish`, and make the first sends now instead of in the next turn of the event loop.

        If sends are under way, those come first. For a publisher that is alone: what others publish in this turn could
        not share the round.
        """
        self._attended = True
        try:
            publish()
        finally:
            self._attended = False
            try:
                if self._round is None:
                    self._step()
            finally:
                if not self._hub.idle:
                    self._work.set()

    def _step(self) -> bool:
        """Make the sends of one slice, to subscribers and then to watchers; return whether there are more to make.

        Here are the exception boundaries around the fan-out. A fault inside is a bug, and ends the connections that may
        have missed something, so that their clients come back and ask for it.
        """
        try:
            self._send_slice()
        except Exception:
            log.exception(Event("internal error", client="fan-out"))
            self._round = None
            self._give_up(self._hub.abandon_round())
        if not self._hub.watchers.idle:
            self._show_slice()
        # Always: the last watcher may have left meanwhile, with everything that waited for it.
        self._through.unpark_all()
        return not self._hub.idle

    def _show_slice(self) -> None:
        try:
            self._hub.watchers.step()
        except Exception:
            log.exception(Event("internal error", client="watchers"))
            self._give_up(self._hub.watchers.abandon())

    def _send_slice(self) -> None:
        if self._round is None:
            self._began = time.perf_counter()
            self._round = self._hub.next_round()
        if self._round is not None and not self._round.step(_SLICE):
            self._round = None
            self.round_times.observe(time.perf_counter() - self._began)

    async def room(self) -> None:
        """Wait until the fan-out has caught up enough for more to be published."""
        while self._hub.unsent_bytes > _LOG_LIMIT:
            await self._through.park()

    async def settle(self) -> None:
        """Wait until all publications so far have been handed to sockets or backlogs, those of watchers too."""
        while not self._hub.idle:
            await self._through.park()

    def _wake(self) -> None:
        if not self._attended:
            self._work.set()
