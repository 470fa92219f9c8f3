"""What the signals mean: SIGTERM and SIGINT stop the daemon, SIGHUP makes it read its configuration again."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

import trio

from realtimed.errors import ConfigurationError
from realtimed.process.logs import Event

__all__ = ["HEEDED", "Signals"]

HEEDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Signals:
    """Heeds signals, as trio delivers them in `received`.

    The first one that stops the daemon calls `stop`, each later one `stop_now`. SIGHUP calls `reload`.
    """

    def __init__(
        self,
        received: AsyncIterator[int],
        *,
        stop: Callable[[], None],
        stop_now: Callable[[], None],
        reload: Callable[[], None],
    ) -> None:
        self._received = received
        self._stop = stop
        self._stop_now = stop_now
        self._reload = reload
        self._stopped = False
        self._reload_due = False

    async def run(self) -> None:
        """Heed signals forever."""
        if self._reload_due:
            self._reload()
        async for number in self._received:
            _log(number)
            if number == signal.SIGHUP:
                self._reload()
            elif self._stopped:
                self._stop_now()
            else:
                self._stopped = True
                self._stop()

    async def unless_stopped(self, work: Callable[[], Awaitable[_T]]) -> _T | None:
        """Return the result of `work`, or None if a signal to stop came first. A reload waits until `run`.

        Raises the `ConfigurationError` of `work`.
        """
        result: _T | None = None
        failure: ConfigurationError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel, nursery.cancel_scope)
            try:
                result = await work()
            except ConfigurationError as error:  # by hand, or the nursery would wrap it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    async def _cancel(self, work: trio.CancelScope) -> None:
        """Cancel `work` at a signal to stop."""
        async for number in self._received:
            _log(number)
            if number == signal.SIGHUP:
                self._reload_due = True  # there is nothing yet that could be reloaded
            else:
                self._stopped = True
                self._stop()
                work.cancel()


def _log(number: int) -> None:
    log.info(Event("signal", name=signal.Signals(number).name))
