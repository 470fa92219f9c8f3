"""The fake subscribers of all tests, wire formats that a test can read, and the fake owner of a stream."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from realtimed.hub.channel import Channel
from realtimed.hub.publication import Ending, Publication, WireFormat
from realtimed.net.outbound import OutboundStream

__all__ = [
    "LINES",
    "LOUD_LINES",
    "OTHER_LINES",
    "Bare",
    "Lines",
    "Listener",
    "Looked",
    "LoudLines",
    "Owner",
    "Sink",
    "SocketListener",
]


class Lines:
    """A wire format that a test can read: "channel/offset/message;"."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, publication: Publication) -> bytes:
        self.encoded += 1
        return f"{publication.channel}/{publication.offset}/{publication.payload.decode()};".encode()


class LoudLines(Lines):
    """The same with "!" behind each message."""

    def encode(self, publication: Publication) -> bytes:
        return super().encode(publication)[:-1] + b"!;"


class Bare(Lines):
    """The payload, with nothing around it."""

    def encode(self, publication: Publication) -> bytes:
        self.encoded += 1
        return publication.payload


LINES = Lines()
OTHER_LINES = Lines()
LOUD_LINES = LoudLines()


@dataclass(eq=False)
class Listener:
    """A subscriber, or a watcher, that remembers what it was sent.

    Subclasses override `take` to do something else with it.
    """

    form: WireFormat = LINES
    channels: set[Channel] = field(default_factory=set)
    parts: list[bytes] = field(default_factory=list)
    sends: int = 0
    fd: int = -1

    def write(self, data: bytes, sent: int = 0) -> None:
        assert data
        self.sends += 1
        self.take(data[sent:])

    def take(self, data: bytes) -> None:
        """Remember `data`."""
        self.parts.append(data)

    @property
    def received(self) -> bytes:
        """All parts in one."""
        return b"".join(self.parts)

    @property
    def messages(self) -> list[str]:
        """The messages received, in one of the formats of lines."""
        return [line.rpartition("/")[2] for line in self.received.decode().split(";")[:-1]]


class SocketListener:
    """A subscriber with a real socket, and a peer that reads when a test says so."""

    def __init__(self) -> None:
        self.form: WireFormat = Bare()
        self.socket, self.peer = socket.socketpair()
        self.socket.setblocking(False)
        self.peer.setblocking(False)
        self.channels: set[Channel] = set()
        self.fd = self.socket.fileno()
        self.writes = 0
        self.kept: list[tuple[bytes, int]] = []
        self.errors: list[OSError] = []

    def write(self, data: bytes, sent: int = 0) -> None:
        self.writes += 1
        if self.fd >= 0 and not sent:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                pass
            except OSError as error:
                self.errors.append(error)
                return
        if sent < len(data):
            self.kept.append((data, sent))

    def block(self) -> None:
        """Have a backlog, as a stream does."""
        self.fd = -1

    def received(self) -> bytes:
        """Return what the peer can read now."""
        data = b""
        while True:
            try:
                more = self.peer.recv(2**20)
            except BlockingIOError:
                return data
            if not more:
                return data
            data += more


class Sink:
    """A subscriber that takes everything, in a function written in C as `socket.send` is: for counting calls."""

    def __init__(self, form: WireFormat) -> None:
        self.form = form
        self.channels: set[Channel] = set()
        self.fd = -1
        self.write: Callable[..., None] = len  # type: ignore[assignment]  # nobody looks at what it returns


class Looked(Sink):
    """A sink that counts how often one of its kind is looked up in a set."""

    count: ClassVar = 0

    def __hash__(self) -> int:
        Looked.count += 1
        return super().__hash__()


class Owner:
    """The owner of a stream, which remembers what the stream says of itself.

    Once it has a `stream`, it seals it when that is slow, as a session does. It may own a publisher's or a client's.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.replays_sent = 0
        self.stream: OutboundStream | None = None

    def end(self, ending: Ending, reason: str) -> None:
        self.said.append("broken" if ending is Ending.GONE else reason)
        if ending is Ending.SLOW and self.stream is not None:
            self.stream.seal()

    def guard(self, step: Callable[[], None]) -> None:
        step()

    def drained(self) -> None:
        """Nothing has waited for that."""

    def replay_sent(self) -> None:
        self.replays_sent += 1
