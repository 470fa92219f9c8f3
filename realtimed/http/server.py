"""The HTTP endpoint of the daemon, for monitoring. `routes` has the answers.

It has a separate socket, which the network does not reach. A connection may make one request. Slow peers and long
requests are refused, and further connections wait in the kernel's queue. So all of them together take only a small part
of the daemon's time.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Final

import h11
import trio

from realtimed.http.routes import Answer, Routes, sentence
from realtimed.net.accepting import accept
from realtimed.net.gate import Gate
from realtimed.net.head import Head, HeadBuffer
from realtimed.net.listener import SocketListener
from realtimed.process.logs import Event

__all__ = ["Endpoint", "serve"]

_REQUEST_TIMEOUT: Final = 5.0
"""Seconds that a request may take to arrive."""

_ANSWER_TIMEOUT: Final = 5.0
"""Seconds that a peer may take to read the answer."""

_HEAD_LIMIT: Final = 8 * 1024
"""Bytes of a request's head."""

_CONNECTIONS: Final = 16
"""Connections at a time."""

_PACE: Final = 0.01
"""Seconds between two connections, on average."""

log = logging.getLogger(__name__)


class Endpoint:
    """Reads the request of each connection and sends the answer of `routes`."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._open = 0
        self._next_turn = trio.current_time()
        self._place_free = trio.lowlevel.ParkingLot()

    async def places(self) -> int:
        """Wait until more connections may be accepted; return how many."""
        await trio.sleep_until(self._next_turn)
        await trio.lowlevel.checkpoint()  # the connections accepted last have begun by now
        while self._open >= _CONNECTIONS:
            await self._place_free.park()
        return _CONNECTIONS - self._open

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Answer the one request of a connection, and close it."""
        self._open += 1
        self._next_turn = max(self._next_turn, trio.current_time()) + _PACE
        try:
            async with stream:
                await self._serve(stream)
        except trio.BrokenResourceError:
            pass  # the peer has gone
        finally:
            self._open -= 1
            self._place_free.unpark_all()

    async def _serve(self, stream: trio.abc.Stream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_LIMIT)
        answer = sentence(HTTPStatus.REQUEST_TIMEOUT, f"A request may take {_REQUEST_TIMEOUT:g} s to arrive.")
        bodiless = False
        with trio.move_on_after(_REQUEST_TIMEOUT):
            try:
                head = await _receive_head(stream)
            except OverflowError:
                answer = sentence(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"A request's head may have {_HEAD_LIMIT} bytes."
                )
            else:
                if not head:
                    return
                answer, bodiless = self._answer_head(head, http)
        await _send(stream, http, answer, bodiless=bodiless)

    def _answer_head(self, data: bytes, http: h11.Connection) -> tuple[Answer, bool]:
        """Return the answer to a request, and whether only its head is sent."""
        # Find faults before h11 does: its pattern for a header takes quadratic time for one that does not match.
        fault = Head(data).fault
        if fault is not None:
            return sentence(fault.status, fault.sentence), False
        http.receive_data(data)
        try:
            request = http.next_event()
        except h11.RemoteProtocolError as error:
            reason = f"That is not a request that can be read: {error}."
            return sentence(HTTPStatus(error.error_status_hint), reason), False
        assert isinstance(request, h11.Request), "the head is whole"
        return self._routes.answer(request.method, request.target), request.method == b"HEAD"


async def _receive_head(stream: trio.abc.Stream) -> bytes:
    """Read the head of a request. Return b"" if the peer hangs up. Raises `OverflowError` if the head is too long."""
    collected = HeadBuffer(_HEAD_LIMIT)
    while data := await stream.receive_some(4096):
        if collected.feed(data):
            return collected.head
    return b""


async def _send(stream: trio.abc.Stream, http: h11.Connection, answer: Answer, *, bodiless: bool = False) -> None:
    """Send an answer, the last of its connection, within the time that the peer may take."""
    headers = [
        ("Content-Type", answer.content_type),
        ("Content-Length", str(len(answer.body))),
        ("Cache-Control", "no-store"),
        ("Connection", "close"),
        *answer.headers,
    ]
    head = h11.Response(status_code=answer.status.value, reason=answer.status.phrase, headers=headers)
    parts = [http.send(head), http.send(h11.Data(data=b"" if bodiless else answer.body)), http.send(h11.EndOfMessage())]
    with trio.move_on_after(_ANSWER_TIMEOUT):
        await stream.send_all(b"".join(part for part in parts if part))


async def serve(
    listener: SocketListener[trio.SocketStream],
    nursery: trio.Nursery,
    routes: Routes,
    gate: Gate | None = None,
) -> None:
    """Serve an `Endpoint` at `listener` forever, each connection in a task of `nursery`; see `accept` for `gate`."""
    endpoint = Endpoint(routes)

    async def serve_one(stream: trio.SocketStream) -> None:
        try:
            await endpoint.serve(stream)
        except Exception:  # the boundary of this connection: a fault ends nothing else
            log.exception(Event("internal error", client="http"))

    await accept(listener, lambda stream: nursery.start_soon(serve_one, stream), endpoint.places, gate)
