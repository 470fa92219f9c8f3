"""The scenarios. Each alternates between the servers, round by round, and compares within each round.

A slow moment of the machine then hits all of them about equally. The servers of a case run all the time, with their
clients connected, but only one of them has anything to do.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from statistics import median
from typing import Any, Final

import trio

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.connections import connect_storm, idle_memory, many_connections
from benchmarks.loading import Load, Sample, loading
from benchmarks.processes import BenchmarkError
from benchmarks.report import Table, count, span
from benchmarks.servers import REALTIMED, realtimed_behind_caddy, realtimed_v1
from benchmarks.targets import Server
from benchmarks.whole_way import whole_way
from tests.kit.stack import ROOT, running_daemon

__all__ = ["SCENARIOS"]

_SLOW_LIMIT: Final = 64_000
"""Deliveries in flight that a slow server gets; with more, one run would take a minute."""


async def _compare(bench: Bench, title: str, servers: Sequence[Server], windows: Sequence[int], **options: Any) -> None:
    """Measure deliveries of all servers, and report a table for each number of messages in flight."""
    samples: dict[tuple[int, str], list[Sample]] = {}
    async with bench.started(servers) as targets, AsyncExitStack() as stack:
        loads: dict[str, Load] = {}
        for name, (target, place) in targets.items():
            bench.progress(f"{title}: connecting to {name}")
            try:
                loads[name] = await stack.enter_async_context(loading(bench.load, target, place, **options))
                await loads[name].run(1, 0.1)
            except BenchmarkError as error:
                print(f"{name}: {error}", file=sys.stderr)
                loads.pop(name, None)
        slow = {server.name for server in servers if server.slow}
        audience = options["clients"] // options.get("channels", 1)
        for number in range(bench.rounds):
            for window in windows:
                for name in list(loads):
                    if name in slow and audience * window > _SLOW_LIMIT:
                        continue
                    bench.progress(f"{title}: {window} in flight, round {number + 1} of {bench.rounds}, {name}")
                    try:
                        sample = await loads[name].run(window, bench.seconds)
                    except BenchmarkError as error:
                        print(f"{name}: {error}", file=sys.stderr)
                        del loads[name]
                    else:
                        samples.setdefault((window, name), []).append(sample)
    for window in windows:
        these = {server.name: samples[window, server.name] for server in servers if (window, server.name) in samples}
        if these:
            bench.report(_comparison(f"{title}, {window} in flight", these, options | {"window": window}))


def _comparison(title: str, samples: dict[str, list[Sample]], case: dict[str, Any]) -> Table:
    columns = [
        "server", "deliveries/s", "realtimed ÷ it", "broadcast p50 ms", "p99 ms", "ping p99 ms", "server CPU",
        "client CPU", "others", "deliveries per server CPU s", "realtimed ÷ it", "stopped by",
    ]  # fmt: skip
    table = Table(title, columns, data={"case": case, "servers": {}})
    ours = samples.get(REALTIMED.name, [])
    for name, runs in samples.items():
        ratios = [our.rate / run.rate for our, run in zip(ours, runs, strict=False) if run.rate]
        work_ratios = [
            our.per_server_second / run.per_server_second
            for our, run in zip(ours, runs, strict=False)
            if run.per_server_second
        ]
        whole = [run for run in runs if run.whole]
        shares = {
            part: median(run.cpu[part] / run.client["seconds"] for run in runs if run.client["seconds"])
            for part in runs[0].cpu
        }
        parts = [f"{share:.0%}" for part, share in shares.items() if part != "client"]
        ping = [run.client["ping_ms"]["p99"] for run in runs if run.client.get("ping_ms", {}).get("max")]
        table.rows.append([
            name,
            span(run.rate for run in runs),
            span(ratios) if name != REALTIMED.name else "1",
            count(median(run.client["broadcast_ms"]["p50"] for run in runs)),
            count(median(run.client["broadcast_ms"]["p99"] for run in runs)),
            count(median(ping)) if ping else "–",
            " + ".join(parts),
            f"{shares['client']:.0%}",
            f"{median(run.others / run.client['seconds'] for run in runs if run.client['seconds']):.0%}",
            count(median(run.per_server_second for run in runs)),
            count(median(work_ratios)) if work_ratios else "–",
            ", ".join(f"{what} ({times})" for what, times in Counter(run.stopped_by for run in runs).most_common()),
        ])  # fmt: skip
        table.data["servers"][name] = {
            "whole": len(whole) == len(runs),
            "rate": median(run.rate for run in runs),
            "realtimed_ratio": median(ratios) if ratios else None,
            "realtimed_ratio_per_cpu_second": median(work_ratios) if work_ratios else None,
            "rounds": [run.as_json() for run in runs],
        }
    if "floor" in samples and ours:
        shares_of_floor = [our.rate / run.rate for our, run in zip(ours, samples["floor"], strict=False) if run.rate]
        table.notes.append(f"realtimed reaches {median(shares_of_floor):.0%} of the floor.")
        table.data["share_of_floor"] = median(shares_of_floor)
    return table


async def one_channel(bench: Bench) -> None:
    """Measure everyone on one channel."""
    for clients in bench.clients:
        for size in bench.sizes:
            windows = list(bench.windows)
            if not bench.full and (clients > 1000 or size != 128):
                windows = [window for window in windows if window == 8] or windows[:1]
            # 64 messages of 16 KiB exceed a slow consumer's limit at once; that is another scenario.
            windows = [window for window in windows if window * size <= 512 * 1024]
            title = f"One channel: {clients} subscribers, {size} B"
            await _compare(bench, title, bench.servers, windows, clients=clients, size=size, pinging=True)


async def many_channels(bench: Bench) -> None:
    """Measure messages that are each for two clients of ten thousand."""
    servers = [server for server in bench.servers if server.many_channels]
    clients = max(bench.clients)
    channels = clients // 2
    title = f"Many channels: {clients} subscribers, {channels} channels, 128 B"
    await _compare(bench, title, servers, [64, 512], clients=clients, channels=channels)
    if bench.full and bench.chosen(REALTIMED.name):
        title = "Many channels a client: 1000 subscribers of 128 channels each, 1280 channels, 128 B"
        ours = bench.chosen(REALTIMED.name)
        await _compare(bench, title, ours, [64, 512], clients=1000, channels=1280, channels_each=128)


async def through_caddy(bench: Bench) -> None:
    """Measure the way of a real deployment: TCP to Caddy, and a Unix socket from there."""
    behind = Server("behind Caddy", lambda: None, realtimed_behind_caddy)
    servers = [*bench.chosen(REALTIMED.name), behind]
    clients = min(4000, max(bench.clients))
    title = f"Through Caddy: {clients} subscribers, 128 B (server CPU: realtimed + Caddy)"
    await _compare(bench, title, servers, bench.windows, clients=clients, pinging=True)


async def protocols(bench: Bench) -> None:
    """Measure what the envelopes of realtime.v1 cost: 1,000 subscribers that speak it, and 1,000 that speak plain."""
    servers = [*bench.chosen(REALTIMED.name), Server("realtime.v1", lambda: None, realtimed_v1)]
    windows = [window for window in bench.windows if window <= 8] or bench.windows
    await _compare(bench, "Protocols: 1000 subscribers, 128 B", servers, windows, clients=1000)


async def history(bench: Bench) -> None:
    """Measure what it costs to keep a publication: pipelined broadcasts with history and without."""
    table = Table(
        "History: pipelined broadcasts of 128 B, server CPU each µs",
        ["subscribers", "history-size 100", "history-size 0", "difference"],
        data={"rounds": {}},
        notes=["Each figure is the median of the rounds, with the least and the greatest in brackets."],
    )
    async with AsyncExitStack() as stack:
        daemons = [
            await stack.enter_async_context(running_daemon(bench.place(f"history {size}"), "--history-size", size))
            for size in ("100", "0")
        ]
        for subscribers in (0, 1):
            pairs: list[list[float]] = []
            for number in range(bench.rounds):
                bench.progress(f"history: {subscribers} subscribers, round {number + 1} of {bench.rounds}")
                pairs.append([
                    json.loads((await trio.run_process(
                        [sys.executable, "-m", "benchmarks.publishing", "keeping", str(daemon.control_socket),
                         str(daemon.process.pid), str(subscribers)], capture_stdout=True, cwd=ROOT,
                    )).stdout)["cpu"]
                    for daemon in daemons
                ])  # fmt: skip
            kept, none = zip(*pairs, strict=True)
            table.rows.append([str(subscribers), span(kept), span(none), span(a - b for a, b in pairs)])
            table.data["rounds"][str(subscribers)] = pairs
    bench.report(table)


async def slow_consumers(bench: Bench) -> None:
    """Measure the rate of clients that read: alone, with others that read as well, and with others that never do."""
    reading, others = 900, 100
    names = ("realtimed", "websockets", "ws", "uWebSockets", "nchan") if bench.full else ("realtimed", "uWebSockets")
    table = Table(
        f"Slow consumers: {reading} reading subscribers, 1 KB, 8 in flight; messages/s",
        ["server", "alone", f"and {others} more", f"and {others} stalled", "stalled ÷ alone", "stalled ÷ more",
         "memory grown by"],
        data={"servers": {}},
    )  # fmt: skip
    cases = ((reading, 0), (reading + others, 0), (reading + others, others))
    async with bench.started(bench.chosen(*names)) as targets:
        rounds: dict[str, list[list[Sample]]] = {name: [] for name in targets}
        grown: dict[str, int] = dict.fromkeys(targets, 0)
        for number in range(bench.rounds):
            for name, (target, place) in targets.items():
                bench.progress(f"slow consumers: round {number + 1} of {bench.rounds}, {name}")
                samples: list[Sample] = []
                process = next(iter(target.processes.values()))
                for clients, stalled in cases:
                    before = machine.resident_bytes(process)
                    async with loading(bench.load, target, place, clients=clients, size=1024, stalled=stalled) as load:
                        await load.run(1, 0.1)
                        samples.append(await load.run(8, bench.seconds))
                        grown[name] = max(grown[name], machine.resident_bytes(process) - before)
                rounds[name].append(samples)
    for name, samples_of_rounds in rounds.items():
        # Deliveries to stalled clients are not counted: a rate is that of one client that reads.
        rates = [
            tuple(sample.rate / (clients - stalled) for sample, (clients, stalled) in zip(samples, cases, strict=True))
            for samples in samples_of_rounds
        ]
        alone, more, stalled_too = zip(*rates, strict=True)
        to_alone = [rate / before for rate, before in zip(stalled_too, alone, strict=True)]
        to_more = [rate / before for rate, before in zip(stalled_too, more, strict=True)]
        memory = f"{grown[name] / 2**20:.0f} MiB"
        table.rows.append([name, span(alone), span(more), span(stalled_too), span(to_alone), span(to_more), memory])
        table.data["servers"][name] = {
            "ratio_to_alone": median(to_alone),
            "ratio_to_more": median(to_more),
            "memory_grown": grown[name],
            "rounds": [[sample.as_json() for sample in samples] for samples in samples_of_rounds],
        }
    bench.report(table)


async def publishers(bench: Bench) -> None:
    """Measure what a publisher waits for, and what a broadcast costs when nobody listens; see publishing.py."""
    table = Table(
        "Publishers: a channel without subscribers",
        ["way", "each takes µs (median)", "p99 µs", "a second", "server CPU each µs"],
        data={"ways": {}},
        notes=["Each figure is the median of the rounds, with the least and the greatest in brackets."],
    )
    rounds: dict[str, list[dict[str, float]]] = {}
    async with bench.started(bench.chosen("realtimed", "Redis")) as targets:
        for number in range(bench.rounds):
            for name, (target, _) in targets.items():
                bench.progress(f"publishers: round {number + 1} of {bench.rounds}, {name}")
                done = await trio.run_process(
                    [sys.executable, "-m", "benchmarks.publishing", name,
                     target.publish_address.removeprefix("unix:"), str(next(iter(target.processes.values())))],
                    capture_stdout=True, cwd=ROOT,
                )  # fmt: skip
                for way, figures in json.loads(done.stdout).items():
                    rounds.setdefault(way, []).append(figures)
    for way, figures in rounds.items():
        known = {name: [each[name] for each in figures if name in each] for name in ("p50", "p99", "rate", "cpu")}
        table.rows.append([way, *(span(values) for values in known.values())])
        table.data["ways"][way] = figures
    bench.report(table)


SCENARIOS: Final[dict[str, Callable[[Bench], Awaitable[None]]]] = {
    "one-channel": one_channel,
    "many-channels": many_channels,
    "connect-storm": connect_storm,
    "idle-memory": idle_memory,
    "many-connections": many_connections,
    "publishers": publishers,
    "protocols": protocols,
    "history": history,
    "slow-consumers": slow_consumers,
    "through-caddy": through_caddy,
    "whole-way": whole_way,
}
