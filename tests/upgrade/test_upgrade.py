"""An upgrade as administrators see it: the command, the log, systemd, and what it says when it fails."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtimed import Client, RefusedError
from tests.kit.blocking import daemon_in_thread
from tests.kit.failing_successor import CRASH, FEW, HANG, WRONG, fail_at
from tests.kit.patience import LONG_PATIENCE, until
from tests.kit.realtimectl import ctl
from tests.kit.service_manager import service_manager
from tests.kit.stack import Daemon, running_daemon
from tests.kit.successors import ended, open_files, resident_bytes, serving, until_ended
from tests.load.attackers import connect


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    configuration = runtime_dir / "realtimed.toml"
    configuration.write_text("")
    options = ("--config", str(configuration), "--http", f"unix:{runtime_dir / 'http.sock'}")
    with daemon_in_thread(runtime_dir, *options, module="tests.kit.failing_successor") as daemon, ended(daemon):
        yield daemon


def call(daemon: Daemon) -> Client:
    return Client(daemon.control_socket, timeout=LONG_PATIENCE)


def until_subscribed(client: Client) -> None:
    while not client.stats()["subscriptions"]:
        pass


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (CRASH, "the new process has ended; its exit status is 3"),
        (HANG, "the new process has said nothing for 1 s"),
        (WRONG, "expected a number of seconds above 0"),
    ],
)
def test_whatever_fails_leaves_the_daemon_serving(daemon: Daemon, failing: str, said: str) -> None:
    with call(daemon) as client, connect(daemon.websocket_socket, "news") as listener:
        until_subscribed(client)
        before = client.broadcast("news", "before")
        with fail_at(daemon, failing), pytest.raises(RefusedError, match=said) as refusal:
            client.upgrade()
        assert refusal.value.code == "upgrade_failed"
        assert client.broadcast("news", "after") == before._replace(offset=before.offset + 1)
        received = b""
        while b"after" not in received:
            received += listener.recv(4096)
        assert received == b"\x81\x06before\x81\x05after"
    assert "WARNING not upgraded reason=" in daemon.log
    assert serving(daemon) == daemon.process.pid


def test_a_successor_that_may_open_fewer_files_leaves_the_daemon_serving(daemon: Daemon) -> None:
    sockets = [connect(daemon.websocket_socket) for _ in range(100)]
    try:
        with call(daemon) as client:
            with (
                fail_at(daemon, FEW),
                pytest.raises(RefusedError, match=r"of 100 open files only .* arrived: its limit of open files is too"),
            ):
                client.upgrade()
            assert client.stats()["clients"] == len(sockets)
            assert client.upgrade()["clients"] == len(sockets)
    finally:
        for sock in sockets:
            sock.close()


def test_a_daemon_without_open_files_to_spare_says_so_and_serves_on(daemon: Daemon) -> None:
    pid = daemon.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with call(daemon) as client:
        client.ping()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(daemon) - 1, before[1]))
        with pytest.raises(RefusedError, match="the new process cannot be started: Too many open files"):
            client.upgrade()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        client.upgrade()


def test_other_addresses_need_a_restart(daemon: Daemon, runtime_dir: Path) -> None:
    other = runtime_dir / "other.sock"
    (runtime_dir / "realtimed.toml").write_text(f"http = 'unix:{other}'\n")
    with call(daemon) as client:  # the option wins: nothing has changed
        assert client.upgrade()["former_pid"] == daemon.process.pid
    assert not other.exists()


def test_the_command_says_what_has_happened_in_numbers(daemon: Daemon) -> None:
    with connect(daemon.websocket_socket, "news"):
        done = ctl(daemon, "upgrade")
        now = serving(daemon)
        assert done.status == 0
        assert f"process {now} (0.1.0) has taken over 1 clients and 1 publishers" in done.out
        assert f"from process {daemon.process.pid} (0.1.0): nobody was served for " in done.out
        done = ctl(daemon, "--json", "upgrade")
        told = done.json
        assert (told["former_pid"], told["pid"], told["clients"]) == (now, serving(daemon), 1)
        assert 0 < told["pause"] < told["seconds"]
        with fail_at(daemon, CRASH):
            done = ctl(daemon, "upgrade")
        assert (done.status, done.out) == (1, "")
        assert "its exit status is 3 (upgrade_failed)" in done.err


def test_figures_and_keys_go_on(daemon: Daemon) -> None:
    with call(daemon) as client, connect(daemon.websocket_socket, "news"):
        until_subscribed(client)
        receipt = client.broadcast("news", "x", key="K")
        before, info = client.stats(), client.info()
        client.upgrade()
        after = client.stats()
        assert client.broadcast("news", "x", key="K") == receipt._replace(repeated=True)
        assert client.info()["started"] == info["started"]
    counters = ("publications", "deliveries", "sends", "sent_bytes", "rounds", "connections", "commands", "uptime")
    assert all(after[name] >= before[name] for name in counters)
    assert (after["upgrades"], after["keys"], after["clients"]) == (1, 1, 1)


def test_an_http_request_under_way_is_answered_by_the_old_process(daemon: Daemon, runtime_dir: Path) -> None:
    with call(daemon) as client, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LONG_PATIENCE)
        sock.connect(str(runtime_dir / "http.sock"))
        sock.sendall(b"GET /healthz HTTP/1.1\r\n")
        until(lambda: connections_of(daemon.process.pid, runtime_dir / "http.sock") == 1)
        client.upgrade()
        sock.sendall(b"Host: localhost\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert daemon.process.wait(LONG_PATIENCE) == 0


def connections_of(pid: int, path: Path) -> int:
    """Return how many connections at a Unix socket a process has accepted."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    inodes = {each.split()[6] for each in lines if each.endswith(f" {path}") and each.split()[5] == "03"}
    links = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    return sum(link == f"socket:[{inode}]" for link in links for inode in inodes)


def test_after_twenty_upgrades_the_process_is_as_after_one(daemon: Daemon) -> None:
    sockets = [connect(daemon.websocket_socket, "news") for _ in range(50)]
    try:
        with call(daemon) as client:
            client.upgrade()
            files, memory = open_files(daemon), resident_bytes(daemon)
            for _ in range(19):
                client.upgrade()
            assert client.broadcast("news", "x").recipients == len(sockets)
            until(lambda: open_files(daemon) == files)  # this one's own connection may be counted twice for a moment
            assert resident_bytes(daemon) < 1.05 * memory
    finally:
        for sock in sockets:
            sock.close()


def test_a_signal_stops_the_process_that_serves(daemon: Daemon, runtime_dir: Path) -> None:
    with call(daemon) as client:
        pid = client.upgrade()["pid"]
    assert pid != daemon.process.pid
    assert daemon.process.wait(LONG_PATIENCE) == 0
    os.kill(pid, signal.SIGTERM)
    until_ended(pid)
    assert not daemon.control_socket.exists()
    assert not (runtime_dir / "http.sock").exists()


async def test_the_service_manager_follows_the_main_process(runtime_dir: Path) -> None:
    with service_manager(runtime_dir / "notify") as manager:
        async with running_daemon(runtime_dir, environment=manager.environment) as daemon:
            await manager.until("READY")
            with ended(daemon):
                with call(daemon) as client:
                    pid = client.upgrade()["pid"]
                told = await manager.until("MAINPID")
                assert told == {"MAINPID": str(pid)}
                await manager.until("READY")
                assert await daemon.wait() == 0
            await manager.until("STOPPING")
