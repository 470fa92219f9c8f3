"""Measures realtimed and other servers with one load client, in one run: ``python -m benchmarks --help``.

Progress goes to standard error, tables to standard output, everything to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from benchmarks import machine, tools
from benchmarks.bench import Bench
from benchmarks.processes import BenchmarkError
from benchmarks.report import Table
from benchmarks.scenarios import SCENARIOS
from benchmarks.servers import OTHER_CHECKOUT, REALTIMED, SERVERS, other_checkout
from benchmarks.targets import Server
from tests.kit.stack import MissingComponentError, PartFailedError, runtime_directory


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench ARGS='…'", description="Measure realtimed and other servers in one run."
    )
    names = ", ".join(server.name for server in SERVERS)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--servers", nargs="+", metavar="SERVER", help=f"of {names}; default: all")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="BYTES", help="of messages")
    parser.add_argument("--clients", nargs="+", type=int, metavar="N", help="subscribers, or connections")
    parser.add_argument("--in-flight", nargs="+", type=int, metavar="N", help="messages in flight")
    parser.add_argument(
        "--against", type=Path, metavar="PATH",
        help="another checkout of the project: compare its daemon with ours, and with no other server unless named",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run; default: %(default)s")
    parser.add_argument("--full", action="store_true", help="all sizes and numbers; takes about an hour")
    results = tools.CACHE / "results.json"
    parser.add_argument("--json", type=Path, default=results, help="where results go; default: %(default)s")
    arguments = parser.parse_args()
    for name in arguments.scenarios:
        if name not in SCENARIOS:
            parser.error(f"there is no scenario {name}")
    for name in arguments.servers or ():
        if name not in {server.name for server in SERVERS}:
            parser.error(f"there is no server {name}")
    return arguments


def _wanted(names: list[str] | None, against: Path | None) -> list[Server]:
    """Return the servers that the command line asks for."""
    if against is None:
        return [server for server in SERVERS if names is None or server.name in names]
    named = [server for server in SERVERS if server.name in (names or [REALTIMED.name])]
    return [*named, other_checkout(against.resolve())]


def _prepared(servers: Sequence[Server]) -> tuple[list[Server], dict[str, str]]:
    """Return the servers that can be measured, and why the others cannot."""
    present, absent = [], {}
    for server in servers:
        _progress(f"preparing {server.name}")
        try:
            server.prepare()
        except tools.AbsentError as error:
            absent[server.name] = str(error)
        else:
            present.append(server)
    return present, absent


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run the scenarios that the command line names; return the exit status."""
    arguments = _arguments()
    sizes = arguments.sizes or ([64, 128, 1024, 16384] if arguments.full else [128])
    servers, absent = _prepared(_wanted(arguments.servers, arguments.against))
    if OTHER_CHECKOUT in absent:
        print(absent[OTHER_CHECKOUT], file=sys.stderr)
        return 1
    results: list[dict[str, object]] = []
    about = {**machine.describe(), "rounds": arguments.rounds, "seconds": arguments.seconds, "absent": absent}

    def report(table: Table) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(table, flush=True)
        results.append({"title": table.title, "columns": table.columns, "rows": table.rows, **table.data})

    began = time.monotonic()
    status = 0
    try:
        with runtime_directory() as directory:
            load = tools.compiled("load", directory)
            bench = Bench(
                load=load,
                directory=directory,
                servers=servers,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                sizes=sizes,
                clients=arguments.clients or [1000, 10_000],
                crowds=arguments.clients or [5000, 10_000],
                windows=arguments.in_flight or [1, 8, 64],
                full=arguments.full,
                against=arguments.against and arguments.against.resolve(),
                progress=_progress,
                report=report,
            )
            for name in arguments.scenarios or SCENARIOS:
                try:
                    trio.run(SCENARIOS[name], bench)
                except (BenchmarkError, MissingComponentError, PartFailedError) as error:
                    print(f"\n{name}: {error}", file=sys.stderr)
                    status = 1
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    for name, reason in absent.items():
        print(f"{name}: absent ({reason})")
    print(f"\n{about['processor']}, {about['cores']} cores; {time.monotonic() - began:.0f} s")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + os.linesep)
    print(f"Everything is in {arguments.json}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
