"""Deadlines of many things, watched by one task: a timer for each would cost more than the thing."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

import trio

from realtimed.process.logs import Event

__all__ = ["Deadlines"]

_AT_ONCE: Final = 32
"""Things that are due and dealt with before other tasks get their turn."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls `due` with each thing that was added `seconds()` ago and has not been removed.

    `seconds` may return something else after a while. Then `changed` has to be called, and the new time applies to
    everything that was added.
    """

    # Invariant: `_since` has the things and when they were added, on trio's clock, in this order. So the first is due
    # first. An OrderedDict, since the first item of a dict whose first items were removed takes long to find.

    def __init__(self, seconds: Callable[[], float], due: Callable[[T], None]) -> None:
        self._seconds = seconds
        self._due = due
        self._since: OrderedDict[T, float] = OrderedDict()
        self._changed = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[T]:
        return iter(self._since)

    def add(self, thing: T) -> None:
        """Give `thing` its time from now on, unless it has one already."""
        if not self._since:
            self._changed.unpark_all()
        self._since.setdefault(thing, trio.current_time())

    def ages(self) -> Iterator[tuple[T, float]]:
        """Yield the things with the seconds since they were added, the oldest first."""
        now = trio.current_time()
        return ((thing, now - since) for thing, since in self._since.items())

    def resume(self, thing: T, age: float) -> None:
        """Add a thing that was added elsewhere `age` seconds ago. The oldest ones come first, and before all others."""
        self._since[thing] = trio.current_time() - age
        self._changed.unpark_all()

    def remove(self, thing: T) -> None:
        """Do nothing about `thing`, if it was added."""
        self._since.pop(thing, None)

    def changed(self) -> None:
        """Look at the time again that things have."""
        self._changed.unpark_all()

    async def run(self) -> None:
        """Call `due` for each thing that is due, forever."""
        while True:
            for _ in range(_AT_ONCE):
                wait = self._wait()
                if wait > 0:
                    with trio.move_on_after(wait):
                        await self._changed.park()
                    break
                self._deal_with(self._since.popitem(last=False)[0])
            await trio.lowlevel.checkpoint()

    def _wait(self) -> float:
        """Return in how many seconds the first thing is due; infinity if there is none."""
        if not self._since:
            return math.inf
        return next(iter(self._since.values())) + self._seconds() - trio.current_time()

    def _deal_with(self, thing: T) -> None:
        """Call `due`. This is an exception boundary: what is wrong with one thing must not keep the others waiting."""
        try:
            self._due(thing)
        except Exception:
            log.exception(Event("internal error", client="deadline"))
