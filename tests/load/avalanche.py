"""The daemon restarts under thousands of clients: everyone comes back, at a time of its own, and knows what it missed.

`python -m tests.load.avalanche --help`. Prints how long clients were away and how many came back in one second; exits
with 1 if anyone did not come back, or lost a message without being told.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tests.kit.clients import publisher
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import Daemon, running_caddy, running_daemon, runtime_directory
from tests.load.returning import (
    CHANNEL,
    Address,
    Client,
    LostError,
    Readers,
    allow_open_files,
    behind_caddy,
    full_jitter,
    message,
    spread,
)

__all__ = ["Outcome", "Plan", "run"]

BEFORE: Final = 5
"""Messages published before the restart, and again when the next daemon is there but nobody has come back yet."""


@dataclass(frozen=True)
class Plan:
    """How the daemon ends: with SIGTERM it says goodbye, with SIGKILL it cannot."""

    clients: int
    number: signal.Signals = signal.SIGTERM
    through_caddy: bool = False
    keep_history: bool = False


@dataclass
class Outcome:
    """What has become of it; `down` is how long there was no daemon, in seconds."""

    plan: Plan
    clients: list[Client]
    goodbyes: Counter[str] = field(default_factory=Counter)
    advised: int = 0
    down: float = 0.0
    published: int = 0

    @property
    def back(self) -> int:
        """How many were subscribed a second time."""
        return sum(len(client.away) == 1 for client in self.clients)

    @property
    def most_in_a_second(self) -> int:
        """The largest number of subscriptions after the restart that fell into one second."""
        times = sorted(client.joined_at[-1] for client in self.clients if client.away)
        first = most = 0
        for last, at in enumerate(times):
            while times[first] < at - 1:
                first += 1
            most = max(most, last - first + 1)
        return most

    @property
    def faults(self) -> list[str]:
        """What went wrong, in words."""
        told = [what for client in self.clients for what in client.told]
        for client in self.clients:
            if len(client.away) != 1 or not client.complete.is_set():
                told.append(f"client {client.number} has come back {len(client.away)} times, to {client.offset}")
            elif client.recoveries + client.refusals != 1:
                told.append(f"client {client.number}: {client.recoveries} recoveries, {client.refusals} refusals")
            elif client.recoveries and client.received != self.published:
                told.append(f"client {client.number} has {client.received} of {self.published} messages")
        return told

    def __str__(self) -> str:
        failures = Counter(reason for client in self.clients for reason in client.failures)
        away = sorted(time for client in self.clients for time in client.away)
        recovered = sum(client.recoveries for client in self.clients)
        lines = [
            f"back            {self.back} of {len(self.clients)} clients, {self.advised} of them as advised",
            f"goodbyes        {dict(self.goodbyes)}",
            f"no daemon for   {self.down:.2f} s",
            f"time away       {spread(away)}",
            f"in one second   {self.most_in_a_second} at most",
            f"failed attempts {dict(failures)}",
            f"recovered       {recovered}, told that they are not: {self.back - recovered}",
        ]
        return "\n".join([*lines, *self.faults[:20]])


class _Avalanche:
    """All clients' lives."""

    def __init__(self, plan: Plan, address: Address, readers: Readers, chance: random.Random) -> None:
        self.outcome = Outcome(plan, [Client(number, last=BEFORE) for number in range(plan.clients)])
        self.all_connected = trio.Event()
        self._address = address
        self._readers = readers
        self._chance = chance
        self._connected = 0

    async def live(self, client: Client) -> None:
        """Connect again and again, as the server advises or with full jitter."""
        failures = 0
        while True:
            try:
                connection = await client.connect(self._address, self._readers)
            except LostError:
                failures += 1
                await trio.sleep(full_jitter(failures, self._chance))
                continue
            failures = 0
            self._connected += 1
            if self._connected == len(self.outcome.clients):
                self._connected = 0
                self.all_connected.set()
            await connection.over.wait()
            client.lost()
            self.outcome.goodbyes[connection.reason.partition(", come back in ")[0]] += 1
            if connection.advice is None:
                await trio.sleep(full_jitter(failures, self._chance))
            else:
                self.outcome.advised += 1
                await trio.sleep(connection.advice)

    async def complete(self) -> None:
        """Wait until everyone has the message that is waited for."""
        for client in self.outcome.clients:
            await client.complete.wait()


async def run(
    plan: Plan, directory: Path, chance: random.Random, progress: Callable[[str], None] = lambda _: None
) -> Outcome:
    """End a daemon under its clients and start the next; return what came of it when all are back, or cannot be."""
    options = ["--max-connections-per-address", "0"]  # behind Caddy they all have the address of this machine
    if plan.keep_history:
        options += ["--state-file", str(directory / "state")]
    async with AsyncExitStack() as first, AsyncExitStack() as parts:
        daemon = await first.enter_async_context(running_daemon(directory, *options))
        address = Address.of(daemon.websocket_socket)
        if plan.through_caddy:
            caddy = await parts.enter_async_context(running_caddy(directory, websocket_socket=daemon.websocket_socket))
            address = behind_caddy(caddy)
        readers = await parts.enter_async_context(Readers.running())
        nursery = await parts.enter_async_context(trio.open_nursery())
        avalanche = _Avalanche(plan, address, readers, chance)
        outcome = avalanche.outcome
        for client in outcome.clients:
            nursery.start_soon(avalanche.live, client)
        with trio.fail_after(LONG_PATIENCE):
            await avalanche.all_connected.wait()
            await _publish(daemon, outcome)
            await avalanche.complete()
        progress(f"{plan.clients} clients are connected, and have {outcome.published} messages")

        avalanche.all_connected = trio.Event()
        for client in outcome.clients:
            client.complete = trio.Event()
        if plan.number != signal.SIGTERM:
            daemon.process.send_signal(plan.number)
        await first.aclose()  # sends a SIGTERM to what still runs; a second one would cut its stop short
        ended = time.monotonic()
        async with running_daemon(directory, *options) as daemon:
            outcome.down = time.monotonic() - ended
            progress(f"the daemon was away for {outcome.down:.2f} s")
            first_new = outcome.published if plan.keep_history and plan.number != signal.SIGKILL else 0
            for client in outcome.clients:
                client.last = first_new + 2 * BEFORE
            await _publish(daemon, outcome, first_new)
            with trio.move_on_after(LONG_PATIENCE):
                await avalanche.all_connected.wait()
                await _publish(daemon, outcome, first_new + BEFORE)
                await avalanche.complete()
            nursery.cancel_scope.cancel()
    return outcome


async def _publish(daemon: Daemon, outcome: Outcome, after: int = 0) -> None:
    """Publish the messages whose offsets follow `after`."""
    async with publisher(daemon.control_socket) as sender:
        for offset in range(after + 1, after + 1 + BEFORE):
            receipt = await sender.call("broadcast", CHANNEL, message(offset))
            assert receipt["offset"] == offset, receipt
            outcome.published += 1


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.load.avalanche", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--clients", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--kill", action="store_true", help="end the daemon with SIGKILL, not with SIGTERM")
    parser.add_argument("--caddy", action="store_true", help="connect through Caddy")
    parser.add_argument("--state-file", action="store_true", help="let history outlive the restart")
    parser.add_argument("--seed", type=int, default=None, help="of the chance; another one each time if not given")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    allow_open_files(2 * options.clients)
    print(f"seed {seed}", flush=True)
    number = signal.SIGKILL if options.kill else signal.SIGTERM
    plan = Plan(options.clients, number, options.caddy, options.state_file)
    with runtime_directory() as directory:
        outcome = trio.run(run, plan, directory, random.Random(seed), partial(print, flush=True))
    print(outcome)
    print("somebody is LOST" if outcome.faults else "everyone is back, and nobody was left in the dark")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
