"""Peers that break off, vanish or stand still, against the real daemon: it goes on, and keeps nothing of them."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from realtimed.config.loading import load
from realtimed.control.server import Connection
from realtimed.daemon import Daemon as Inside
from realtimed.net.stream import QueuedStream
from realtimed.rpc.wire import encode_request
from tests.kit.clients import REQUEST, publisher
from tests.kit.patience import PATIENCE
from tests.kit.sockets import RESET_AT_CLOSE
from tests.kit.stack import Daemon, running_daemon, standing_still


def ports_of(daemon: Daemon) -> list[int]:
    """Return the port for WebSockets and that of the metrics."""
    return [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", daemon.log)]


@pytest.mark.parametrize("sent", [b"", REQUEST[:40], REQUEST, REQUEST + b"\x81\xfe\x01\x00mask"])
async def test_who_was_reset_before_the_daemon_looked_leaves_nothing(runtime_dir: Path, sent: bytes) -> None:
    """A peer that has sent so much and reset before its connection is accepted costs neither a traceback nor a task."""
    options = ["--websocket", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, *options, module="tests.kit.observed_daemon") as daemon,
            publisher(daemon.control_socket) as asking,
        ):
            while (before := await asking.call("stats"))["publishers"] > 1:
                pass
            with standing_still(daemon.process.pid):
                for port in ports_of(daemon) * 10:
                    with socket.create_connection(("127.0.0.1", port)) as peer:
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                        peer.sendall(sent)
            # Those that have not been accepted yet have no task, and some have a descriptor and no task.
            costs, now = ("tasks", "descriptors"), await asking.call("stats")
            while now["clients"] or any(now[each] > before[each] for each in costs):
                now = await asking.call("stats")
            assert [now[each] for each in costs] == [before[each] for each in costs]
    assert "Traceback" not in daemon.log


async def test_a_stop_may_meet_a_connection_at_any_moment_of_its_end(nursery: trio.Nursery) -> None:
    """Whichever step of its end a publisher's connection has reached, a stop of the service raises nothing."""
    for steps in range(12):
        inside = Inside(load({"io_uring": "off"}))
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        nursery.start_soon(Connection(QueuedStream(ours, inside.answers), inside.service).run)
        await wait_all_tasks_blocked()
        theirs.close()
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        inside.service.stop()
        with trio.fail_after(PATIENCE):
            while inside.service.connections:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("io_uring", ["auto", "off"])
async def test_subscribers_that_hang_up_with_full_sockets_end_nothing_but_themselves(
    runtime_dir: Path, io_uring: str
) -> None:
    """A publication that meets a connection just as it ends, and does not fit into its socket, ends nothing else.

    Whoever half-closes the control socket and reads nothing is such a connection; one in a few dozen meets a round.
    """
    message = "x" * 60_000  # four of them fill a socket's buffer
    leaving = 100
    async with running_daemon(runtime_dir, "--io-uring", io_uring) as daemon, trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + PATIENCE
        published = 0

        async def publish() -> None:
            nonlocal published
            async with publisher(daemon.control_socket) as sender:
                while True:
                    await sender.stream.send_all(encode_request(1, "broadcast", ("news", message)) * 8)
                    for _ in range(8):
                        answer = await sender.answer()
                        assert answer.error is None
                        published += 1

        nursery.start_soon(publish)
        streams = []
        for _ in range(leaving):
            stream = await trio.open_unix_socket(daemon.control_socket)
            streams.append(stream)
            await stream.send_all(encode_request(1, "subscribe", ("news",)))
            await stream.receive_some(1)
            await stream.send_eof()
            at_least = published + 8
            while published < at_least:
                await trio.lowlevel.checkpoint()
        for stream in streams:
            await stream.aclose()
        async with publisher(daemon.control_socket) as asking:
            while (await asking.call("stats"))["publishers"] > 2:
                pass
        nursery.cancel_scope.cancel()
    assert published >= 8 * leaving
    assert "Traceback" not in daemon.log


async def test_every_connection_has_an_end_that_is_counted(runtime_dir: Path) -> None:
    """Clients that hang up before they have the answer to their handshake, too."""
    async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as asking:
        for _ in range(100):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.websocket_socket))
                sock.sendall(REQUEST)
        with trio.fail_after(20):
            while (stats := await asking.call("stats"))["connections"] + stats["handshakes_refused"] < 100:
                pass
            while (stats := await asking.call("stats"))["clients"]:
                pass
        assert sum(stats["closed"].values()) == stats["connections"]
        assert daemon.log.count("client closed") == stats["connections"]
