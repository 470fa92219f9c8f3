"""Connections of the control socket that make a daemon hold much: its resident memory is bounded, no peer notices."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from realtimed import Client, RefusedError
from realtimed.rpc.wire import encode_request
from tests.kit.blocking import daemon_in_thread
from tests.kit.clients import subscribe
from tests.kit.stack import Daemon
from tests.load.attackers import MIB, Bystander, Growth, connect, text_frame

PATIENCE = 60
"""Seconds until a socket gives up: then the test has failed."""

SLACK = 64 * MIB
"""Bytes that a daemon may take beyond its limits."""

NOTICED = 0.05
"""Seconds that a bystander's pings may take."""

TEXT = "x" * 65_000


@contextmanager
def attacked(directory: Path, bound: int, *options: str) -> Iterator[Daemon]:
    """Run a daemon, and fail if it takes more memory than the bound and some slack, or if a bystander waits."""
    with (
        daemon_in_thread(directory, *options, module="tests.kit.timed_daemon") as daemon,
        Client(daemon.control_socket, timeout=PATIENCE) as asking,
    ):
        asking.stats()
        with Growth(daemon) as growth, Bystander(daemon) as bystander:
            yield daemon
        assert growth.most < bound + SLACK
        # Where the machine is busy otherwise, two turns of the event loop say what the daemon adds to it.
        assert min(bystander.ping_p99, 2 * asking.stats()["turn_p99"]) < NOTICED
        assert "Traceback" not in daemon.log


@contextmanager
def connected(daemon: Daemon) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(daemon.control_socket))
        yield sock


def test_many_long_answers_that_nobody_reads(runtime_dir: Path) -> None:
    """4,200 bytes of commands, whose answers would take 1.9 GB, from each of ten connections."""
    commands = b"".join(encode_request(id, "history", ["news"]) for id in range(300))
    with attacked(runtime_dir, 128 * MIB) as daemon, Client(daemon.control_socket) as client, ExitStack() as stack:
        for _ in range(100):
            client.broadcast("news", TEXT)
        for _ in range(10):
            stack.enter_context(connected(daemon)).sendall(commands)
        while client.stats()["answers_bytes"] < 60 * MIB:  # an answer a connection
            pass
        for _ in range(100):
            client.ping()
        assert client.stats()["answers_bytes"] < 80 * MIB


def test_watchers_that_do_not_read(runtime_dir: Path) -> None:
    with (
        attacked(runtime_dir, 128 * MIB, "--history-size", "0") as daemon,
        Client(daemon.control_socket, timeout=PATIENCE) as client,
        ExitStack() as stack,
    ):
        for number in range(16):
            watcher = stack.enter_context(connected(daemon))
            watcher.sendall(encode_request(1, "watch", [f"{number}-*"]))  # or they would share what waits for them
            watcher.recv(100)
        for number in range(4000):
            client.broadcast(f"{number % 16}-news", TEXT)
        while (stats := client.stats())["watchers"] > 12:
            pass
        assert stats["answers_bytes"] <= 128 * MIB
    assert "publisher disconnected code=too_much" in daemon.log


def test_commands_that_begin_and_do_not_end(runtime_dir: Path) -> None:
    begun = encode_request(1, "broadcast", ["news", "x" * 1_000_000])[:-1]
    with (
        attacked(runtime_dir, 128 * MIB) as daemon,
        Client(daemon.control_socket, timeout=PATIENCE) as client,
        ExitStack() as stack,
    ):
        sockets = [stack.enter_context(connected(daemon)) for _ in range(300)]

        def begin(some: list[socket.socket]) -> None:
            for sock in some:
                with suppress(OSError):  # it has been ended
                    sock.sendall(begun)

        threads = [threading.Thread(target=begin, args=[sockets[at::10]]) for at in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = client.stats()
        assert stats["answers_bytes"] <= 128 * MIB
        assert stats["publishers"] < 140
    assert "the limit, max-answers-total, is 134217728" in daemon.log


def test_one_text_for_many_channels(runtime_dir: Path) -> None:
    with (
        attacked(runtime_dir, 64 * MIB) as daemon,
        Client(daemon.control_socket, timeout=PATIENCE) as client,
        connect(daemon.websocket_socket) as slow,
    ):
        slow.sendall(text_frame(subscribe("one")))
        with pytest.raises(RefusedError, match="names 8000 channels; the limit is 5000 a command"):
            client.broadcast_many(["one"] * 8000, TEXT)
        with pytest.raises(RefusedError, match="more than 8192 MessagePack values"):
            client.broadcast_many(["one"] * 40_000, TEXT)
        for _ in range(5):
            assert len(client.broadcast_many(["one"] * 5000, TEXT)) == 5000
        assert len(client.broadcast_many([f"other-{number}" for number in range(5000)], TEXT)) == 5000


def test_keys_for_many_channels(runtime_dir: Path) -> None:
    with (
        attacked(runtime_dir, 32 * MIB, "--history-size", "0") as daemon,
        Client(daemon.control_socket, timeout=PATIENCE) as client,
    ):
        for number in range(60):
            client.broadcast_many([f"{number}-{place}".ljust(200, "x") for place in range(5000)], "x", key=str(number))
        assert 28 * MIB < client.stats()["keys_bytes"] <= 32 * MIB


def test_keys_of_many_broadcasts(runtime_dir: Path) -> None:
    with attacked(runtime_dir, 32 * MIB, "--history-size", "0") as daemon, connected(daemon) as sock:
        stop = threading.Thread(target=lambda: [None for _ in iter(lambda: sock.recv(2**20), b"")])
        stop.start()
        for number in range(120):
            sock.sendall(b"".join(encode_request(1, "broadcast", ["a", "x", f"{number}-{at}"]) for at in range(1000)))
        sock.shutdown(socket.SHUT_WR)
        stop.join()
        with Client(daemon.control_socket) as client:
            stats = client.stats()
        assert 28 * MIB < stats["keys_bytes"] <= 32 * MIB
        assert stats["keys"] > 30_000


def test_lists_of_more_than_an_answer_may_have(runtime_dir: Path) -> None:
    """400 WebSockets with 100 channels of 200 characters each: the lists take 8 MiB, and one answer may have 2."""
    with (
        attacked(runtime_dir, 128 * MIB, "--max-answers-total", "8M") as daemon,
        Client(daemon.control_socket, timeout=PATIENCE) as client,
        ExitStack() as stack,
    ):
        for number in range(400):
            names = [f"{number}-{place}-".ljust(200, "x") for place in range(100)]
            stack.enter_context(connect(daemon.websocket_socket)).sendall(
                b"".join(text_frame(subscribe(name)) for name in names)
            )
            while client.stats()["subscriptions"] < 100 * (number + 1) + 1:  # one by one: this is no attack yet
                pass
        with connected(daemon) as sock:
            for method in (b"clients", b"channels"):
                sock.sendall(encode_request(1, method.decode(), []))
                assert b"answer_too_large" in sock.recv(2**16)
        found = client.clients()
        assert len({each.id for each in found}) == 401
        assert sorted({len(each.channels) for each in found}) == [1, 100]
        assert len(client.channels()) == 40_001
        assert (client.count_clients(), client.count_channels("7-")) == (401, 100)  # the bystander among them
        assert [each.id for each in client.clients(channel=found[7].channels[0])] == [found[7].id]
        assert len(client.clients(limit=250)) == 250
