"""One WebSocket's life: handshake, conversation, goodbye. The only user of trio_websocket.

The library reads frames, answers pings and speaks HTTP; whoever ends the connection from our side writes the Close
through the stream, so the library never is in the state "closing" and never refuses what a peer may still send.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import Final

import trio

from realtimed.config.settings import Config
from realtimed.websocket.frames import PING, CloseCode
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["heartbeat"]

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


async def heartbeat(sessions: Sessions, current: Callable[[], Config]) -> None:
    """Ping every client once a `heartbeat`, a share of them each second; close those that are silent, or old.

    `current` returns the configuration, of which all but `heartbeat` itself may change.
    """
    interval = current().heartbeat
    shares = max(round(interval), 1)
    turn = 0
    due: list[Session] = []
    excused_until = -math.inf
    while True:
        began = trio.current_time()
        planned = began + interval / shares
        # The pongs come at once: after hundreds of pings, everyone else would wait for as many.
        parts = max(min(len(due) // _PINGS_AT_LEAST, _PARTS), 1)
        for part in range(parts):
            await trio.sleep_until(began + (part + 1) * interval / shares / parts)
            for session in due[part::parts]:
                if session.id in sessions.members and not session.stream.pending:
                    session.stream.write(PING)
        due.clear()
        turn = (turn + 1) % shares
        now = trio.current_time()
        silence_timeout = current().silence_timeout
        if now - planned > (silence_timeout - interval) / 2:
            # It was this process that stood still, and what clients have said meanwhile has not been read yet.
            excused_until = now + silence_timeout
        silent_since = now - silence_timeout if now >= excused_until else -math.inf
        for count, session in enumerate(list(sessions.members.values()), 1):
            if session.stream.heard_at < silent_since:
                session.close(CloseCode.SILENT, f"nothing heard from you for {silence_timeout:g} s")
            elif session.expires_at < now:
                session.say_goodbye("max-age", random.uniform(0, _RETURN_WITHIN))
            elif session.number % shares == turn:
                due.append(session)
            if count % _SWEEP == 0:
                await trio.lowlevel.checkpoint()
