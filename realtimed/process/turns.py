"""Work that many may have for the same turn of the event loop, divided so that the turn stays short."""

from __future__ import annotations

from types import TracebackType

import trio

__all__ = ["Turns"]


class Turns(trio.abc.Instrument):
    """Up to `budget` is done in a turn by those who come; once that is spent, `at_a_time` of the others go on in each.

    Who has something to do asks whether it is `used_up` and calls `spend` for what it does; if it is, it first waits
    with ``async with``, which goes in the order of coming. An instrument of trio: it has to be added to the run.
    """

    def __init__(self, budget: float, at_a_time: int) -> None:
        self._budget = budget
        self._spent = 0.0
        self._going_on = trio.Semaphore(at_a_time)

    def before_io_wait(self, timeout: float) -> None:
        """See `trio.abc.Instrument`: this turn is over."""
        self._spent = 0.0

    def used_up(self, share: float = 1.0) -> bool:
        """Return whether enough has been done in this turn: so many times the budget."""
        return self._spent >= self._budget * share

    def spend(self, amount: float) -> None:
        """Take note that so much has been done, or is about to be."""
        self._spent += amount

    async def __aenter__(self) -> None:
        await self._going_on.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._going_on.release()
