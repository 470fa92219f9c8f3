"""Child processes that end with us, whatever happens: on the way out, at Ctrl-C, and when we are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

__all__ = ["BenchmarkError", "running", "until_connectable"]

_START_TIMEOUT: Final = 60.0
"""Seconds until a server has to accept connections."""

_STOP_TIMEOUT: Final = 3.0
"""Seconds a server has to end; what it does then is not measured."""


class BenchmarkError(Exception):
    """A measurement did not come about, and why."""


@asynccontextmanager
async def running(
    command: Sequence[str | Path], log_file: Path, environment: Mapping[str, str] | None = None, *, pipes: bool = False
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own; end it and all it has started on the way out."""
    # Started by this thread: the death signal is tied to the thread that starts a process.
    setpriv = shutil.which("setpriv")
    tied = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    with log_file.open("ab") as log:
        process = subprocess.Popen(  # noqa: ASYNC220
            [*tied, *command],
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with trio.CancelScope(shield=True), trio.move_on_after(_STOP_TIMEOUT):
            if process.poll() is None:
                await _end_of(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


async def _end_of(process: subprocess.Popen[bytes]) -> None:
    handle = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)


async def until_connectable(address: Path | int, process: subprocess.Popen[bytes], log_file: Path) -> None:
    """Wait until a server accepts connections at a Unix socket or at a port of this machine.

    Raises `BenchmarkError` if that takes too long.
    """
    with trio.move_on_after(_START_TIMEOUT):
        while process.poll() is None:
            try:
                if isinstance(address, int):
                    stream = await trio.open_tcp_stream("127.0.0.1", address)
                else:
                    stream = await trio.open_unix_socket(address)
            except OSError:
                await trio.sleep(0.01)
            else:
                await stream.aclose()
                return
    said = await trio.Path(log_file).read_text(errors="replace")
    raise BenchmarkError(f"{log_file.stem} did not start: {said.strip()[-500:]}")
