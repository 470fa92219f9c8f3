"""What real networks, disks and administrators do to a daemon, and that it goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import socket
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio_websocket import ConnectionClosed
from wsproto.events import TextMessage

from realtimed.config.loading import load
from realtimed.daemon import Daemon as DaemonInside
from realtimed.rpc.wire import encode_request
from realtimed.websocket.frames import CloseCode
from tests.kit.clients import (
    REQUEST,
    Publisher,
    RawClient,
    publisher,
    raw_client,
    subscribe,
    undisturbed,
    until_subscribed,
    websocket,
)
from tests.kit.sockets import RESET_AT_CLOSE
from tests.kit.stack import ROOT, Daemon, running_caddy, running_daemon


async def until_left(asking: Publisher, clients: int) -> None:
    """Wait until no more than this many clients are connected."""
    while (await asking.call("stats"))["clients"] > clients:
        pass


def open_files(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def limit(daemon: Daemon, kind: int, value: int) -> None:
    resource.prlimit(daemon.process.pid, kind, (value, resource.prlimit(daemon.process.pid, kind)[1]))


# Peers.


@pytest.mark.parametrize("batch", [1, 3])
async def test_peers_that_send_byte_by_byte_are_served_as_any(daemon: Daemon, batch: int) -> None:
    async def send_slowly(stream: trio.SocketStream, data: bytes) -> None:
        for at in range(0, len(data), batch):
            await stream.send_all(data[at : at + batch])
            await trio.lowlevel.checkpoint()

    async with undisturbed(daemon), await trio.open_unix_socket(daemon.websocket_socket) as stream:
        client = RawClient(stream)
        await send_slowly(stream, REQUEST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive_some(1)
        assert head.startswith(b"HTTP/1.1 101 ")
        await send_slowly(stream, client.frames.send(TextMessage(data=subscribe("slow"))))
        async with publisher(daemon.control_socket) as sender:
            await until_subscribed(sender, "slow", 1)
            await send_slowly(sender.stream, encode_request(7, "broadcast", ["slow", "hello"]))
            answer = await sender.answer()
            assert isinstance(answer.result, dict)
            assert (answer.id, answer.result["recipients"]) == (7, 1)
        client.frames.receive_data(await stream.receive_some())
        assert list(client.frames.events()) == [TextMessage(data="hello")]


FRAME = b"\x81\xa6mask" + bytes(0x26)


@pytest.mark.parametrize(
    "sent",
    [b"", REQUEST[:50], REQUEST, REQUEST + FRAME[:1], REQUEST + FRAME[:20], REQUEST + FRAME, REQUEST + b"\x88\x82m"],
    ids=["nothing", "half a head", "a head", "half a header", "half a frame", "a bad message", "half a Close"],
)
async def test_a_reset_at_any_stage_leaves_nothing(runtime_dir: Path, sent: bytes) -> None:
    async with running_daemon(runtime_dir, "--websocket", "127.0.0.1:0") as daemon, undisturbed(daemon):
        match = re.search(r"127\.0\.0\.1:(\d+)", daemon.log)
        assert match is not None
        async with publisher(daemon.control_socket) as asking:
            await asking.call("ping")  # it has been accepted
            before = open_files(daemon)
            for _ in range(20):
                sock = socket.create_connection(("127.0.0.1", int(match[1])))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                sock.sendall(sent)
                sock.close()
            while open_files(daemon) > before:
                await asking.call("ping")
            await until_left(asking, 1)


async def test_a_reset_in_the_middle_of_a_replay_leaves_nothing(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--websocket", "127.0.0.1:0") as daemon,
        undisturbed(daemon),
        publisher(daemon.control_socket) as sender,
    ):
        match = re.search(r"127\.0\.0\.1:(\d+)", daemon.log)
        assert match is not None
        for _ in range(100):
            receipt = await sender.call("broadcast", "long", "x" * 60_000)
        since = {"epoch": receipt["epoch"], "offset": 0}
        for _ in range(10):
            stream = await trio.open_tcp_stream("127.0.0.1", int(match[1]))
            await stream.send_all(REQUEST.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Protocol: realtime.v1\r\n\r\n"))
            await RawClient(stream).send(TextMessage(data=subscribe("long", since=since)))
            received = b""
            while b"replay" not in received and len(received) < 100_000:
                received += await stream.receive_some(10_000)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            await stream.aclose()
        await until_left(sender, 1)
        assert (await sender.call("stats"))["backlog_bytes"] == 0


async def test_a_publisher_that_vanishes_in_a_command_and_one_that_stands_still_hold_nobody_up(
    runtime_dir: Path,
) -> None:
    half = encode_request(1, "broadcast", ["news", "x" * 1000])[:-100]
    async with (
        running_daemon(runtime_dir, "--command-timeout", "1") as daemon,
        undisturbed(daemon),
        publisher(daemon.control_socket) as still,
    ):
        async with publisher(daemon.control_socket) as vanishing:
            await vanishing.stream.send_all(half)
        await still.stream.send_all(half)
        answer = await still.answer()
        assert isinstance(answer.error, dict)
        assert (answer.id, answer.error["code"]) == (None, "timeout")
        async with publisher(daemon.control_socket) as asking:
            assert (await asking.call("stats"))["publications"] == 0


# The system.


async def test_a_disk_that_is_full_costs_the_history_and_nothing_else(runtime_dir: Path) -> None:
    state = runtime_dir / "state"
    async with running_daemon(runtime_dir, "--state-file", str(state)) as daemon:
        async with publisher(daemon.control_socket) as sender:
            for _ in range(100):
                await sender.call("broadcast", "news", "x" * 10_000)
        limit(daemon, resource.RLIMIT_FSIZE, 500_000)
        daemon.process.terminate()
        await trio.to_thread.run_sync(daemon.process.wait)
    assert daemon.process.returncode == 0
    assert f"history is lost state_file={state}.new reason='{os.strerror(errno.EFBIG)}'" in daemon.log
    assert not state.with_name("state.new").exists(), "what has been written of it is gone"
    async with running_daemon(runtime_dir, "--state-file", str(state)) as daemon:
        assert "history begins anew" in daemon.log


async def test_a_daemon_that_stood_still_cuts_nobody_off_for_its_own_silence(runtime_dir: Path) -> None:
    async with (
        running_daemon(
            runtime_dir, "--heartbeat", "0.3", "--silence-timeout", "1.2", "--close-timeout", "0.5"
        ) as daemon,
        undisturbed(daemon),
        raw_client(daemon.websocket_socket) as silent,
    ):
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            await trio.sleep(2.5)
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
        began = trio.current_time()
        assert await silent.close_code() == CloseCode.SILENT, "who says nothing afterwards is closed in the end"
        assert trio.current_time() - began > 0.9, "after a chance to be heard"
        assert daemon.log.count("code=4408") == 1


def test_the_time_of_day_is_for_showing_only() -> None:
    """Deadlines, ages and durations go by clocks that nobody sets; only these places ask for the time of day."""
    asked = [
        f"{file.name}: {line.strip()}"
        for file in sorted((ROOT / "realtimed").rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"\btime\.time\b(?!_)", line)
    ]
    assert asked == [
        # How long nobody ran: no other clock knows.
        "state.py: saved = snapshot.read(_read(self._path), time.time())",
        "state.py: for part in snapshot.dump(hub, time.time()):",
        "stats.py: started: float = field(default_factory=time.time)",
        "session.py: self.connected_since = time.time()",
    ]


class PoorSocket(socket.socket):
    """A socket for which the kernel has no memory once `poor` is set."""

    poor = False

    def send(self, *arguments: Any) -> int:
        if self.poor:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return super().send(*arguments)


async def test_a_kernel_without_memory_ends_the_connection_it_had_none_for(nursery: trio.Nursery) -> None:
    inside = DaemonInside(load({"io_uring": "off"}))
    nursery.start_soon(inside.fan_out.run)
    await nursery.start(inside.sessions.run)
    clients = []
    peers = AsyncExitStack()
    for _ in range(2):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        sock = PoorSocket(fileno=ours.detach())
        inside.sessions.welcome(inside.sessions.client_stream(sock))
        peer = RawClient(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        peers.push_async_exit(peer.stream)
        await peer.stream.send_all(REQUEST)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += await peer.stream.receive_some(1)
        await peer.send(TextMessage(data=subscribe("news")))
        clients.append((sock, peer))
    while "news" not in inside.hub.channels or inside.hub.channels["news"].count < 2:
        await trio.lowlevel.checkpoint()
    (poor, gone), (_, other) = clients
    poor.poor = True
    assert inside.hub.publish("news", "hello").recipients == 2
    assert await gone.events_until_eof() == []
    other.frames.receive_data(await other.stream.receive_some())
    assert list(other.frames.events()) == [TextMessage(data="hello")]
    while len(inside.sessions.members) > 1:
        await trio.lowlevel.checkpoint()
    assert inside.sessions.closed == {1006: 1}
    await peers.aclose()
    while inside.sessions.members:
        await trio.lowlevel.checkpoint()
    nursery.cancel_scope.cancel()


# Caddy.


async def test_a_caddy_that_stands_still_holds_up_nobody_else(runtime_dir: Path) -> None:
    message = "x" * 2000
    count = 1500  # 3 MB for each client: more than the kernel, Caddy and a backlog hold
    async with (
        running_daemon(runtime_dir, "--max-backlog", "256K") as daemon,
        undisturbed(daemon),
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket) as caddy,
        publisher(daemon.control_socket) as sender,
        AsyncExitStack() as stack,
    ):
        port = caddy.port
        clients = []
        for _ in range(20):
            client = await stack.enter_async_context(websocket(port, headers=[("Origin", f"http://localhost:{port}")]))
            await client.send_message(subscribe("news"))
            clients.append(client)
        await until_subscribed(sender, "news", 20)
        os.kill(caddy.process.pid, signal.SIGSTOP)
        try:
            longest = 0.0
            for number in range(count):
                began = trio.current_time()
                await sender.call("broadcast", "news", f"{number} {message}")
                longest = max(longest, trio.current_time() - began)
            assert longest < 2, "publishers are held up for a moment at most"
            assert (await sender.call("stats"))["backlog_bytes"] <= 20 * 2**18
        finally:
            os.kill(caddy.process.pid, signal.SIGCONT)
        for client in clients:
            numbers = list[int]()
            ending = None
            try:
                while not numbers or numbers[-1] < count - 1:
                    numbers.append(int((await client.get_message()).split()[0]))
            except ConnectionClosed as error:
                ending = error.reason
            assert ending is None or ending.code == CloseCode.SLOW_CONSUMER
            assert all(later == sooner + 1 for sooner, later in pairwise([-1, *numbers])), "there is no gap"
        while (await sender.call("stats"))["backlog_bytes"]:
            pass


async def test_the_clients_of_a_killed_caddy_are_gone_at_once(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir) as daemon, undisturbed(daemon), publisher(daemon.control_socket) as asking:
        async with AsyncExitStack() as stack:
            caddy = await stack.enter_async_context(
                running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket)
            )
            headers = [("Origin", f"http://localhost:{caddy.port}")]
            for _ in range(200):
                await stack.enter_async_context(websocket(caddy.port, headers=headers))
            caddy.process.kill()
            await until_left(asking, 1)
        assert (await asking.call("stats"))["closed"] == {"1006": 200}
