"""The exception boundary of each publisher's connection."""

from __future__ import annotations

import logging

from realtimed.control.server import Connection
from realtimed.control.service import Service
from realtimed.net.stream import QueuedStream
from realtimed.process.logs import Event

__all__ = ["run_connection", "serve_publisher"]

log = logging.getLogger(__name__)


async def serve_publisher(stream: QueuedStream, service: Service) -> None:
    """Serve one publisher."""
    await run_connection(Connection(stream, service))


async def run_connection(connection: Connection) -> None:
    """Run a connection. A fault inside is a bug, and ends this connection only."""
    try:
        await connection.run()
    except Exception:
        log.exception(Event("internal error", client="publisher"))
