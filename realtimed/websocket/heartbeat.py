"""Pings all clients, and ends connections that are silent or old."""

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
"""A client whose connection is closed for its age is asked to come back within this many seconds. They are few."""

_SWEEP: Final = 1000
"""Clients checked before other tasks get their turn."""

_PARTS: Final = 50
"""The most parts into which the pings of a share are divided."""

_PINGS_A_PART: Final = 4
"""The fewest pings in a part, if there are several parts."""


class Heartbeat:
    """Pings every client once a `heartbeat`, and ends the connections of silent and of old clients.

    Clients are divided into shares, one for each second of a `heartbeat`. `current` returns the configuration; all of
    it may change but `heartbeat`.
    """

    def __init__(self, sessions: Sessions, current: Callable[[], Config]) -> None:
        self._sessions = sessions
        self._current = current
        self._interval = current().heartbeat
        self._shares = max(round(self._interval), 1)
        self._excused_until = -math.inf

    async def run(self) -> None:
        """Ping and check clients forever."""
        step = self._interval / self._shares
        due: list[Session] = []
        while True:
            begin = trio.current_time()
            await self._ping(due, begin, step)
            self._excuse_silence(delay=trio.current_time() - (begin + step))
            due = await self._sweep()

    def _excuse_silence(self, delay: float) -> None:
        """Excuse silence after a `delay`: if this process stood still, it has yet to read what clients sent."""
        silence_timeout = self._current().silence_timeout
        if delay > (silence_timeout - self._interval) / 2:
            self._excused_until = trio.current_time() + silence_timeout

    async def _sweep(self) -> list[Session]:
        """End the connections of silent and of old clients. Return the clients of the next share, to be pinged."""
        share = self._sessions.share = (self._sessions.share + 1) % self._shares
        now = trio.current_time()
        silence_timeout = self._current().silence_timeout
        silent_since = now - silence_timeout if now >= self._excused_until else -math.inf
        due: list[Session] = []
        for count, session in enumerate(list(self._sessions.members.values()), 1):
            if session.stream.heard_at < silent_since:
                session.close(Ending.SILENT, f"nothing heard from you for {silence_timeout:g} s")
            elif session.expires_at < now:
                session.send_away(Ending.MAX_AGE, random.uniform(0, _RETURN_WITHIN))
            elif session.rank % self._shares == share:
                due.append(session)
            if count % _SWEEP == 0:
                await trio.lowlevel.checkpoint()
        return due

    async def _ping(self, due: list[Session], begin: float, seconds: float) -> None:
        """Ping the clients in `due`, spread over `seconds` from `begin` on, and return at the end of these.

        Pongs come at once: after hundreds of pings in one go, all other work would wait for as many pongs.
        """
        parts = max(min(len(due) // _PINGS_A_PART, _PARTS), 1)
        for part in range(parts):
            await trio.sleep_until(begin + (part + 1) * seconds / parts)
            for session in due[part::parts]:
                if session.id in self._sessions.members and not session.stream.pending:
                    session.stream.write(PING)
