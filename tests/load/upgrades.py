"""Upgrades under all kinds of clients at once: every one gets each byte once and in order, and nobody is closed.

`python -m tests.load.upgrades --help`. Prints what each upgrade has cost, and exits with 1 if any client, any publisher
or any upgrade was not as it should be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import select
import socket
import ssl
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from realtimed import Client, RefusedError
from tests.kit.blocking import caddy_in_thread, daemon_in_thread
from tests.kit.clients import REQUEST, subscribe
from tests.kit.failing_successor import fail_at
from tests.kit.frames import masked_frame
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, runtime_directory
from tests.kit.successors import ended, open_files, resident_bytes
from tests.load.returning import allow_open_files

__all__ = ["Outcome", "run"]

MEMBERS: Final = 200
"""Clients of each channel of the crowd."""

_V1: Final = b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"
_PONG: Final = masked_frame(b"", 0x8A)
_READ: Final = 2**16
_KEPT: Final = 3000
"""Messages that those who come back have missed."""

_OPTIONS: Final = (
    "--heartbeat", "2s", "--history-size", "5000", "--max-backlog", "64M", "--backlog-timeout", "60s",
    "--max-connections-per-address", "0", "--handshakes-per-address", "0", "--log-level", "warning",
)  # fmt: skip


@dataclass
class Outcome:
    """What has been seen: faults in words, things counted, and the upgrades' pauses in seconds."""

    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)

    def fault(self, who: str, what: object) -> None:
        self.faults.append(f"{who}: {str(what)[:300]}")


class Peer:
    """A client that blocks: it reads frames one by one, and answers pings."""

    def __init__(self, sock: socket.socket, outcome: Outcome, *, v1: bool = True) -> None:
        self._outcome = outcome
        self.socket = sock
        self.socket.sendall(REQUEST.removesuffix(b"\r\n") + (_V1 if v1 else b"\r\n"))
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if b" 101 " not in head:
            raise ConnectionError(head)
        if v1:
            self.event()

    def _more(self) -> None:
        data = self.socket.recv(_READ)
        if not data:
            raise ConnectionError("the connection has ended")
        self._buffer += data

    def frame(self) -> tuple[int, bytes]:
        while (found := frame_in(self._buffer, 0)) is None:
            self._more()
        first, begin, end = found
        payload, self._buffer = self._buffer[begin:end], self._buffer[end:]
        return first, payload

    def event(self) -> dict[str, Any]:
        while True:
            first, payload = self.frame()
            if first == 0x89:
                self.socket.sendall(_PONG)
                self._outcome.counts["pings answered"] += 1
            elif first == 0x88:
                raise ConnectionError(f"closed: {payload!r}")
            elif first != 0x8A:
                event: dict[str, Any] = json.loads(payload)
                return event

    def say(self, **fields: object) -> None:
        self.socket.sendall(masked_frame(json.dumps(fields).encode()))

    def expect(self, **fields: object) -> None:
        event = self.event()
        if event != fields:
            raise ValueError(f"{event} in place of {fields}")


def frame_in(data: bytes | bytearray, at: int) -> tuple[int, int, int] | None:
    """Return the first byte of a server's frame, and where its payload begins and ends; None if it is not whole."""
    if len(data) < at + 2:
        return None
    size, begin = data[at + 1], at + 2
    if size >= 126:
        begin += 2 if size == 126 else 8
        size = int.from_bytes(data[at + 2 : begin], "big")
    return (data[at], begin, begin + size) if len(data) >= begin + size else None


# Those who do something special. Each goes on until `over` is set.

Actor = Callable[["Scene"], None]


@dataclass
class Scene:
    """What all actors share."""

    daemon: Daemon
    outcome: Outcome
    epoch: str = ""
    over: threading.Event = field(default_factory=threading.Event)
    made: Counter[str] = field(default_factory=Counter)
    """How many calls each publisher has made."""

    sockets: list[socket.socket] = field(default_factory=list)
    """All sockets of actors: what a fault has left open is closed at the end."""

    def connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        self.sockets.append(sock)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.daemon.websocket_socket))
        return sock

    def peer(self, *, v1: bool = True) -> Peer:
        return Peer(self.connected(), self.outcome, v1=v1)

    def client(self) -> Client:
        return Client(self.daemon.control_socket, timeout=PATIENCE)

    def pause(self, longest: float) -> None:
        self.over.wait(random.random() * longest)


def fragments(scene: Scene) -> None:
    """Send messages in fragments, with pings in between, and with pauses that an upgrade fits into."""
    peer = scene.peer()
    for number in itertools.count():
        if scene.over.is_set():
            return
        text = json.dumps({"action": "ping", "id": number}).encode()
        a = random.randrange(1, len(text))
        b = random.randrange(a, len(text) + 1)
        peer.socket.sendall(masked_frame(text[:a], 0x01))
        scene.pause(0.3)
        if random.random() < 0.3:
            peer.socket.sendall(masked_frame(b"abc", 0x89))
        peer.socket.sendall(masked_frame(text[a:b], 0x00))
        scene.pause(0.3)
        peer.socket.sendall(masked_frame(text[b:], 0x80))
        peer.expect(event="pong", id=number)
        scene.outcome.counts["messages in fragments"] += 1


def halves(scene: Scene) -> None:
    """Send each frame in two pieces."""
    peer = scene.peer()
    for number in itertools.count():
        if scene.over.is_set():
            return
        frame = masked_frame(json.dumps({"action": "ping", "id": number}).encode())
        cut = random.randrange(1, len(frame))
        peer.socket.sendall(frame[:cut])
        scene.pause(0.3)
        peer.socket.sendall(frame[cut:])
        peer.expect(event="pong", id=number)
        scene.outcome.counts["frames in two pieces"] += 1


def slow(scene: Scene) -> None:
    """Read a busy channel in bursts, so that much waits in the daemon."""
    peer = scene.peer()
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    readable = select.poll()
    readable.register(peer.socket, select.POLLIN)
    peer.say(action="subscribe", channel="big")
    last = peer.event()["offset"]
    while not scene.over.is_set():
        scene.over.wait(0.4)
        until = time.monotonic() + 0.15
        while time.monotonic() < until:
            if not readable.poll(100):
                continue
            offset = peer.event()["offset"]
            if offset != last + 1:
                raise ValueError(f"message {offset} behind message {last}")
            last = offset
            scene.outcome.counts["messages to slow consumers"] += 1


def replays(scene: Scene) -> None:
    """Come back to thousands of messages, and read them slowly."""
    while not scene.over.is_set():
        peer = scene.peer()
        peer.say(action="subscribe", channel="kept", since={"epoch": scene.epoch, "offset": 1})
        scene.pause(0.8)
        event = peer.event()
        if not event["recovered"]:
            raise ValueError(event)
        for offset in range(2, event["offset"] + 1):
            if (got := peer.event()["offset"]) != offset:
                raise ValueError(f"message {got} in place of {offset}")
            if random.random() < 0.01:
                scene.pause(0.04)
        scene.outcome.counts["replays"] += 1
        peer.socket.close()


def comers_and_goers(scene: Scene) -> None:
    """Connect, subscribe, and go: with a Close or without a word."""
    while not scene.over.is_set():
        peer = scene.peer(v1=random.random() < 0.5)
        peer.socket.sendall(masked_frame(subscribe(f"x{random.randrange(9)}").encode()))
        if random.random() < 0.5:
            peer.socket.sendall(masked_frame((1000).to_bytes(2, "big"), 0x88))
            while peer.frame()[0] != 0x88:
                pass
        peer.socket.close()
        scene.outcome.counts["came and went"] += 1


def half_heads(scene: Scene) -> None:
    """Send each request in two pieces."""
    while not scene.over.is_set():
        sock = scene.connected()
        cut = random.randrange(1, len(REQUEST))
        sock.sendall(REQUEST[:cut])
        scene.pause(0.5)
        sock.sendall(REQUEST[cut:])
        if not sock.recv(_READ).startswith(b"HTTP/1.1 101 "):
            raise ValueError("a request in two pieces was not accepted")
        sock.close()
        scene.outcome.counts["requests in two pieces"] += 1


def calls_of_their_own(scene: Scene) -> None:
    """Publish as PHP does: a connection for each call, with a key."""
    name = f"p{threading.get_ident()}"
    for number in itertools.count():
        if scene.over.is_set():
            return
        with scene.client() as client:
            client.broadcast("calls", f"{name} {number}", key=f"{name} {number}")
        scene.made[name] = number + 1
        scene.outcome.counts["calls with a connection each"] += 1
        scene.over.wait(0.002)


def calls_on_one_connection(scene: Scene) -> None:
    """Publish on a connection that is kept, without keys: no call may fail or be repeated."""
    name = f"k{threading.get_ident()}"
    with scene.client() as client:
        for number in itertools.count():
            if scene.over.is_set():
                return
            client.broadcast("calls", f"{name} {number}")
            scene.made[name] = number + 1
            scene.outcome.counts["calls on kept connections"] += 1
            scene.over.wait(0.004)


def big_messages(scene: Scene) -> None:
    """Publish large messages to the slow ones."""
    with scene.client() as client:
        while not scene.over.is_set():
            client.broadcast("big", "x" * 20_000)
            scene.over.wait(0.02)


def tail(scene: Scene) -> None:
    """Follow the calls on the control socket: each once, in the order of each publisher."""
    seen = Counter[str]()
    with scene.client() as client, client.subscribe("calls") as subscription:
        last = None
        while (message := subscription.receive(timeout=2)) is not None or not scene.over.is_set():
            if message is None:
                continue
            if last is not None and message.offset != last + 1:
                raise ValueError(f"call {message.offset} behind {last}")
            last = message.offset
            name, number = str(message.message).split()
            if int(number) != seen[name]:
                raise ValueError(f"{name} has said {number} behind {seen[name] - 1}")
            seen[name] += 1
            scene.outcome.counts["messages that were followed"] += 1
    if seen != scene.made:
        raise ValueError(f"{seen} in place of {scene.made}")


_ACTORS: Final[tuple[tuple[Actor, int], ...]] = (
    (fragments, 3), (halves, 3), (slow, 2), (replays, 3), (comers_and_goers, 3), (half_heads, 2),
    (calls_of_their_own, 2), (calls_on_one_connection, 2), (big_messages, 1),
)  # fmt: skip


@contextmanager
def acting(scene: Scene) -> Iterator[None]:
    """Let all actors act. At the end they stop, and their faults are in the outcome."""

    def act(actor: Actor) -> None:
        try:
            actor(scene)
        except (OSError, ValueError, RefusedError, KeyError) as error:
            scene.outcome.fault(actor.__name__, f"{type(error).__name__}: {error}")

    followers = [threading.Thread(target=act, args=(tail,)) for _ in range(2)]
    others = [threading.Thread(target=act, args=(actor,)) for actor, count in _ACTORS for _ in range(count)]
    for thread in followers:
        thread.start()
    with scene.client() as client:
        while client.stats()["subscriptions"] < len(followers):
            pass
    for thread in others:
        thread.start()
    try:
        yield
    finally:
        scene.over.set()
        for thread in [*others, *followers]:
            thread.join()
        for sock in scene.sockets:
            sock.close()


class Member:
    """One of the crowd, with a socket that does not block. Checks every frame as it comes."""

    def __init__(self, sock: socket.socket, channel: int, *, v1: bool) -> None:
        self.socket = sock
        self.channel = channel
        self.v1 = v1
        self.offset = 0
        self._buffer = bytearray()

    def read(self) -> int:
        """Take what has come; return how many messages that were. Raises `ValueError` and `ConnectionError`."""
        try:
            while data := self.socket.recv(_READ):
                self._buffer += data
                if not isinstance(self.socket, ssl.SSLSocket):
                    break
            else:
                raise ConnectionError("the connection has ended")
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        before, at = self.offset, 0
        while (found := frame_in(self._buffer, at)) is not None:
            first, begin, end = found
            self._take(first, bytes(self._buffer[begin:end]))
            at = end
        del self._buffer[:at]
        return self.offset - before

    def _take(self, first: int, payload: bytes) -> None:
        if first == 0x89:
            self.socket.send(_PONG)
        elif first == 0x88:
            raise ConnectionError(f"closed: {payload!r}")
        elif not self.v1:
            self._check(payload.decode(), self.offset + 1)
        else:
            event = json.loads(payload)
            if event["event"] == "message":
                self._check(event["data"], event["offset"])
            elif event["event"] != "subscribed":
                raise ValueError(event)

    def _check(self, text: str, offset: int) -> None:
        if (text, offset) != (said(self.channel, self.offset + 1), self.offset + 1):
            raise ValueError(f"message {offset}, {text[:40]!r}, behind message {self.offset} of crowd-{self.channel}")
        self.offset = offset


def said(channel: int, offset: int) -> str:
    """Return the message of a channel of the crowd with this offset."""
    return f"{channel} {offset} {'x' * 50}"


class Crowd:
    """Thousands who only listen."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._epoll = select.epoll()
        self._members: dict[int, Member] = {}
        self.sent = Counter[int]()
        """How many messages were published on each channel."""

    @property
    def channels(self) -> int:
        return -(-len(self._members) // MEMBERS)

    def add(self, path: Path, port: int | None) -> None:
        """Connect one more: directly, or through Caddy with TLS."""
        number = len(self._members)
        channel, v1 = number // MEMBERS, bool(number % 2)
        sock = _connected(path, port)
        request = REQUEST.removesuffix(b"\r\n")
        if port is not None:
            request = request.replace(b"Host: localhost", b"Host: localhost:%d" % port)
            request += b"Origin: https://localhost:%d\r\n" % port
        sock.sendall(request + (_V1 if v1 else b"\r\n"))
        answer = b""
        while b"\r\n\r\n" not in answer or (v1 and b"welcome" not in answer):
            data = sock.recv(_READ)
            if not data:
                raise ConnectionError(answer)
            answer += data
        if b" 101 " not in answer.partition(b"\r\n")[0]:
            raise ConnectionError(answer)
        sock.sendall(masked_frame(subscribe(f"crowd-{channel}").encode()))
        sock.setblocking(False)
        self._members[sock.fileno()] = Member(sock, channel, v1=v1)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def read(self, timeout: float) -> None:
        """Read what has come."""
        for fd, _ in self._epoll.poll(timeout, 512):
            member = self._members[fd]
            try:
                self._outcome.counts["messages to the crowd"] += member.read()
            except (ValueError, OSError) as error:
                self._outcome.fault("crowd", error)
                self._epoll.unregister(fd)

    def check(self) -> None:
        """Wait until everyone has everything."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(each.offset < self.sent[each.channel] for each in self._all()):
            self.read(0.1)
        for each in self._all():
            if each.offset != self.sent[each.channel]:
                self._outcome.fault("crowd", f"{each.offset} of {self.sent[each.channel]} messages have come")

    def _all(self) -> Iterator[Member]:
        return iter(self._members.values())

    def close(self) -> None:
        for each in self._all():
            each.socket.close()
        self._epoll.close()


def _connected(path: Path, port: int | None) -> socket.socket:
    if port is None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        return sock
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(("localhost", port), PATIENCE), server_hostname="localhost")


def publish(scene: Scene, crowd: Crowd, rate: float, until: Callable[[], bool]) -> None:
    """Publish to the crowd, one message after the other with a receipt each: consecutive, in one epoch."""
    epochs: dict[int, str] = {}
    with scene.client() as client:
        began, count = time.monotonic(), 0
        while not until():
            channel = count % crowd.channels
            offset = crowd.sent[channel] + 1
            try:
                receipt = client.broadcast(f"crowd-{channel}", said(channel, offset), key=f"{channel} {offset}")
            except (OSError, RefusedError) as error:
                scene.outcome.fault("publisher", error)
                return
            crowd.sent[channel] = offset
            count += 1
            if (receipt.offset, receipt.epoch) != (offset, epochs.setdefault(channel, receipt.epoch)):
                scene.outcome.fault("publisher", f"{receipt} in place of offset {offset}, epoch {epochs[channel]}")
            scene.over.wait(max(began + count / rate - time.monotonic(), 0))
    scene.outcome.counts["calls with receipts"] = count


def upgrade(scene: Scene, number: int, failing: str) -> None:
    """Upgrade once; `failing` says what goes wrong, "" if nothing does."""
    with fail_at(scene.daemon, failing), scene.client() as client:
        try:
            report = client.upgrade()
        except RefusedError as error:
            if not failing or error.code != "upgrade_failed":
                scene.outcome.fault("upgrade", error)
            print(f"upgrade {number}: {failing or 'failed'}: {error.message}", flush=True)
            return
    if failing:
        scene.outcome.fault("upgrade", f"it has not failed, though {failing}")
    scene.outcome.pauses.append(float(report["pause"]))
    print(
        f"upgrade {number}: {report['clients']} clients, {report['publishers']} publishers,"
        f" paused {report['pause'] * 1000:.0f} ms, {report['seconds']:.2f} s in all",
        flush=True,
    )


FAILURES: Final = ("it crashes before it is ready", "it hangs before it is ready", "it finds a wrong configuration")


def run(clients: int, behind_caddy: int, upgrades: int, failures: int, rate: float, interval: float) -> Outcome:
    """Upgrade under all of them; return what was seen."""
    outcome = Outcome()
    with ExitStack() as stack:
        directory = stack.enter_context(runtime_directory())
        configuration = directory / "realtimed.toml"
        configuration.write_text("")
        options = (*_OPTIONS, "--config", str(configuration))
        daemon = stack.enter_context(daemon_in_thread(directory, *options, module="tests.kit.failing_successor"))
        stack.callback(lambda: print(daemon.log[-6000:], file=sys.stderr) if outcome.faults else None)
        stack.enter_context(ended(daemon))
        scene, crowd = Scene(daemon, outcome), Crowd(outcome)
        stack.callback(crowd.close)
        with scene.client() as client:
            receipts = client.broadcast_each(("kept", "k" * 300) for _ in range(_KEPT))
            scene.epoch = receipts[0].epoch  # type: ignore[union-attr]  # nothing is refused
            first = client.broadcast("keyed", "once", key="K")
        port = stack.enter_context(caddy_in_thread(directory, daemon)) if behind_caddy else None
        done = threading.Event()
        reader = threading.Thread(target=_read_until, args=(crowd, done))
        reader.start()
        for number in range(clients + behind_caddy):
            crowd.add(daemon.websocket_socket, port if number >= clients else None)
        print(f"{clients} clients, {behind_caddy} more through Caddy with TLS", flush=True)
        stack.enter_context(acting(scene))
        publisher = threading.Thread(target=publish, args=(scene, crowd, rate, done.is_set))
        publisher.start()
        plan = ["", *FAILURES[:failures], *[""] * (upgrades - 1)]
        for number, failing in enumerate(plan, 1):
            scene.over.wait(interval)
            upgrade(scene, number, failing)
            if number in (1, len(plan)):
                files, memory = open_files(daemon), resident_bytes(daemon)
                print(f"after it: {files} open files, {memory / 2**20:.1f} MiB", flush=True)
        scene.over.wait(interval)
        done.set()
        publisher.join()
        reader.join()
        crowd.check()
        with scene.client() as client:
            again = client.broadcast("keyed", "once", key="K")
            if again != first._replace(repeated=True):
                outcome.fault("keys", f"{again} in place of {first}")
            if closed := client.stats()["closed"].keys() - {"1000", "1006"}:  # those who went by themselves
                outcome.fault("closed", f"the daemon has closed with {sorted(closed)}")
        if "Traceback" in daemon.log or "internal error" in daemon.log:
            outcome.fault("log", daemon.log[-2000:])
    return outcome


def _read_until(crowd: Crowd, done: threading.Event) -> None:
    while not done.is_set():
        crowd.read(0.1)


def main() -> int:
    """Run what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="make upgrades ARGS='…'", description=__doc__)
    parser.add_argument("--clients", type=int, default=8000, help="who only listen (default: 8000)")
    parser.add_argument("--behind-caddy", type=int, default=2000, help="more of them, with TLS (default: 2000)")
    parser.add_argument("--upgrades", type=int, default=10, help="that succeed (default: 10)")
    parser.add_argument("--failures", type=int, default=3, help="upgrades that fail (default: 3, at most)")
    parser.add_argument("--rate", type=float, default=200, help="messages a second to the crowd (default: 200)")
    parser.add_argument("--interval", type=float, default=3, help="seconds between upgrades (default: 3)")
    given = parser.parse_args()
    allow_open_files(given.clients + given.behind_caddy)
    outcome = run(given.clients, given.behind_caddy, given.upgrades, given.failures, given.rate, given.interval)
    for what, count in outcome.counts.most_common():
        print(f"{count:10,}  {what}")
    if outcome.pauses:
        median, longest = statistics.median(outcome.pauses) * 1000, max(outcome.pauses) * 1000
        print(f"pauses: median {median:.0f} ms, longest {longest:.0f} ms")
    for fault in outcome.faults[:20]:
        print(f"FAULT {fault}", flush=True)
    print("every client has everything, once and in order" if not outcome.faults else f"{len(outcome.faults)} faults")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
