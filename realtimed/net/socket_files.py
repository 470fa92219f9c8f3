"""Unix sockets whose files are removed under the running daemon: by a cleaner of /tmp, or an administrator's rm.

The sockets go on to work for those who are connected, but nobody else finds them any more. So they are looked at now
and then, and made anew where they are gone.
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
"""Seconds between two looks: so long, at most, nobody can connect."""

log = logging.getLogger(__name__)


class SocketFiles:
    """Keeps the files of `listeners` where they belong. `obstacle` says which one is gone and why it stays so."""

    # Invariant: `_trouble` holds what kept those listeners from being renewed that are out of reach.

    def __init__(self, listeners: Sequence[SocketListener[Any]]) -> None:
        self._listeners = listeners
        self._trouble: dict[str, str] = {}

    @property
    def obstacle(self) -> str | None:
        """What is wrong, if anything is."""
        return next((f"{listener} is gone: {reason}" for listener, reason in self._trouble.items()), None)

    async def run(self) -> None:
        """Look after them forever."""
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
