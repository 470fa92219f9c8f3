"""One WebSocket's life: handshake, conversation, goodbye. The only user of trio_websocket.

The library reads frames, answers pings and speaks HTTP; whoever ends the connection from our side writes the Close
through the stream, so the library never is in the state "closing" and never refuses what a peer may still send.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, Protocol

import trio

from realtimed.net.stream import QueuedStream
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["Listener", "relief"]

_PATH: Final = "/ws"
_HEAD_LIMIT: Final = 16 * 1024
"""Bytes of a request's head."""


_IN_WORDS: Final = {"restart": "restarting", "max-age": "connected for max-age"}

_YOUNGEST: Final = 0.5
"""The share of `max-age` that every connection may reach."""

_RETURN_WITHIN: Final = 1.0
"""Seconds within which a client that was closed for its age is told to come back. They are few at a time."""

_SWEEP: Final = 1000
"""Clients that are looked at in one go before other tasks get their turn."""

_PARTS: Final = 50
_PINGS_AT_LEAST: Final = 4
"""Into how many parts a second's pings are cut at most, and how many pings a part has at least."""

_LEFT_ALLOWED: Final = 5000
"""Parsers, of about 1.5 KB each, that may lie about until the garbage is collected. That may take half a second."""

_FRAMES_A_TURN: Final = 96
_READERS_A_TURN: Final = 16
"""How many frames the library is given at once in one turn of the event loop, and of how many clients it gets a few in
each turn when there are more."""

_HANDSHAKES: Final = 8
_DEPARTURES: Final = 8
"""How many handshakes are under way at a time, and how many connections are given up in a turn of the event loop: when
thousands come or go, all others are served in between."""

_RELIEF: Final = 0.9
"""To which part of `max-backlog-total` the slowest clients are disconnected once it is exceeded."""

_RELIEF_SLICE: Final = 8
"""Clients that are disconnected for that before other tasks get their turn."""

_RELIEF_INTERVAL: Final = 1.0
"""Seconds until the next look when nobody can be disconnected any more, and too much still waits."""

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is subscribed on the control socket, and may retain history that counts for clients."""

    @property
    def stream(self) -> QueuedStream:
        """Its stream."""

    @property
    def closing(self) -> bool:
        """Whether somebody has ended the connection."""

    def slow(self, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""

    def broken(self) -> None:
        """See `realtimed.net.stream.Owner`."""


async def relief(sessions: Sessions, listeners: Callable[[], Iterable[Listener]]) -> None:
    """Whenever too much waits for all clients together, disconnect those that most waits for, at once.

    Publishers wait until that is done, and no longer: a client that does not read delays nobody else.
    """
    backlogs = sessions.backlogs
    while True:
        await backlogs.exceeded()
        holding = [(_held_for(each), each) for each in (*sessions.members.values(), *listeners())]
        holding = sorted((pair for pair in holding if pair[0]), key=itemgetter(0))
        leaving = 0  # bytes of those that have been ended and are not gone
        while holding and backlogs.held - leaving > backlogs.total_limit * _RELIEF:
            for burden, each in reversed(holding[-_RELIEF_SLICE:]):
                if backlogs.held - leaving <= backlogs.total_limit * _RELIEF:
                    break
                if each.closing:  # its Close is behind all that waits
                    each.broken()
                else:
                    each.slow(
                        f"{burden} bytes are waiting, and {backlogs.held} for all clients;"
                        f" the limit, max-backlog-total, is {backlogs.total_limit}"
                    )
                leaving += _held_for(each)
            del holding[-_RELIEF_SLICE:]
            await trio.lowlevel.checkpoint()
            while backlogs.let_go():
                await trio.lowlevel.checkpoint()
        if backlogs.held > backlogs.total_limit:
            await trio.sleep(_RELIEF_INTERVAL)


def _held_for(holder: Session | Listener) -> int:
    """Return how many bytes that count for clients may be free again without this connection."""
    return holder.stream.burden if isinstance(holder, Session) else holder.stream.retained
