"""Nothing is lost across a reconnect: clients behind Caddy whose connections keep breaking, and what each of them gets.

`python -m tests.load.jitter --help`. Prints progress and a verdict; exits with 1 if any message was lost, came twice
or came out of order at any client.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from benchmarks.machine import processor_seconds
from tests.kit.clients import publisher
from tests.kit.stack import PartFailedError, running_caddy, running_daemon, runtime_directory
from tests.load.returning import (
    CHANNEL,
    Address,
    Client,
    Connection,
    LostError,
    Readers,
    allow_open_files,
    behind_caddy,
    full_jitter,
    message,
    spread,
)

__all__ = ["Outcome", "Plan", "run"]

MARKS: Final = 2
"""Messages at the end, when nothing is cut any more. Behind the second nothing is on its way that came twice."""

LOST_AFTER: Final = 60
"""Seconds without an end after the last cut, after which those that are not complete have lost something."""

_REPORT_INTERVAL: Final = 5.0


@dataclass(frozen=True)
class Plan:
    """Messages a second, and seconds: between two cuts of one client on average, and to be away at most.

    `history_seconds` is how far the channel's history reaches back: longer than any client is away, even one that is
    cut again while it connects.
    """

    clients: int
    seconds: float
    rate: float = 20.0
    every: float = 15.0
    away: float = 2.0
    history_seconds: float = 20.0
    upgrade_every: float = 0.0
    """Seconds between two upgrades of the daemon; 0 for none."""

    @property
    def messages(self) -> int:
        return round(self.seconds * self.rate)


@dataclass
class Outcome:
    """What has become of it; `cpu` is in seconds, by part."""

    plan: Plan
    clients: list[Client]
    cuts: Counter[str] = field(default_factory=Counter)
    ended_by_server: list[str] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def expected(self) -> int:
        return len(self.clients) * (self.plan.messages + MARKS)

    @property
    def received(self) -> int:
        return sum(client.received for client in self.clients)

    @property
    def faults(self) -> list[str]:
        """What went wrong, in words."""
        told = [what for client in self.clients for what in client.told]
        for client in self.clients:
            if client.refusals:
                told.append(f"client {client.number} was told {client.refusals} times that it is not recovered")
            if client.received != self.plan.messages + MARKS:
                told.append(f"client {client.number} has {client.received} of {self.plan.messages + MARKS} messages")
        return told

    def __str__(self) -> str:
        away = sorted(time for client in self.clients for time in client.away)
        replayed = sum(client.replayed for client in self.clients)
        failures = Counter(reason for client in self.clients for reason in client.failures)
        cuts = ", ".join(f"{count} {how}" for how, count in sorted(self.cuts.items()))
        shares = ", ".join(f"{part} {used / self.seconds:.0%}" for part, used in self.cpu.items())
        most = max(client.largest_replay for client in self.clients)
        lines = [
            f"messages      {self.received} of {self.expected}: {self.received / self.expected:.4%}",
            f"cuts          {sum(self.cuts.values())} ({cuts})",
            f"recovered     {sum(client.recoveries for client in self.clients)} times, with {most} messages at most",
            f"replayed      {replayed} messages, {replayed / self.expected:.1%} of all",
            f"not recovered {sum(client.refusals for client in self.clients)}",
            f"time away     {spread(away)}",
            f"not connected {dict(failures)}",
            f"ended by the server {Counter(self.ended_by_server)}",
            f"processor     {shares} of a core, for {self.seconds:.1f} s",
        ]
        return "\n".join([*lines, *self.faults[:20]])


class _Storm:
    """All clients' lives, and the chance that rules them."""

    # `_lives` are the connections of now, those that are still being made included; the end of such a scope's time is a
    # cut. While it is calm they have no end.

    def __init__(self, plan: Plan, address: Address, readers: Readers, chance: random.Random) -> None:
        self.outcome = Outcome(plan, [Client(number, last=plan.messages + 1) for number in range(plan.clients)])
        self.all_connected = trio.Event()
        self._address = address
        self._readers = readers
        self._chance = chance
        self._lives: set[trio.CancelScope] = set()
        self._calm = True

    def break_out(self) -> None:
        """Cut connections from now on."""
        self._calm = False
        for life in self._lives:
            life.deadline = self._end_of_life()

    def calm_down(self) -> None:
        """Cut nothing any more."""
        self._calm = True
        for life in self._lives:
            life.deadline = math.inf

    async def complete(self) -> None:
        """Wait until everyone has the message that is waited for; the next one is, from now on."""
        for client in self.outcome.clients:
            await client.complete.wait()
            client.complete = trio.Event()
            client.last += 1

    async def live(self, client: Client) -> None:
        """Connect again and again."""
        failures = 0
        vanished = ExitStack()
        with vanished:
            while True:
                connection: Connection | None = None
                with self._life() as life:
                    try:
                        connection = await client.connect(self._address, self._readers)
                    except LostError:
                        failures += 1
                    else:
                        failures = 0
                        self._note_connected()
                        await connection.over.wait()
                        self.outcome.ended_by_server.append(connection.reason)
                client.lost()
                vanished.close()
                if life.cancelled_caught:
                    self._cut(connection, vanished)
                    await trio.sleep(self._chance.uniform(0, self.outcome.plan.away))
                else:
                    await trio.sleep(full_jitter(failures, self._chance))

    def _cut(self, connection: Connection | None, vanished: ExitStack) -> None:
        """Break a connection in one of the ways in which connections break. One that vanishes is closed much later."""
        if connection is None:
            how = "while it connects"
        else:
            how = self._chance.choice(["reset", "closed", "vanished"])
            if how == "vanished":
                connection.abandon()
                vanished.callback(connection.close)
            else:
                connection.close(reset=how == "reset")
        self.outcome.cuts[how] += 1

    @contextmanager
    def _life(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope(deadline=self._end_of_life()) as life:
            self._lives.add(life)
            try:
                yield life
            finally:
                self._lives.remove(life)

    def _end_of_life(self) -> float:
        if self._calm:
            return math.inf
        return trio.current_time() + self._chance.expovariate(1 / self.outcome.plan.every)

    def _note_connected(self) -> None:
        if all(client.joined_at for client in self.outcome.clients):
            self.all_connected.set()


async def run(
    plan: Plan, directory: Path, chance: random.Random, progress: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Publish as planned while connections break; return what came of it when everyone is complete, or cannot be."""
    history = str(math.ceil(plan.rate * plan.history_seconds))
    async with (
        # Behind Caddy all clients have the address of this machine.
        running_daemon(directory, "--history-size", history, "--max-connections-per-address", "0") as daemon,
        running_caddy(directory, websocket_socket=daemon.websocket_socket) as caddy,
        publisher(daemon.control_socket) as sender,
        Readers.running() as readers,
        trio.open_nursery() as nursery,
    ):
        storm = _Storm(plan, behind_caddy(caddy), readers, chance)
        parts = {"Caddy": caddy.process.pid}
        if not plan.upgrade_every:  # otherwise the daemon's process changes
            parts["daemon"] = daemon.process.pid
        for client in storm.outcome.clients:
            nursery.start_soon(storm.live, client)
        with trio.fail_after(LOST_AFTER):
            await storm.all_connected.wait()
        progress(f"{plan.clients} clients are connected")

        before = {part: processor_seconds(pid) for part, pid in parts.items()}
        began, ours = time.monotonic(), time.process_time()
        storm.break_out()
        if plan.upgrade_every:
            nursery.start_soon(_keep_upgrading, daemon.control_socket, plan.upgrade_every, progress)
        start = trio.current_time()
        for number in range(1, plan.messages + 1):
            await trio.sleep_until(start + number / plan.rate)
            await sender.call("broadcast", CHANNEL, message(number))
            if number % round(plan.rate * _REPORT_INTERVAL) == 0:
                received = sum(client.received for client in storm.outcome.clients)
                progress(f"{number} messages, {sum(storm.outcome.cuts.values())} cuts, {received} received")
        storm.outcome.seconds = time.monotonic() - began
        storm.outcome.cpu = {part: processor_seconds(pid) - before[part] for part, pid in parts.items()}
        storm.outcome.cpu["clients"] = time.process_time() - ours

        storm.calm_down()
        with trio.move_on_after(LOST_AFTER):
            for mark in range(MARKS):
                await sender.call("broadcast", CHANNEL, message(plan.messages + 1 + mark))
                await storm.complete()
        nursery.cancel_scope.cancel()
    return storm.outcome


async def _keep_upgrading(path: Path, every: float, progress: Callable[[str], None]) -> None:
    async with publisher(path) as administrator:
        while True:
            await trio.sleep(every)
            report = await administrator.call("upgrade")
            if "pause" not in report:
                raise PartFailedError(f"an upgrade has failed: {report}")
            progress(f"upgraded, with {report['clients']} clients; paused for {report['pause'] * 1000:.0f} ms")


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.jitter", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="of publishing; default: %(default)s")
    parser.add_argument("--rate", type=float, default=20, help="messages a second; default: %(default)s")
    parser.add_argument("--every", type=float, default=15, help="seconds between a client's cuts, on average")
    parser.add_argument("--away", type=float, default=2, help="seconds until it comes back, at most")
    parser.add_argument("--upgrade-every", type=float, default=0, help="seconds between upgrades; 0 for none")
    parser.add_argument("--seed", type=int, default=None, help="of the chance; another one each time if not given")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    allow_open_files(4 * options.clients)
    print(f"seed {seed}", flush=True)
    plan = Plan(
        options.clients, options.seconds, options.rate, options.every, options.away, upgrade_every=options.upgrade_every
    )
    with runtime_directory() as directory:
        outcome = trio.run(run, plan, directory, random.Random(seed), partial(print, flush=True))
    print(outcome)
    print("LOST, twice or out of order" if outcome.faults else "every message at every client, in order, once")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
