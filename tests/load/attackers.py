"""Clients that mean no good, on plain sockets, and a bystander that must not notice them.

`python -m tests.load.attackers WEBSOCKET CONTROL` is the bystander, in a process of its own so that an attacker does
not take its time: it goes on until its standard input ends, and then prints how long it had to wait, in JSON.
"""

from __future__ import annotations

import json
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self, cast

from benchmarks.machine import resident_bytes
from realtimed import Client
from tests.kit.clients import REQUEST, subscribe
from tests.kit.frames import masked_frame
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import Daemon

__all__ = ["MIB", "Bystander", "Growth", "Pace", "connect", "crowd", "text_frame"]

MIB: Final = 2**20


_ROUNDS_PER_SECOND: Final = 40
"""How often the bystander pings and publishes: a little less than a client may."""

_V1: Final = b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"


def text_frame(text: str) -> bytes:
    """Return a client's frame, masked with zeros."""
    return masked_frame(text.encode())


def connect(path: Path, *channels: str, v1: bool = False, headers: str = "") -> socket.socket:
    """Open a WebSocket and subscribe; read nothing but the handshake's answer.

    Raises `ConnectionRefusedError` if the handshake is refused.
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(LONG_PATIENCE)
    sock.connect(str(path))
    request = REQUEST.removesuffix(b"\r\n") + headers.encode()
    sock.sendall(request + (_V1 if v1 else b"\r\n"))
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = sock.recv(1)
        if not more:
            raise ConnectionRefusedError(answer)
        answer += more
    if b" 101 " not in answer:
        raise ConnectionRefusedError(answer)
    if channels:
        sock.sendall(b"".join(text_frame(subscribe(channel)) for channel in channels))
    return sock


@contextmanager
def crowd(path: Path, count: int, *channels: str, v1: bool = False) -> Iterator[Sequence[socket.socket]]:
    """Keep this many clients that read nothing."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(path, *channels, v1=v1)) for _ in range(count)]


class Pace:
    """How long an attack goes on, and at most how many bytes a second it sends."""

    def __init__(self, seconds: float, rate: float = 4e6) -> None:
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._rate = rate
        self._spent = 0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end

    @property
    def left(self) -> float:
        """How many seconds are left."""
        return max(self._end - time.monotonic(), 0)

    def spend(self, count: int) -> None:
        """Wait until this many more bytes may be sent."""
        self._spent += count
        time.sleep(max(min(self._began + self._spent / self._rate, self._end) - time.monotonic(), 0))

    def flood(self, socks: Sequence[socket.socket], data: bytes) -> int:
        """Send `data` again and again on each socket that takes it, until the time is over; read what comes back.

        Returns how many bytes were sent. A connection that the daemon ends is no longer used.
        """
        sent_in_all = 0
        at = dict.fromkeys(socks, 0)
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while not self.over and at:
                for key, events in selector.select(min(self.left, 0.1)):
                    sock = cast(socket.socket, key.fileobj)
                    sent = self._exchange(sock, events, data[at[sock] : at[sock] + 2**16])
                    if sent is None:
                        selector.unregister(sock)
                        del at[sock]
                    else:
                        at[sock] = (at[sock] + sent) % len(data)
                        sent_in_all += sent
                        self.spend(sent)
        return sent_in_all

    def _exchange(self, sock: socket.socket, events: int, data: bytes) -> int | None:
        """Read what is there and send what goes; return how much that was, or None if the daemon has hung up."""
        try:
            if events & selectors.EVENT_READ and not sock.recv(2**18):
                return None
            return sock.send(data) if events & selectors.EVENT_WRITE else 0
        except BlockingIOError:
            return 0
        except OSError:
            return None


class Bystander:
    """Pings the daemon, and publishes something for itself, many times a second; knows how long each took (seconds)."""

    def __init__(self, daemon: Daemon) -> None:
        self.pings: list[float] = []
        self.broadcasts: list[float] = []
        sockets = daemon.websocket_socket, daemon.control_socket
        self._command = [sys.executable, "-m", "tests.load.attackers", *map(str, sockets)]
        self._process: subprocess.Popen[str]

    def begin(self) -> None:
        """Stand by."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def end(self) -> None:
        """Leave."""
        try:
            answer = self._process.communicate(timeout=LONG_PATIENCE)[0]
            self.pings, self.broadcasts = json.loads(answer)
        finally:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def ping_p99(self) -> float:
        return _p99(self.pings)

    @property
    def broadcast_p99(self) -> float:
        return _p99(self.broadcasts)


def _p99(waits: list[float]) -> float:
    return sorted(waits)[len(waits) * 99 // 100]


class Growth:
    """How much resident memory a daemon has gained since this was made, in bytes, looked at every 20 ms."""

    def __init__(self, daemon: Daemon) -> None:
        self._pid = daemon.process.pid
        self._before = self.highest = resident_bytes(self._pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def most(self) -> int:
        return self.highest - self._before

    def _run(self) -> None:
        while not self._over.wait(0.02):
            self.highest = max(self.highest, resident_bytes(self._pid))


def _stand_by(websocket: Path, control: Path) -> None:
    """Be the bystander."""
    pings: list[float] = []
    broadcasts: list[float] = []
    with connect(websocket, "bystander") as sock, Client(control) as publisher:
        while publisher.broadcast("bystander", "ready").recipients != 1:
            pass
        print("ready", flush=True)
        heard = b""

        def wait_for(what: bytes) -> None:
            nonlocal heard
            while what not in heard:  # the daemon pings as well
                more = sock.recv(4096)
                if not more:
                    sys.exit(f"the daemon has hung up: {heard!r}")
                heard += more
            heard = heard[heard.index(what) + len(what) :]

        number = 0
        while not select.select([sys.stdin], [], [], 1 / _ROUNDS_PER_SECOND)[0]:
            number += 1
            began = time.monotonic()
            sock.sendall(b"\x89\x81\x00\x00\x00\x00p")
            wait_for(b"\x8a\x01p")
            ponged = time.monotonic()
            publisher.broadcast("bystander", f"<{number}>")
            wait_for(f"<{number}>".encode())
            pings.append(ponged - began)
            broadcasts.append(time.monotonic() - ponged)
    print(json.dumps([pings, broadcasts]))


if __name__ == "__main__":
    _stand_by(Path(sys.argv[1]), Path(sys.argv[2]))
