"""One connection of the daemon in memory: its real session over a real socket, with a clock that jumps."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from realtimed.config.loading import load
from realtimed.control.server import Connection
from realtimed.daemon import Daemon
from realtimed.net.stream import QueuedStream

__all__ = ["BURST", "MAX_INBOUND", "cut", "publisher_hears", "websocket_hears"]

MAX_INBOUND: Final = 1024
BURST: Final = 60

_CONFIG: Final = load({
    "max_inbound": MAX_INBOUND, "inbound_burst": BURST, "max_message": 200, "history_size": 3, "max_connections": 10,
})  # fmt: skip

_BEYOND_ALL_DEADLINES: Final = 1000.0
"""Seconds of a clock that jumps: no deadline of the daemon is as long."""


def cut(data: bytes, how: int) -> list[bytes]:
    """Cut data into at most nine pieces, in a way that `how` says."""
    if how % 4 == 0:
        return [data]
    size = max(how, len(data) // 8 + 1)
    return [data[at : at + size] for at in range(0, len(data), size)]


def websocket_hears(pieces: Sequence[bytes]) -> bytes:
    """Return all that a client hears that sends these pieces, a request's head first, and then hangs up."""
    return _run(_serve_websocket, pieces)


def publisher_hears(pieces: Sequence[bytes]) -> bytes:
    """Return all that a publisher hears that sends these pieces and then hangs up."""
    return _run(_serve_publisher, pieces)


def _run(serve: Callable[[Daemon, socket.socket], Awaitable[None]], pieces: Sequence[bytes]) -> bytes:
    return trio.run(_converse, serve, pieces, clock=MockClock(autojump_threshold=0))


async def _converse(serve: Callable[[Daemon, socket.socket], Awaitable[None]], pieces: Sequence[bytes]) -> bytes:
    daemon = Daemon(_CONFIG)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    heard = bytearray()

    async def listen() -> None:
        try:
            async for data in peer:
                heard.extend(data)
        except trio.BrokenResourceError:
            pass  # the daemon has hung up on what it did not want to read

    async def speak() -> None:
        try:
            for piece in pieces:
                await peer.send_all(piece)
                await wait_all_tasks_blocked()
            await peer.send_eof()
        except trio.BrokenResourceError:
            pass

    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as peer, trio.open_nursery() as background:
        background.start_soon(daemon.fan_out.run)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            nursery.start_soon(speak)
            with trio.fail_after(_BEYOND_ALL_DEADLINES):
                await serve(daemon, ours)
        background.cancel_scope.cancel()
    assert ours.fileno() < 0, "the socket is closed"
    assert not daemon.sessions.members
    assert not daemon.service.connections
    assert not daemon.hub.subscriptions
    assert not daemon.hub.watchers
    assert not daemon.backlogs.held
    assert not daemon.answers.held
    return bytes(heard)


async def _serve_websocket(daemon: Daemon, sock: socket.socket) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.sessions.run)
        daemon.sessions.welcome(daemon.sessions.client_stream(sock))
        await daemon.sessions.emptied()
        nursery.cancel_scope.cancel()


async def _serve_publisher(daemon: Daemon, sock: socket.socket) -> None:
    await Connection(QueuedStream(sock, daemon.answers), daemon.service).run()
