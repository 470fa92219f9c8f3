"""The benchmarks' crowd, and the daemon of another checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from benchmarks.crowd import live, measure_heartbeat
from benchmarks.processes import BenchmarkError
from benchmarks.servers import other_checkout, running_checkout
from benchmarks.tools import AbsentError
from realtimed import Client
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import ROOT

CLIENTS = 20


async def test_a_crowd_connects_speaks_is_slow_receives_and_leaves(tmp_path: Path) -> None:
    async with running_checkout(tmp_path, ROOT, "--max-backlog-total", "10M") as daemon:
        with trio.fail_after(LONG_PATIENCE), Client(daemon.control_socket) as client:
            address, server = str(daemon.websocket_socket), daemon.process.pid
            figures = await trio.to_thread.run_sync(live, client, address, server, CLIENTS)
            stats = client.stats()
    costs = ("connected", "connect", "speak", "vanish", "close")
    assert all(figures[name] > 0 for name in costs)
    assert stats["deliveries"] == CLIENTS * (5 + 100)
    # One half is gone without a word; the other says goodbye.
    assert (stats["ended"]["gone"], stats["ended"]["by_client"]) == (CLIENTS // 2, CLIENTS // 2)
    assert stats["ended"]["slow"] == 0


async def test_a_crowd_answers_pings(tmp_path: Path) -> None:
    async with running_checkout(tmp_path, ROOT, "--heartbeat", "0.2", "--silence-timeout", "1m") as daemon:
        with trio.fail_after(LONG_PATIENCE), Client(daemon.control_socket) as client:
            address, server = str(daemon.websocket_socket), daemon.process.pid
            figures = await trio.to_thread.run_sync(measure_heartbeat, client, address, server, CLIENTS)
    assert figures["heartbeat"] > 0


async def test_a_crowd_says_that_the_daemon_has_refused_it(tmp_path: Path) -> None:
    async with running_checkout(tmp_path, ROOT, "--max-connections", "10") as daemon:
        with trio.fail_after(LONG_PATIENCE), Client(daemon.control_socket) as client:
            address, server = str(daemon.websocket_socket), daemon.process.pid
            with pytest.raises(BenchmarkError, match=r"a handshake was answered: .* 503 "):
                await trio.to_thread.run_sync(live, client, address, server, CLIENTS)


def test_another_checkout_is_what_python_then_imports(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "realtimed", tmp_path / "realtimed", ignore=shutil.ignore_patterns("__pycache__"))
    other_checkout(tmp_path).prepare()


def test_a_directory_without_the_package_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="not a checkout"):
        other_checkout(tmp_path).prepare()
