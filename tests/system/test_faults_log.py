"""A log that is full, closed, or read by nobody holds up nothing, and what is lost of it is counted."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

from realtimed.process.log_output import LogOutput
from tests.kit.clients import Publisher, publisher, subscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.stack import ROOT, until_serving

KEPT: Final = 2**18
"""Bytes of lines that are kept for a slow reader."""

REFUSED: Final = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
"""What is logged in a line of some 200 bytes."""


@contextmanager
def a_pipe(size: int) -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, size)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


@asynccontextmanager
async def daemon_logging_to(
    directory: Path, redirection: str, *options: str, stderr: int | None = None
) -> AsyncIterator[tuple[trio.Process, Publisher]]:
    """Run a daemon whose standard descriptors a shell has redirected; at the end it has to end cleanly."""
    sockets = ["--socket", f"{directory}/rt.sock", "--websocket", f"unix:{directory}/ws.sock"]
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "realtimed", *sockets, *options]
    process = await trio.lowlevel.open_process(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        with trio.fail_after(PATIENCE):
            await until_serving(directory / "rt.sock")
            async with publisher(directory / "rt.sock") as asking:
                await asking.call("ping")
                yield process, asking
                assert (await asking.call("ping")) == "pong"
            process.terminate()
            assert await process.wait() == 0
    finally:
        if process.poll() is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def make_lines(directory: Path, count: int) -> None:
    """Make the daemon log this many lines, of some 200 bytes each."""
    limit = trio.CapacityLimiter(50)

    async def be_refused() -> None:
        async with limit, await trio.open_unix_socket(directory / "ws.sock") as stream:
            await stream.send_all(REFUSED)
            async for _ in stream:
                pass

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(be_refused)


async def test_a_log_that_nobody_reads_holds_up_nobody_and_says_what_is_lost(runtime_dir: Path) -> None:
    """With a full pipe for a log the daemon serves on; read again, it has every line but those it counts."""
    count = 2500  # some 500,000 bytes
    with a_pipe(2**16) as (reading, writing):
        async with daemon_logging_to(runtime_dir, "", stderr=writing) as (_, asking):
            await make_lines(runtime_dir, count)
            async with websocket(runtime_dir / "ws.sock") as client:
                await client.send_message(subscribe("news"))
                while "news" not in await asking.call("channels"):
                    pass
                await asking.call("broadcast", "news", "hello")
                assert await client.get_message() == "hello"
            while (stats := await asking.call("stats"))["clients"]:  # the last line is that of a client
                pass
            assert stats["handshakes_refused"] == count
            read = b""
            while b"log lines lost" not in read or not read.endswith(b"\n"):
                await trio.lowlevel.wait_readable(reading)
                read += os.read(reading, 2**16)
            assert (await asking.call("stats"))["log_lines_lost"] == stats["log_lines_lost"]
    lines = read.decode().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (INFO|WARNING) \w", line) for line in lines)
    refused = [int(match[1], 16) for line in lines if (match := re.search(r"refused client=c-\w+-(\w+)", line))]
    assert len(read) > KEPT, "what a slow reader may still read is kept"
    [lost] = re.findall(r"WARNING log lines lost count=(\d+)\n", read.decode())
    assert int(lost) == stats["log_lines_lost"] > 0
    assert count - len(refused) <= int(lost) <= count - len(refused) + 1, "`client closed` may be one of them"


@pytest.mark.parametrize(
    "redirection",
    ["2>/dev/full", ">/dev/full 2>&1", "2>&-", "<&- >&- 2>&-"],
    ids=["full", "both full", "closed", "all closed"],
)
async def test_a_log_that_cannot_be_written_ends_nothing(runtime_dir: Path, redirection: str) -> None:
    """Whatever is wrong with its standard descriptors, the daemon serves, counts what is lost, and ends with 0."""
    async with daemon_logging_to(runtime_dir, redirection, "--log-level", "debug") as (process, asking):
        for fd in range(0 if redirection.startswith("<&-") else 2, 3):  # what is closed must not become a socket
            assert str(await trio.Path(f"/proc/{process.pid}/fd/{fd}").readlink()) in ("/dev/full", "/dev/null")
        async with websocket(runtime_dir / "ws.sock") as client:
            await client.send_message(subscribe("news"))
            while "news" not in await asking.call("channels"):
                pass
            await make_lines(runtime_dir, 20)
            await asking.call("broadcast", "news", "hello")
            assert await client.get_message() == "hello"
        lost = (await asking.call("stats"))["log_lines_lost"]
        assert lost >= 20 if "full" in redirection else lost == 0  # /dev/null takes everything


async def test_a_reader_of_the_log_that_has_gone_ends_nothing(runtime_dir: Path) -> None:
    """A log whose reader has gone, which raises SIGPIPE, costs its lines only."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        async with daemon_logging_to(runtime_dir, "", stderr=writing) as (_, asking):
            await make_lines(runtime_dir, 20)
            assert (await asking.call("stats"))["log_lines_lost"] >= 20
    finally:
        os.close(writing)


# The output by itself.


def test_what_a_slow_reader_takes_is_what_was_written_up_to_a_bound() -> None:
    """Lines come whole and in order; what is kept is bounded, and what is not is counted."""
    with a_pipe(4096) as (reading, writing):
        output = LogOutput(writing)
        lines = [f"{number:0>400}\n" for number in range(1000)]
        for line in lines:
            output.write(line)
        assert KEPT - 401 < output.pending <= KEPT
        taken = len(lines) - output.lost
        read = b""
        while output.pending:
            read += os.read(reading, 100)
            output.flush()
        output.write("and on it goes\n")
        while not read.endswith(b"goes\n"):
            read += os.read(reading, 2**16)
            output.flush()
    assert read.decode() == "".join([*lines[:taken], "and on it goes\n"])
    assert KEPT // 401 < taken < len(lines), "those that wait, and those in the pipe"


def test_half_a_line_is_a_line(runtime_dir: Path) -> None:
    """Where only a part of a line could be written before the disk was full, the next one begins on its own."""
    full = False

    def write(fd: int, data: bytes) -> int:
        nonlocal full
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        full = len(data) > 5
        return real(fd, data[:5])

    real = os.write
    with (runtime_dir / "log").open("wb") as file, pytest.MonkeyPatch.context() as patch:
        output = LogOutput(file.fileno())
        patch.setattr(os, "write", write)
        output.write("first line\n")
        assert (output.lost, output.pending) == (1, 0)
        output.write("lost\n")
        full = False
        output.write("2nd\n")
    assert output.lost == 2
    assert (runtime_dir / "log").read_text() == "first\n2nd\n"


def test_a_descriptor_that_does_not_wait_loses_nothing() -> None:
    """Where somebody has made the descriptor non-blocking, what it does not take is kept as well."""
    with a_pipe(4096) as (reading, writing):
        os.set_blocking(writing, False)
        output = LogOutput(writing)
        output.write("x" * 10_000 + "\n")
        assert (output.lost, output.pending) == (0, 10_001)
        read = os.read(reading, 2**16)
        while output.pending:
            output.flush()
            read += os.read(reading, 2**16)
    assert read == b"x" * 10_000 + b"\n"
