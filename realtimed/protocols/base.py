"""What all protocols have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from realtimed.frames import Frame, WireFormat
from realtimed.hub import Hub, Subscriber

__all__ = ["Conversation", "ViolationError"]


class ViolationError(Exception):
    """The client said something that ends the connection with a close `code` and a `reason` it can act on."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
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
    def receive(self, message: str | bytes) -> Sequence[Frame]:
        """Do what a client's message asks for and return the frames that answer it, to be written at once.

        Raises `ViolationError` when the connection has to end.
        """

    def farewell(self, reason: str, retry_after: float) -> bytes:
        """Return the frames that go out before a Close which is not the client's fault; seconds."""
        return b""
