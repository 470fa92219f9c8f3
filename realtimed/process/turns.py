"""Divides the work of many tasks among turns of the event loop, so that each turn stays short."""

from __future__ import annotations

from types import TracebackType

import trio

__all__ = ["Turns"]


class Turns(trio.abc.Instrument):
    """In each turn tasks may spend `budget` without waiting; once it is spent, only `at_a_time` of the others go on.

    A task asks whether the budget is `used_up`. If it is, the task first waits with ``async with``, first come, first
    served. Then it calls `spend` for its work. This is an instrument of trio, and has to be added to the run.
    """

    def __init__(self, budget: float, at_a_time: int) -> None:
        self._budget = budget
        self._spent = 0.0
        self._going_on = trio.Semaphore(at_a_time)

    def before_io_wait(self, timeout: float) -> None:
        """See `trio.abc.Instrument`: this turn is over."""
        self._spent = 0.0

    def used_up(self, share: float = 1.0) -> bool:
        """Return whether `share` times the budget has been spent in this turn."""
        return self._spent >= self._budget * share

    def spend(self, amount: float) -> None:
        """Record work that has been done, or is about to be."""
        self._spent += amount

    async def __aenter__(self) -> None:
        await self._going_on.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._going_on.release()
