"""The whole way of a message, Caddy included, beside a hub that is a part of Caddy.

Clients come to both through TCP on the loopback interface. The processor time and the memory of Caddy and of the daemon
count together. The two take turns, round by round, and change places in each: who was first is second in the next.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

import trio

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.go_servers import CADDYHUB
from benchmarks.loading import Load, Sample, loading
from benchmarks.processes import BenchmarkError
from benchmarks.report import Table, count, span
from benchmarks.servers import realtimed_behind_caddy
from benchmarks.targets import Server, Target

__all__ = ["whole_way"]

_OURS: Final = Server("realtimed behind Caddy", lambda: None, realtimed_behind_caddy)

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
    """Compare the rate, the processor time, the latency and the memory of both."""
    if not bench.chosen(CADDYHUB.name):
        return
    for case, (options, windows) in _CASES.items():
        samples = await _rounds(bench, case, options, windows)
        table = Table(
            f"The whole way: {case}, 128 B",
            ["in flight", "", "realtimed behind Caddy", "hub in Caddy", "realtimed ÷ hub"],
            data={"case": case, "windows": {}},
            notes=["Medians of the rounds, and of the rounds' own ratios; in brackets the least and the greatest."],
        )
        for window in windows:
            ours, hub = (samples[window, server.name] for server in (_OURS, CADDYHUB))
            for figure, value in _FIGURES.items():
                left, right = [value(sample) for sample in ours], [value(sample) for sample in hub]
                ratios = [a / b for a, b in zip(left, right, strict=True) if b]
                table.rows.append([str(window), figure, count(median(left)), count(median(right)), span(ratios)])
            table.rows.append([str(window), "processor", _shares(ours), _shares(hub), ""])
            table.data["windows"][str(window)] = {
                name: [sample.as_json() for sample in rounds] for name, rounds in (("ours", ours), ("hub", hub))
            }
        bench.report(table)
    await _memory(bench)


def _shares(samples: list[Sample]) -> str:
    """Return what each process used, in cores, and whether a run lost messages."""
    parts = [part for part in samples[0].cpu if part != "client"]
    used = [median(sample.cpu[part] / sample.client["seconds"] for sample in samples) for part in parts]
    lost = "" if all(sample.whole for sample in samples) else ", messages lost"
    return " + ".join(f"{share:.0%}" for share in used) + lost


async def _rounds(
    bench: Bench, case: str, options: dict[str, Any], windows: tuple[int, ...]
) -> dict[tuple[int, str], list[Sample]]:
    """Run both with their clients connected, one working at a time."""
    samples: dict[tuple[int, str], list[Sample]] = {}
    async with bench.started([_OURS, CADDYHUB]) as targets, AsyncExitStack() as stack:
        if len(targets) < 2:
            raise BenchmarkError("one of the two has not started")
        loads: dict[str, Load] = {}
        for name, (target, place) in targets.items():
            bench.progress(f"whole way, {case}: connecting to {name}")
            loads[name] = await stack.enter_async_context(loading(bench.load, target, place, **options))
            await loads[name].run(8, 0.3)
        for number in range(bench.rounds):
            for window in windows:
                for name in sorted(loads, reverse=number % 2 == 1):
                    bench.progress(f"whole way, {case}: {window} in flight, round {number + 1}, {name}")
                    samples.setdefault((window, name), []).append(await loads[name].run(window, bench.seconds))
    return samples


async def _memory(bench: Bench) -> None:
    """Report the memory that a connection holds in all processes of the server, and what connecting it costs."""
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in range(bench.rounds):
        for server in (_OURS, CADDYHUB) if number % 2 == 0 else (CADDYHUB, _OURS):
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
    ours, hub = rounds[_OURS.name], rounds[CADDYHUB.name]
    table = Table(
        f"The whole way: {_MANY} connections, each subscribed to the same channel",
        ["", "realtimed behind Caddy", "hub in Caddy", "realtimed ÷ hub"],
        data={"rounds": rounds},
        notes=["Resident memory of all processes; what the kernel holds for sockets is not in it. 1 KB is 1024 bytes."],
    )
    for figure in ours[0]:
        left, right = [each[figure] for each in ours], [each[figure] for each in hub]
        ratios = [a / b for a, b in zip(left, right, strict=True) if b]
        table.rows.append([figure, span(left), span(right), span(ratios)])
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
