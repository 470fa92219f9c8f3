"""Fixtures for tests of the clients: daemons that they share, stand-ins, and clients of each kind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtimed import Client
from tests.kit.blocking import daemon_in_thread
from tests.kit.fake_daemon import listening
from tests.kit.patience import PATIENCE
from tests.kit.php import Php, running_php
from tests.kit.stack import Daemon, runtime_directory


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    """Give a path for the socket of a stand-in."""
    return runtime_dir / "control.sock"


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    """Listen at `path`: the test plays the daemon, step by step."""
    with listening(path, backlog=8) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """Run a daemon without history that the tests of a module share."""
    with runtime_directory() as directory, daemon_in_thread(directory, "--history-size", "0") as running:
        yield running


@pytest.fixture
def observer(shared_daemon: Daemon) -> Iterator[Client]:
    """Give a Python client of the shared daemon, to see what PHP has done."""
    with Client(shared_daemon.control_socket) as client:
        yield client


@pytest.fixture(scope="module")
def php(shared_daemon: Daemon) -> Iterator[Php]:
    """Run PHP with a client of the shared daemon."""
    with running_php(shared_daemon.control_socket) as running:
        yield running


@pytest.fixture
def client(path: Path) -> Iterator[Php]:
    """Run PHP with a client of a stand-in at `path`."""
    with running_php(path) as running:
        yield running
