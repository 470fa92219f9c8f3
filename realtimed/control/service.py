"""What all connections of the control socket share, and what they may hold together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from realtimed.config.settings import Config
from realtimed.control.commands import Context
from realtimed.hub.channel import Subscriber
from realtimed.hub.publication import Ending
from realtimed.hub.watch import Watcher
from realtimed.net.backlogs import Backlogs
from realtimed.net.stream import QueuedStream
from realtimed.process.turns import Turns

__all__ = ["ANSWER_LIMIT", "WAITING_LIMIT", "Publisher", "Service", "shed_largest"]

WAITING_LIMIT: Final = 64 * 2**20
"""Bytes that may wait for one connection to read them."""

ANSWER_LIMIT: Final = 32 * 2**20
"""Bytes of memory that one answer may take, or a quarter of `max-answers-total` if that is less."""

_ANSWER_LEAST: Final = 2**20
"""Bytes that any answer may take, whatever that limit is: those that are told of what was done do not take more."""

_READ_TOGETHER: Final = 2**20
_READ_MOST: Final = 64 * 2**10
_READ_LEAST: Final = 4 * 2**10
"""Bytes that all connections may read in one turn of the event loop, and each of them."""

_SECONDS_A_TURN: Final = 0.004
_AT_A_TIME: Final = 2
"""Processor time that commands take in one turn of the event loop, and connections that go on in one whatever it is."""

_SHED_TO: Final = 0.9
"""To which part of `max-answers-total` connections are ended once it is exceeded."""

_SHED_INTERVAL: Final = 1.0
"""Seconds until the next look when no connection is left that holds anything, and too much is still held."""


class Publisher(Protocol):
    """A connection, as it is known here."""

    @property
    def stream(self) -> QueuedStream:
        """Its stream."""

    @property
    def closing(self) -> bool:
        """Whether somebody has ended the connection."""

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""

    @property
    def burden(self) -> int:
        """How many bytes of memory may be free again without this connection."""

    def stop(self) -> None:
        """Take no more commands, but for one that has begun to arrive, or the first of all. Returns at once."""

    def end_now(self, code: str, reason: str) -> None:
        """End the connection without a word to its publisher, unless it is ending already. Returns at once."""


@dataclass
class Service:
    """What all connections share. `room` waits until more may be published; `at_once` publishes and sends in one go.

    `answers` counts what all connections hold.
    """

    context: Context
    config: Config
    answers: Backlogs
    room: Callable[[], Awaitable[None]]
    at_once: Callable[[Callable[[], None]], None]
    connections: set[Publisher] = field(default_factory=set)
    commands: int = 0
    stopping: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    """Refused commands, by the code of the error."""
    walks: trio.StrictFIFOLock = field(default_factory=trio.StrictFIFOLock)
    """Held by who carries out steps of a kind of which one is carried out at a time."""
    turns: Turns = field(default_factory=lambda: Turns(_SECONDS_A_TURN, _AT_A_TIME))
    """Processor time for commands."""
    left: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    """Where to wait for a connection to be gone, or to be done with its commands."""
    settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    """Waits until everything published so far has been handed to the sockets or to their backlogs."""
    listening: set[Publisher] = field(default_factory=set)
    """Those of the connections that have no commands left and stay to hear what the others publish."""

    @property
    def answer_limit(self) -> int:
        """How many bytes of memory one answer may take."""
        return max(min(ANSWER_LIMIT, self.config.max_answers_total // 4), _ANSWER_LEAST)

    async def hear_out(self, connection: Publisher) -> None:
        """Wait, when the daemon stops, until no connection has commands left and all they published is handed on."""
        self.listening.add(connection)
        self.left.unpark_all()
        while len(self.connections) > len(self.listening):
            await self.left.park()
        await self.settle()

    @property
    def read_bytes(self) -> int:
        """How much a connection reads at a time: less if they are many, since all of them may do so in one turn."""
        return max(min(_READ_MOST, _READ_TOGETHER // len(self.connections)), _READ_LEAST)

    def give_up(self, subscribers: Collection[Subscriber | Watcher]) -> None:
        """End those connections that are among the subscribers, after a fault in which they may miss something."""
        for connection in list(self.connections):
            if connection.stream in subscribers:
                connection.end(Ending.GONE, "the peer takes nothing any more")

    def note_refusal(self, code: str) -> None:
        """Count a command that is refused."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def stop(self) -> None:
        """Let every connection end once it has answered what has been sent to it.

        One that has just been made is given the time to send its first command, or whoever opens a connection for each
        command would meet with errors whenever the daemon restarts.
        """
        self.stopping = True
        for connection in self.connections:
            connection.stop()


async def shed_largest(service: Service) -> None:
    """Whenever all connections together hold too much, end those that hold most, for ever."""
    answers = service.answers
    while True:
        await answers.exceeded()
        ended = _end_largest(service)
        while not service.connections.isdisjoint(ended):
            await service.left.park()
        if not ended:
            await trio.sleep(_SHED_INTERVAL)


def _end_largest(service: Service) -> list[Publisher]:
    """End connections until enough will be free; return them."""
    answers = service.answers
    held = excess = answers.held
    excess -= int(answers.total_limit * _SHED_TO)
    holding = sorted((each for each in service.connections if each.burden), key=lambda each: each.burden)
    ended = []
    while holding and excess > 0:
        largest = holding.pop()
        excess -= largest.burden
        largest.end_now(
            "too_much",
            f"it holds {largest.burden} bytes with answers that it has not read and commands that it has not finished,"
            f" and all publishers hold {held}; the limit, max-answers-total, is {answers.total_limit}",
        )
        ended.append(largest)
    return ended
