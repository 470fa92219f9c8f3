"""Runs publishers, one after another, against a running server, and prints JSON. A scenario starts it as a process.

Usage: python -m benchmarks.publishing realtimed|Redis SOCKET SERVER-PROCESS
       python -m benchmarks.publishing keeping SOCKET SERVER-PROCESS SUBSCRIBERS
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import msgpack

from benchmarks.machine import processor_seconds
from realtimed import Client

_MESSAGE: Final = "x" * 128
_CALLS: Final = 2_000
_PIPELINED: Final = 50_000
_PHP_CALLS: Final = 500
_KEPT: Final = 100_000
_COMMAND: Final = b'{"action":"subscribe","channel":"history"}'
_SUBSCRIBE: Final = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    b"\x81%c\x00\x00\x00\x00%b" % (0x80 | len(_COMMAND), _COMMAND)
)
_COMMANDS: Final = 5
_ROOT: Final = Path(__file__).resolve().parent.parent

Figures = dict[str, float]


def _spread(nanoseconds: list[int]) -> Figures:
    ordered = sorted(nanoseconds)
    return {"p50": ordered[len(ordered) // 2] / 1e3, "p99": ordered[len(ordered) * 99 // 100] / 1e3}


def _one_by_one(call: Callable[[], object], times: int) -> list[int]:
    taken = []
    for _ in range(times):
        began = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - began)
    return taken


def _with_cost(server: int, times: int, work: Callable[[], Figures]) -> Figures:
    """Add to what `work` returns how often a second it was done, and what each cost the server in microseconds."""
    began, before = time.perf_counter(), processor_seconds(server)
    figures = work()
    elapsed, used = time.perf_counter() - began, processor_seconds(server) - before
    return {**figures, "rate": times / elapsed, "cpu": used / times * 1e6}


def _pipelined(path: str, commands: bytes, last: bytes) -> Figures:
    """Write all commands, read all answers until `last` ends them; both at once, or buffers would fill."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.setblocking(False)
        unsent, end = memoryview(commands), b""
        while not end.endswith(last):
            if unsent:
                with suppress(BlockingIOError):
                    unsent = unsent[sock.send(unsent[: 1 << 16]) :]
            try:
                end = (end + sock.recv(1 << 20))[-len(last) :]
            except BlockingIOError:
                if not unsent:
                    time.sleep(0.0005)
    return {}


def _realtimed(path: str, server: int) -> dict[str, Figures]:
    ways: dict[str, Figures] = {}
    with Client(path) as client:
        client.broadcast("nobody", _MESSAGE)
        ways["realtimed, Python Client"] = _with_cost(
            server, _CALLS, lambda: _spread(_one_by_one(lambda: client.broadcast("nobody", _MESSAGE), _CALLS))
        )

        def each() -> Figures:
            client.broadcast_each(("nobody", _MESSAGE) for _ in range(_PIPELINED))
            return {}

        ways["realtimed, Python Client, broadcast_each"] = _with_cost(server, _PIPELINED, each)
    command = msgpack.packb([0, 1, "broadcast", ["nobody", _MESSAGE]])
    notification = msgpack.packb([2, "broadcast", ["nobody", _MESSAGE]])
    ping, pong = msgpack.packb([0, 99, "ping", []]), msgpack.packb([1, 99, None, "pong"])
    for name, raw in (("requests", command), ("notifications", notification)):
        commands = raw * _PIPELINED + ping
        ways[f"realtimed, pipelined {name}"] = _with_cost(
            server,
            _PIPELINED,
            lambda commands=commands: _pipelined(path, commands, pong),  # type: ignore[misc]
        )
    php = shutil.which("php")
    if php is not None:
        script = [php, str(Path(__file__).parent / "call.php"), str(_ROOT / "app" / "realtime.php"), str(_PHP_CALLS)]
        environment = {**os.environ, "REALTIME_SOCKET": path}

        def call_php() -> Figures:
            done = subprocess.run(script, env=environment, capture_output=True, check=True)
            return _spread(json.loads(done.stdout))

        ways["realtimed, PHP, a connection a call"] = _with_cost(server, _PHP_CALLS, call_php)
    broadcast = [sys.executable, "-m", "realtimed.cli.realtimectl", "--socket", path, "broadcast", "nobody", _MESSAGE]
    ways["realtimed, realtimectl broadcast"] = _spread(
        _one_by_one(lambda: subprocess.run(broadcast, check=True, capture_output=True), _COMMANDS)
    )
    return ways


def _keeping(path: str, server: int, subscribers: int) -> Figures:
    """Broadcast pipelined notifications to WebSockets that read everything."""
    raw = msgpack.packb([2, "broadcast", ["history", _MESSAGE]])
    ping, pong = msgpack.packb([0, 99, "ping", []]), msgpack.packb([1, 99, None, "pong"])
    with ExitStack() as stack:
        for _ in range(subscribers):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(Path(path).with_name("realtime-ws.sock")))
            client.sendall(_SUBSCRIBE)
            client.recv(4096)
            reader = threading.Thread(target=_read_all, args=(client,))
            reader.start()
            stack.callback(reader.join)
            stack.callback(client.shutdown, socket.SHUT_RDWR)
        _pipelined(path, raw * 1000 + ping, pong)
        return _with_cost(server, _KEPT, lambda: _pipelined(path, raw * _KEPT + ping, pong))


def _read_all(client: socket.socket) -> None:
    while client.recv(1 << 20):
        pass


def _redis(path: str, server: int) -> dict[str, Figures]:
    message = _MESSAGE.encode()
    command = b"*3\r\n$7\r\nPUBLISH\r\n$6\r\nnobody\r\n$%d\r\n%b\r\n" % (len(message), message)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

        def call() -> None:
            sock.sendall(command)
            sock.recv(100)

        ways = {
            "Redis, PUBLISH": _with_cost(server, _CALLS, lambda: _spread(_one_by_one(call, _CALLS))),
        }
    ways["Redis, pipelined PUBLISH"] = _with_cost(
        server, _PIPELINED, lambda: _pipelined(path, command * _PIPELINED + b"PING\r\n", b"+PONG\r\n")
    )
    return ways


if __name__ == "__main__":
    if sys.argv[1] == "keeping":
        print(json.dumps(_keeping(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        sys.exit()
    measure = {"realtimed": _realtimed, "Redis": _redis}[sys.argv[1]]
    print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
