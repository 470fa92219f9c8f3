"""What all connections of the control socket share: their turns, their limits, and how the daemon stops them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from time import thread_time
from typing import Final, Protocol

import trio

from realtimed.config.settings import Config
from realtimed.control.commands import Context
from realtimed.control.steps import Work
from realtimed.hub.channel import Subscriber
from realtimed.hub.publication import Ending
from realtimed.hub.watch import Watcher
from realtimed.net.backlogs import Backlogs
from realtimed.net.fanout import MISSED
from realtimed.net.gate import Gate
from realtimed.net.stream import QueuedStream
from realtimed.process.turns import Turns

__all__ = ["SLICE_SECONDS", "WAITING_LIMIT", "Publisher", "Service"]

WAITING_LIMIT: Final = 64 * 2**20
"""Bytes that may wait for one connection to read them."""

SLICE_SECONDS: Final = 0.002
"""Processor time that a connection takes in one turn of the event loop."""

_SECONDS_A_TURN: Final = 0.004
"""Processor time that the commands of all connections take in one turn of the event loop."""

_AT_A_TIME: Final = 2
"""Connections that go on in each turn when that time is spent, so that the others wait but never stop."""

_READ_TOGETHER: Final = 2**20
"""Bytes that all connections together may read in one turn of the event loop."""

_READ_MOST: Final = 64 * 2**10
_READ_LEAST: Final = 4 * 2**10
"""Bytes that one connection may read in a turn, at most and whatever the number of connections."""


class Publisher(Protocol):
    """A connection, as far as it is known here."""

    @property
    def stream(self) -> QueuedStream:
        """Its stream."""

    @property
    def closing(self) -> bool:
        """Whether the daemon has ended the connection, or it has closed."""

    @property
    def burden(self) -> int:
        """How many bytes of memory may be free again without this connection."""

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.outbound.Owner`."""

    def stop(self) -> None:
        """Take no more commands, except one that has begun to arrive, or the first of all. Returns at once."""

    def end_now(self, code: str, reason: str) -> None:
        """End the connection without a word to its publisher, unless it is ending already. Returns at once."""

    def refuse_upgrade(self, reason: str) -> None:
        """Answer the request for an upgrade, if there was one: it has failed."""


@dataclass
class Service:
    """What all connections share."""

    context: Context
    config: Config
    answers: Backlogs
    """Counts the memory that all connections hold."""
    until_publishable: Callable[[], Awaitable[None]]
    """Waits until more may be published."""
    publish_now: Callable[[Callable[[], None]], None]
    """Calls a function that publishes, and makes the first sends at once."""
    gate: Gate
    """While it is closed, nothing is read and no command is carried out."""
    connections: set[Publisher] = field(default_factory=set)
    commands: int = 0
    """Commands carried out or refused."""
    stopping: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    """Refused commands, by the code of the error."""
    turns: Turns = field(default_factory=lambda: Turns(_SECONDS_A_TURN, _AT_A_TIME))
    """Processor time for commands."""
    finished: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    """Wakes those that wait for a connection to close, or to have no commands left."""
    settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    """Waits until everything published so far has been handed to the sockets or to their backlogs."""
    lingering: set[Publisher] = field(default_factory=set)
    """The connections that have no commands left and stay open to hear what the others publish."""
    _long_query: trio.StrictFIFOLock = field(default_factory=trio.StrictFIFOLock, init=False)
    """Held while the steps of a command that does not publish are taken: one such command at a time."""

    @property
    def read_size(self) -> int:
        """How many bytes a connection reads at a time: fewer if there are many, as all may read in the same turn."""
        return max(min(_READ_MOST, _READ_TOGETHER // len(self.connections)), _READ_LEAST)

    def give_up(self, subscribers: Collection[Subscriber | Watcher]) -> None:
        """End those connections that are among the subscribers."""
        for connection in list(self.connections):
            if connection.stream in subscribers:
                connection.end_now("internal_error", MISSED)

    def begin(self, work: Work, until: float) -> bool:
        """Take steps of `work` until `thread_time` is `until`, unless it has to wait for that of another connection.

        Returns whether that was all of them. Raises `RefusedError` as `Work.go_on` does.
        """
        return (work.publishes or not self._long_query.locked()) and work.go_on(until)

    async def finish(self, work: Work, before_turn: Callable[[], None]) -> None:
        """Take all other steps of `work`, with turns for others in between; `before_turn` is called before each turn.

        Raises `RefusedError` as `Work.go_on` does.
        """
        if work.publishes:
            with trio.CancelScope(shield=True):  # all is published after some turns of the event loop
                await self._take_steps(work, before_turn)
        else:
            async with self._long_query:
                await self._take_steps(work, before_turn)

    async def _take_steps(self, work: Work, before_turn: Callable[[], None]) -> None:
        over = False
        while not over:
            before_turn()
            async with self.turns:
                began = thread_time()
                over = work.go_on(began + SLICE_SECONDS)
                self.turns.spend(thread_time() - began)

    def note_refusal(self, code: str) -> None:
        """Count a command that is refused."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def stop(self) -> None:
        """Make every connection end once it has answered what has been sent to it.

        A connection that has just been opened gets time to send its first command. Otherwise publishers that open a
        connection for each command would see errors whenever the daemon restarts.
        """
        self.stopping = True
        for connection in self.connections:
            connection.stop()

    async def hear_out(self, connection: Publisher) -> None:
        """When the daemon stops, wait until no connection has commands left and all publications are handed on."""
        self.lingering.add(connection)
        self.finished.unpark_all()
        while len(self.connections) > len(self.lingering):
            await self.finished.park()
        await self.settle()
