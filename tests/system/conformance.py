"""The Autobahn test suite against the daemon, directly and through Caddy with the project's Caddyfile.

`python -m tests.system.conformance` runs all its cases and prints what did not pass. It exits with 1 unless
`VERDICTS` expects that. The cases are those of autobahntestsuite, as the package `kosoku` carries and runs them. They
expect an echo server: see `tests.system.echo_daemon`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio
from kosoku.cases import CASES

from tests.kit.stack import Daemon, free_port, running_caddy, running_daemon, runtime_directory

__all__ = ["COMPRESSION", "LIMITS", "PROTOCOL", "Verdict", "case_numbers", "echo_behind_caddy", "echo_daemon", "run"]

PROTOCOL: Final = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*")
"""Framing, pings, reserved bits, opcodes, fragments, UTF-8, closing, fragments made on the way."""

LIMITS: Final = ("9.*",)
"""Messages of up to 16 MiB, in frames and pieces of all sizes."""

COMPRESSION: Final = ("12.*", "13.*")

OPTIONS: Final = (
    "--max-inbound=17M",  # cases 9.1.6 and 9.2.6 are 16 MiB
    "--max-backlog=64M",
    "--inbound-rate=1000000",  # cases 9.3 and 9.4 have 256,000 frames
    "--inbound-burst=1000000",
    "--heartbeat=3600",  # a ping in the middle is nothing that a case expects
    "--silence-timeout=7200",
)
"""How the daemon has to be set up for a suite that asks for more than a client may."""

AT_ONCE: Final = 6
"""Cases run at a time: some wait for a second or two."""

_HEAD_LIMIT: Final = 16 * 1024


@dataclass(frozen=True)
class Verdict:
    """What has become of a case: the suite's words for what was said, and for how the connection ended."""

    case: str
    behavior: str
    close: str
    what: str

    @property
    def as_expected(self) -> bool:
        """Whether it passed, or did what `docs/protocol.md` says of it."""
        expected = EXPLAINED.get(self.case) or ("UNIMPLEMENTED" if self.case[:3] in ("12.", "13.") else "OK")
        return self.behavior == expected and self.close == ("INFORMATIONAL" if expected == "INFORMATIONAL" else "OK")


EXPLAINED: Final[Mapping[str, str]] = {
    "7.1.6": "INFORMATIONAL",  # a Close behind two messages: whether they come back first is left open
    "7.13.1": "INFORMATIONAL",  # the close codes 5000 and 65535: RFC 6455 says nothing of them
    "7.13.2": "INFORMATIONAL",
}
"""The cases for which the suite knows no right and wrong."""


def case_numbers(patterns: Sequence[str]) -> set[str]:
    """Return the numbers of all cases that fit."""
    chapters = tuple(pattern.removesuffix("*") for pattern in patterns)
    return {number for number in CASES if number.startswith(chapters)}


async def run(url: str, *patterns: str) -> list[Verdict]:
    """Run the cases that fit against an echo server."""
    command = [sys.executable, "-m", "tests.system.autobahn", url, str(AT_ONCE), *patterns]
    ended = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
    verdicts = [json.loads(line) for line in ended.stdout.splitlines()]
    return [Verdict(each["case"], each["behavior"], each["close"], each["what"]) for each in verdicts]


@asynccontextmanager
async def echo_daemon(directory: Path) -> AsyncIterator[tuple[Daemon, str]]:
    """Run the daemon as an echo server; give it and the URL of its TCP socket."""
    address = f"127.0.0.1:{free_port()}"
    async with running_daemon(directory, *OPTIONS, "--websocket", address, module="tests.system.echo_daemon") as daemon:
        yield daemon, f"ws://{address}/ws"


@asynccontextmanager
async def echo_behind_caddy(directory: Path) -> AsyncIterator[tuple[Daemon, str]]:
    """Run the daemon as an echo server behind Caddy; give it and the URL under which Caddy lets one in."""
    async with (
        running_daemon(directory, *OPTIONS, module="tests.system.echo_daemon") as daemon,
        running_caddy(directory, websocket_socket=daemon.websocket_socket) as caddy,
        _origin_added(caddy.port) as port,
    ):
        yield daemon, f"ws://127.0.0.1:{port}/ws"


@asynccontextmanager
async def _origin_added(target: int) -> AsyncIterator[int]:
    """Listen at a port that leads to `target`, and add an Origin to requests: the suite sends none; Caddy wants one.

    Behind the request it passes on bytes as they come, and ends of file.
    """

    async def relay(client: trio.SocketStream) -> None:
        async with client, await trio.open_tcp_stream("127.0.0.1", target) as server:
            head = b""
            while b"\r\n" not in head and len(head) < _HEAD_LIMIT:
                more = await client.receive_some()
                if not more:
                    return
                head += more
            try:
                line, _, rest = head.partition(b"\r\n")
                await server.send_all(line + f"\r\nOrigin: http://localhost:{target}\r\n".encode() + rest)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_pass_on, client, server)
                    async for data in server:
                        await client.send_all(data)
                    nursery.cancel_scope.cancel()
            except* trio.BrokenResourceError:
                pass  # one side is gone: so the other is hung up on

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, relay, listeners))
        yield int(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def _pass_on(source: trio.SocketStream, target: trio.SocketStream) -> None:
    async for data in source:
        await target.send_all(data)
    await target.send_eof()


async def _report(where: str, url: str, patterns: Sequence[str]) -> bool:
    """Run cases and print what became of them; return whether all was as expected."""
    began = time.monotonic()
    verdicts = await run(url, *patterns)
    missing = case_numbers(patterns) - {verdict.case for verdict in verdicts}
    seconds = time.monotonic() - began
    counts: dict[str, int] = {}
    for verdict in verdicts:
        counts[verdict.behavior] = counts.get(verdict.behavior, 0) + 1
    shown = ", ".join(f"{count} {behavior}" for behavior, count in sorted(counts.items()))
    print(f"{where}: {len(verdicts)} cases in {seconds:.1f} s: {shown}", flush=True)
    for number in sorted(missing):
        print(f"  {number}: it was not run")
    for verdict in verdicts:
        if not verdict.as_expected:
            print(f"  {verdict.case}: {verdict.behavior}, {verdict.close}: {verdict.what}")
    return not missing and all(verdict.as_expected for verdict in verdicts)


async def _main(patterns: Sequence[str]) -> int:
    good = True
    for where, running in (("directly", echo_daemon), ("through Caddy", echo_behind_caddy)):
        with runtime_directory() as directory:
            async with running(directory) as (_, url):
                good = await _report(where, url, patterns) and good
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.system.conformance", description=__doc__)
    parser.add_argument(
        "cases", nargs="*", default=[*PROTOCOL, *LIMITS, *COMPRESSION], help='numbers, or patterns such as "9.*"'
    )
    sys.exit(trio.run(_main, parser.parse_args().cases))
