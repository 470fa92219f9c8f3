"""The one task that sends publications from the hub to the subscribers' sockets."""

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
"""Small sends in one go. They take half a millisecond to one; then every other task may run."""

_LOG_LIMIT: Final = 4 * 2**20
"""Bytes of memory for publications that wait for the fan-out. Above it, publishers wait too."""

MISSED: Final = "an internal error: messages may have been missed"
"""The reason for which connections are given up after a fault."""

log = logging.getLogger(__name__)


class FanOut:
    """Runs the hub's rounds, and makes publishers wait while they are faster.

    After a fault, `give_up` ends the connections that may have missed something.

    `round_times` observes the seconds of each round, from when it is put together until its last send.
    """

    # `_round` is the round under way, if any. It began at `_began` on the clock of `time.perf_counter`. While
    # `_attended`, nobody need wake the task: `publish_now` sends what is published. `_progress` holds the tasks that
    # wait until less is unsent; each step wakes them.

    def __init__(self, hub: Hub, give_up: Callable[[Collection[Subscriber | Watcher]], None]) -> None:
        self.round_times = Histogram()
        self._hub = hub
        self._give_up = give_up
        self._round: Round | None = None
        self._began = 0.0
        self._attended = False
        self._work = trio.Event()
        self._progress = trio.lowlevel.ParkingLot()
        hub.wake = self._wake

    async def run(self) -> None:
        """Fan out forever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._step():
                await trio.lowlevel.checkpoint()

    def publish_now(self, publish: Callable[[], None]) -> None:
        """Call `publish`, and make the first sends now, not in the next turn of the event loop.

        Sends that are under way come first. Only a lone publisher should use this: what others publish in this turn
        could not share the round.
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
        """Make one slice of sends to subscribers, then one to watchers. Return whether there are more to make.

        The exception boundaries around the fan-out are here. A fault inside is a bug. It ends the connections that may
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
        # Do this always: the last watcher may have disconnected, and everything that waited for it is dropped then.
        self._progress.unpark_all()
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
        """Wait until there is room for more to be published."""
        while self._hub.unsent_bytes > _LOG_LIMIT:
            await self._progress.park()

    async def settle(self) -> None:
        """Wait until all publications so far are in sockets or backlogs, those for watchers included."""
        while not self._hub.idle:
            await self._progress.park()

    def _wake(self) -> None:
        if not self._attended:
            self._work.set()
