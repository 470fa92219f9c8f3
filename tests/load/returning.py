"""Thousands of realtime.v1 clients in one process that lose their connections, come back, and count what they get.

They are made to cost little. All sockets are in one epoll set that one task reads; a frame's payload is decoded once,
and each message is checked as it comes: its offset is one more than that of the one before, and its text is the one
that was published with that offset. What is not so is a fault, and a client keeps the first few of them in words.
"""

from __future__ import annotations

import errno
import random
import resource
import select
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import trio

from tests.kit.clients import REQUEST, subscribe
from tests.kit.frames import masked_frame
from tests.kit.sockets import RESET_AT_CLOSE
from tests.kit.stack import Caddy

__all__ = [
    "CHANNEL",
    "Address",
    "Client",
    "LostError",
    "Readers",
    "allow_open_files",
    "behind_caddy",
    "full_jitter",
    "message",
    "spread",
]

CHANNEL: Final = "news"
SIZE: Final = 128
"""Bytes of a message."""

FIRST_DELAY: Final = 0.5
LONGEST_DELAY: Final = 20.0
"""Seconds between which full jitter grows where the server gives no advice; the same as those of app/realtime.js."""

_FAULTS_TOLD: Final = 3
_RECEIVE_BYTES: Final = 2**16
_CROWDED_PAUSE: Final = 0.01
"""Seconds to wait when a Unix socket's queue of connections is full: the kernel tells nobody when there is room."""

_UPGRADED: Final = b"HTTP/1.1 101 "
_TEXT: Final = 0x81
_CLOSE: Final = 0x88
_PING: Final = 0x89
_PONG: Final = b"\x8a\x80\x00\x00\x00\x00"
_CLOSE_BACK: Final = b"\x88\x80\x00\x00\x00\x00"


class _Event(msgspec.Struct):
    event: str
    epoch: str = ""
    offset: int = 0
    data: str = ""
    recovered: bool | None = None
    retry_after_ms: int | None = None


_decode = msgspec.json.Decoder(_Event).decode


class LostError(Exception):
    """A connection has not come about, or has ended before the client was subscribed; the message says why."""


@dataclass(frozen=True)
class Address:
    """Where clients connect: a Unix socket's path, or a port on the loopback interface."""

    family: socket.AddressFamily
    address: str | tuple[str, int]
    request: bytes

    @staticmethod
    def of(path: Path) -> Address:
        """Return the address of the daemon's own WebSocket socket."""
        return Address(socket.AF_UNIX, str(path), _request(""))


def behind_caddy(caddy: Caddy) -> Address:
    """Return the address of Caddy, for clients with the origin it allows."""
    return Address(socket.AF_INET, ("127.0.0.1", caddy.port), _request(f"Origin: http://localhost:{caddy.port}\r\n"))


def _request(headers: str) -> bytes:
    return REQUEST.removesuffix(b"\r\n") + b"Sec-WebSocket-Protocol: realtime.v1\r\n%b\r\n" % headers.encode()


def allow_open_files(number: int) -> None:
    """Raise the soft limit of open files, here and for child processes. Raises `ValueError` beyond the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + 256
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(f"{needed} open files are needed, and the hard limit is {hard}: see ulimit -Hn")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def message(number: int) -> str:
    """Return the message that is published with this offset."""
    return str(number).ljust(SIZE, ".")


def full_jitter(failures: int, chance: random.Random) -> float:
    """Return the seconds to wait after this many failures in a row."""
    return chance.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2**failures))


def spread(seconds: list[float]) -> str:
    """Return what times, in order, look like."""
    if not seconds:
        return "–"
    p50, p95 = seconds[len(seconds) // 2], seconds[len(seconds) * 95 // 100]
    return f"p50 {p50:.2f} s, p95 {p95:.2f} s, longest {seconds[-1]:.2f} s"


class Readers:
    """One epoll set for all clients, and the task that reads what has come for them."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}

    @staticmethod
    @asynccontextmanager
    async def running() -> AsyncIterator[Readers]:
        """Read as long as the context lasts."""
        readers = Readers()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(readers._run)
                try:
                    yield readers
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            for connection in list(readers._connections.values()):
                connection.close()
            readers._epoll.close()

    def add(self, connection: Connection) -> None:
        self._connections[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, select.EPOLLIN)

    def remove(self, connection: Connection) -> None:
        """Read nothing more from a connection that is still open."""
        if self._connections.pop(connection.sock.fileno(), None) is not None:
            self._epoll.unregister(connection.sock)

    async def _run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0):
                connection = self._connections.get(fd)
                if connection is not None:
                    connection.read()


class Connection:
    """One WebSocket of a client. Frames that have not arrived whole when it is cut are lost, as in life."""

    def __init__(self, sock: socket.socket, client: Client, readers: Readers) -> None:
        self.sock = sock
        self.open = False
        self.joined = trio.Event()
        self.over = trio.Event()
        self.reason = ""
        self.advice: float | None = None
        self._client = client
        self._readers = readers
        self._held = b""
        readers.add(self)

    def read(self) -> None:
        """Take in what has come."""
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error.strerror or str(error))
            return
        if not data:
            self.lose("end of file")
        elif self.open:
            self._walk(data)
        else:
            self._greet(data)

    def send_text(self, text: str) -> None:
        """Send a short frame, masked with zeros."""
        self._send(masked_frame(text.encode()))

    def lose(self, reason: str) -> None:
        """Record that the connection is over."""
        if not self.over.is_set():
            self.reason = reason
            self.close()
            self.over.set()
            self.joined.set()

    def close(self, *, reset: bool = False) -> None:
        """Close the socket without a word."""
        if self.sock.fileno() < 0:
            return
        self._readers.remove(self)
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        self.sock.close()

    def abandon(self) -> None:
        """Read nothing more, and leave the socket open: so it looks to the server when a network has vanished."""
        if self.sock.fileno() >= 0:
            self._readers.remove(self)

    def _send(self, data: bytes) -> None:
        with suppress(OSError):  # who cannot be written to, is found out when reading
            self.sock.send(data)

    def _greet(self, data: bytes) -> None:
        self._held += data
        head, end, rest = self._held.partition(b"\r\n\r\n")
        if not end:
            return
        if not head.startswith(_UPGRADED):
            self.lose(head.partition(b"\r\n")[0].decode("latin-1"))
            return
        self.open = True
        self._held = b""
        self.send_text(self._client.subscription())
        if rest:
            self._walk(rest)

    def _walk(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        at, size = 0, len(data)
        while size - at >= 2:
            length, start = data[at + 1], at + 2
            if length >= 126:
                start += 2 if length == 126 else 8
                if size < start:
                    break
                length = int.from_bytes(data[at + 2 : start], "big")
            end = start + length
            if size < end:
                break
            first = data[at]
            if first == _TEXT:
                self._client.hear(_decode(data[start:end]), self)
            elif first == _PING:
                self._send(_PONG)
            elif first == _CLOSE:
                reason = data[start + 2 : end].decode()
                self._send(_CLOSE_BACK)
                self.lose(f"closed with {int.from_bytes(data[start : start + 2], 'big')} {reason}")
                return
            else:
                self._client.fault(f"a frame that begins with {first:#x}")
            at = end
        self._held = data[at:]


@dataclass
class Client:
    """One who wants every message of the channel, in order, once, and comes back for what was missed.

    Times are in seconds; those in `away` are from the end of a connection to the next subscription's answer. `complete`
    is set when it has come to the offset `last`.
    """

    number: int
    epoch: str = ""
    offset: int = 0
    received: int = 0
    replayed: int = 0
    recoveries: int = 0
    refusals: int = 0
    largest_replay: int = 0
    faults: int = 0
    told: list[str] = field(default_factory=list)
    away: list[float] = field(default_factory=list)
    joined_at: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    last: int = -1
    complete: trio.Event = field(default_factory=trio.Event)
    _lost_at: float = 0.0
    _replay_until: int = 0

    async def connect(self, address: Address, readers: Readers) -> Connection:
        """Connect, and subscribe where it left off. Raises `LostError`; `lost` has to be called either way."""
        sock = await self._connected(address)
        connection = Connection(sock, self, readers)
        try:
            sock.send(address.request)
        except OSError as error:
            connection.lose(error.strerror or str(error))
        try:
            await connection.joined.wait()
        except trio.Cancelled:
            connection.close()
            raise
        if connection.over.is_set():
            self.failures.append(connection.reason)
            raise LostError(connection.reason)
        return connection

    def lost(self) -> None:
        """Record that it is no longer connected."""
        if not self._lost_at:
            self._lost_at = time.monotonic()

    def subscription(self) -> str:
        """Return what to say first."""
        if not self.epoch:
            return subscribe(CHANNEL)
        return subscribe(CHANNEL, since={"epoch": self.epoch, "offset": self.offset})

    def hear(self, event: _Event, connection: Connection) -> None:
        """Take in what the server says."""
        if event.event == "message":
            if event.offset != self.offset + 1 or event.data != message(event.offset):
                self.fault(f"message {event.offset} {event.data[:20]!r} came after {self.offset}")
            self.offset = event.offset
            self.received += 1
            if event.offset <= self._replay_until:
                self.replayed += 1
            if event.offset == self.last:
                self.complete.set()
        elif event.event == "subscribed":
            self._join(event)
            connection.joined.set()
        elif event.event == "goodbye":
            connection.advice = (event.retry_after_ms or 0) / 1000
        elif event.event != "welcome":
            self.fault(f"the server said {event}")

    def fault(self, what: str) -> None:
        """Record a fault."""
        self.faults += 1
        if self.faults <= _FAULTS_TOLD:
            self.told.append(f"client {self.number}: {what}")

    def _join(self, event: _Event) -> None:
        now = time.monotonic()
        self.joined_at.append(now)
        if self._lost_at:
            self.away.append(now - self._lost_at)
            self._lost_at = 0.0
        if not self.epoch:
            if event.recovered is not None:
                self.fault(f"recovered is {event.recovered} without since")
        elif event.recovered:
            if event.epoch != self.epoch or event.offset < self.offset:
                self.fault(f"recovered at {event.epoch}/{event.offset} after {self.epoch}/{self.offset}")
            self.recoveries += 1
            self.largest_replay = max(self.largest_replay, event.offset - self.offset)
            self._replay_until = event.offset
            return
        else:
            self.refusals += 1
        self.epoch, self.offset = event.epoch, event.offset
        self._replay_until = 0
        if self.offset == self.last:
            self.complete.set()

    async def _connected(self, address: Address) -> socket.socket:
        while True:
            sock = socket.socket(address.family, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                status = sock.connect_ex(address.address)
                if status == errno.EINPROGRESS:
                    await trio.lowlevel.wait_writable(sock)
                    status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except BaseException:
                sock.close()
                raise
            if not status:
                return sock
            sock.close()
            if status != errno.EAGAIN:
                self.failures.append(errno.errorcode[status])
                raise LostError(errno.errorcode[status])
            await trio.sleep(_CROWDED_PAUSE)
