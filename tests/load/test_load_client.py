"""The benchmarks' load client, against a server that decides who gets a message when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from select import select
from socket import AF_UNIX

import pytest
import trio

from benchmarks.loading import Sample, loading
from benchmarks.processes import BenchmarkError
from benchmarks.targets import CHANNEL, Target
from benchmarks.tools import compiled
from tests.kit.patience import LONG_PATIENCE

DIGITS = 8
PONG = bytes([0x8A, 0x80, 0, 0, 0, 0])


class ByHand:
    """A server whose publications are a channel's number and the message, and which delivers when it is told to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._websocket, self._control = trio.socket.socket(AF_UNIX), trio.socket.socket(AF_UNIX)
        self.channels: dict[bytes, list[trio.SocketStream]] = defaultdict(list)
        self.publisher = self._control  # until there is one

    @property
    def target(self) -> Target:
        """The server as the load client sees it."""
        return Target(
            processes={},
            address=f"unix:{self._directory}/websocket",
            publish_address=f"unix:{self._directory}/control",
            publication=lambda _: (CHANNEL, b""),
        )

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen; at the end close everything."""
        with self._websocket, self._control:
            for listener, name in ((self._websocket, "websocket"), (self._control, "control")):
                await listener.bind(str(self._directory / name))
                listener.listen()
            yield
            self.publisher.close()
            for stream in chain(*self.channels.values()):
                stream.socket.close()

    async def accept(self, clients: int) -> None:
        """Take the publisher and some clients."""
        self.publisher, _ = await self._control.accept()
        for _ in range(clients):
            stream = trio.SocketStream((await self._websocket.accept())[0])
            request = await stream.receive_some()
            self.channels[request[len("GET /") :][:DIGITS]].append(stream)
            await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")

    async def publication(self) -> tuple[bytes, bytes]:
        """Wait for a publication; return its channel and the frame for its subscribers."""
        published = await self.publisher.recv(2 * DIGITS)
        return published[:DIGITS], bytes([0x81, DIGITS]) + published[DIGITS:]

    async def deliver_all(self) -> None:
        """Deliver every publication to all subscribers at once, forever."""
        while True:
            channel, frame = await self.publication()
            for stream in self.channels[channel]:
                await stream.send_all(frame)


async def until_handled(stream: trio.SocketStream) -> None:
    """Wait until the load client has done all that follows from what was sent to one of its clients.

    It answers a ping while it reads, and publishes when it has read. So the second pong comes after that.
    """
    for _ in range(2):
        await stream.send_all(b"\x89\x00")
        answer = b""
        while len(answer) < len(PONG):
            answer += await stream.receive_some(len(PONG) - len(answer))
        assert answer == PONG


async def test_a_message_is_in_flight_until_the_last_of_its_subscribers_has_it(tmp_path: Path) -> None:
    server, ready, may_run, samples = ByHand(tmp_path), trio.Event(), trio.Event(), list[Sample]()
    program = compiled("load", tmp_path)

    async def measure() -> None:
        # Three clients on two channels: one of these has more subscribers than the other.
        async with loading(program, server.target, tmp_path, clients=3, channels=2, size=DIGITS) as load:
            ready.set()
            await may_run.wait()
            samples.append(await load.run(1, LONG_PATIENCE, 2))

    with trio.fail_after(LONG_PATIENCE):
        async with server.listening(), trio.open_nursery() as nursery:
            nursery.start_soon(measure)
            await server.accept(3)
            async with trio.open_nursery() as probing:
                probing.start_soon(server.deliver_all)
                await ready.wait()
                probing.cancel_scope.cancel()
            may_run.set()

            channel, frame = await server.publication()
            first, last = server.channels[channel]
            await first.send_all(frame)
            await until_handled(first)
            assert not select([server.publisher], [], [], 0)[0]
            await last.send_all(frame)
            channel, frame = await server.publication()
            (only,) = server.channels[channel]
            await only.send_all(frame)

    (sample,) = samples
    assert sample.whole
    assert sample.client["messages"] == 2
    assert sample.client["deliveries"] == sample.client["expected"] == 3


async def test_a_channel_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    server = ByHand(tmp_path)
    program = compiled("load", tmp_path)
    async with server.listening():
        with pytest.raises(BenchmarkError, match="nobody reads channel 1"):
            async with loading(program, server.target, tmp_path, clients=1, channels=2, size=DIGITS):
                pass
