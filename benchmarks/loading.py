"""The load client (load.c) as the driver sees it, and one measured run with what everyone used meanwhile."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from benchmarks import machine
from benchmarks.processes import BenchmarkError, running
from benchmarks.targets import Target

__all__ = ["Load", "Sample", "loading"]

_PATIENCE: Final = 180.0
"""Seconds to wait for the load client's word; it gives up by itself before."""

_SATURATED: Final = 0.88
"""A thread that runs for this share of the time is what stops the run; the rest is start and end."""

_DISTURBED: Final = 0.25
"""Cores that other programs may take before they are named as what stopped a run."""

_THREADS: Final = max(1, min(4, machine.CORES // 2))
"""Threads of the load client: one server of one thread has a core of its own, and the client the other half."""


@dataclass(frozen=True)
class Sample:
    """One run: what the load client says, and processor time. Seconds, deliveries a second, milliseconds."""

    rate: float
    whole: bool
    client: dict[str, Any]
    cpu: dict[str, float]
    """Processor seconds of the parts of the server and of the load client."""
    others: float
    """Processor seconds of all other programs on the machine."""
    stopped_by: str

    @property
    def per_server_second(self) -> float:
        """Deliveries for each second of processor time of the whole server: noise from other programs matters less."""
        used = sum(seconds for part, seconds in self.cpu.items() if part != "client")
        return float(self.client["deliveries"]) / used if used else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return everything, for programs."""
        return {"cpu": self.cpu, "others_cpu": self.others, "stopped_by": self.stopped_by, **self.client}


class Load:
    """A load client whose subscribers are connected."""

    def __init__(
        self, target: Target, lines: AsyncIterator[dict[str, Any]], stdin: trio.lowlevel.FdStream, ready: dict[str, Any]
    ) -> None:
        self._target = target
        self._lines = lines
        self._stdin = stdin
        self.ready = ready
        """What the load client has said of connecting."""

    async def run(self, window: int, seconds: float, messages: int = 2**31) -> Sample:
        """Publish with `window` messages in flight; stop after so many seconds or messages."""
        began, busy, before = time.monotonic(), machine.busy_seconds(), self._server_seconds()
        await self._stdin.send_all(b"run %d %f %d\n" % (window, seconds, messages))
        client = await anext(self._lines)
        elapsed = time.monotonic() - began
        cpu = {part: used - before[part] for part, used in self._server_seconds().items()}
        cpu["client"] = float(client["client_cpu"])
        others = max(0.0, machine.busy_seconds() - busy - sum(cpu.values()))
        stopped_by = _what_stopped(client, cpu, others, elapsed)
        return Sample(float(client["rate"]), bool(client["whole"]), client, cpu, others, stopped_by)

    def _server_seconds(self) -> dict[str, float]:
        return {part: machine.processor_seconds(process) for part, process in self._target.processes.items()}


def _what_stopped(client: dict[str, Any], cpu: dict[str, float], others: float, elapsed: float) -> str:
    if not client["whole"]:
        return "messages lost" if client["deliveries"] < client["expected"] else "messages out of order"
    saturated = [part for part, used in cpu.items() if part != "client" and used >= _SATURATED * elapsed]
    if client["busiest_thread"] >= _SATURATED * elapsed:
        saturated.append("client")
    if saturated:
        return " and ".join(saturated)
    if others >= _DISTURBED * elapsed:
        return "other programs"
    if sum(cpu.values()) + others >= _SATURATED * elapsed * machine.CORES:
        return "all cores"
    return "turns"


@asynccontextmanager
async def loading(
    program: Path,
    target: Target,
    directory: Path,
    *,
    clients: int,
    size: int = 128,
    channels: int = 1,
    channels_each: int = 1,
    stalled: int = 0,
    concurrent: int = 256,
    publishing: bool = True,
    pinging: bool = False,
) -> AsyncIterator[Load]:
    """Run a load client; it is handed over when all are connected and, if it publishes, subscribed."""
    prefix, suffix = target.publication(size)
    command: list[str | Path] = [
        program, "--server", target.address, "--clients", str(clients), "--stalled", str(stalled),
        "--channels", str(channels), "--channels-each", str(channels_each), "--size", str(size),
        "--threads", str(_THREADS), "--concurrent", str(concurrent), "--payload-at", str(target.payload_at),
        "--status", str(target.status or ""), "--greeting-bytes", str(target.greeting_bytes),
        "--request", target.request.hex(), "--subscription", target.subscription.hex(),
        "--prefix", prefix.hex(), "--suffix", suffix.hex(),
    ]  # fmt: skip
    if target.payload_tail is not None:
        command += ["--payload-tail", str(target.payload_tail)]
    if target.joined_tail is not None:
        command += ["--joined-tail", str(target.joined_tail)]
    if target.fixed_header is not None:
        command += ["--fixed-header", str(target.fixed_header(size))]
    if publishing:
        command += ["--publish", target.publish_address]
    if pinging and target.answers_pings:
        command += ["--ping"]
    async with running(command, directory / "load.log", pipes=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # The pipes' own objects close their descriptors; trio closes these.
        async with (
            trio.lowlevel.FdStream(os.dup(process.stdin.fileno())) as stdin,
            trio.lowlevel.FdStream(os.dup(process.stdout.fileno())) as stdout,
            aclosing(_read_lines(stdout)) as lines,
        ):
            yield Load(target, lines, stdin, ready=await anext(lines))


async def _read_lines(stream: trio.lowlevel.FdStream) -> AsyncGenerator[dict[str, Any], None]:
    held = b""
    while True:
        while b"\n" not in held:
            with trio.move_on_after(_PATIENCE) as patience:
                data = await stream.receive_some(65536)
            if patience.cancelled_caught:
                raise BenchmarkError(f"the load client has said nothing for {_PATIENCE:g} s")
            if not data:
                raise BenchmarkError("the load client has ended")
            held += data
        line, _, held = held.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if answer["event"] == "failed":
            raise BenchmarkError(f"the load client has failed: {answer['reason']}")
        yield answer
