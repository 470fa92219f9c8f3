"""The program realtimectl for tests: run to its end, or left to follow a channel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from realtimed import Client
from tests.kit.patience import PATIENCE, until
from tests.kit.stack import ROOT, Daemon

__all__ = [
    "INTERRUPTED",
    "NO_DAEMON",
    "OK",
    "PIPE_CLOSED",
    "REALTIMECTL",
    "REFUSED",
    "USAGE",
    "WATCHING",
    "Ended",
    "ctl",
    "environment",
    "line",
    "published",
    "run",
    "tailing",
]

REALTIMECTL = [sys.executable, "-X", "dev", "-W", "error", "-m", "realtimed.cli.realtimectl"]
"""Warnings are errors, and Python looks for mistakes."""

OK, REFUSED, USAGE, NO_DAEMON, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 130, 141


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "REALTIME_SOCKET"} | more


class Ended:
    """A command that has ended, which must not have shown a traceback."""

    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status = status
        self.out = out.decode()
        self.err = err.decode()
        assert "Traceback" not in self.err, self.err

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1
        return json.loads(self.out)


def run(*arguments: str | bytes | Path, stdin: bytes = b"", **more: str) -> Ended:
    done = subprocess.run(
        [*REALTIMECTL, *arguments], input=stdin, capture_output=True, env=environment(**more), cwd=ROOT, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def ctl(daemon: Daemon, *arguments: str | bytes, stdin: bytes = b"", **more: str) -> Ended:
    return run("--socket", daemon.control_socket, *arguments, stdin=stdin, **more)


# tail


@contextmanager
def tailing(daemon: Daemon, *arguments: str, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """Run `realtimectl tail`, and wait until it is subscribed to a channel called "tailed"."""
    process = subprocess.Popen(
        [*REALTIMECTL, "--socket", daemon.control_socket, "tail", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    with process, Client(daemon.control_socket) as client:
        try:
            until(lambda: process.poll() is not None or bool(client.channels("tailed") or client.stats()["watchers"]))
            yield process
        finally:
            process.kill()
        until(lambda: not client.channels("tailed"))


WATCHING: Final = b"realtimectl: watching tailed; Ctrl-C ends it\n"
"""What `tail` says on standard error when it has begun."""


def line(stream: IO[bytes] | None) -> str:
    assert stream is not None
    return stream.readline().decode()


def published(line: str) -> str:
    """Return a line of `tail` or `history` without its time, which has to be about now."""
    shown = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d{3} ", line)
    assert shown is not None, line
    assert abs(time.mktime(time.strptime(shown[1], "%Y-%m-%d %H:%M:%S")) - time.time()) < PATIENCE
    return line[shown.end() :]
