"""The states of a publisher's connection, and what another process has to know to go on with it."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

import msgspec

from realtimed.control.answers import LongAnswer
from realtimed.control.steps import Work
from realtimed.rpc.wire import DecoderState, Message

__all__ = ["Resumed", "State", "Unfinished"]


class State(Enum):
    """What a connection does."""

    NEW = auto()
    """No command has begun to arrive."""
    SERVING = auto()
    """Commands are carried out."""
    LEAVING = auto()
    """The last command has been carried out, and the last answers are being read."""
    ENDING = auto()
    """The stream takes no more answers, and the nursery takes no more tasks."""
    CLOSED = auto()
    """The stream is shut, and the nursery is gone."""


class Unfinished(NamedTuple):
    """A command whose steps are being taken, with the message that it came in, and its answer if it gets one."""

    message: Message
    work: Work
    answer: LongAnswer | None


class Resumed(msgspec.Struct, array_like=True):
    """A connection's state; see `realtimed.control.server.Connection`.

    `age` is for how many seconds a command has been arriving, None if none is. `asked` is the id of a request for an
    upgrade whose outcome is awaited.
    """

    decoder: DecoderState
    is_new: bool
    age: float | None
    commands: int
    refusal_logged: bool
    asked: int | None = None
