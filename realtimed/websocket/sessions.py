"""All sessions, and the things they share."""

from __future__ import annotations

import gc
import itertools
import math
import random
import secrets
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

import trio

from realtimed.config.settings import Config
from realtimed.errors import RefusedError
from realtimed.hub.channel import Subscriber
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending
from realtimed.hub.watch import Watcher
from realtimed.net.admission import Admission
from realtimed.net.backlogs import Backlogs
from realtimed.net.fanout import MISSED
from realtimed.process.open_files import connection_limit
from realtimed.process.turns import Turns
from realtimed.websocket.frames import check_close

if TYPE_CHECKING:
    from realtimed.websocket.session import Session

__all__ = ["Sessions", "admission_limits", "make_sessions"]

_ABANDONED_PARSERS: Final = 5000
"""Abandoned parsers, of about 1.5 KB each, until a garbage collection, which may take half a second."""

_FRAMES_A_TURN: Final = 96
"""Frames that the library is given in one turn of the event loop."""

_READERS_A_TURN: Final = 16
"""Clients whose next few frames the library is given in each turn of the event loop, when there are more frames."""

_HANDSHAKES: Final = 8
"""Handshakes under way at a time: when thousands of clients come, others are served in between."""

_DEPARTURES: Final = 8
"""Connections released in one turn of the event loop: when thousands of clients go, others are served in between."""

_YOUNGEST: Final = 0.5
"""The share of `max-age` that every connection may reach."""


class Sessions:
    """All sessions, their places, and counts of those that have ended."""

    # Invariants: `members` has the sessions whose handshake was answered with 101, until their stream is shut, in the
    # order of their `rank`, which is the number of `connections` before. `refused` counts the other answers by HTTP
    # status. `ended` and `closed` count the ends of WebSockets, by ending and by close code. `abandoned_parsers` counts
    # the parsers that no garbage collection has freed yet.

    def __init__(self, admission: Admission, backlogs: Backlogs) -> None:
        self.admission = admission
        self.backlogs = backlogs
        self.members: dict[str, Session] = {}
        self.connections = 0
        self.refused: dict[int, int] = {}
        self.ended = dict.fromkeys(Ending, 0)
        self.closed: dict[int, int] = {}
        self.abandoned_parsers = 0
        self.send_away: Callable[[Session], None] | None = None
        """Set when the daemon is about to end. It ends the session of a client that still joins."""
        self.run = secrets.token_hex(2)
        """A part of every client's id, so that no client has an id from before a restart."""
        self.turns = Turns(_FRAMES_A_TURN, _READERS_A_TURN)
        """Spreads the frames that clients send over turns of the event loop."""
        self.handshakes = trio.Semaphore(_HANDSHAKES)
        """Held by a session from the arrival of its request until its answer."""
        self.departures = trio.Semaphore(_DEPARTURES)
        self._numbers = itertools.count(1)

    def expiry(self, max_age: float | None) -> float:
        """Return when a connection made now reaches its age, on trio's clock.

        After a restart all clients connect at about the same time. Each connection gets a random age, so that they are
        not all closed at about the same time.
        """
        return math.inf if max_age is None else trio.current_time() + max_age * random.uniform(_YOUNGEST, 1)

    def new_number(self) -> int:
        """Return a number that no other session of this run has had."""
        return next(self._numbers)

    def disconnect(self, client: str, code: int | None, reason: str) -> bool:
        """End the connection of the client with this id. Return whether there is one that was not ending already.

        Without a `code`, the protocol's code is used. Raises `RefusedError`, ``invalid_params``, for a code or a reason
        that a Close may not have.
        """
        try:
            check_close(code, reason)
        except ValueError as error:
            raise RefusedError("invalid_params", str(error)) from None
        session = self.members.get(client)
        return session is not None and session.close(Ending.KICKED, reason, code)

    def give_up(self, subscribers: Collection[Subscriber | Watcher]) -> None:
        """End the connections of those subscribers that are clients."""
        for session in list(self.members.values()):
            if session.stream in subscribers:
                session.end(Ending.FAULT, MISSED)

    def count_refusal(self, status: int) -> None:
        """Count a request that did not become a WebSocket."""
        self.refused[status] = self.refused.get(status, 0) + 1

    def count_end(self, ending: Ending, code: int) -> None:
        """Count a WebSocket that has ended."""
        self.ended[ending] += 1
        self.closed[code] = self.closed.get(code, 0) + 1

    def count_abandoned_parser(self) -> None:
        """Count a parser that only a full garbage collection can free, and run one when there are too many.

        They are few: only clients that end in the middle of a frame leave one. See
        `realtimed.websocket.stream.ClientStream`.
        """
        self.abandoned_parsers += 1
        if self.abandoned_parsers >= _ABANDONED_PARSERS:
            self.abandoned_parsers = 0
            gc.collect()


def make_sessions(config: Config, hub: Hub) -> Sessions:
    """Return the sessions of a daemon, none so far, with the limits of a configuration."""
    backlogs = Backlogs(
        limit=config.max_backlog,
        timeout=config.backlog_timeout,
        total_limit=config.max_backlog_total,
        replays=hub.replays,
    )
    return Sessions(Admission(*admission_limits(config), time.monotonic), backlogs)


def admission_limits(config: Config) -> tuple[int, int | None, float]:
    """Return the limits of `Admission`: all connections, those of one address, and its handshakes a second."""
    limit = connection_limit(config.max_connections)
    return limit, config.max_connections_per_address, config.handshakes_per_address
