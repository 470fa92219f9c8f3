"""Disconnects the slowest clients when too much waits for all clients together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, Protocol

import trio

from realtimed.hub.publication import Ending
from realtimed.net.backlogs import Backlogs
from realtimed.net.stream import QueuedStream
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions

__all__ = ["Publisher", "shed_slowest"]

_GOAL: Final = 0.9
"""The part of `max-backlog-total` down to which clients are disconnected."""

_SLICE: Final = 8
"""Clients disconnected before other tasks get their turn."""

_RETRY: Final = 1.0
"""Seconds until the next try when too much still waits and there is no client left to disconnect."""


class Publisher(Protocol):
    """A connection on the control socket. History that is retained for it counts as if it were for clients."""

    @property
    def stream(self) -> QueuedStream:
        """Its stream."""

    @property
    def closing(self) -> bool:
        """Whether the connection is ending."""

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.outbound.Owner`."""


async def shed_slowest(sessions: Sessions, publishers: Callable[[], Iterable[Publisher]]) -> None:
    """Whenever too much waits for all clients together, disconnect those for whom most waits, forever.

    Publishers wait until that is done, and no longer: a client that does not read delays nobody else.
    """
    backlogs = sessions.backlogs
    while True:
        await backlogs.exceeded()
        await _shed(backlogs, [*sessions.members.values(), *publishers()])
        if backlogs.held > backlogs.total_limit:
            await trio.sleep(_RETRY)


async def _shed(backlogs: Backlogs, clients: list[Session | Publisher]) -> None:
    """Disconnect clients, those with the largest burdens first, until the goal will be reached."""
    burdened = [(burden, client) for client in clients if (burden := _burden(client))]
    burdened.sort(key=itemgetter(0))
    goal = backlogs.total_limit * _GOAL
    leaving = 0  # bytes of clients whose connections have been ended and are not gone
    while burdened and backlogs.held - leaving > goal:
        for burden, client in reversed(burdened[-_SLICE:]):
            if backlogs.held - leaving <= goal:
                break
            _end(client, burden, backlogs)
            leaving += _burden(client)
        del burdened[-_SLICE:]
        await trio.lowlevel.checkpoint()
        while backlogs.let_go():
            await trio.lowlevel.checkpoint()


def _end(client: Session | Publisher, burden: int, backlogs: Backlogs) -> None:
    """End a client's connection: with a Close, or at once if a Close already waits behind everything else."""
    if client.closing:
        client.end(Ending.GONE, "the peer takes nothing any more")
    else:
        client.end(
            Ending.SLOW,
            f"{burden} bytes are waiting, and {backlogs.held} for all clients;"
            f" the limit, max-backlog-total, is {backlogs.total_limit}",
        )


def _burden(client: Session | Publisher) -> int:
    """Return how many of the bytes that count for clients may become free without this connection."""
    return client.stream.burden if isinstance(client, Session) else client.stream.retained
