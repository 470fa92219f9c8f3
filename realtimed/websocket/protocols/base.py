"""What all protocols have in common."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Final

import msgspec

from realtimed.hub.channel import Subscriber
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending, Frames, WireFormat
from realtimed.text import quoted
from realtimed.websocket.frames import CloseCode

__all__ = ["CLOSE_CODES", "Conversation", "ViolationError", "not_json", "not_valid"]

CLOSE_CODES: Final[Mapping[Ending, CloseCode]] = {
    Ending.KICKED: CloseCode.NOT_ALLOWED,
    Ending.RESTART: CloseCode.COME_BACK,
    Ending.MAX_AGE: CloseCode.COME_BACK,
    Ending.SLOW: CloseCode.SLOW_CONSUMER,
    Ending.SILENT: CloseCode.SILENT,
    Ending.BAD_MESSAGE: CloseCode.BAD_MESSAGE,
    Ending.TOO_MANY: CloseCode.TOO_MANY,
    Ending.TOO_BIG: CloseCode.MESSAGE_TOO_BIG,
    Ending.NO_SUCH_PATH: CloseCode.NO_SUCH_PATH,
    Ending.PROTOCOL_ERROR: CloseCode.PROTOCOL_ERROR,
    Ending.INVALID_DATA: CloseCode.INVALID_DATA,
}
"""The code of our Close, for each ending that has one."""

_INTERRUPTED: Final = {Ending.RESTART: "restarting", Ending.MAX_AGE: "connected for max-age"}

_OTHER_ACTION: Final = re.compile(r"Invalid (?:enum )?value '(.*)' - at `\$\.action`", re.DOTALL)
_HALF_A_PAIR_AT_THE_END: Final = re.compile(r"\\u[Dd][89ABab][0-9A-Fa-f]{2}.{,11}\Z", re.DOTALL)


class ViolationError(Exception):
    """A client's message ends its connection. The client can act on the `reason`."""

    def __init__(self, ending: Ending, reason: str) -> None:
        super().__init__(ending, reason)
        self.ending = ending
        self.reason = reason


class Conversation(ABC):
    """One client's side of a protocol."""

    __slots__ = ("hub", "subscriber")

    name: ClassVar[str]
    form: ClassVar[WireFormat]

    def __init__(self, hub: Hub, subscriber: Subscriber) -> None:
        self.hub = hub
        self.subscriber = subscriber

    def greeting(self, client: str, heartbeat: float) -> bytes:
        """Return the frames that open the conversation; `heartbeat` is in seconds."""
        return b""

    @abstractmethod
    def receive(self, message: str | bytes) -> Iterable[Frames]:
        """Do what a client's message asks for, and return the frames that answer it.

        The caller writes them before anything else. A long answer is an iterator that makes frames lazily.

        Raises `ViolationError` when the connection must end.
        """

    def close_code(self, ending: Ending) -> int:
        """Return the code of our Close for an ending that has one."""
        return CLOSE_CODES[ending]

    def farewell(self, ending: Ending, retry_after: float) -> bytes:
        """Return the frames to send before a Close that is not the client's fault.

        `ending` is ``RESTART`` or ``MAX_AGE``. They ask the client to come back after `retry_after` seconds.
        """
        return b""

    def farewell_reason(self, ending: Ending, retry_after: float) -> str:
        """Return the reason of the Close that follows `farewell`."""
        return f"{_INTERRUPTED[ending]}, come back in {retry_after * 1000:.0f} ms"


def not_valid(error: msgspec.ValidationError, actions: str) -> str:
    """Return a sentence that says what is wrong with a message, from the decoder's `error`. `actions` names all."""
    other_action = _OTHER_ACTION.fullmatch(str(error))
    if other_action is None:
        return str(error)
    return f"Expected {actions}, got {quoted(other_action[1], 20)} - at `$.action`"


def not_json(message: str, error: Exception) -> str:
    """Return a sentence that says why `message` is not JSON, from the decoder's `error`."""
    if isinstance(error, RecursionError):
        return "this JSON is nested too deeply"
    reason = str(error).removeprefix("JSON is malformed: ")
    if reason == "Input data was truncated":
        # The decoder says the same when it looks behind the end for the other half of a pair of surrogates.
        reason = "half a surrogate pair" if _HALF_A_PAIR_AT_THE_END.search(message) else "it ends too early"
    return f"not JSON: {reason}"
