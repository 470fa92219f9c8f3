"""All sessions, and the things they share."""

from __future__ import annotations

import gc
import math
import random
import secrets
import socket
import time
from collections.abc import Callable, Collection
from typing import Final

import trio

from realtimed.config.settings import Config
from realtimed.errors import RefusedError
from realtimed.hub.channel import Subscriber
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending
from realtimed.hub.watch import Watcher as ChannelWatcher
from realtimed.net.admission import Admission
from realtimed.net.backlogs import Backlogs
from realtimed.net.drains import Drains
from realtimed.net.fanout import MISSED
from realtimed.net.gate import Gate
from realtimed.net.watcher import Watcher
from realtimed.process.deadlines import Deadlines
from realtimed.process.open_files import connection_limit
from realtimed.websocket.arrival import Arrival
from realtimed.websocket.connection import Connection
from realtimed.websocket.engines import Engines
from realtimed.websocket.frames import check_close
from realtimed.websocket.session import Session
from realtimed.websocket.stream import ClientStream, InboundLimits

__all__ = ["Sessions"]

_ABANDONED_PARSERS: Final = 5000
"""Abandoned parsers, of about 1.5 KB each, until a garbage collection, which may take half a second."""

_YOUNGEST: Final = 0.5
"""The share of `max-age` that every connection may reach."""


class Sessions:
    """All sessions, their places, the tasks that they share, and counts of those that have ended.

    `config` may be replaced; see `configure`. `released` is called for each connection whose socket has been closed.
    """

    # Invariants: `members` has the sessions whose handshake was answered with 101, until their stream is shut, in the
    # order of their `rank`, which is the number of `connections` before. `open` is how many connections there are: the
    # members, and the arrivals. An arrival is in `handshakes` or, after a refusal, in `closings`. `refused` counts the
    # refusals by HTTP status. `ended` and `closed` count the ends of WebSockets, by ending and by close code.
    # `abandoned_parsers` counts the parsers that no garbage collection has freed yet.

    nursery: trio.Nursery
    """Where the shared tasks and the engines run. `run` opens and closes it."""
    watcher: Watcher
    """What watches the sockets. `run` opens and closes it."""

    def __init__(self, config: Config, hub: Hub, released: Callable[[], None]) -> None:
        self.config = config
        self.hub = hub
        self.admission = Admission(*_admission_limits(config), time.monotonic)
        self.backlogs = Backlogs(
            limit=config.max_backlog,
            timeout=config.backlog_timeout,
            total_limit=config.max_backlog_total,
            replays=hub.replays,
        )
        self.drains = Drains(self.backlogs)
        self.inbound = _inbound_limits(config)
        self.engines = Engines(self._count_abandoned_parser)
        self.handshakes: Deadlines[Arrival] = Deadlines(
            lambda: self.config.handshake_timeout, lambda each: each.guard(each.too_late)
        )
        """Connections whose request has not arrived."""
        self.closings: Deadlines[Connection] = Deadlines(lambda: self.config.close_timeout, lambda each: each.over())
        """Connections that end, and have to be over in time."""
        self.departing: Deadlines[Connection] = Deadlines(lambda: 0.0, lambda each: each.over())
        """Connections that are over in the next turns of the event loop, whatever waits for the peer."""
        self.members: dict[str, Session] = {}
        self.gate = Gate()
        """What clients send is read only while it is open."""
        self.open = 0
        self.connections = 0
        self.refused: dict[int, int] = {}
        self.ended = dict.fromkeys(Ending, 0)
        self.closed: dict[int, int] = {}
        self.abandoned_parsers = 0
        self.send_away: Callable[[Session], None] | None = None
        """Set when the daemon is about to end. It ends the session of a client that still joins."""
        self.run_id = secrets.token_hex(2)
        """A part of every client's id, so that no client has an id from before a restart."""
        self.issued = 0
        """How many ids have been given."""
        self.share = 0
        """The share of the clients that is being pinged; see `Heartbeat`."""
        self.announced: set[Session] | None = None
        """While a hand-over is under way: the sessions of whose sockets another process has copies."""
        self._released = released
        self._emptied = trio.lowlevel.ParkingLot()

    def configure(self, config: Config) -> None:
        """Replace the configuration. What clients may send changes for new connections only."""
        self.config = config
        self.admission.configure(*_admission_limits(config))
        self.backlogs.configure(config.max_backlog, config.backlog_timeout, config.max_backlog_total)
        self.inbound = _inbound_limits(config)
        self.handshakes.changed()
        self.closings.changed()
        for session in self.members.values():
            session.stream.limits_changed()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connections that `welcome` gets, until cancelled. Then end those that are left."""
        trio.lowlevel.add_instrument(self.engines.turns)
        self.watcher = Watcher(self.gate)
        try:
            async with trio.open_nursery() as self.nursery:
                self.engines.nursery = self.nursery
                for task in (self.watcher, self.drains, self.handshakes, self.closings, self.departing):
                    self.nursery.start_soon(task.run)
                task_status.started()
        finally:
            trio.lowlevel.remove_instrument(self.engines.turns)
            for each in [*self.handshakes, *self.closings, *self.members.values()]:
                each.over()
            self.watcher.close()

    def client_stream(self, sock: socket.socket) -> ClientStream:
        """Return the stream for a connection."""
        return ClientStream(sock, self.backlogs, self.inbound, self.watcher, self.drains)

    def welcome(self, stream: ClientStream) -> None:
        """Serve a connection."""
        self.open += 1
        Arrival(stream, self).begin()

    def release(self, connection: Connection, stream: ClientStream) -> None:
        """Close the socket of a connection that is over, and forget both."""
        for deadlines in (self.closings, self.departing):
            deadlines.remove(connection)
        if stream.descriptor in self.watcher:
            self.watcher.remove(stream.descriptor)
        if self.announced and connection in self.announced:
            stream.hang_up()
        stream.shut()
        stream.detach()
        self.open -= 1
        self._released()
        if not self.open:
            self._emptied.unpark_all()

    async def emptied(self) -> None:
        """Wait until there are no connections."""
        while self.open:
            await self._emptied.park()

    def expiry(self) -> float:
        """Return when a connection made now reaches its age, on trio's clock.

        After a restart all clients connect at about the same time. Each connection gets a random age, so that they are
        not all closed at about the same time.
        """
        max_age = self.config.max_age
        return math.inf if max_age is None else trio.current_time() + max_age * random.uniform(_YOUNGEST, 1)

    def new_id(self) -> str:
        """Return an id that no other connection has had."""
        self.issued += 1
        return f"c-{self.run_id}-{self.issued:x}"

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

    def give_up(self, subscribers: Collection[Subscriber | ChannelWatcher]) -> None:
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

    def _count_abandoned_parser(self) -> None:
        """Count a parser that only a full garbage collection can free, and run one when there are too many.

        They are few: only clients that end in the middle of a frame leave one. See `realtimed.websocket.engines`.
        """
        self.abandoned_parsers += 1
        if self.abandoned_parsers >= _ABANDONED_PARSERS:
            self.abandoned_parsers = 0
            gc.collect()


def _admission_limits(config: Config) -> tuple[int, int | None, float]:
    """Return the limits of `Admission`: all connections, those of one address, and its handshakes a second."""
    limit = connection_limit(config.max_connections)
    return limit, config.max_connections_per_address, config.handshakes_per_address


def _inbound_limits(config: Config) -> InboundLimits:
    return InboundLimits(config.max_inbound, config.inbound_rate, config.inbound_burst)
