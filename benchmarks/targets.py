"""The description of a server to measure: how to run it, subscribe to it and publish to it.

In templates ######## stands for the number of a channel.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.processes import running, until_connectable

__all__ = ["CHANNEL", "REQUEST", "Server", "Target", "length_prefixed", "started"]

CHANNEL: Final = b"########"

REQUEST: Final = (
    b"GET %b HTTP/1.1\r\nHost: localhost\r\n%bUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@dataclass(frozen=True)
class Target:
    """A running server as the load client sees it. Addresses are ``unix:PATH`` or ``tcp:PORT``."""

    processes: Mapping[str, int]
    """The roots of the server's processes, by the names of its parts; the first is the server itself."""
    address: str
    publish_address: str
    publication: Callable[[int], tuple[bytes, bytes]]
    """The bytes before and after a message of a size on the publisher's connection."""
    request: bytes = REQUEST % (b"/" + CHANNEL, b"")
    subscription: bytes = b""
    """The text message that subscribes, where the request does not."""
    payload_at: int = 0
    """Bytes of a frame's payload before the message, at least."""
    payload_tail: int | None = None
    """Bytes behind the message, where the number of those before it varies."""
    joined_tail: int | None = None
    """Bytes behind each message, where the server puts several into a frame, with a line feed between them."""
    status: int | None = 101
    """Of the answer to the request; None where that is not HTTP."""
    greeting_bytes: int = 0
    """Bytes behind the head of that answer, or all of it."""
    fixed_header: Callable[[int], int] | None = None
    """Bytes before a message of a size, where a frame is not a WebSocket frame."""
    answers_pings: bool = True


@dataclass(frozen=True)
class Server:
    """One of those compared."""

    name: str
    prepare: Callable[[], object]
    """Installs missing parts. Raises `AbsentError` if that cannot be done."""
    running: Callable[[Path], AbstractAsyncContextManager[Target]]
    """Runs it, with its sockets and its log in a directory of its own."""
    many_channels: bool = True
    is_websocket: bool = True
    slow: bool = False
    """Some hundred times slower than the others: measured with fewer messages in flight, or a run takes minutes."""


def length_prefixed(size: int) -> tuple[bytes, bytes]:
    """Return what surrounds a message on the control sockets of this suite's own servers."""
    return (len(CHANNEL) + size).to_bytes(4, "big") + CHANNEL, b""


@asynccontextmanager
async def started(
    name: str, command: Sequence[str | Path], directory: Path, listening: Sequence[Path | int], **environment: str
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the `with` block; it is handed over when it accepts connections."""
    log_file = directory / f"{name}.log"
    async with running(command, log_file, environment) as process:
        for address in listening:
            await until_connectable(address, process, log_file)
        yield process
