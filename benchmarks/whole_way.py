"""The whole way of a message, Caddy included, beside two forms of a hub that is a part of Caddy.

One form makes a system call for each message and client, the other joins the messages that wait for one client. Clients
come to all through TCP on the loopback interface. The processor time and the memory of Caddy and of the daemon count
together. The servers take turns, round by round, and their order is reversed in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

import trio

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.go_servers import CADDYHUB, CADDYHUB_JOINED
from benchmarks.loading import Load, Sample, loading
from benchmarks.processes import BenchmarkError
from benchmarks.report import Table, count, span
from benchmarks.servers import realtimed_behind_caddy
from benchmarks.targets import Server, Target

__all__ = ["whole_way"]

_OURS: Final = Server("realtimed behind Caddy", lambda: None, realtimed_behind_caddy)
_SERVERS: Final = (_OURS, CADDYHUB, CADDYHUB_JOINED)
_NAMES: Final = ("realtimed behind Caddy", "hub in Caddy", "joining hub")

_CLIENTS: Final = 1000
_MANY: Final = 4000
_CHANNELS: Final = 2000

_CASES: Final[dict[str, tuple[dict[str, Any], tuple[int, ...]]]] = {
    f"{_CLIENTS} subscribers of one channel": ({"clients": _CLIENTS}, (1, 8, 64)),
    f"{_MANY} subscribers of {_CHANNELS} channels": ({"clients": _MANY, "channels": _CHANNELS}, (64, 512)),
}
"""What clients do, and how many messages are in flight."""

_SETTLE: Final = 2.0
"""Seconds in which the servers may finish what connecting clients have left them to do, before memory is read."""

_BROADCASTS: Final = 100

_Figure = Callable[[Sample], float]


def _microseconds(sample: Sample) -> float:
    """Return the processor time of the whole server for one delivery."""
    return 1e6 / sample.per_server_second if sample.per_server_second else 0.0


_FIGURES: Final[dict[str, _Figure]] = {
    "deliveries/s": lambda sample: sample.rate,
    "CPU µs a delivery": _microseconds,
    "p50 ms": lambda sample: float(sample.client["broadcast_ms"]["p50"]),
    "p99 ms": lambda sample: float(sample.client["broadcast_ms"]["p99"]),
}


async def whole_way(bench: Bench) -> None:
    """Compare the rate, the processor time, the latency and the memory of all three."""
    if not bench.chosen(CADDYHUB.name):
        return
    for case, (options, windows) in _CASES.items():
        samples = await _rounds(bench, case, options, windows)
        table = Table(
            f"The whole way: {case}, 128 B",
            ["in flight", "", *_NAMES, "realtimed ÷ hub", "realtimed ÷ joining hub"],
            data={"case": case, "windows": {}},
            notes=["Medians of the rounds, and of the rounds' own ratios; in brackets the least and the greatest."],
        )
        for window in windows:
            runs = [samples[window, server.name] for server in _SERVERS]
            for figure, value in _FIGURES.items():
                values = [[value(sample) for sample in rounds] for rounds in runs]
                cells = [count(median(each)) for each in values]
                table.rows.append([str(window), figure, *cells, *_ratios(values)])
            table.rows.append([str(window), "processor", *map(_shares, runs), "", ""])
            table.data["windows"][str(window)] = {
                name: [sample.as_json() for sample in rounds] for name, rounds in zip(_NAMES, runs, strict=True)
            }
        bench.report(table)
    await _memory(bench)


def _ratios(values: Sequence[Sequence[float]]) -> list[str]:
    """Return how many times as much the first server has as each of the others, compared within each round."""
    ours, *others = values
    return [span(a / b for a, b in zip(ours, theirs, strict=True) if b) for theirs in others]


def _shares(samples: list[Sample]) -> str:
    """Return what each process used, in cores, and whether a run lost messages."""
    parts = [part for part in samples[0].cpu if part != "client"]
    used = [median(sample.cpu[part] / sample.client["seconds"] for sample in samples) for part in parts]
    lost = "" if all(sample.whole for sample in samples) else ", messages lost"
    return " + ".join(f"{share:.0%}" for share in used) + lost


async def _rounds(
    bench: Bench, case: str, options: dict[str, Any], windows: tuple[int, ...]
) -> dict[tuple[int, str], list[Sample]]:
    """Run all with their clients connected, one working at a time."""
    samples: dict[tuple[int, str], list[Sample]] = {}
    async with bench.started(_SERVERS) as targets, AsyncExitStack() as stack:
        if len(targets) < len(_SERVERS):
            raise BenchmarkError("one of the servers has not started")
        loads: dict[str, Load] = {}
        for name, (target, place) in targets.items():
            bench.progress(f"whole way, {case}: connecting to {name}")
            loads[name] = await stack.enter_async_context(loading(bench.load, target, place, **options))
            await loads[name].run(8, 0.3)
        for number in range(bench.rounds):
            for window in windows:
                for name in list(loads)[:: 1 if number % 2 == 0 else -1]:
                    bench.progress(f"whole way, {case}: {window} in flight, round {number + 1}, {name}")
                    samples.setdefault((window, name), []).append(await loads[name].run(window, bench.seconds))
    return samples


async def _memory(bench: Bench) -> None:
    """Report the memory that a connection holds in all processes of the server, and what connecting it costs."""
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in range(bench.rounds):
        for server in _SERVERS[:: 1 if number % 2 == 0 else -1]:
            bench.progress(f"whole way, memory: round {number + 1} of {bench.rounds}, {server.name}")
            figures: dict[str, float] = {}
            # Two processes, one after the other: what earlier clients have left behind would count as well.
            for broadcasts in (0, _BROADCASTS):
                async with bench.started([server]) as targets:
                    if not targets:
                        raise BenchmarkError(f"{server.name} has not started again")
                    target, place = targets[server.name]
                    figures |= await _footprint(bench, target, place, broadcasts)
            rounds.setdefault(server.name, []).append(figures)
    table = Table(
        f"The whole way: {_MANY} connections, each subscribed to the same channel",
        ["", *_NAMES, "realtimed ÷ hub", "realtimed ÷ joining hub"],
        data={"rounds": rounds},
        notes=["Resident memory of all processes; what the kernel holds for sockets is not in it. 1 KB is 1024 bytes."],
    )
    for figure in rounds[_OURS.name][0]:
        values = [[each[figure] for each in rounds[server.name]] for server in _SERVERS]
        table.rows.append([figure, *map(span, values), *_ratios(values)])
    bench.report(table)


async def _footprint(bench: Bench, target: Target, place: Path, broadcasts: int) -> dict[str, float]:
    """Connect clients to a server that has had none, and broadcast to them; return what that takes a connection."""

    def of_all(read: Callable[[int], float]) -> float:
        return sum(read(process) for process in target.processes.values())

    empty, before = of_all(machine.resident_bytes), of_all(machine.processor_seconds)
    async with loading(bench.load, target, place, clients=_MANY, publishing=broadcasts > 0) as load:
        if broadcasts:
            await load.run(1, 60, broadcasts)
        await trio.sleep(_SETTLE)
        used = of_all(machine.processor_seconds) - before
        held = (of_all(machine.resident_bytes) - empty) / _MANY / 1024
    if broadcasts:
        return {f"KB a connection, after {broadcasts} messages": held}
    return {"KB a connection, idle": held, "CPU µs to connect and subscribe": used / _MANY * 1e6}
