"""One WebSocket's life: handshake, conversation, goodbye. The only user of trio_websocket.

The library reads frames, answers pings and speaks HTTP; whoever ends the connection from our side writes the Close
through the stream, so the library never is in the state "closing" and never refuses what a peer may still send.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Set as AbstractSet
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from realtimed.config.settings import Config
from realtimed.hub.channel import Channel
from realtimed.hub.hub import Hub
from realtimed.net.admission import Place, TurnedAway
from realtimed.net.head import Head
from realtimed.process.logs import Event
from realtimed.text import quoted
from realtimed.websocket.frames import CloseCode, close_frame
from realtimed.websocket.handshake import forwarded_for, path, refusal, request_for_library, subprotocols
from realtimed.websocket.protocols import Conversation, ViolationError, choose
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.stream import ClientStream

__all__ = ["Session"]

_PATH: Final = "/ws"
_HEAD_LIMIT: Final = 16 * 1024
"""Bytes of a request's head."""


_IN_WORDS: Final = {"restart": "restarting", "max-age": "connected for max-age"}

_YOUNGEST: Final = 0.5
"""The share of `max-age` that every connection may reach."""

_RETURN_WITHIN: Final = 1.0
"""Seconds within which a client that was closed for its age is told to come back. They are few at a time."""

_SWEEP: Final = 1000
"""Clients that are looked at in one go before other tasks get their turn."""

_PARTS: Final = 50
_PINGS_AT_LEAST: Final = 4
"""Into how many parts a second's pings are cut at most, and how many pings a part has at least."""

_LEFT_ALLOWED: Final = 5000
"""Parsers, of about 1.5 KB each, that may lie about until the garbage is collected. That may take half a second."""

_FRAMES_A_TURN: Final = 96
_READERS_A_TURN: Final = 16
"""How many frames the library is given at once in one turn of the event loop, and of how many clients it gets a few in
each turn when there are more."""

_HANDSHAKES: Final = 8
_DEPARTURES: Final = 8
"""How many handshakes are under way at a time, and how many connections are given up in a turn of the event loop: when
thousands come or go, all others are served in between."""

_RELIEF: Final = 0.9
"""To which part of `max-backlog-total` the slowest clients are disconnected once it is exceeded."""

_RELIEF_SLICE: Final = 8
"""Clients that are disconnected for that before other tasks get their turn."""

_RELIEF_INTERVAL: Final = 1.0
"""Seconds until the next look when nobody can be disconnected any more, and too much still waits."""

log = logging.getLogger(__name__)


class Session:
    """One client, from the first byte to the last. It is its stream's owner."""

    __slots__ = (
        "_address",
        "_closed",
        "_config",
        "_connected_at",
        "_conversation",
        "_departed",
        "_handshake",
        "_hub",
        "_nursery",
        "_place",
        "_sessions",
        "_websocket",
        "connected_since",
        "expires_at",
        "id",
        "number",
        "rank",
        "stream",
    )

    # `_nursery` holds the library's reader and the stream's drain task. Its deadline is set when the connection is
    # closing: whatever the peer does then, it ends. `_closed` is set by the first to end the connection. `_place` is
    # there from the moment that the handshake is let in until the stream is shut.

    def __init__(self, stream: ClientStream, hub: Hub, config: Config, sessions: Sessions) -> None:
        self.number = sessions.new_number()
        self.id = f"c-{sessions.run}-{self.number:x}"
        self.rank = 0
        self.stream = stream
        self.connected_since = time.time()
        self._connected_at = trio.current_time()  # for durations: the time of day may be put right in between
        self.expires_at = _expiry(config.max_age)
        self._hub = hub
        self._config = config
        self._sessions = sessions
        self._address = ""
        self._nursery: trio.Nursery
        self._handshake: trio.CancelScope | None = None
        self._websocket: WebSocketConnection | None = None
        self._conversation: Conversation | None = None
        self._closed: tuple[int, str] | None = None
        self._departed = False
        self._place: Place | None = None

    async def run(self) -> None:
        """Serve the client until the connection is over, and shut its stream."""
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    self.stream.attach(self._nursery, self)
                    websocket = await self._shake_hands()
                    if websocket is not None:
                        await self._converse(websocket)
                finally:
                    # A nursery that is closing takes no new tasks: from here on nothing may begin to wait for the peer.
                    self.stream.seal()
                self._limit_the_end()
                if websocket is None:
                    await self.stream.flush()
                    self._nursery.cancel_scope.cancel()
                # Else the library's reader ends with the peer's Close or end of file, the drain task with the backlog.
        finally:
            with trio.CancelScope(shield=True):
                async with self._sessions.departures:
                    self._depart()

    def _depart(self) -> None:
        """Give back everything that the connection has taken."""
        self._note_end(1006, "the peer has gone")  # if nobody has noted an end: it has not even had its answer
        self._departed = True
        self._hub.leave(self.stream)
        self._sessions.members.pop(self.id, None)
        self.stream.shut()
        if self._place is not None:
            self._sessions.admission.leave(self._place)
        self._let_go()
        if self.stream.answered == HTTPStatus.SWITCHING_PROTOCOLS and not self.stream.parser_is_through:
            self._sessions.note_left()

    def describe(self) -> dict[str, object]:
        """Return what the ``clients`` command shows."""
        return {
            "id": self.id,
            "protocol": self._conversation.name or "plain" if self._conversation is not None else "",
            "channels": sorted(channel.name for channel in self.stream.channels),
            "address": self._address,
            "connected_since": self.connected_since,
            "pending": self.stream.pending,
        }

    def close(self, code: int, reason: str) -> bool:
        """End the connection; what was published before still goes out before the Close. Returns at once.

        Returns whether it is this that ends it.
        """
        if self._closed is not None:
            return False
        self._hub.catch_up(self.stream)
        return self._end(code, reason)

    @property
    def address(self) -> str:
        """Who is there, as far as is known."""
        return self._address

    @property
    def channels(self) -> AbstractSet[Channel]:
        """What the client is subscribed to."""
        return self.stream.channels

    @property
    def closing(self) -> bool:
        """Whether somebody has ended the connection."""
        return self._closed is not None

    def say_goodbye(self, reason: str, retry_after: float) -> None:
        """Close for a reason that is not the client's fault, advising it to come back after so many seconds.

        The reason is one of ``restart`` and ``max-age``.
        """
        if self._closed is None and self._conversation is not None:
            self._hub.catch_up(self.stream)
            self.stream.write(self._conversation.farewell(reason, retry_after))
            self._end(CloseCode.COME_BACK, f"{_IN_WORDS[reason]}, come back in {retry_after * 1000:.0f} ms")

    def _let_go(self) -> None:
        """Break the circles of references, so that memory comes back at once and not with the garbage collector."""
        self.stream.detach()
        del self._nursery
        self._websocket = self._conversation = None

    # What the stream tells its owner.

    def slow(self, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""
        self._end(CloseCode.SLOW_CONSUMER, reason, drop_unsent=True)

    def broken(self) -> None:
        """See `realtimed.net.stream.Owner`."""
        self._note_end(1006, "the peer takes nothing any more")
        if not self._departed:
            self._nursery.cancel_scope.cancel()

    def misbehaved(self, code: CloseCode, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""
        self.close(code, reason)

    def library_done(self) -> None:
        """See `realtimed.net.stream.Owner`."""
        if self._handshake is not None:
            self._note_refusal(self.stream.answered, "not a valid WebSocket handshake")
            self.stream.seal()
            self._handshake.cancel()
        else:
            self._follow_library()

    # The handshake.

    async def _shake_hands(self) -> WebSocketConnection | None:
        """Answer the request; return None if that was the end of it."""
        head = await self._receive_head()
        if not head:
            return None
        # The deadline begins anew, as in `receive_head`: it is not the client's fault that it had to wait for its turn,
        # or that this process stood still.
        websocket = None
        async with self._sessions.handshakes:
            self._handshake = trio.CancelScope(deadline=trio.current_time() + self._config.handshake_timeout)
            with self._handshake:
                websocket = await self._answer_request(Head(head))
        if self._handshake.cancelled_caught and not self.stream.sealed:
            self._respond_that_time_is_up()
        self._handshake = None
        return websocket

    async def _receive_head(self) -> bytes:
        """Return the head of the request, or b"" if that was the end of it."""
        try:
            return await self.stream.receive_head(_HEAD_LIMIT, trio.current_time() + self._config.handshake_timeout)
        except trio.TooSlowError:
            self._respond_that_time_is_up()
        except OverflowError:
            self._respond(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"A request's head may have {_HEAD_LIMIT} bytes.")
        except trio.BrokenResourceError:
            pass  # the peer has gone
        return b""

    async def _answer_request(self, head: Head) -> WebSocketConnection | None:
        self._address = self._client_address(head)
        refused = refusal(head)
        if refused is not None:
            self._respond(*refused)
            return None
        admitted = self._sessions.admission.admit(self._address)
        if isinstance(admitted, TurnedAway):
            self._turn_away(admitted)
            return None
        self._place = admitted
        return await self._accept(head)

    async def _accept(self, head: Head) -> WebSocketConnection:
        protocol = choose(subprotocols(head))
        self.stream.hand_on(request_for_library(head, protocol.name))
        # The meter has measured every message in bytes before the library gets to measure it in characters.
        request = await wrap_server_stream(self._nursery, self.stream, max_message_size=self._config.max_inbound)
        self._conversation = protocol(self._hub, self.stream)
        self.stream.form = protocol.form
        self._websocket = await request.accept(subprotocol=protocol.name or None)
        asked = path(head)
        self.rank = self._sessions.connections
        self._sessions.connections += 1
        self._sessions.members[self.id] = self
        self.stream.open_gate()
        log.debug(Event("client connected", client=self.id, address=self._address, protocol=protocol.name or "plain"))
        if asked != _PATH:
            self.close(CloseCode.NO_SUCH_PATH, f"no such path: {quoted(asked)}; WebSockets are served at {_PATH}")
        else:
            self.stream.write(self._conversation.greeting(self.id, self._config.heartbeat))
            if self._sessions.send_away is not None:
                self._sessions.send_away(self)
        return self._websocket

    def _client_address(self, head: Head | None) -> str:
        """Return who is there, as far as that is known; `head` is None if there is none.

        What a proxy on this machine adds to X-Forwarded-For is believed, nothing else.
        """
        peer, _ = self.stream.peer()
        if peer and not ip_address(peer.partition("%")[0]).is_loopback:
            return peer
        try:
            # An address's zone may be as long as it likes.
            return str(ip_address(forwarded_for(head).partition("%")[0])) if head is not None else peer
        except ValueError:
            return peer

    def _respond_that_time_is_up(self) -> None:
        limit = f"{self._config.handshake_timeout:g} s"
        self._respond(HTTPStatus.REQUEST_TIMEOUT, f"The limit of a handshake, handshake-timeout, is {limit}.")

    def _turn_away(self, why: TurnedAway) -> None:
        """Answer a valid handshake for which there is no place. What one address is refused is logged now and then."""
        if why.limit == "max_connections":
            self._note_refusal(HTTPStatus.SERVICE_UNAVAILABLE, why.sentence)
        else:
            self._count_refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            if why.unlogged:
                log.warning(
                    Event("address refused", address=self._address, reason=why.sentence, handshakes=why.unlogged)
                )
        headers = f"Connection: close\r\nRetry-After: {why.retry_after}\r\n"
        self._write_answer(HTTPStatus.SERVICE_UNAVAILABLE, why.sentence, headers)

    def _respond(
        self, status: HTTPStatus, sentence: str, headers: str = "Connection: close\r\n", header: str = ""
    ) -> None:
        """Refuse the request with an HTTP answer of our own, which is the last of this connection."""
        self._note_refusal(status.value, sentence, header)
        self._write_answer(status, sentence, headers)

    def _write_answer(self, status: HTTPStatus, sentence: str, headers: str) -> None:
        body = sentence.encode() + b"\n"
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(body)}\r\n{headers}"
        self.stream.write(f"{head}Content-Type: text/plain; charset=utf-8\r\n\r\n".encode() + body)
        self.stream.seal()

    def _count_refusal(self, status: int) -> None:
        self._sessions.refused[status] = self._sessions.refused.get(status, 0) + 1

    def _note_refusal(self, status: int, reason: str, header: str = "") -> None:
        """Count and log a refusal. `header` is the name of the one that is wrong, "" if it is none."""
        self._count_refusal(status)
        where = self._address or self._client_address(None)
        log.info(
            Event(
                "handshake refused", client=self.id, status=status, reason=reason, header=header or None, address=where
            )
        )

    # The conversation.

    async def _converse(self, websocket: WebSocketConnection) -> None:
        """Read the client's messages until the connection is closing and the library sees its end."""
        conversation = self._conversation
        try:
            while conversation is not None:
                message = await websocket.get_message()
                await self.stream.flush_replay()
                if self._closed is None:
                    self._answer(conversation, message)
        except ConnectionClosed:
            self._follow_library()

    def _answer(self, conversation: Conversation, message: str | bytes) -> None:
        """Carry out a message. An answer may be megabytes, so nothing keeps it while the next message is awaited."""
        try:
            self.stream.write_frames(conversation.receive(message))
        except ViolationError as violation:
            self.close(violation.code, violation.reason)

    def _follow_library(self) -> None:
        """Take note of how the library saw the connection end.

        From a peer that breaks RFC 6455 the library hangs up without a word: then the Close is ours to write.
        """
        ending = self._websocket.closed if self._websocket is not None else None
        if self.stream.cut_off:  # what the library says of its last words means nothing
            self._note_end(1006, "")
        elif ending is None:
            return
        elif ending.code in (CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_DATA):
            self.close(ending.code, ending.reason or "")
        else:
            self._note_end(ending.code, ending.reason or "")
            self.stream.seal()

    def _end(self, code: int, reason: str, *, drop_unsent: bool = False) -> bool:
        """Write the Close, unless somebody has, and give the peer until the deadline to answer it."""
        if not self._note_end(code, reason):
            return False
        self._hub.leave(self.stream)
        self.stream.finish(close_frame(code, reason), drop_unsent=drop_unsent)
        self._limit_the_end()
        return True

    def _limit_the_end(self) -> None:
        """Whatever the peer does from now on, the connection is over by the close-timeout."""
        scope = self._nursery.cancel_scope
        scope.deadline = min(scope.deadline, trio.current_time() + self._config.close_timeout)

    def _note_end(self, code: int, reason: str) -> bool:
        """Count and log why the connection ends; return whether this is the first reason."""
        if self._closed is not None or self.id not in self._sessions.members:
            return False
        self._closed = (code, reason)
        self._sessions.closed[code] = self._sessions.closed.get(code, 0) + 1
        seconds = round(trio.current_time() - self._connected_at, 1)
        log.info(
            Event("client closed", client=self.id, code=code, reason=reason, address=self._address, seconds=seconds)
        )
        return True


def _expiry(max_age: float | None) -> float:
    """Return when a connection that is made now gets too old, by trio's clock.

    After a restart everyone connects at about the same time. So that they are not closed at about the same time, each
    gets an age of its own.
    """
    return math.inf if max_age is None else trio.current_time() + max_age * random.uniform(_YOUNGEST, 1)
