"""Sessions without a daemon, whose clients are the other ends of socket pairs."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from realtimed.config.settings import Config
from realtimed.hub.hub import Hub
from realtimed.websocket.sessions import Sessions

__all__ = ["connect", "running_sessions"]


@asynccontextmanager
async def running_sessions(**settings: Any) -> AsyncIterator[Sessions]:
    """Serve clients, with these settings in place of the defaults, until the end of the block. Then end them all."""
    config = Config(**settings)
    hub = Hub(max_message=config.max_message, max_channels=config.max_channels)
    sessions = Sessions(config, hub, released=lambda: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(sessions.run)
        yield sessions
        nursery.cancel_scope.cancel()


def connect(sessions: Sessions, sent: bytes = b"") -> socket.socket:
    """Open a connection on which `sent` waits to be read; return the peer's end, which does not block."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    peer.sendall(sent)
    sessions.welcome(sessions.client_stream(ours))
    return peer
