"""Sending everyone away, at a pace: who is told when, and when to come back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final

import trio

from realtimed.session import Session, Sessions

__all__ = ["Drain"]

_TICK: Final = 0.05
"""Seconds between two shares of the clients."""

_LONGEST_TICK: Final = 0.3
"""Seconds for which a share is made up at most. What a busy processor has kept us from doing is not made up in one go,
but spread over the time that is left."""

_SLICE: Final = 100
"""Clients that are sent away in one go before other tasks get their turn."""

_RETURNS_PER_SECOND: Final = 500
"""How many clients are told to come back in each second after the end."""

_SHORTEST_RETURN: Final = 1.0
"""Seconds from the end until the first comes back: about what a restart takes."""


class Drain:
    """The end of all sessions, within a number of seconds, from now on.

    Clients are advised to come back after its end, when there is a daemon again: each at a moment of its own, over a
    time that grows with their number.
    """

    def __init__(self, sessions: Sessions, seconds: float) -> None:
        self._sessions = sessions
        self._ends_at = trio.current_time() + seconds
        self._spread = 1 + len(sessions.members) / _RETURNS_PER_SECOND
        self._waiting: list[Session] = []

    async def run(self, tell: Callable[[int], None]) -> None:
        """Send away, in each second, about the same share of those who are there; return when the time is over.

        `tell` is called with the number of those who are left, again and again.
        """
        joined = -1
        looked_at = trio.current_time()
        while (left := self._ends_at - looked_at) > 0:
            if joined != self._sessions.connections:  # handshakes that were under way
                joined = self._sessions.connections
                self._waiting = self._open()
            if not self._waiting:
                break
            tell(len(self._waiting))
            await trio.sleep(min(_TICK, left))
            now = trio.current_time()
            share = min(now - looked_at, _LONGEST_TICK) / left
            looked_at = now
            await self._send_away(math.ceil(len(self._waiting) * share))

    async def finish(self) -> None:
        """Send away everyone who is left, and from now on everyone who comes."""
        self._sessions.send_away = self._send_one_away
        self._waiting = self._open()
        await self._send_away(len(self._waiting))

    def finish_now(self) -> None:
        """Do the same as `finish`, at once, for want of time."""
        self._sessions.send_away = self._send_one_away
        for session in self._open():
            self._send_one_away(session)

    def _open(self) -> list[Session]:
        return [session for session in self._sessions.members.values() if not session.closing]

    async def _send_away(self, count: int) -> None:
        for number in range(min(count, len(self._waiting))):
            if number % _SLICE == _SLICE - 1:
                await trio.lowlevel.checkpoint()
            self._send_one_away(self._waiting.pop())

    def _send_one_away(self, session: Session) -> None:
        left = max(self._ends_at - trio.current_time(), 0)
        session.say_goodbye("restart", left + _SHORTEST_RETURN + random.uniform(0, self._spread))
