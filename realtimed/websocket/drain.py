"""Sends all clients away at a pace when the daemon stops."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Final

import trio

from realtimed.hub.publication import Ending
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["Drain", "Pace"]

_TICK: Final = 0.05
"""Seconds between two shares of clients."""

_LARGEST_SHARE: Final = 1.3
"""How many times an even share of the clients one second may get. After a busy processor has caused a delay, the pace
catches up at this rate, not in one go."""

_SPARE: Final = 0.1
"""The part of the time that is kept free at its end, to catch up after a delay."""

_SLICE: Final = 100
"""Clients sent away before other tasks get their turn."""

_RETURNS_PER_SECOND: Final = 500
"""Clients asked to come back in each second after the end."""

_SHORTEST_RETURN: Final = 1.0
"""Seconds from the end until the first client comes back: about as long as a restart takes."""


class Pace:
    """Decides how many clients to send away when, so that each second gets about the same share. Has no clock.

    All times are in seconds on the caller's clock. The drain begins at `now` and lasts `seconds`.
    """

    # Invariants: `_most` is how many clients may go in one second. `_recent` has the shares of the last second: when,
    # and how many. `_due` is how many clients should have gone by `_at` but have not, with a fraction.

    def __init__(self, now: float, seconds: float) -> None:
        self._ends_at = now + seconds
        self._spare = seconds * _SPARE
        self._at = now
        self._most = 0
        self._due = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the end; 0 or less when the drain is over."""
        return self._ends_at - now

    def plan(self, now: float, clients: int) -> None:
        """Adapt the pace to a number of clients. Call this before the first share, and when more have joined."""
        self._most = max(self._most, math.ceil(clients / self.seconds_left(now) * _LARGEST_SHARE))

    def share(self, now: float, clients: int) -> int:
        """Return how many of the remaining `clients` to send away now."""
        while self._recent and self._recent[0][0] <= now - 1:
            self._recent.popleft()
        passed = now - self._at
        self._due += (clients - self._due) * passed / max(self._ends_at - self._at - self._spare, passed)
        self._at = now
        count = min(int(self._due), self._most - sum(each for _, each in self._recent))
        self._due -= count
        self._recent.append((now, count))
        return count


class Drain:
    """Ends all sessions within a number of seconds from now.

    It asks clients to come back after that, when a daemon runs again. Each gets a random time of its own, from a span
    that grows with the number of clients.
    """

    def __init__(self, sessions: Sessions, seconds: float) -> None:
        self._sessions = sessions
        self._pace = Pace(trio.current_time(), seconds)
        self._spread = 1 + len(sessions.members) / _RETURNS_PER_SECOND
        self._waiting: list[Session] = []

    async def run(self) -> None:
        """Send away about the same share of the clients in each second.

        Returns when the time is over or no client remains. `finish` sends away those that remain.
        """
        joined = -1
        while (seconds := self._pace.seconds_left(trio.current_time())) > 0:
            if joined != self._sessions.connections:  # handshakes were under way, or this is the first time
                joined = self._sessions.connections
                self._waiting = self._open()
                self._pace.plan(trio.current_time(), len(self._waiting))
            if not self._waiting:
                break
            await trio.sleep(min(_TICK, seconds))
            await self._send_away(self._pace.share(trio.current_time(), len(self._waiting)))

    async def finish(self) -> None:
        """Send away all remaining clients, and from now on each client that joins."""
        self._sessions.send_away = self._send_one_away
        self._waiting = self._open()
        await self._send_away(len(self._waiting))

    def finish_now(self) -> None:
        """Do the same as `finish` without a pause, when there is no time for one."""
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
        until_end = max(self._pace.seconds_left(trio.current_time()), 0)
        session.send_away(Ending.RESTART, until_end + _SHORTEST_RETURN + random.uniform(0, self._spread))
