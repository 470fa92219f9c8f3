"""One WebSocket's life: handshake, conversation, goodbye. The only user of trio_websocket.

The library reads frames, answers pings and speaks HTTP; whoever ends the connection from our side writes the Close
through the stream, so the library never is in the state "closing" and never refuses what a peer may still send.
"""

from __future__ import annotations

import gc
import itertools
import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from realtimed.net.admission import Admission
from realtimed.net.backlog import Backlogs
from realtimed.process.turns import Turns

if TYPE_CHECKING:
    from realtimed.websocket.session import Session

__all__ = ["Sessions"]

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


class Sessions:
    """All sessions, the places that they take, and what has become of those that are over."""

    # Invariant: `members` holds those whose handshake has been answered with 101, until their stream is shut, in the
    # order of their `rank`, which is the number of `connections` that were there before. `refused`
    # counts the other answers by HTTP status, `closed` the ends of WebSockets by close code. `left` counts the parsers
    # that have been left behind since the last full garbage collection that was made for them.

    def __init__(self, admission: Admission, backlogs: Backlogs) -> None:
        self.admission = admission
        self.backlogs = backlogs
        self.members: dict[str, Session] = {}
        self.connections = 0
        self.refused: dict[int, int] = {}
        self.closed: dict[int, int] = {}
        self.left = 0
        self.send_away: Callable[[Session], None] | None = None
        """Set when the daemon is about to end: says goodbye to whoever joins nevertheless."""
        self.run = secrets.token_hex(2)
        """In every client's id: one that was noted before a restart means nobody after it."""
        self.turns = Turns(_FRAMES_A_TURN, _READERS_A_TURN)
        """Frames that clients have sent."""
        self.handshakes = trio.Semaphore(_HANDSHAKES)
        """Held by those whose request has arrived."""
        self.departures = trio.Semaphore(_DEPARTURES)
        self._numbers = itertools.count(1)

    def note_left(self) -> None:
        """Take note of a parser that only a full garbage collection finds; make one when there are too many.

        Few are left: those of clients that end in the middle of a frame. See `realtimed.net.stream.ClientStream`.
        """
        self.left += 1
        if self.left >= _LEFT_ALLOWED:
            self.left = 0
            gc.collect()

    def new_number(self) -> int:
        """Return a number that no other session of this run has or had."""
        return next(self._numbers)
