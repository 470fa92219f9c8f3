"""Scenarios about connections: what they hold, and what it costs to make, keep and end them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import trio

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.loading import loading
from benchmarks.processes import BenchmarkError
from benchmarks.report import Table, span
from benchmarks.servers import OTHER_CHECKOUT, REALTIMED, running_checkout
from tests.kit.stack import ROOT

__all__ = ["connect_storm", "idle_memory", "many_connections"]

_SETTLE: Final = 1.0
"""Seconds in which a server that has nothing left to do uses less than `_QUIET` of a core."""

_QUIET: Final = 0.1
_PATIENCE: Final = 60.0
"""Seconds in which a server has to become quiet."""

_PER_CONNECTION: Final = {
    "memory, bytes": {
        "subscribed_memory": "idle and subscribed",
        "spoke_memory": "after it has spoken once",
        "slow_memory": "and has been slow once",
        "received_memory": "and has received 100 messages",
    },
    "processor time, µs": {
        "connect": "to connect and subscribe",
        "speak": "to be asked and to answer",
        "heartbeat": "a heartbeat: ping and pong",
        "vanish": "to leave without a word",
        "close": "to leave with a Close",
    },
    "seconds": {"connected": "until all are connected and subscribed"},
}
"""The figures of a crowd that are shown, each divided by the number of clients except the seconds."""

_LIFE: Final = ("--heartbeat", "1h", "--silence-timeout", "2h", "--history-size", "0")
"""Pings that come during a step would be measured with it, and history is not memory of connections."""

_HEARTBEAT: Final = ("--heartbeat", "4s", "--history-size", "0")


async def connect_storm(bench: Bench) -> None:
    """Measure what it takes when everyone comes back at once, and when all leave."""
    for clients in bench.crowds:
        await _connect_storm(bench, clients)


async def _connect_storm(bench: Bench, clients: int) -> None:
    names = ("realtimed", "trio-websocket", "websockets", "ws", "uWebSockets", "nchan")
    table = Table(
        f"Connect storm: {clients} clients at once",
        [
            "server",
            "all connected after s",
            "handshake p99 ms",
            "server CPU a connection µs",
            "realtimed ÷ it",
            "to leave µs",
            "realtimed ÷ it",
        ],
        data={"servers": {}},
        notes=["For realtimed each connection also sends a subscription; the others subscribe by the request's path."],
    )
    results: dict[str, list[dict[str, Any]]] = {}
    async with bench.started(bench.chosen(*names)) as targets:
        for number in range(bench.rounds):
            for name, (target, place) in targets.items():
                bench.progress(f"connect storm: round {number + 1} of {bench.rounds}, {name}")
                process = next(iter(target.processes.values()))
                before = machine.processor_seconds(process)
                async with loading(
                    bench.load, target, place, clients=clients, concurrent=clients, publishing=False
                ) as load:
                    await _until_quiet(process)
                    used = machine.processor_seconds(process) - before
                await _until_quiet(process)  # it has seen them all go
                left = machine.processor_seconds(process) - before - used
                results.setdefault(name, []).append({**load.ready, "server_cpu": used, "leaving_cpu": left})
    ours = results.get(REALTIMED.name, [])
    for name, rounds in results.items():
        row = [name, span(each["seconds"] for each in rounds), span(each["handshake_ms"]["p99"] for each in rounds)]
        for figure in ("server_cpu", "leaving_cpu"):
            ratios = [our[figure] / each[figure] for our, each in zip(ours, rounds, strict=False) if each[figure]]
            row.append(span(each[figure] / clients * 1e6 for each in rounds))
            row.append(span(ratios) if name != REALTIMED.name else "1")
        table.rows.append(row)
        table.data["servers"][name] = {"rounds": rounds}
    bench.report(table)


async def _until_quiet(process: int) -> None:
    """Wait until a server has finished what its clients have left it to do, however busy the machine is.

    Raises `BenchmarkError` if that takes too long.
    """
    with trio.move_on_after(_PATIENCE):
        used = math.inf
        while used > _QUIET * _SETTLE:
            before = machine.processor_seconds(process)
            await trio.sleep(_SETTLE)
            used = machine.processor_seconds(process) - before
        return
    raise BenchmarkError(f"the server is still busy {_PATIENCE:g} s after its clients")


async def idle_memory(bench: Bench) -> None:
    """Measure what a connection holds that says nothing. One round: memory is not noisy."""
    for clients in bench.crowds:
        await _idle_memory(bench, clients)


async def _idle_memory(bench: Bench, clients: int) -> None:
    servers = [server for server in bench.servers if server.is_websocket]
    table = Table(
        f"Idle memory: {clients} connections, each subscribed to the same channel",
        ["server", "empty MiB", "with connections MiB", "KB a connection", "after one broadcast KB"],
        data={"servers": {}},
        notes=["Resident memory of the process; what the kernel holds for sockets is not in it. 1 KB is 1024 bytes."],
    )
    for server in servers:
        bench.progress(f"idle memory: {server.name}")
        async with bench.started([server]) as targets:
            for name, (target, place) in targets.items():
                process = next(iter(target.processes.values()))
                empty = machine.resident_bytes(process)
                async with loading(bench.load, target, place, clients=clients, publishing=False):
                    await _until_quiet(process)
                    full = machine.resident_bytes(process)
                async with loading(bench.load, target, place, clients=clients) as load:
                    await load.run(1, 0, 1)
                    await _until_quiet(process)
                    used = machine.resident_bytes(process)
                each = [(bytes_ - empty) / clients / 1024 for bytes_ in (full, used)]
                table.rows.append([
                    name, f"{empty / 2**20:.1f}", f"{full / 2**20:.1f}", f"{each[0]:.1f}", f"{each[1]:.1f}",
                ])  # fmt: skip
                table.data["servers"][name] = {"empty": empty, "idle": full, "used": used, "clients": clients}
    bench.report(table)


async def many_connections(bench: Bench) -> None:
    """Measure thousands of connections of realtimed through their life: a fresh daemon for each round. See crowd.py."""
    checkouts = {REALTIMED.name: ROOT} | ({OTHER_CHECKOUT: bench.against} if bench.against else {})
    for clients in bench.crowds:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for number in range(bench.rounds):
            for name, checkout in checkouts.items():
                bench.progress(f"many connections: {clients}, round {number + 1} of {bench.rounds}, {name}")
                life = await _crowd(bench, "life", clients, checkout, _LIFE)
                heartbeat = await _crowd(bench, "heartbeat", clients, checkout, _HEARTBEAT)
                rounds[name].append(life | heartbeat)
        bench.report(_life_table(clients, rounds))


async def _crowd(bench: Bench, task: str, clients: int, checkout: Path, options: Sequence[str]) -> dict[str, float]:
    """Run a crowd against a fresh daemon of a checkout; return what it has measured."""
    options = (*options, "--max-connections-per-address", "0")
    async with running_checkout(bench.place(task), checkout, *options) as daemon:
        done = await trio.run_process(
            [sys.executable, "-m", "benchmarks.crowd", task, daemon.control_socket, daemon.websocket_socket,
             str(daemon.process.pid), str(clients)],
            capture_stdout=True, capture_stderr=True, check=False, cwd=ROOT,
        )  # fmt: skip
    if done.returncode:
        raise BenchmarkError(f"a crowd of {clients} clients: {done.stderr.decode().strip()[-500:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _life_table(clients: int, rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    ours, *others = rounds
    table = Table(
        f"Many connections: {clients} at once, each subscribed to a channel of 1000",
        ["a connection", *rounds, *(f"{ours} ÷ {other}" for other in others)],
        data={"clients": clients, "rounds": rounds},
        notes=["Each figure is the median of the rounds, with the least and the greatest in brackets.",
               "Memory is what the process holds beyond what it held before anyone came."],
    )  # fmt: skip
    units = {"memory, bytes": 1 / clients, "processor time, µs": 1e6 / clients, "seconds": 1.0}
    for unit, names in _PER_CONNECTION.items():
        for name, what in names.items():
            values = {each: [figures[name] * units[unit] for figures in rounds[each]] for each in rounds}
            ratios = [[a / b for a, b in zip(values[ours], values[other], strict=True)] for other in others]
            table.rows.append([f"{unit}: {what}", *map(span, values.values()), *map(span, ratios)])
            table.data.setdefault("ratios", {})[name] = [median(each) for each in ratios]
    return table
