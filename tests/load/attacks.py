"""Attacks on a daemon: does another client notice, and does memory stay within the bounds that are configured?

`python -m tests.load.attacks --seconds 30` makes each of them for so long, at up to 4 MB a second, and prints how
long the pings and broadcasts of a bystander took, how long the daemon's turns were in processor time, and by how much
its resident memory grew. Exits with 1 if memory grew by more than the bounds and 64 MiB, or the pings took 50 ms or
more, but for a hundredth of them. On a machine that is busy otherwise they may, as long as two turns take less.
"""

from __future__ import annotations

import argparse
import itertools
import select
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from realtimed import Client
from realtimed.rpc.wire import encode_notification, encode_request
from tests.kit.clients import REQUEST, subscribe
from tests.kit.stack import Daemon, running_daemon, runtime_directory
from tests.load.attackers import MIB, Bystander, Growth, Pace, connect, crowd, text_frame

__all__ = ["ATTACKS", "Attack", "Outcome", "attack", "attacked_daemon"]

_SLACK: Final = 64 * MIB
_PING_LIMIT: Final = 0.05

_HISTORY: Final = 64 * MIB
_BACKLOG: Final = 256 * MIB
"""The defaults of `history-total` and `max-backlog-total`."""


_SPACES: Final = REQUEST.removesuffix(b"\r\n") + b"X: a" + b" " * 15_700 + b"b\r\n\r\n"


@dataclass(frozen=True)
class Attack:
    """What is done to a daemon with these options, and how many bytes of memory its bounds let it take for that.

    `run` attacks until the time is over, yields, and leaves when it is called again.
    """

    name: str
    run: Callable[[Daemon, Pace], Iterator[None]]
    bound: int = 0
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How long a bystander waited and turns were, but for a hundredth (seconds), and what memory grew by (bytes)."""

    attack: Attack
    ping: float
    broadcast: float
    turn: float
    growth: int

    def __str__(self) -> str:
        return (
            f"{self.attack.name:44} ping {self.ping * 1000:6.1f} ms   broadcast {self.broadcast * 1000:6.1f} ms"
            f"   turn {self.turn * 1000:4.1f} ms"
            f"   memory +{self.growth / MIB:5.0f} MiB of {(self.attack.bound + _SLACK) / MIB:.0f}"
        )

    def complaints(self, tolerance: float = 1.0) -> list[str]:
        """What is wrong. A short attack needs some tolerance: its first second is more than a hundredth of it."""
        limit = _PING_LIMIT * tolerance
        wrong = []
        if self.ping >= limit and 2 * self.turn >= limit:
            wrong.append(f"a bystander's pings took {self.ping * 1000:.0f} ms")
        if self.growth > self.attack.bound + _SLACK:
            wrong.append(f"memory grew by {self.growth / MIB:.0f} MiB")
        return wrong


def attack(daemon: Daemon, kind: Attack, seconds: float) -> Outcome:
    """Attack a daemon that is running with the attack's options."""
    with Client(daemon.control_socket, timeout=60) as asking:
        asking.stats()
        bystander = Bystander(daemon)
        with Growth(daemon) as growth:
            bystander.begin()
            with contextmanager(kind.run)(daemon, Pace(seconds)):
                bystander.end()
                turn = asking.stats()["turn_p99"]
    return Outcome(kind, bystander.ping_p99, bystander.broadcast_p99, turn, growth.most)


@asynccontextmanager
async def attacked_daemon(directory: Path, kind: Attack) -> AsyncIterator[Daemon]:
    """Run a daemon that can be attacked."""
    options = ("--log-level=error", *kind.options)
    async with running_daemon(directory, *options, module="tests.kit.timed_daemon") as daemon:
        yield daemon


def _publisher(daemon: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon.control_socket))
    return sock


# Clients that read nothing.


def _one_byte_messages(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with crowd(daemon.websocket_socket, 400, "news"), _publisher(daemon) as publisher:
        pace.flood([publisher], encode_notification("broadcast", ["news", "x"]) * 1000)
        yield


def _one_byte_messages_in_envelopes(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with crowd(daemon.websocket_socket, 400, "news", v1=True), _publisher(daemon) as publisher:
        pace.flood([publisher], encode_notification("broadcast", ["news", "x"]) * 1000)
        yield


def _middling_messages(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with crowd(daemon.websocket_socket, 400, "news"), _publisher(daemon) as publisher:
        pace.flood([publisher], encode_notification("broadcast", ["news", "x" * 300]) * 100)
        yield


def _different_channels(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """Nothing that one waits for is shared with another."""
    with ExitStack() as stack:
        for number in range(400):
            stack.enter_context(connect(daemon.websocket_socket, f"news-{number}"))
        publisher = stack.enter_context(_publisher(daemon))
        pace.flood(
            [publisher],
            b"".join(encode_notification("broadcast", [f"news-{number}", "x" * 3000]) for number in range(400)),
        )
        yield


def _evicted_history(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """Replays that nobody reads, of history that is dropped meanwhile."""
    channels = [f"news-{number}" for number in range(10)]
    with ExitStack() as stack, Client(daemon.control_socket) as publisher:
        positions = [publisher.broadcast(channel, "x") for channel in channels]
        while not pace.over:
            for channel, position in zip(channels, positions, strict=True):
                client = stack.enter_context(connect(daemon.websocket_socket, v1=True))
                since = {"epoch": position.epoch, "offset": 0}
                for _ in range(100):
                    pace.spend(65_000)
                    publisher.broadcast(channel, "x" * 65_000)
                since["offset"] = publisher.history(channel, 1).position.offset - 100
                client.sendall(text_frame(subscribe(channel, since=since)))
        yield


def _back_after_4409(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """A thousand clients that read nothing, and come back whenever they are disconnected."""
    message = encode_notification("broadcast", ["news", "x" * 10_000])
    with ExitStack() as stack:
        clients = {stack.enter_context(connect(daemon.websocket_socket, "news")) for _ in range(1000)}
        publisher = stack.enter_context(_publisher(daemon))
        publisher.setblocking(False)
        poll = select.poll()
        by_fd = {}
        for client in clients:
            poll.register(client, select.POLLRDHUP)
            by_fd[client.fileno()] = client
        begun = 0
        while not pace.over:
            with suppress(BlockingIOError):
                begun = (begun + publisher.send(message[begun:])) % len(message)
            pace.spend(len(message))
            for fd, _ in poll.poll(0):
                poll.unregister(fd)
                by_fd.pop(fd).close()
                client = stack.enter_context(connect(daemon.websocket_socket, "news"))
                poll.register(client, select.POLLRDHUP)
                by_fd[client.fileno()] = client
        yield


# Many at once.


def _empty_messages(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with crowd(daemon.websocket_socket, 1000, "news"), ExitStack() as stack:
        publishers = [stack.enter_context(_publisher(daemon)) for _ in range(4)]
        pace.flood(publishers, encode_notification("broadcast", ["news", ""]) * 1000)
        yield


def _empty_messages_on_many_channels(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with ExitStack() as stack:
        for number in range(100):
            stack.enter_context(connect(daemon.websocket_socket, *(f"news-{number}-{each}" for each in range(100))))
        publishers = [stack.enter_context(_publisher(daemon)) for _ in range(4)]
        commands = [
            encode_notification("broadcast", [f"news-{number}-{each}", ""])
            for each in range(100)
            for number in range(100)
        ]
        pace.flood(publishers, b"".join(commands))
        yield


def _many_subscriptions(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """As many channels as there may be, with the longest of names."""
    with ExitStack() as stack:
        numbers = itertools.count()
        while not pace.over:
            client = stack.enter_context(connect(daemon.websocket_socket, v1=True))
            for _ in range(2):
                frames = b"".join(text_frame(subscribe(f"{next(numbers):x<200}")) for _ in range(45))
                pace.spend(len(frames))
                client.sendall(frames)
        yield


def _come_and_go(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """Channels that nobody publishes on, with a new name each."""
    numbers = itertools.count()
    while not pace.over:
        with connect(daemon.websocket_socket) as client:
            frames = b"".join(text_frame(subscribe(f"{next(numbers):x<200}")) for _ in range(90))
            pace.spend(len(frames))
            client.sendall(frames)
    yield


def _handshakes(daemon: Daemon, pace: Pace, request: bytes, together: int) -> Iterator[None]:
    while not pace.over:
        with ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(together)]
            for sock in socks:
                sock.connect(str(daemon.websocket_socket))
                sock.sendall(request)
            pace.spend(together * len(request))
            for sock in socks:
                sock.recv(1)
    yield


def _fragments(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """Messages in as many frames as may come at once."""
    frames = b"\x01\x80" + bytes(4) + b"\x00\x80\x00\x00\x00\x00" * 90
    while not pace.over:
        with crowd(daemon.websocket_socket, 200, "news") as clients:
            pace.spend(200 * len(frames))
            for client in clients:
                client.sendall(frames)
            for client in clients:
                client.sendall(b"\x89\x80" + bytes(4))
            for client in clients:
                client.recv(100)
    yield


# The control socket.


def _long_answers(daemon: Daemon, pace: Pace) -> Iterator[None]:
    """Commands of some bytes with answers of megabytes, by one who reads nothing, and by one who reads."""
    with Client(daemon.control_socket) as publisher:
        for _ in range(100):
            publisher.broadcast("news", "x" * 65_000)
    command = encode_request(1, "history", ["news", 100])
    with _publisher(daemon) as mute, _publisher(daemon) as reader:
        mute.sendall(command * 300)
        pace.flood([reader], command)
        yield


def _lists_of_clients(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with crowd(daemon.websocket_socket, 300, *(f"{number:x<200}" for number in range(90))), ExitStack() as stack:
        publishers = [stack.enter_context(_publisher(daemon)) for _ in range(3)]
        pace.flood(publishers, encode_request(1, "clients", []) + encode_request(2, "channels", []))
        yield


def _mute_watchers(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(16):
            watcher = stack.enter_context(_publisher(daemon))
            for number in range(128):
                watcher.sendall(encode_notification("watch", [f"n*e*w*s*{number}"]))
            watcher.sendall(encode_notification("watch", ["*"]))
        publisher = stack.enter_context(_publisher(daemon))
        pace.flood([publisher], encode_notification("broadcast", ["news", "x" * 3000]))
        yield


def _watchers_of_many_patterns(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher_number in range(16):
            watcher = stack.enter_context(_publisher(daemon))
            for number in range(128):
                watcher.sendall(encode_notification("watch", [f"*a*a*a*{watcher_number}-{number}"]))
        publisher = stack.enter_context(_publisher(daemon))
        pace.flood(
            [publisher], b"".join(encode_notification("broadcast", [f"{n}:{'a' * 190}", "x"]) for n in range(1000))
        )
        yield


def _unfinished_commands(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with ExitStack() as stack:
        command = encode_notification("broadcast", ["news", "x" * 1_000_000])[:-1]
        while not pace.over:
            publisher = stack.enter_context(_publisher(daemon))
            publisher.settimeout(1)
            pace.spend(len(command))
            with suppress(OSError):
                publisher.sendall(command)
        yield


def _nested_arrays(daemon: Daemon, pace: Pace) -> Iterator[None]:
    while not pace.over:
        with _publisher(daemon) as publisher, suppress(OSError):
            data = b"\x94\x00\x01\xa4ping" + b"\xdc\xff\xff" * 1500
            pace.spend(len(data))
            publisher.sendall(data)
            publisher.shutdown(socket.SHUT_WR)
            publisher.recv(2**16)
    yield


def _many_names(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with _publisher(daemon) as publisher:
        pace.flood([publisher], encode_request(1, "broadcast_many", [[f"c{n}" for n in range(5000)], "x"]))
        yield


def _one_name_many_times(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with crowd(daemon.websocket_socket, 10, "news"), _publisher(daemon) as publisher:
        pace.flood([publisher], encode_request(1, "broadcast_many", [["news"] * 5000, "x" * 65_000]))
        yield


def _many_publishers(daemon: Daemon, pace: Pace, command: bytes) -> Iterator[None]:
    with ExitStack() as stack:
        publishers = [stack.enter_context(_publisher(daemon)) for _ in range(100)]
        pace.flood(publishers, command * 1000)
        yield


def _heavy_keys(daemon: Daemon, pace: Pace) -> Iterator[None]:
    with ExitStack() as stack:
        publisher = stack.enter_context(_publisher(daemon))
        names = [f"c{n}" for n in range(1000)]
        commands = [encode_request(1, "broadcast_many", [names, "x", f"key-{number}"]) for number in range(2000)]
        pace.flood([publisher], b"".join(commands))
        yield


ATTACKS: Final = (
    Attack("one-byte messages, 400 that do not read", _one_byte_messages, _BACKLOG),
    Attack("one-byte messages in envelopes", _one_byte_messages_in_envelopes, _BACKLOG + _HISTORY),
    Attack("messages of 300 bytes", _middling_messages, _BACKLOG + _HISTORY),
    Attack("400 channels, messages of 3000 bytes", _different_channels, _BACKLOG + _HISTORY),
    Attack("replays of history that is dropped", _evicted_history, _BACKLOG + _HISTORY),
    Attack("1000 that do not read and come back", _back_after_4409, _BACKLOG + _HISTORY),
    Attack("empty messages", _empty_messages, _BACKLOG + _HISTORY),
    Attack("empty messages on 10,000 channels", _empty_messages_on_many_channels, _BACKLOG + _HISTORY),
    Attack("subscriptions", _many_subscriptions, 400 * MIB),
    Attack("clients that come, subscribe and go", _come_and_go, _HISTORY),
    Attack("handshakes", partial(_handshakes, request=REQUEST, together=200)),
    Attack("handshakes full of spaces", partial(_handshakes, request=_SPACES, together=20)),
    Attack("messages in many frames", _fragments, 30 * MIB),
    Attack("100 that ping", partial(_many_publishers, command=encode_notification("ping", []))),
    Attack("100 that make mistakes", partial(_many_publishers, command=encode_notification("pong", []))),
    Attack(
        "100 that count channels",
        partial(_many_publishers, command=encode_request(1, "channels", [{"count": True}])),
    ),
    Attack(
        "100 that broadcast to 50 names",
        partial(
            _many_publishers,
            command=encode_request(1, "broadcast_many", [[f"c{number}" for number in range(50)], "x"]),
        ),
        _HISTORY,
    ),
    Attack("commands with long answers", _long_answers, 128 * MIB + _HISTORY),
    Attack("lists of clients and channels", _lists_of_clients, 128 * MIB),
    Attack("watchers that do not read", _mute_watchers, 128 * MIB + _HISTORY),
    Attack("watchers of many patterns", _watchers_of_many_patterns, 128 * MIB + _HISTORY),
    Attack("commands that do not end", _unfinished_commands, 128 * MIB),
    Attack("arrays in arrays", _nested_arrays),
    Attack("broadcasts to 5000 names", _many_names, _HISTORY),
    Attack("broadcasts to one name, 5000 times", _one_name_many_times, _BACKLOG + _HISTORY),
    Attack("idempotency keys for many names", _heavy_keys, 32 * MIB + _HISTORY),
)


async def _run(kind: Attack, seconds: float) -> Outcome:
    with runtime_directory() as directory:
        async with attacked_daemon(directory, kind) as daemon:
            return await trio.to_thread.run_sync(attack, daemon, kind, seconds)


def main() -> int:
    """Run the attacks whose names contain what was asked for."""
    parser = argparse.ArgumentParser(prog="make attack ARGS=…", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="how long each attack goes on (30)")
    parser.add_argument("name", nargs="?", default="", help="only those whose names contain this")
    arguments = parser.parse_args()
    failed = 0
    for kind in ATTACKS:
        if arguments.name in kind.name:
            outcome = trio.run(_run, kind, arguments.seconds)
            complaints = outcome.complaints()
            print(outcome, *(f"\n    {complaint}" for complaint in complaints), flush=True)
            failed += bool(complaints)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
