"""Sessions without a daemon, whose clients are the other ends of socket pairs."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from realtimed.config.settings import Config
from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.websocket.sessions import Sessions

__all__ = ["connect", "running_sessions"]


@asynccontextmanager
async def running_sessions(**settings: Any) -> AsyncIterator[Sessions]:
    """Serve clients, with these settings in place of the defaults, until the end of the block. Then end them all."""
    config = Config(**settings)
    kept = Retention(config.history_size, config.history_age)
    history = History(limit=config.history_total, clock=time.monotonic, default=kept)
    hub = Hub(max_message=config.max_message, max_channels=config.max_channels, history=history)
    sessions = Sessions(config, hub, released=lambda: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(sessions.run)
        yield sessions
        nursery.cancel_scope.cancel()


def connect(sessions: Sessions, sent: bytes = b"", *, tcp: bool = False) -> socket.socket:
    """Open a connection on which `sent` waits to be read; return the peer's end, which does not block."""
    ours, peer = _tcp_pair() if tcp else socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    peer.sendall(sent)
    sessions.welcome(sessions.client_stream(ours))
    return peer


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = socket.create_connection(listening.getsockname())
        return listening.accept()[0], peer
