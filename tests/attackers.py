"""Clients that mean no good, on plain sockets, and a bystander that must not notice them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

from benchmarks.machine import resident_bytes
from tests.clients import REQUEST, subscribe
from tests.stack import Daemon

MIB: Final = 2**20

_PATIENCE: Final = 60
"""Seconds that a socket may take over anything."""

_PINGS_PER_SECOND: Final = 45
"""About as many as a client may send."""

_V1: Final = b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"


def text_frame(text: str) -> bytes:
    """Return a client's frame, masked with zeros."""
    payload = text.encode()
    size = len(payload)
    head = bytes([0x81, 0x80 | size]) if size < 126 else bytes([0x81, 0x80 | 126]) + size.to_bytes(2, "big")
    return head + bytes(4) + payload


def connect(path: Path, *channels: str, v1: bool = False, headers: str = "") -> socket.socket:
    """Open a WebSocket and subscribe; read nothing but the handshake's answer."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(_PATIENCE)
    sock.connect(str(path))
    request = REQUEST.removesuffix(b"\r\n") + headers.encode()
    sock.sendall(request + (_V1 if v1 else b"\r\n"))
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = sock.recv(1)
        assert more, answer
        answer += more
    assert b" 101 " in answer, answer
    if channels:
        sock.sendall(b"".join(text_frame(subscribe(channel)) for channel in channels))
    return sock


@contextmanager
def crowd(path: Path, count: int, *channels: str, v1: bool = False) -> Iterator[Sequence[socket.socket]]:
    """Have so many clients that read nothing."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(path, *channels, v1=v1)) for _ in range(count)]


class Bystander:
    """A client that pings the daemon as often as it may, and remembers how long each answer took (seconds)."""

    def __init__(self, path: Path) -> None:
        self.waits: list[float] = []
        self._path = path
        self._over = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    @property
    def p99(self) -> float:
        return sorted(self.waits)[len(self.waits) * 99 // 100]

    def _run(self) -> None:
        try:
            with connect(self._path) as sock:
                while not self._over.wait(1 / _PINGS_PER_SECOND):
                    began = time.monotonic()
                    sock.sendall(b"\x89\x81\x00\x00\x00\x00p")
                    heard = b""
                    while b"\x8a\x01p" not in heard:  # the daemon pings as well
                        more = sock.recv(100)
                        assert more, heard
                        heard += more
                    self.waits.append(time.monotonic() - began)
        except (OSError, AssertionError) as error:
            self._failed = error


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
