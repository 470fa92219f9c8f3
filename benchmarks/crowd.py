"""A crowd of clients that do the same at once, step by step. Prints as JSON what each step has cost the daemon.

Usage: python -m benchmarks.crowd life|heartbeat CONTROL-SOCKET WEBSOCKET-SOCKET SERVER-PROCESS CLIENTS

Processor times are in seconds, memory in bytes, all of them for the whole crowd. A scenario starts this as a process of
its own, so that both it and the daemon have the full number of open files.
"""

from __future__ import annotations

import errno
import json
import resource
import select
import socket
import sys
import time
from collections.abc import Collection
from contextlib import closing
from typing import Final, Self

from benchmarks.machine import anonymous_bytes, precise_processor_seconds
from benchmarks.processes import BenchmarkError
from realtimed import Client

__all__ = ["CHANNEL_CLIENTS", "Crowd", "live", "measure_heartbeat"]

CHANNEL_CLIENTS: Final = 1_000
"""Clients of one channel: those that are slow at the same time. The kernel holds some 200 KB for each of them."""

_REQUEST: Final = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"
)
_TEXT, _CLOSE, _PONG = 0x81, 0x88, 0x8A
_EMPTY_PING: Final = b"\x89\x00"
_GOING_AWAY: Final = (1001).to_bytes(2, "big")

_MESSAGES: Final = 100
_END: Final = "|the end"
_MESSAGE: Final = "x" * 56 + _END

_LARGE_MESSAGES: Final = 5
_LARGE_MESSAGE: Final = "x" * 60_000 + _END
"""Five of them are more than the kernel takes for a client that does not read: the rest is the daemon's backlog."""

_HEARTBEATS: Final = 2
_READ_BYTES: Final = 1 << 18
_EVENTS: Final = 512
_SETTLE: Final = 1.0
"""Seconds in which the daemon may finish what a step has left it to do, and give memory back."""

_QUEUE_FULL: Final = 0.001
"""Seconds until the kernel's queue of connections is tried again. It does not say when there is room."""

_PATIENCE: Final = 60.0
"""Seconds a step may take before the measurement is given up."""


def _frame(opcode: int, payload: bytes = b"") -> bytes:
    # A masking key of zeros: the masked payload is the payload itself.
    return bytes([opcode, 0x80 | len(payload)]) + bytes(4) + payload


class Crowd:
    """Clients of realtime.v1, each subscribed to one channel that it shares with `CHANNEL_CLIENTS` in all.

    Nobody reads but in `connect`, `receive` and `answer_pings`. They raise `BenchmarkError` if the daemon ends a
    connection, or takes longer than a minute.
    """

    def __init__(self, address: str, clients: int) -> None:
        self._address = address
        self._clients = clients
        self._sockets: dict[int, socket.socket] = {}  # by file descriptor, in the order in which they have connected
        self._epoll = select.epoll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._epoll.close()
        for sock in self._sockets.values():
            sock.close()

    @property
    def channels(self) -> list[str]:
        """The names of the channels."""
        return [f"channel-{number}" for number in range(-(-self._clients // CHANNEL_CLIENTS))]

    def members(self, channel: str) -> list[int]:
        """Return the descriptors of the clients of a channel."""
        at = self.channels.index(channel) * CHANNEL_CLIENTS
        return list(self._sockets)[at : at + CHANNEL_CLIENTS]

    def connect(self) -> float:
        """Connect all at once; each subscribes as soon as it is connected. Return the seconds until all are subscribed.

        At once means: as fast as the kernel takes connections for the daemon, whatever the daemon has done by then.
        """
        began = time.monotonic()
        deadline = began + _PATIENCE
        channels = self.channels
        shaking: dict[int, str] = {}  # channels of those that have not been answered, by descriptor
        subscribed = 0
        while subscribed < self._clients:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self._clients - subscribed} of {self._clients} clients are not subscribed")
            patience = _PATIENCE
            if len(self._sockets) < self._clients:
                channel = channels[len(self._sockets) // CHANNEL_CLIENTS]
                connected = self._connect_one()
                if connected is not None:
                    shaking[connected] = channel
                    continue
                patience = _QUEUE_FULL
            for descriptor, _ in self._epoll.poll(patience, _EVENTS):
                data = self._read(descriptor)
                if descriptor in shaking:
                    self._subscribe(descriptor, shaking.pop(descriptor), data)
                else:
                    subscribed += b'"subscribed"' in data
        return time.monotonic() - began

    def _connect_one(self) -> int | None:
        """Begin one more connection; return its descriptor, or None if the kernel's queue is full."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        error = sock.connect_ex(self._address)
        if error:
            sock.close()
            if error == errno.EAGAIN:
                return None
            raise BenchmarkError(f"connecting: {errno.errorcode[error]}")
        sock.sendall(_REQUEST)
        self._sockets[sock.fileno()] = sock
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return sock.fileno()

    def _subscribe(self, descriptor: int, channel: str, answer: bytes) -> None:
        if not answer.startswith(b"HTTP/1.1 101 "):
            raise BenchmarkError(f"a handshake was answered: {answer[:200]!r}")
        subscription = json.dumps({"action": "subscribe", "channel": channel}).encode()
        self._sockets[descriptor].sendall(_frame(_TEXT, subscription))

    def _read(self, descriptor: int) -> bytes:
        data = self._sockets[descriptor].recv(_READ_BYTES)
        if not data:
            raise BenchmarkError("the daemon has ended a connection")
        return data

    def say(self, frame: bytes) -> None:
        """Have each client send a frame."""
        for sock in self._sockets.values():
            sock.sendall(frame)

    def receive(self, wanted: bytes, times: int = 1, among: Collection[int] | None = None) -> None:
        """Have all read until each client, or each of some, has received `wanted` so many times."""
        left = dict.fromkeys(self._sockets if among is None else among, times)
        ends: dict[int, bytes] = {}  # what may be the beginning of `wanted`
        deadline = time.monotonic() + _PATIENCE
        while left:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{len(left)} of {self._clients} clients have not received {wanted!r}")
            for descriptor, _ in self._epoll.poll(_PATIENCE, _EVENTS):
                data = ends.pop(descriptor, b"") + self._read(descriptor)
                if descriptor not in left:
                    continue
                left[descriptor] -= data.count(wanted)
                if left[descriptor] > 0:
                    ends[descriptor] = data.rpartition(wanted)[2][-len(wanted) + 1 :]
                else:
                    del left[descriptor]

    def answer_pings(self, number: int) -> None:
        """Answer pings until so many have come."""
        pong = _frame(_PONG)
        deadline = time.monotonic() + _PATIENCE
        while number > 0:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{number} pings have not come")
            for descriptor, _ in self._epoll.poll(_PATIENCE, _EVENTS):
                number -= self._read(descriptor).count(_EMPTY_PING)
                self._sockets[descriptor].sendall(pong)

    def vanish(self, clients: int) -> None:
        """Have some clients go without a word."""
        for descriptor in list(self._sockets)[:clients]:
            self._epoll.unregister(descriptor)
            self._sockets.pop(descriptor).close()


class _Cost:
    """What has been used since the crowd was not there."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._empty = anonymous_bytes(server)
        self._before = precise_processor_seconds(server)

    def processor(self) -> float:
        """Return the processor seconds since the last call."""
        before, self._before = self._before, precise_processor_seconds(self._server)
        return self._before - before

    def memory(self) -> int:
        """Return how much the daemon has grown in all, once it had time to give back what a step took."""
        time.sleep(_SETTLE)
        grown = anonymous_bytes(self._server) - self._empty
        self.processor()  # what it did meanwhile belongs to no step
        return grown


def _until(client: Client, name: str, value: int) -> None:
    """Wait until a counter of the daemon is at a value."""
    deadline = time.monotonic() + _PATIENCE
    while (now := client.stats()[name]) != value:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the daemon has {now} {name} instead of {value}")
        time.sleep(0.01)  # it answers at once, whatever it has to do


def live(client: Client, address: str, server: int, clients: int) -> dict[str, float]:
    """Lead a crowd through the life of its connections: connect, speak, be slow, receive, leave."""
    client.stats()
    with Crowd(address, clients) as crowd:
        return _life(crowd, client, _Cost(server), clients)


def _life(crowd: Crowd, client: Client, cost: _Cost, clients: int) -> dict[str, float]:
    figures: dict[str, float] = {"connected": crowd.connect(), "connect": cost.processor()}
    figures["subscribed_memory"] = cost.memory()

    crowd.say(_frame(_TEXT, b'{"action":"ping"}'))
    crowd.receive(b'"pong"')
    figures["speak"] = cost.processor()
    figures["spoke_memory"] = cost.memory()

    for channel in crowd.channels:
        members = crowd.members(channel)
        for _ in range(_LARGE_MESSAGES):
            client.broadcast(channel, _LARGE_MESSAGE)
        _until(client, "backlogged", len(members))
        crowd.receive(_END.encode(), _LARGE_MESSAGES, members)
    _until(client, "backlogged", 0)
    figures["slow_memory"] = cost.memory()

    for _ in range(_MESSAGES):
        for channel in crowd.channels:
            client.broadcast(channel, _MESSAGE)
    crowd.receive(_END.encode(), _MESSAGES)
    figures["received_memory"] = cost.memory()

    crowd.vanish(clients // 2)
    _until(client, "clients", clients - clients // 2)
    figures["vanish"] = cost.processor() * clients / (clients // 2)
    crowd.say(_frame(_CLOSE, _GOING_AWAY))
    _until(client, "clients", 0)
    figures["close"] = cost.processor() * clients / (clients - clients // 2)
    figures["empty_memory"] = cost.memory()
    return figures


def measure_heartbeat(client: Client, address: str, server: int, clients: int) -> dict[str, float]:
    """Measure what one ping of all clients and their pongs cost."""
    with Crowd(address, clients) as crowd:
        crowd.connect()
        crowd.answer_pings(clients)  # the first ones may have come while others were connecting
        _until(client, "clients", clients)
        cost = _Cost(server)
        crowd.answer_pings(_HEARTBEATS * clients)
        return {"heartbeat": cost.processor() / _HEARTBEATS}


def main() -> int:
    """Run what the command line says; return the exit status."""
    task, control, address, server, clients = sys.argv[1:]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    measure = {"life": live, "heartbeat": measure_heartbeat}[task]
    try:
        with closing(Client(control)) as client:
            print(json.dumps(measure(client, address, int(server), int(clients))))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
