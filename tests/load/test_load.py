"""Ten publishers of every kind at once, a thousand subscribers through Caddy: all arrives, once, in order."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Final

import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import TextMessage

from tests.kit.clients import REQUEST, publisher, subscribe
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import APP, Caddy, Daemon, find_php, running_caddy, running_daemon

SUBSCRIBERS: Final = 1000
CHANNELS: Final = 50
CHANNELS_A_SUBSCRIBER: Final = 2
BROADCASTS: Final = {"php": 2475, "python": 2475, "pipelined": 5000, "shell": 50}
"""How many each publisher of a kind sends."""

PUBLISHERS: Final = ("php", "php", "php", "php", "python", "python", "python", "pipelined", "shell", "shell")
THE_END: Final = "the end"

PHP: Final = """
require $argv[1];
[, , $name, $channels, $count] = $argv;
for ($n = 0; $n < $count; $n++) {
    broadcast('c' . ($n * 7 % $channels), "$name:$n");
}
"""

PYTHON: Final = """
import sys
from realtimed import broadcast
name, channels, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for n in range(count):
    broadcast(f"c{n * 7 % channels}", f"{name}:{n}")
"""

PIPELINED: Final = """
import sys
from realtimed import Client
name, channels, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Client() as client:
    client.broadcast_each((f"c{n * 7 % channels}", f"{name}:{n}") for n in range(count))
"""


class Subscriber:
    """A client through Caddy that keeps what it gets, message for message."""

    def __init__(self, channels: Sequence[int]) -> None:
        self.channels = channels
        self.at_end = trio.Event()
        self.messages: list[str] = []
        self.unfinished = ""
        self.frames = Connection(ConnectionType.CLIENT)

    async def run(self, caddy: Caddy, ready: trio.Event) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", caddy.port) as stream:
            origin = f"Origin: http://localhost:{caddy.port}\r\n\r\n".encode()
            await stream.send_all(REQUEST.removesuffix(b"\r\n") + origin)
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await stream.receive_some(1)
            assert b" 101 " in answer, answer
            for number in self.channels:
                await stream.send_all(self.frames.send(TextMessage(data=subscribe(f"c{number}"))))
            ready.set()
            while data := await stream.receive_some(2**16):
                self.frames.receive_data(data)
                for event in self.frames.events():
                    if isinstance(event, TextMessage):
                        self.unfinished += event.data  # a read may end in the middle of a frame
                        if event.message_finished:
                            self.messages.append(self.unfinished)
                            self.unfinished = ""
                if self.messages[-CHANNELS_A_SUBSCRIBER:] == [THE_END] * CHANNELS_A_SUBSCRIBER:
                    self.at_end.set()


def command(kind: str, name: str) -> list[str | Path]:
    arguments = [name, str(CHANNELS), str(BROADCASTS[kind])]
    if kind == "php":
        return [find_php(), "-r", PHP, "--", APP / "realtime.php", *arguments]
    return [sys.executable, "-c", PYTHON if kind == "python" else PIPELINED, *arguments]


async def publish(kind: str, name: str, daemon: Daemon) -> None:
    environment = {"REALTIME_SOCKET": str(daemon.control_socket), "PATH": "/usr/bin:/bin"}
    if kind == "shell":
        realtimectl = Path(sys.executable).parent / "realtimectl"
        for number in range(BROADCASTS[kind]):
            line: list[str | Path] = [realtimectl, "broadcast", f"c{number * 7 % CHANNELS}", f"{name}:{number}"]
            await trio.run_process(line, env=environment, capture_stdout=True)
    else:
        await trio.run_process(command(kind, name), env=environment, stderr=subprocess.STDOUT)


async def test_everything_arrives_once_and_in_each_publishers_order(runtime_dir: Path) -> None:
    assert sum(BROADCASTS[kind] for kind in PUBLISHERS) >= 20_000
    names = [f"{kind}{number}" for kind, number in zip(PUBLISHERS, count(), strict=False)]
    expected: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for kind, name in zip(PUBLISHERS, names, strict=True):
        for sent in range(BROADCASTS[kind]):
            expected[sent * 7 % CHANNELS][name].append(sent)
    chance = random.Random(50)
    choices = [chance.sample(range(CHANNELS), CHANNELS_A_SUBSCRIBER) for _ in range(SUBSCRIBERS)]
    subscribers = [Subscriber(channels) for channels in choices]

    # Pings are not answered here; behind Caddy all have the address of this machine.
    options = ("--silence-timeout", str(2 * LONG_PATIENCE), "--max-connections-per-address", "0")
    with trio.fail_after(2 * LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, *options) as daemon,
            running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket) as caddy,
            publisher(daemon.control_socket) as asking,
            trio.open_nursery() as reading,
        ):
            for subscriber in subscribers:
                ready = trio.Event()
                reading.start_soon(subscriber.run, caddy, ready)
                await ready.wait()
            while (await asking.call("stats"))["subscriptions"] != SUBSCRIBERS * CHANNELS_A_SUBSCRIBER:
                pass
            async with trio.open_nursery() as publishing:
                for kind, name in zip(PUBLISHERS, names, strict=True):
                    publishing.start_soon(publish, kind, name, daemon)
            # Behind it nothing is on its way any more that came twice.
            await asking.call("broadcast_many", [f"c{number}" for number in range(CHANNELS)], THE_END)
            for subscriber in subscribers:
                await subscriber.at_end.wait()
            statistics = await asking.call("stats")
            reading.cancel_scope.cancel()

    assert statistics["publications"] == sum(BROADCASTS[kind] for kind in PUBLISHERS) + CHANNELS
    assert statistics["deliveries"] == sum(len(each.messages) for each in subscribers)
    for subscriber in subscribers:
        # A channel's share of one publisher's numbers is known, so the two channels of a client can be told apart.
        seen: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        in_order: dict[str, list[int]] = defaultdict(list)
        for message in subscriber.messages[:-CHANNELS_A_SUBSCRIBER]:
            name, _, number = message.partition(":")
            seen[int(number) * 7 % CHANNELS][name].append(int(number))
            in_order[name].append(int(number))
        assert seen == {channel: expected[channel] for channel in subscriber.channels}
        assert all(numbers == sorted(numbers) for numbers in in_order.values()), "order holds across channels"
