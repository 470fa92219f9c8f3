"""`python -m tests.kit.stack` in a process of its own, and the processes that it has started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.kit.patience import PATIENCE
from tests.kit.stack import ROOT, free_port

__all__ = ["Launcher", "launcher", "processes_in"]


@dataclass
class Launcher:
    """A running `python -m tests.kit.stack`."""

    process: trio.Process
    port: int
    output: str
    directory: Path


@asynccontextmanager
async def launcher() -> AsyncIterator[Launcher]:
    """Run the launcher until its guide is printed; afterwards it must have ended."""
    port = free_port()
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(_run, port)
        assert process.stdout is not None
        output = ""
        with trio.fail_after(PATIENCE):
            while "Ctrl-C" not in output:
                data = await process.stdout.receive_some()
                assert data, output
                output += data.decode()
        match = re.search("REALTIME_SOCKET=(.*)/realtime.sock", output)
        assert match is not None
        yield Launcher(process, port, output, Path(match[1]))
        with trio.fail_after(PATIENCE):
            await process.wait()


async def _run(port: int, *, task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(
        [sys.executable, "-m", "tests.kit.stack"],
        cwd=ROOT,
        env={**os.environ, "SERVER_ADDRESS": f":{port}", "ALLOWED_ORIGINS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        task_status=task_status,
    )


def processes_in(directory: Path, argument: str = "") -> list[int]:
    """Return the processes whose command line or environment names `directory`; those with an `argument` if given."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            is_ours = str(directory).encode() in command + environment
            if is_ours and (not argument or argument.encode() in command.split(b"\0")):
                found.append(int(entry.name))
    return found
