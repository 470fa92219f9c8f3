"""Daemons that have been upgraded: the process that serves is not the one that was started."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import machine
from realtimed import Client, NoDaemonError
from tests.kit.daemon import Daemon
from tests.kit.patience import LONG_PATIENCE

__all__ = ["ended", "open_files", "resident_bytes", "serving", "until_ended"]


def serving(daemon: Daemon) -> int:
    """Return the process that serves now."""
    with Client(daemon.control_socket, timeout=LONG_PATIENCE) as client:
        pid: int = client.info()["pid"]
        return pid


@contextmanager
def ended(daemon: Daemon) -> Iterator[None]:
    """End the process that serves, whichever it is by then; its parent may have gone."""
    try:
        yield
    finally:
        try:
            pid = serving(daemon)
        except NoDaemonError:
            return  # it has been ended
        os.kill(pid, signal.SIGTERM)
        until_ended(pid)


def until_ended(pid: int) -> None:
    """Wait until a process has ended, which need not be a child of this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], LONG_PATIENCE)[0], f"process {pid} does not end"
    finally:
        os.close(handle)


def open_files(daemon: Daemon) -> int:
    """Return how many files the process has open that serves."""
    return len(list(Path(f"/proc/{serving(daemon)}/fd").iterdir()))


def resident_bytes(daemon: Daemon) -> int:
    """Return the memory of the process that serves."""
    return machine.resident_bytes(serving(daemon))
