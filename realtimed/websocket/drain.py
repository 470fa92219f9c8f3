"""Sending everyone away, at a pace: who is told when, and when to come back."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Final

import trio

from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["Drain"]

_TICK: Final = 0.05
"""Seconds between two shares of the clients."""

_LARGEST_SHARE: Final = 1.3
"""What one second may get, of what every second would get if all were alike. What a busy processor has kept us from
doing is made up as fast as this allows, and not in one go."""

_SPARE: Final = 0.1
"""Which part of the time is left free at its end, to make up for what a busy processor has kept us from doing."""

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
        self._spare = seconds * _SPARE
        self._spread = 1 + len(sessions.members) / _RETURNS_PER_SECOND
        self._waiting: list[Session] = []

    async def run(self) -> None:
        """Send away, in each second, about the same share of those who are there.

        Returns when the time is over or nobody is left; those who could not be sent away in time are for `finish`.
        """
        joined = -1
        limit = 0
        due = 0.0
        recent: deque[tuple[float, int]] = deque()  # who was sent away within the last second: when, how many
        now = trio.current_time()
        while (left := self._ends_at - now) > 0:
            if joined != self._sessions.connections:  # handshakes were under way
                joined = self._sessions.connections
                self._waiting = self._open()
                limit = max(limit, math.ceil(len(self._waiting) / left * _LARGEST_SHARE))
            if not self._waiting:
                break
            before = now
            await trio.sleep(min(_TICK, left))
            now = trio.current_time()
            while recent and recent[0][0] <= now - 1:
                recent.popleft()
            passed = now - before
            due += (len(self._waiting) - due) * passed / max(left - self._spare, passed)
            count = min(int(due), limit - sum(each for _, each in recent))
            due -= count
            recent.append((now, count))
            await self._send_away(count)

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
