"""realtimed as a child process."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tests.kit.parts import STOP_TIMEOUT, Part, PartFailedError, ending, environment_with, start, until_ready

__all__ = ["Daemon", "running_daemon", "until_serving"]


_PROBE_INTERVAL: Final = 0.01
"""Seconds between two looks whether a socket accepts connections."""


_HAND_OVER: Final = """
import fcntl, os, sys
names, fds, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in fds.split()]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ.update(LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=names, LISTEN_PID=str(os.getpid()))
os.execv(command[0], command)
"""
"""A program that becomes another, to which it hands sockets in the way of sd_listen_fds(3)."""


_TAKEN_OVER: Final = re.compile(r"INFO (?:handed|taken) over pid=(\d+)")


async def until_ended(pid: int) -> None:
    """Wait until a process has ended, which need not be a child of this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Daemon(Part):
    """A running realtimed."""

    control_socket: Path
    websocket_socket: Path

    @property
    def successor(self) -> int | None:
        """The process that serves after upgrades, as the log says; None if there was no upgrade."""
        if not self.log_file.exists():  # a test has removed its directory
            return None
        taken = _TAKEN_OVER.findall(self.log)
        return int(taken[-1]) if taken else None

    async def fail_if_it_ends(self) -> None:
        """See `Part`. An upgrade is no end: then it is about the process that serves now."""
        status, former = await self.wait(), None
        while status == 0 and (pid := self.successor) not in (None, former):
            former = pid
            assert former is not None
            await until_ended(former)
        raise PartFailedError(f"{self.name} ended unexpectedly, with status {status}.{self.log_shown()}")

    async def stop(self) -> int:
        """See `Part`. After upgrades, end the process that serves now as well."""
        pid = self.successor
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            with trio.CancelScope(shield=True), trio.move_on_after(STOP_TIMEOUT):
                await until_ended(pid)
        return await super().stop()


@asynccontextmanager
async def running_daemon(
    directory: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    sockets: Mapping[str, socket.socket] | None = None,
    module: str = "realtimed",
    ready_at: Path | None = None,
) -> AsyncIterator[Daemon]:
    """Run realtimed with its sockets in `directory`; `options` are added to its command line.

    Another `module` is run in its place that takes the same command line. `ready_at` is its control socket if `options`
    say another one.

    With `sockets` it is handed these, under their names, as systemd does. Whoever connects to them then has to wait
    until it is ready, and so it is handed over at once.
    """
    control, websocket = ready_at or directory / "realtime.sock", directory / "realtime-ws.sock"
    command: list[str | Path] = [sys.executable, "-m", module]
    if sockets is None:
        command += ["--socket", control, "--websocket", f"unix:{websocket}"]
    else:
        fds = " ".join(str(sock.fileno()) for sock in sockets.values())
        command[:0] = [sys.executable, "-c", _HAND_OVER, ":".join(sockets), fds]
    process, log_file = start(
        "realtimed",
        [*command, *options],
        directory,
        environment_with(environment or {}),
        pass_fds=[sock.fileno() for sock in (sockets or {}).values()],
    )
    daemon = Daemon("realtimed", process, log_file, control, websocket)
    async with ending(daemon):
        if sockets is None:
            await until_ready(daemon, partial(until_serving, control))
        yield daemon


async def until_serving(path: Path) -> None:
    """Wait until a daemon serves connections to a Unix socket: by then it has also logged that it is ready."""
    while True:
        try:
            stream = await trio.open_unix_socket(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            await trio.sleep(_PROBE_INTERVAL)  # the kernel tells nobody when a socket begins to listen
        else:
            async with stream:
                await stream.send_eof()
                with suppress(trio.BrokenResourceError):  # it has ended
                    await stream.receive_some()
            return
