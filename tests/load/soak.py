"""The daemon under changing clients for a long time: does everything end where it began?

`python -m tests.load.soak --minutes 20` runs rounds. In each, clients come, subscribe, and end in every way there is;
publishers broadcast, repeat themselves, talk nonsense, and die. Then all of them go, and when the daemon is idle, its
memory, descriptors and tasks are read. The first rounds warm it up; after them nothing may grow: exits with 1 unless
descriptors and tasks are as they were, memory is within 2 %, and a witness had all its messages.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from trio_websocket import ConnectionClosed, HandshakeError
from wsproto.events import CloseConnection, Ping, TextMessage

from realtimed.rpc.wire import encode_notification, encode_request
from tests.kit.clients import REQUEST, Publisher, closing, publisher, raw_client, subscribe, websocket
from tests.kit.patience import LONG_PATIENCE
from tests.kit.sockets import RESET_AT_CLOSE
from tests.kit.stack import Daemon, running_daemon, runtime_directory

__all__ = ["Outcome", "Plan", "Reading", "run"]

CHANNELS: Final = [f"soak:{number}" for number in range(20)]
WITNESSED: Final = "witness"

OPTIONS: Final = (
    "--log-level=error",
    "--heartbeat=1",
    "--silence-timeout=4",
    "--handshake-timeout=2",
    "--command-timeout=2",
    "--close-timeout=1",
    "--backlog-timeout=2",
    "--max-backlog=256K",
    "--history-age=4",
    "--retry-window=4",
)
"""Deadlines that pass often, and a history that is gone soon."""

MEMORY_TOLERANCE: Final = 0.02


@dataclass(frozen=True)
class Plan:
    """How long, in how many rounds, of which how many warm up; how much of a core it may take, clients included."""

    minutes: float
    rounds: int = 10
    warm_up: int = 3
    duty: float = 0.3
    seed: int = 1


@dataclass(frozen=True)
class Reading:
    """What the idle daemon holds: memory in bytes, descriptors, tasks; and what it has done so far."""

    memory: int
    descriptors: int
    tasks: int
    connections: int
    deliveries: int

    def __str__(self) -> str:
        return (
            f"{self.memory / 2**20:7.2f} MiB, {self.descriptors} descriptors, {self.tasks} tasks"
            f" after {self.connections} connections, {self.deliveries} deliveries"
        )


@dataclass
class Outcome:
    """The readings after each round, how connections ended, by close code, and what a witness has seen."""

    plan: Plan
    readings: list[Reading] = field(default_factory=list)
    closed: dict[str, int] = field(default_factory=dict)
    ways: Counter[str] = field(default_factory=Counter)
    witnessed: int = 0
    complaints: list[str] = field(default_factory=list)

    def judge(self) -> list[str]:
        """Return what is wrong."""
        first, last = self.readings[self.plan.warm_up - 1], self.readings[-1]
        wrong = list(self.complaints)
        if last.descriptors != first.descriptors:
            wrong.append(f"there were {first.descriptors} descriptors, and there are {last.descriptors}")
        if last.tasks != first.tasks:
            wrong.append(f"there were {first.tasks} tasks, and there are {last.tasks}")
        if last.memory > first.memory * (1 + MEMORY_TOLERANCE):
            wrong.append(f"memory has grown by {last.memory / first.memory - 1:.1%}")
        return wrong


class Soak:
    """One run against a daemon."""

    def __init__(self, plan: Plan, daemon: Daemon) -> None:
        self.plan = plan
        self.daemon = daemon
        self.outcome = Outcome(plan)
        self.random = random.Random(plan.seed)
        self._pace_from, self._spent_from = time.monotonic(), self._processor_time()

    async def run(self) -> Outcome:
        """Run all rounds."""
        length = self.plan.minutes * 60 / self.plan.rounds
        async with publisher(self.daemon.control_socket) as asking:
            for number in range(self.plan.rounds):
                with trio.CancelScope() as witnessing:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(self._witness)
                        async with trio.open_nursery() as crowd:
                            await self._churn(crowd, length)
                            crowd.cancel_scope.deadline = trio.current_time() + LONG_PATIENCE
                        witnessing.cancel()
                self.outcome.readings.append(await self._idle(asking))
                warm = "warming up" if number < self.plan.warm_up else ""
                print(f"{(number + 1) * length / 60:6.1f} min {self.outcome.readings[-1]} {warm}", flush=True)
            self.outcome.closed = (await asking.call("stats"))["closed"]
        if "Traceback" in self.daemon.log:
            self.outcome.complaints.append("something went wrong inside:" + self.daemon.log_shown())
        return self.outcome

    async def _churn(self, crowd: trio.Nursery, seconds: float) -> None:
        """Let clients and publishers come for a time, as many as the duty allows."""
        ends = trio.current_time() + seconds
        clients: list[Way] = [
            self.listens, self.listens, self.comes_back, self.resets, self.goes_silent, self.reads_nothing,
            self.talks_nonsense, self.breaks_the_protocol, self.pings_for_a_while, self.connects_slowly,
            self.is_no_websocket, self.says_goodbye,
        ]  # fmt: skip
        publishers: list[Way] = [
            self.publishes, self.publishes, self.publishes_with_a_key, self.publishes_in_numbers, self.watches,
            self.publishes_nonsense, self.dies_in_a_command, self.reads_no_answers,
        ]  # fmt: skip
        while trio.current_time() < ends:
            for ways in (clients, publishers):
                way = self.random.choice(ways)
                self.outcome.ways[way.__name__] += 1
                crowd.start_soon(self._endure, way)
            await trio.sleep(0.02)
            await self._keep_to_duty()

    async def _endure(self, way: Way) -> None:
        """Let one come and go; that the daemon hangs up on it is part of it."""
        try:
            await way()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed, HandshakeError):
            pass

    async def _keep_to_duty(self) -> None:
        """Wait until this process and the daemon have taken no more than their share of the time."""
        spent = self._processor_time() - self._spent_from
        ahead = spent / self.plan.duty - (time.monotonic() - self._pace_from)
        if ahead > 0:
            await trio.sleep(ahead)
        else:
            self._pace_from, self._spent_from = time.monotonic(), self._processor_time()

    def _processor_time(self) -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        fields = Path(f"/proc/{self.daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return used.ru_utime + used.ru_stime + ticks / 100

    async def _idle(self, asking: Publisher) -> Reading:
        """Wait until nobody is there and nothing is kept any more; return what the daemon holds then."""
        with trio.fail_after(LONG_PATIENCE):
            while True:
                stats = await asking.call("stats")
                if not (stats["clients"] or stats["history_channels"] or stats["backlog_bytes"]) and (
                    stats["publishers"] == 1
                ):
                    break
                await trio.sleep(0.1)
        return Reading(*(int(stats[name]) for name in ("memory", "descriptors", "tasks", "connections", "deliveries")))

    # One who must not be disturbed by all the others.

    async def _witness(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Broadcast to a client of one's own, which must have all of it in order, and soon."""
        async with (
            websocket(self.daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
            publisher(self.daemon.control_socket) as sender,
        ):
            await client.get_message()
            await client.send_message(subscribe(WITNESSED))
            expected = json.loads(await client.get_message())["offset"] + 1
            task_status.started()
            while True:
                with trio.move_on_after(LONG_PATIENCE) as patience:
                    await sender.call("broadcast", WITNESSED, str(expected))
                    event = json.loads(await client.get_message())
                if patience.cancelled_caught or (event["offset"], event["data"]) != (expected, str(expected)):
                    self.outcome.complaints.append(f"the witness waited for message {expected}, and had no such")
                    return
                expected += 1
                self.outcome.witnessed += 1
                await trio.sleep(0.1)

    # How clients live and end.

    def _channels(self) -> list[str]:
        return self.random.sample(CHANNELS, self.random.randint(1, 5))

    async def _listen(self, *, subprotocols: tuple[str, ...] = (), channels: list[str], since: Any = None) -> Any:
        """Subscribe, read for a while, and hang up; return where the first channel was then."""
        position = None
        async with websocket(self.daemon.websocket_socket, subprotocols=subprotocols) as client:
            for channel in channels:
                more = {"since": since} if since is not None and channel == channels[0] else {}
                await client.send_message(subscribe(channel, **more))
            with trio.move_on_after(self.random.expovariate(1 / 3)):
                while True:
                    message = await client.get_message()
                    event = json.loads(message) if subprotocols else {}
                    if event.get("channel") == channels[0] and event["event"] == "subscribed":
                        position = {"epoch": event["epoch"], "offset": event["offset"]}
                    elif event.get("channel") == channels[0] and position is not None:
                        position["offset"] = event["offset"]
        return position

    async def listens(self) -> None:
        await self._listen(channels=self._channels())

    async def comes_back(self) -> None:
        channels, position = self._channels(), None
        for _ in range(3):
            position = await self._listen(subprotocols=("realtime.v1",), channels=channels, since=position)

    async def says_goodbye(self) -> None:
        async with raw_client(self.daemon.websocket_socket) as client:
            await client.send(TextMessage(data=subscribe(self.random.choice(CHANNELS))))
            await trio.sleep(self.random.random())
            await client.send(CloseConnection(code=1000))
            with trio.move_on_after(2):
                await client.events_until_eof()

    async def resets(self) -> None:
        async with raw_client(self.daemon.websocket_socket) as client:
            await client.send(*[TextMessage(data=subscribe(channel)) for channel in self._channels()])
            await trio.sleep(self.random.random())
            client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)

    async def goes_silent(self) -> None:
        async with raw_client(self.daemon.websocket_socket) as client:
            await client.send(TextMessage(data=subscribe(self.random.choice(CHANNELS))))
            await client.events_until_eof()

    async def reads_nothing(self) -> None:
        async with raw_client(self.daemon.websocket_socket) as client:
            await client.send(*[TextMessage(data=subscribe(channel)) for channel in CHANNELS])
            await trio.sleep(6)

    async def talks_nonsense(self) -> None:
        async with websocket(self.daemon.websocket_socket) as client:
            await client.send_message(self.random.choice(["no JSON", "{}", subscribe("no spaces"), "x" * 17_000]))
            await closing(client)

    async def breaks_the_protocol(self) -> None:
        async with raw_client(self.daemon.websocket_socket) as client:
            await client.stream.send_all(self.random.randbytes(100))
            with trio.move_on_after(5):
                await client.events_until_eof()

    async def pings_for_a_while(self) -> None:
        async with raw_client(self.daemon.websocket_socket) as client:
            for _ in range(self.random.randint(1, 8)):
                await client.send(*[Ping(payload=b"x" * 100)] * 20)
            if self.random.random() < 0.5:
                await client.send(CloseConnection(code=1000))
            with trio.move_on_after(2):
                await client.events_until_eof()

    async def connects_slowly(self) -> None:
        async with await trio.open_unix_socket(self.daemon.websocket_socket) as stream:
            for at in range(0, len(REQUEST), 40):
                await stream.send_all(REQUEST[at : at + 40])
                await trio.sleep(0.3)
            while await stream.receive_some():
                pass

    async def is_no_websocket(self) -> None:
        async with await trio.open_unix_socket(self.daemon.websocket_socket) as stream:
            await stream.send_all(self.random.choice([b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET /ws"]))
            if self.random.random() < 0.5:
                while await stream.receive_some():
                    pass

    # How publishers live and end.

    def _message(self) -> str | bytes:
        size = int(self.random.paretovariate(0.8) * 30) % 60_000
        return "ä" * (size // 2) if self.random.random() < 0.7 else b"\xff" * size

    async def publishes(self) -> None:
        async with publisher(self.daemon.control_socket) as sender:
            for _ in range(self.random.randint(1, 5)):
                await sender.call("broadcast", self.random.choice(CHANNELS), self._message())

    async def publishes_with_a_key(self) -> None:
        key = f"{self.random.random()}"
        for _ in range(2):
            async with publisher(self.daemon.control_socket) as sender:
                await sender.call("broadcast", CHANNELS[0], "once", key)

    async def publishes_in_numbers(self) -> None:
        async with publisher(self.daemon.control_socket) as sender:
            await sender.stream.send_all(
                b"".join(encode_notification("broadcast", [name, self._message()]) for name in CHANNELS)
            )
            await sender.call("broadcast_many", self._channels(), self._message())
            await sender.call("clients")
            await sender.call("history", CHANNELS[0], 10)

    async def watches(self) -> None:
        async with publisher(self.daemon.control_socket) as sender:
            await sender.stream.send_all(
                encode_request(1, "watch", ["soak:1*"]) + encode_request(2, "subscribe", [CHANNELS[3]])
            )
            with trio.move_on_after(self.random.expovariate(1 / 2)):
                while await sender.stream.receive_some(2**16):
                    pass

    async def publishes_nonsense(self) -> None:
        async with publisher(self.daemon.control_socket) as sender:
            await sender.call("broadcast", "no spaces", "x")
            await sender.call("broadcast", "soak:1", "x" * 70_000)
            await sender.stream.send_all(self.random.choice([b"\xc1", b"\x93\x00", b"GET / HTTP/1.1\r\n\r\n"]))
            while await sender.stream.receive_some(2**16):
                pass

    async def dies_in_a_command(self) -> None:
        async with publisher(self.daemon.control_socket) as sender:
            await sender.stream.send_all(encode_request(1, "broadcast", [CHANNELS[1], "x" * 1000])[:-100])
            await trio.sleep(self.random.random() * 3)

    async def reads_no_answers(self) -> None:
        async with publisher(self.daemon.control_socket) as sender:
            await sender.stream.send_all(encode_request(1, "clients", []) * 50)
            await trio.sleep(self.random.random() * 3)


Way = Callable[[], Awaitable[None]]


async def run(plan: Plan) -> Outcome:
    """Run a daemon and let it soak."""
    with runtime_directory() as directory:
        async with running_daemon(directory, *OPTIONS, module="tests.kit.observed_daemon") as daemon:
            return await Soak(plan, daemon).run()


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="how long, beside the pauses (default: 20)")
    parser.add_argument("--rounds", type=int, default=10, help="how many times everyone goes (default: 10)")
    parser.add_argument("--duty", type=float, default=0.3, help="how much of a core it may take (default: 0.3)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    plan = Plan(given.minutes, given.rounds, max(1, round(given.rounds * 0.3)), given.duty, given.seed)
    outcome = trio.run(partial(run, plan))
    print(f"closed: {outcome.closed}")
    print(f"came: {dict(outcome.ways)}; the witness had {outcome.witnessed} messages")
    wrong = outcome.judge()
    for line in wrong:
        print(f"wrong: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(_main())
