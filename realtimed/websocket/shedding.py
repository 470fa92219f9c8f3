"""What happens when too much waits for all clients together: the slowest are disconnected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, Protocol

import trio

from realtimed.hub.publication import Ending
from realtimed.net.stream import QueuedStream
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["Listener", "shed_slowest"]

_GOAL: Final = 0.9
"""The part of `max-backlog-total` down to which clients are disconnected."""

_SLICE: Final = 8
"""Clients that are disconnected before other tasks get their turn."""

_RETRY: Final = 1.0
"""Seconds until the next look when nobody can be disconnected any more, and too much still waits."""


class Listener(Protocol):
    """A subscriber on the control socket. History that is retained for it counts for clients."""

    @property
    def stream(self) -> QueuedStream:
        """Its stream."""

    @property
    def closing(self) -> bool:
        """Whether the connection is ending."""

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""


async def shed_slowest(sessions: Sessions, listeners: Callable[[], Iterable[Listener]]) -> None:
    """Whenever too much waits for all clients together, disconnect those for whom most waits, forever.

    Publishers wait until that is done, and no longer: a client that does not read delays nobody else.
    """
    backlogs = sessions.backlogs
    while True:
        await backlogs.exceeded()
        waiting = [(_burden(each), each) for each in (*sessions.members.values(), *listeners())]
        waiting = sorted((pair for pair in waiting if pair[0]), key=itemgetter(0))
        goal = backlogs.total_limit * _GOAL
        leaving = 0  # bytes of clients that have been ended and are not gone
        while waiting and backlogs.held - leaving > goal:
            for burden, each in reversed(waiting[-_SLICE:]):
                if backlogs.held - leaving <= goal:
                    break
                if each.closing:  # its Close is behind all that waits
                    each.end(Ending.GONE, "the peer takes nothing any more")
                else:
                    each.end(
                        Ending.SLOW,
                        f"{burden} bytes are waiting, and {backlogs.held} for all clients;"
                        f" the limit, max-backlog-total, is {backlogs.total_limit}",
                    )
                leaving += _burden(each)
            del waiting[-_SLICE:]
            await trio.lowlevel.checkpoint()
            while backlogs.let_go():
                await trio.lowlevel.checkpoint()
        if backlogs.held > backlogs.total_limit:
            await trio.sleep(_RETRY)


def _burden(client: Session | Listener) -> int:
    """Return how many bytes, of those that count for clients, may be free again without this connection."""
    return client.stream.burden if isinstance(client, Session) else client.stream.retained
