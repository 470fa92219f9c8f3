"""Replaces Unix socket files that something removes while the daemon runs, such as a cleaner of /tmp or an `rm`.

The sockets still work for connected peers, but nobody else can find them. So the daemon checks the files regularly, and
makes missing ones again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import trio

from realtimed.net.listener import SocketListener
from realtimed.process.logs import Event

__all__ = ["SocketFiles"]

_INTERVAL: Final = 1.0
"""Seconds between two checks. For at most this long nobody can connect."""

log = logging.getLogger(__name__)


class SocketFiles:
    """Keeps the socket files of `listeners` in place."""

    # Invariant: `_trouble` maps the name of each listener that nobody can reach to the reason why it was not renewed.

    def __init__(self, listeners: Sequence[SocketListener[Any]]) -> None:
        self._listeners = listeners
        self._trouble: dict[str, str] = {}

    @property
    def obstacle(self) -> str | None:
        """A clause that says which file is gone and why it stays gone, or None."""
        return next((f"{listener} is gone: {reason}" for listener, reason in self._trouble.items()), None)

    async def run(self) -> None:
        """Check the files forever."""
        while True:
            await trio.sleep(_INTERVAL)
            for listener in self._listeners:
                self._look_after(listener)

    def _look_after(self, listener: SocketListener[Any]) -> None:
        name = listener.name
        try:
            renewed = listener.renew()
        except OSError as error:
            reason = error.strerror or str(error)
            if self._trouble.get(name) != reason:
                self._trouble[name] = reason
                log.warning(Event("socket is gone", listener=name, reason=reason))
        else:
            self._trouble.pop(name, None)
            if renewed:
                log.warning(Event("socket made anew", listener=name))
