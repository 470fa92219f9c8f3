"""WebSocket clients for tests: well-behaved ones on trio-websocket, and raw ones that may do anything."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Event, TextMessage

from realtimed.rpc.wire import Decoder, Response, encode_request
from tests.kit.budget import processor_time
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon

REQUEST: Final = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def handshake_of(address: str) -> bytes:
    """Return a handshake as a proxy passes it on that speaks for `address`, or for nobody."""
    return REQUEST if not address else REQUEST[:-2] + b"X-Forwarded-For: " + address.encode() + b"\r\n\r\n"


def subscribe(channel: object, **more: object) -> str:
    return json.dumps({"action": "subscribe", "channel": channel, **more})


def unsubscribe(channel: object, **more: object) -> str:
    return json.dumps({"action": "unsubscribe", "channel": channel, **more})


@asynccontextmanager
async def websocket(
    to: Path | int, *, subprotocols: Sequence[str] = (), resource: str = "/ws", headers: Sequence[tuple[str, str]] = ()
) -> AsyncIterator[WebSocketConnection]:
    """Connect to a Unix socket, or to a local port; close without waiting for the answer if the test has not."""
    async with trio.open_nursery() as nursery:
        if isinstance(to, Path):
            stream = await trio.open_unix_socket(to)
        else:
            stream = await trio.open_tcp_stream("127.0.0.1", to)
        connection = await wrap_client_stream(
            nursery,
            stream,
            "localhost",
            resource,
            subprotocols=subprotocols,
            extra_headers=[(name.encode(), value.encode()) for name, value in headers],
            max_message_size=2**24,
            receive_buffer_size=2**16,
        )
        try:
            yield connection
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):  # or the nursery would take what the test has raised for its own end
                await trio.aclose_forcefully(stream)


async def closing(connection: WebSocketConnection) -> tuple[int, str]:
    """Read until the server closes; return its code and reason."""
    try:
        while True:
            await connection.get_message()
    except ConnectionClosed:
        reason = connection.closed
    return (reason.code, reason.reason or "") if reason is not None else (0, "")


class RawClient:
    """A socket after a valid handshake, to which a test may write any bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.frames = Connection(ConnectionType.CLIENT)

    async def send(self, *events: Event) -> None:
        await self.stream.send_all(b"".join(self.frames.send(event) for event in events))

    async def events_until_eof(self) -> list[Event]:
        """Read everything the server has to say."""
        events: list[Event] = []
        try:
            while data := await self.stream.receive_some(2**16):
                # A Close ends what wsproto wants to read; what came before it counts.
                if self.frames.state in (ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING):
                    self.frames.receive_data(data)
                    events += self.frames.events()
        except trio.BrokenResourceError:
            pass
        return events

    async def close_code(self) -> int | None:
        """Read to the end; return the code of the server's Close, or None if there was none."""
        closes = [event for event in await self.events_until_eof() if isinstance(event, CloseConnection)]
        return int(closes[0].code) if closes else None


@asynccontextmanager
async def raw_client(path: Path, address: str = "") -> AsyncIterator[RawClient]:
    """Connect to a Unix socket; with an `address`, as a proxy does that speaks for it."""
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(handshake_of(address))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            more = await stream.receive_some(1)
            assert more, answer
            answer += more
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        yield RawClient(stream)


class Publisher:
    """The smallest client of the control socket: one request, one answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._decoder = Decoder(2**26)
        self._answers: list[Response] = []

    async def call(self, method: str, *params: object) -> Any:
        """Return the result, or the error as a dict with a code."""
        await self.stream.send_all(encode_request(1, method, params))
        answer = await self.answer()
        return answer.error or answer.result

    async def answer(self) -> Response:
        while not self._answers:
            data = await self.stream.receive_some(2**16)
            assert data, "the daemon hung up"
            for message in self._decoder.feed(data):
                assert isinstance(message, Response), message
                self._answers.append(message)
        return self._answers.pop(0)


@asynccontextmanager
async def publisher(path: Path) -> AsyncIterator[Publisher]:
    async with await trio.open_unix_socket(path) as stream:
        yield Publisher(stream)


async def until_subscribed(asking: Publisher, channel: str, subscribers: int) -> None:
    while (await asking.call("channels")).get(channel, {}).get("subscribers", 0) != subscribers:
        pass


@asynccontextmanager
async def undisturbed(daemon: Daemon, later: Daemon | None = None, *, budget: float = math.inf) -> AsyncIterator[None]:
    """Fail unless a client and a publisher that were there before are served as if nothing had happened.

    `later` is the daemon whose log counts at the end, if it is another one. Nor may the daemon take more than `budget`
    seconds of processor time meanwhile; see `tests.kit.budget`.
    """
    with trio.fail_after(PATIENCE):
        async with websocket(daemon.websocket_socket) as client, publisher(daemon.control_socket) as other:
            await client.send_message(subscribe("witness"))
            while "witness" not in await other.call("channels"):
                pass
            before = processor_time(daemon.process.pid)
            yield
            if budget < math.inf:
                took = processor_time(daemon.process.pid) - before
                assert took <= budget, f"the daemon took {took:.3f} s of processor time"
            assert (await other.call("broadcast", "witness", "still here"))["recipients"] == 1
            assert await client.get_message() == "still here"
    assert "Traceback" not in (later or daemon).log


async def http_answer(path: Path, request: bytes) -> str:
    """Return the whole answer to a request, up to where the daemon hangs up."""
    with trio.fail_after(PATIENCE):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(request)
            return b"".join([bytes(data) async for data in stream]).decode()


async def accepted_head(path: Path, request: bytes) -> str:
    """Return the head of the answer to a handshake that is accepted."""
    with trio.fail_after(PATIENCE):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(request)
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await stream.receive_some()
    head = answer.partition(b"\r\n\r\n")[0].decode()
    assert head.startswith("HTTP/1.1 101 ")
    return head.lower()


def close_of(events: list[Event]) -> tuple[int, str]:
    [close] = [event for event in events if isinstance(event, CloseConnection)]
    return close.code, close.reason or ""


async def stalled(sender: Publisher, client: RawClient, channel: str, count: int, size: int) -> tuple[int, str]:
    """Publish for a client that reads nothing until it is closed; return the code and reason of the Close."""
    await client.send(TextMessage(data=subscribe(channel)))
    while channel not in await sender.call("channels"):
        pass
    for _ in range(count):
        await sender.call("broadcast", channel, "x" * size)
    while channel in await sender.call("channels"):
        pass
    return close_of(await client.events_until_eof())
