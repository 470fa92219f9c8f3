"""The life of one WebSocket: handshake, conversation, end. The only user of trio_websocket.

The library reads frames, answers pings and speaks HTTP. We write our Closes ourselves, to the stream. So the library is
never in its state "closing", in which it fails on frames that a peer may still send.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from http import HTTPStatus
from typing import Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from realtimed.config.settings import Config
from realtimed.hub.channel import Channel
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending
from realtimed.net.admission import AddressEntry, TurnedAway
from realtimed.net.head import Head
from realtimed.process.logs import Event
from realtimed.text import quoted
from realtimed.websocket.frames import CloseCode, close_frame
from realtimed.websocket.handshake import client_address, http_answer, path, refusal, request_for_library, subprotocols
from realtimed.websocket.protocols import Conversation, ViolationError, choose
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.stream import ClientStream

__all__ = ["Session", "serve_client"]

_PATH: Final = "/ws"
_HEAD_LIMIT: Final = 16 * 1024
"""Bytes of a request's head."""

_OF_THE_LIBRARY: Final[Mapping[int, Ending]] = {
    CloseCode.PROTOCOL_ERROR: Ending.PROTOCOL_ERROR,
    CloseCode.INVALID_DATA: Ending.INVALID_DATA,
}
"""The close codes with which trio-websocket ends a connection."""

_NO_CLOSE: Final = 1006
"""Stands for a close code where there was no Close (RFC 6455 section 7.4.1)."""

log = logging.getLogger(__name__)


class Session:
    """One client, from its first byte to its last. Owns its stream.

    A connection ends in one of four ways, and `_note_end` counts and logs the first of them:
    - `close`: publications from before go out, then a Close with a code and a reason of ours.
    - `send_away`: the same, with advice on when to come back.
    - `end`: the stream has found a reason; without a Close if the client would not get it.
    - `_follow_library`: the client has closed, or trio-websocket has found a protocol error.
    Then the peer has `close-timeout` for its part, and `_depart` releases everything.
    """

    __slots__ = (
        "_address",
        "_config",
        "_connected_at",
        "_conversation",
        "_departed",
        "_ending",
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

    # `_nursery` has the library's reader and the stream's drain task. A closing connection gives it a deadline, so that
    # the connection ends whatever the peer does. `_ending` is the first reason to end the connection. `_place` is the
    # address's entry, set from the admission of the handshake until the stream is shut.

    def __init__(self, stream: ClientStream, hub: Hub, config: Config, sessions: Sessions) -> None:
        self.number = sessions.new_number()
        self.id = f"c-{sessions.run}-{self.number:x}"
        self.rank = 0
        self.stream = stream
        self.connected_since = time.time()
        self._connected_at = trio.current_time()  # for durations: the time of day may be set meanwhile
        self.expires_at = sessions.expiry(config.max_age)
        self._hub = hub
        self._config = config
        self._sessions = sessions
        self._address = ""
        self._nursery: trio.Nursery
        self._handshake: trio.CancelScope | None = None
        self._websocket: WebSocketConnection | None = None
        self._conversation: Conversation | None = None
        self._ending: Ending | None = None
        self._departed = False
        self._place: AddressEntry | None = None

    async def run(self) -> None:
        """Serve the client until the connection is over, and shut its stream."""
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    self.stream.attach(self._nursery, self)
                    self.stream.library_done = self._library_done
                    websocket = await self._shake_hands()
                    if websocket is not None:
                        await self._converse(websocket)
                finally:
                    # A closing nursery takes no new tasks, so from here on nothing new may wait for the peer.
                    self.stream.seal()
                self._limit_the_end()
                if websocket is None:
                    await self.stream.flush()
                    self._nursery.cancel_scope.cancel()
                # Otherwise the library's reader ends with the peer's Close or end of file, the drain with the backlog.
        finally:
            with trio.CancelScope(shield=True):
                async with self._sessions.departures:
                    self._depart()

    def _depart(self) -> None:
        """Release everything that the connection holds."""
        self._note_end(Ending.GONE, "the peer has gone")  # unless an end is already noted
        self._departed = True
        self._hub.leave(self.stream)
        self._sessions.members.pop(self.id, None)
        self.stream.shut()
        if self._place is not None:
            self._sessions.admission.leave(self._place)
        self._let_go()
        if self.stream.http_status == HTTPStatus.SWITCHING_PROTOCOLS and not self.stream.parser_finished:
            self._sessions.count_abandoned_parser()

    @property
    def address(self) -> str:
        """The address of the client, if known, or ""."""
        return self._address

    @property
    def channels(self) -> AbstractSet[Channel]:
        """The channels that the client is subscribed to."""
        return self.stream.channels

    @property
    def closing(self) -> bool:
        """Whether the connection is ending."""
        return self._ending is not None

    def describe(self) -> dict[str, object]:
        """Return the client's row in the answer to ``clients``."""
        return {
            "id": self.id,
            "protocol": self._conversation.name or "plain" if self._conversation is not None else "",
            "channels": sorted(channel.name for channel in self.stream.channels),
            "address": self._address,
            "connected_since": self.connected_since,
            "pending": self.stream.pending,
        }

    def close(self, ending: Ending, reason: str, code: int | None = None) -> bool:
        """End the connection. What was published before still goes out before the Close. Returns at once.

        `code` replaces the protocol's close code for the ending. Returns False if the connection was already ending.
        """
        if self._ending is not None or self._conversation is None:
            return False
        self._hub.catch_up(self.stream)
        return self._close(ending, reason, code)

    def send_away(self, ending: Ending, retry_after: float) -> None:
        """Close a connection without a fault of the client, and ask it to come back after `retry_after` seconds.

        `ending` is ``RESTART`` or ``MAX_AGE``.
        """
        conversation = self._conversation
        if self._ending is None and conversation is not None:
            self._hub.catch_up(self.stream)
            self.stream.write(conversation.farewell(ending, retry_after))
            self._close(ending, conversation.farewell_reason(ending, retry_after))

    def _let_go(self) -> None:
        """Break the reference cycles, so that memory is freed at once, without the garbage collector."""
        self.stream.detach()
        del self._nursery
        self._websocket = self._conversation = None

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.stream.Owner`."""
        if ending in (Ending.GONE, Ending.FAULT):  # without a Close
            self._note_end(ending, reason)
            if not self._departed:
                self._nursery.cancel_scope.cancel()
        elif ending is Ending.SLOW:
            self._close(ending, reason, drop_unsent=True)
        else:
            self.close(ending, reason)

    def _library_done(self) -> None:
        """Handle the end of trio-websocket's work on the stream."""
        if self._handshake is not None:
            self._note_refusal(self.stream.http_status, "not a valid WebSocket handshake")
            self.stream.seal()
            self._handshake.cancel()
        else:
            self._follow_library()

    # The handshake.

    async def _shake_hands(self) -> WebSocketConnection | None:
        """Answer the request. Return None if that ends the connection."""
        head = await self._receive_head()
        if not head:
            return None
        # A new deadline: it is not the client's fault if it waited for its turn, or if this process stood still.
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
        """Return the head of the request, or b"" if the connection ends."""
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
        self._address = client_address(self.stream.peer()[0], head)
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
        # The meter measures every message in bytes before the library measures it in characters.
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
            self.close(Ending.NO_SUCH_PATH, f"no such path: {quoted(asked)}; WebSockets are served at {_PATH}")
        else:
            self.stream.write(self._conversation.greeting(self.id, self._config.heartbeat))
            if self._sessions.send_away is not None:
                self._sessions.send_away(self)
        return self._websocket

    def _respond_that_time_is_up(self) -> None:
        limit = f"{self._config.handshake_timeout:g} s"
        self._respond(HTTPStatus.REQUEST_TIMEOUT, f"The limit of a handshake, handshake-timeout, is {limit}.")

    def _turn_away(self, why: TurnedAway) -> None:
        """Refuse a valid handshake because there is no place. An address's refusals are logged only once in a while."""
        if why.limit == "max_connections":
            self._note_refusal(HTTPStatus.SERVICE_UNAVAILABLE, why.sentence)
        else:
            self._sessions.count_refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            if why.unlogged:
                log.warning(
                    Event("address refused", address=self._address, reason=why.sentence, handshakes=why.unlogged)
                )
        headers = f"Connection: close\r\nRetry-After: {why.retry_after}\r\n"
        self._write_answer(HTTPStatus.SERVICE_UNAVAILABLE, why.sentence, headers)

    def _respond(
        self, status: HTTPStatus, sentence: str, headers: str = "Connection: close\r\n", header: str = ""
    ) -> None:
        """Refuse the request with an HTTP answer, which ends the connection."""
        self._note_refusal(status.value, sentence, header)
        self._write_answer(status, sentence, headers)

    def _write_answer(self, status: HTTPStatus, sentence: str, headers: str) -> None:
        self.stream.write(http_answer(status, sentence, headers))
        self.stream.seal()

    def _note_refusal(self, status: int, reason: str, header: str = "") -> None:
        """Count and log a refusal. `header` is the name of the wrong header, "" if none is wrong."""
        self._sessions.count_refusal(status)
        where = self._address or self.stream.peer()[0]
        log.info(
            Event(
                "handshake refused", client=self.id, status=status, reason=reason, header=header or None, address=where
            )
        )

    # The conversation.

    async def _converse(self, websocket: WebSocketConnection) -> None:
        """Read the client's messages until the library sees the end of the connection."""
        conversation = self._conversation
        try:
            while conversation is not None:
                message = await websocket.get_message()
                await self.stream.flush_replay()
                if self._ending is None:
                    self._answer(conversation, message)
        except ConnectionClosed:
            self._follow_library()

    def _answer(self, conversation: Conversation, message: str | bytes) -> None:
        """Carry out a message. The answer may have megabytes, so nothing keeps it while the next message is awaited."""
        try:
            self.stream.write_frames(conversation.receive(message))
        except ViolationError as violation:
            self.close(violation.ending, violation.reason)

    def _follow_library(self) -> None:
        """Record how the connection ended for the library.

        If the peer breaks RFC 6455, the library hangs up without a Close. Then we write it.
        """
        closed = self._websocket.closed if self._websocket is not None else None
        if self.stream.cut_off:  # the library saw our last words, not the peer's
            self._note_end(Ending.GONE, "")
        elif closed is None:
            return
        elif closed.code in _OF_THE_LIBRARY:
            self.close(_OF_THE_LIBRARY[closed.code], closed.reason or "")
        else:
            self._note_end(Ending.BY_CLIENT, closed.reason or "", closed.code)
            self.stream.seal()

    def _close(self, ending: Ending, reason: str, code: int | None = None, *, drop_unsent: bool = False) -> bool:
        """Write the Close, unless the connection is already ending, and give the peer until the deadline to answer."""
        if self._conversation is None:
            return False
        code = code or self._conversation.close_code(ending)
        if not self._note_end(ending, reason, code):
            return False
        self._hub.leave(self.stream)
        self.stream.finish(close_frame(code, reason), drop_unsent=drop_unsent)
        self._limit_the_end()
        return True

    def _limit_the_end(self) -> None:
        """Ensure that the connection is over after the close-timeout, whatever the peer does."""
        scope = self._nursery.cancel_scope
        scope.deadline = min(scope.deadline, trio.current_time() + self._config.close_timeout)

    def _note_end(self, ending: Ending, reason: str, code: int = _NO_CLOSE) -> bool:
        """Count and log why the connection ends. Return False if that is already done, or it is not a WebSocket."""
        if self._ending is not None or self.id not in self._sessions.members:
            return False
        self._ending = ending
        self._sessions.count_end(ending, code)
        seconds = round(trio.current_time() - self._connected_at, 1)
        log.info(
            Event(
                "client closed",
                client=self.id,
                code=code,
                reason=reason,
                address=self._address,
                seconds=seconds,
                ending=ending.value,
            )
        )
        return True


async def serve_client(stream: ClientStream, hub: Hub, config: Config, sessions: Sessions) -> None:
    """Serve one WebSocket. This is its exception boundary: a fault inside is a bug and ends only this connection."""
    session = Session(stream, hub, config, sessions)
    try:
        await session.run()
    except Exception:
        log.exception(Event("internal error", client=session.id))
