"""WebSocket handshakes through Caddy, written out: any target, any headers, and the whole of the answer."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import h11
import trio


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


Header = tuple[str, str]


@asynccontextmanager
async def connected(
    port: int, tls: ssl.SSLContext | None = None, host: str = "localhost"
) -> AsyncIterator[trio.abc.Stream]:
    """Connect to Caddy on this machine; with `tls`, ask for the certificate of `host` and check it."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as transport:
        if tls is None:
            yield transport
        else:
            secured = trio.SSLStream(transport, tls, server_hostname=host)
            await secured.do_handshake()
            yield secured


async def request(
    stream: trio.abc.Stream, target: str, headers: Sequence[Header] = (), host: str = "localhost"
) -> Answer:
    """Send a GET, and return the answer with its body; a 101 has none."""
    connection = h11.Connection(h11.CLIENT)
    head = h11.Request(method="GET", target=target, headers=[("Host", host), *headers])
    await stream.send_all((connection.send(head) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    answer: h11.Response | h11.InformationalResponse | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(2**16)))
        elif isinstance(event, (h11.Response, h11.InformationalResponse)):
            answer = event
        elif isinstance(event, h11.Data):
            body += event.data
        if answer is not None and (answer.status_code == 101 or isinstance(event, h11.EndOfMessage)):
            fields = {name.decode(): value.decode() for name, value in answer.headers}
            return Answer(answer.status_code, fields, body.decode())


async def get(port: int, target: str, headers: Sequence[Header] = (), host: str = "localhost") -> Answer:
    """Make one request on a connection of its own."""
    async with connected(port) as stream:
        return await request(stream, target, [*headers, ("Connection", "close")], host)


def upgrade(*origins: str) -> list[Header]:
    """Return the headers of a WebSocket handshake, with one Origin header for each of `origins`."""
    return [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        *(("Origin", origin) for origin in origins),
    ]


async def handshake(port: int, target: str, *origins: str) -> Answer:
    """Try to open a WebSocket; it is closed at once if that succeeds."""
    async with connected(port) as stream:
        return await request(stream, target, upgrade(*origins))
