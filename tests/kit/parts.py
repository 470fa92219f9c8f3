"""The parts of the stack as child processes: how they are started, awaited, and ended.

A part's output goes to a file, not to a pipe: nothing that a test does can stall a part by not reading.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

__all__ = [
    "APP",
    "CADDYFILE",
    "ROOT",
    "STOP_TIMEOUT",
    "MissingComponentError",
    "Part",
    "PartFailedError",
    "ending",
    "environment_with",
    "free_port",
    "notifications",
    "runtime_directory",
    "standing_still",
    "start",
    "until_ready",
]


ROOT: Final = Path(__file__).resolve().parents[2]


APP: Final = ROOT / "app"


CADDYFILE: Final = ROOT / "caddy" / "Caddyfile"


_START_TIMEOUT: Final = 30.0
"""Seconds a part may take to become ready; far more than it needs, for machines that are busy."""


STOP_TIMEOUT: Final = 15.0
"""Seconds a part may take to end after SIGTERM; Caddy gives open requests 10."""


_LOG_SHOWN: Final = 50
"""Lines of a part's log that are shown when it fails."""


_OURS: Final = re.compile(
    r"REALTIME_|LISTEN_|WATCHDOG_"
    r"|(SERVER_ADDRESS|ALLOWED_ORIGINS|TRUSTED_PROXIES|METRICS_CLIENTS|PHP_FASTCGI|CERTIFICATE_PORT"
    r"|CADDY_GLOBAL_OPTIONS|CADDY_SERVER_OPTIONS|CADDY_ADMIN|NOTIFY_SOCKET|JOURNAL_STREAM)$"
)
"""Variables that steer a part. What the caller's shell holds of them reaches no part unasked."""


class MissingComponentError(Exception):
    """A program that is needed is not installed; the message says how to install it."""


class PartFailedError(Exception):
    """A part did not start, or ended by itself, or did not end; the message holds the end of its log."""


@dataclass(frozen=True)
class Part:
    """A running part of the stack."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """All that the part has written to its standard output and error."""
        return self.log_file.read_text("utf-8", "replace")

    async def until_logged(self, text: str) -> None:
        """Wait until `text` is in the log."""
        while text not in self.log:
            await trio.lowlevel.checkpoint()

    async def wait(self) -> int:
        """Wait for the process to end; return its exit status, negative for the signal that killed it."""
        if self.process.returncode is None:
            handle = os.pidfd_open(self.process.pid)
            try:
                await trio.lowlevel.wait_readable(handle)
            finally:
                os.close(handle)
        return self.process.wait()

    async def stop(self) -> int:
        """End the process with SIGTERM; return its exit status.

        Raises `PartFailedError` if that takes too long; it is killed then.
        """
        if self.process.poll() is None:
            self.process.terminate()
            try:
                with trio.CancelScope(shield=True), trio.move_on_after(STOP_TIMEOUT):
                    return await self.wait()
                raise PartFailedError(f"{self.name} did not end within {STOP_TIMEOUT:g} s.{self.log_shown()}")
            finally:
                if self.process.poll() is None:
                    self.process.kill()
                    self.process.wait()
        return self.process.wait()

    async def fail_if_it_ends(self) -> None:
        """Wait until the process ends; then raise `PartFailedError`."""
        status = await self.wait()
        raise PartFailedError(f"{self.name} ended unexpectedly, with status {status}.{self.log_shown()}")

    def log_shown(self) -> str:
        """Return the end of the log, ready to stand below an error message."""
        lines = self.log.splitlines()[-_LOG_SHOWN:]
        return "".join(f"\n  | {line}" for line in lines) if lines else " It has logged nothing."


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """Make a directory for sockets and logs that only we may enter, and remove it at the end.

    It is in /tmp whatever TMPDIR says, since the path of a Unix socket may be no longer than 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="realtime-", dir="/tmp") as name:
        yield Path(name)


def free_port() -> int:
    """Return a TCP port that was free on all addresses a moment ago."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def environment_with(variables: Mapping[str, str | None]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
    return inherited | {name: value for name, value in variables.items() if value is not None}


def start(
    name: str,
    command: Sequence[str | Path],
    directory: Path,
    environment: Mapping[str, str],
    working_directory: Path = ROOT,
    pass_fds: Sequence[int] = (),
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a process, in a session of its own: Ctrl-C is for us, and we end the parts in order."""
    # Should we be killed, the kernel ends the process: it is tied to the thread that starts it, so not to one of
    # trio's workers, which come and go.
    setpriv = shutil.which("setpriv")
    tied = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
    log_file = directory / f"{name}.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [*tied, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=working_directory,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    return process, log_file


@asynccontextmanager
async def ending(part: Part) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await part.stop()


async def until_ready(part: Part, ready: Callable[[], Awaitable[None]]) -> None:
    """Wait until `ready` returns; raise `PartFailedError` if the process ends first, or if it takes too long."""
    is_ready = False

    async def stop_waiting_if_it_ends() -> None:
        await part.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + _START_TIMEOUT
        nursery.start_soon(stop_waiting_if_it_ends)
        await ready()
        is_ready = True
        nursery.cancel_scope.cancel()
    if not is_ready:
        status = part.process.poll()
        ending = f"within {_START_TIMEOUT:g} s" if status is None else f"but ended with status {status}"
        raise PartFailedError(f"{part.name} did not become ready {ending}.{part.log_shown()}")


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Stop a process, and let it go on at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def notifications(path: Path) -> Iterator[tuple[dict[str, str], Callable[[], Awaitable[None]]]]:
    """Give the variable with which a process tells systemd that it is ready, and a function that waits for that.

    The socket is read until the end. PHP-FPM sends its status every ten seconds, Caddy two lines at each reload, and
    both stand still once the kernel's queue of ten is full.
    """
    ready, scope = trio.Event(), trio.CancelScope()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(str(path))
    bound.setblocking(False)

    async def read() -> None:
        with scope, bound:
            while True:
                await trio.lowlevel.wait_readable(bound)
                with suppress(BlockingIOError):  # it may wake up for nothing
                    if b"READY=1" in bound.recv(4096).split(b"\n"):
                        ready.set()

    # Not a task in a nursery: that would wrap the errors of the caller's block in a group.
    trio.lowlevel.spawn_system_task(read)
    try:
        yield {"NOTIFY_SOCKET": str(path)}, ready.wait
    finally:
        scope.cancel()
        path.unlink()
