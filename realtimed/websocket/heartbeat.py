"""Pings for all clients, and the end of connections that are silent or old."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final

import trio

from realtimed.config.settings import Config
from realtimed.hub.publication import Ending
from realtimed.websocket.frames import PING
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["Heartbeat"]

_RETURN_WITHIN: Final = 1.0
"""Seconds within which a client is asked to come back after its connection was closed for its age. They are few."""

_SWEEP: Final = 1000
"""Clients that are looked at before other tasks get their turn."""

_PARTS: Final = 50
"""The most parts into which the pings of one share are divided."""

_PINGS_A_PART: Final = 4
"""The fewest pings in a part, if it is not the only one."""


class Heartbeat:
    """Pings every client once a `heartbeat`, and ends the connections of silent and of old clients.

    Clients are divided into shares, one for each second of a `heartbeat`. `current` returns the configuration, in
    which everything but `heartbeat` itself may change.
    """

    def __init__(self, sessions: Sessions, current: Callable[[], Config]) -> None:
        self._sessions = sessions
        self._current = current
        self._interval = current().heartbeat
        self._shares = max(round(self._interval), 1)
        self._share = 0
        self._excused_until = -math.inf

    async def run(self) -> None:
        """Do this forever."""
        step = self._interval / self._shares
        due: list[Session] = []
        while True:
            begin = trio.current_time()
            await self._ping(due, begin, step)
            self._excuse_silence(late=trio.current_time() - (begin + step))
            due = await self._sweep()

    def _excuse_silence(self, late: float) -> None:
        """If this process stood still, what clients have sent meanwhile has yet to be read: excuse their silence."""
        silence_timeout = self._current().silence_timeout
        if late > (silence_timeout - self._interval) / 2:
            self._excused_until = trio.current_time() + silence_timeout

    async def _sweep(self) -> list[Session]:
        """End the connections of silent and of old clients; return those of the others that are to be pinged next."""
        self._share = (self._share + 1) % self._shares
        now = trio.current_time()
        silence_timeout = self._current().silence_timeout
        silent_since = now - silence_timeout if now >= self._excused_until else -math.inf
        due: list[Session] = []
        for count, session in enumerate(list(self._sessions.members.values()), 1):
            if session.stream.heard_at < silent_since:
                session.close(Ending.SILENT, f"nothing heard from you for {silence_timeout:g} s")
            elif session.expires_at < now:
                session.send_away(Ending.MAX_AGE, random.uniform(0, _RETURN_WITHIN))
            elif session.number % self._shares == self._share:
                due.append(session)
            if count % _SWEEP == 0:
                await trio.lowlevel.checkpoint()
        return due

    async def _ping(self, due: list[Session], begin: float, seconds: float) -> None:
        """Ping the clients that are due, spread over the time that begins at `begin`, and return at its end.

        Pongs come at once: after hundreds of pings in one go, all others would wait for as many pongs.
        """
        parts = max(min(len(due) // _PINGS_A_PART, _PARTS), 1)
        for part in range(parts):
            await trio.sleep_until(begin + (part + 1) * seconds / parts)
            for session in due[part::parts]:
                if session.id in self._sessions.members and not session.stream.pending:
                    session.stream.write(PING)
