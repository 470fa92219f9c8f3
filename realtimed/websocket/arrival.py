"""A connection until its request is answered: then it is a session, or it ends."""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import trio

from realtimed.hub.publication import Ending
from realtimed.net.admission import AddressEntry, TurnedAway
from realtimed.net.head import Head, HeadBuffer
from realtimed.net.outbound import READ_BYTES
from realtimed.process.logs import Event
from realtimed.websocket.connection import Connection
from realtimed.websocket.handshake import client_address, http_answer, path, refusal, subprotocols, switching_protocols
from realtimed.websocket.protocols import choose
from realtimed.websocket.session import Session
from realtimed.websocket.stream import ClientStream

if TYPE_CHECKING:
    from realtimed.websocket.sessions import Sessions

__all__ = ["Arrival"]

_HEAD_LIMIT: Final = 16 * 1024
"""Bytes of a request's head."""

log = logging.getLogger(__name__)


class Arrival(Connection):
    """A connection that sends its request, or gets a refusal. Owns its stream until that is shut or has a session.

    Its `id` is the one that the client gets, or would have got.
    """

    __slots__ = ("_began_at", "_buffer", "_over", "_sessions")

    # Invariant: there is a `_buffer` while more of the head may come. Without one the request has been answered: there
    # is a session, or a refusal has been written, and the connection ends when it has been sent.

    def __init__(self, stream: ClientStream, sessions: Sessions, id: str = "") -> None:
        super().__init__(id or sessions.new_id(), stream)
        self._sessions = sessions
        self._buffer: HeadBuffer | None = HeadBuffer(_HEAD_LIMIT)
        self._over = False
        self._began_at = trio.current_time()

    def begin(self) -> None:
        """Wait for the request. When many clients connect at once, most requests are there already."""
        sessions = self._sessions
        self.stream.attach(self)
        sessions.handshakes.add(self)
        self.guard(partial(sessions.watcher.add, self.stream.descriptor, self))
        self.readable()

    # For another process, or from one.

    @property
    def answered(self) -> bool:
        """Whether the request has been answered, or the connection is over."""
        return self._buffer is None or self._over

    @property
    def collected(self) -> bytes:
        """What has come of the request."""
        return self._buffer.collected if self._buffer is not None else b""

    def resume(self, age: float) -> None:
        """Go on waiting for the request, as another process has for `age` seconds; nothing is read yet."""
        self._began_at -= age
        self.stream.attach(self)
        self._sessions.handshakes.resume(self, age)
        self._sessions.watcher.add(self.stream.descriptor, self)

    def resume_head(self, head: bytes) -> None:
        """Go on with a request of which this has come: less than all of it."""
        if self._buffer is not None:
            self._buffer.feed(head)

    def leave_to_another_process(self) -> None:
        """Forget a connection that goes on elsewhere."""
        self.over()

    def _read(self) -> bool:
        """Read some of the request. Return whether to read again; the watcher has been asked to, then."""
        if self._buffer is None or self._over:
            return False
        data = self._receive()
        if data is None:
            return False
        if not data:
            self.over()
            return False
        try:
            whole = self._buffer.feed(data)
        except OverflowError:
            self._respond(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"A request's head may have {_HEAD_LIMIT} bytes.")
            return False
        if whole:
            head, rest, self._buffer = self._buffer.head, self._buffer.rest, None
            self._answer(Head(head), rest, more=len(data) == READ_BYTES)
            return False
        if len(data) == READ_BYTES or self._hung_up:
            self._sessions.watcher.again(self)
            return True
        return False

    def too_late(self) -> None:
        """Refuse the request if its head has not arrived, even if this process stood still meanwhile."""
        while self._read():
            pass
        if self._buffer is not None and not self._over:
            limit = f"{self._sessions.config.handshake_timeout:g} s"
            self._respond(HTTPStatus.REQUEST_TIMEOUT, f"The limit of a handshake, handshake-timeout, is {limit}.")

    def _answer(self, head: Head, rest: bytes, *, more: bool) -> None:
        """Answer the request. `rest` is what came behind it, and `more` says that there may be more to read."""
        address = client_address(self.stream.peer_address(), head)
        refused = refusal(head)
        if refused is not None:
            self._respond(*refused, address=address)
            return
        admitted = self._sessions.admission.admit(address)
        if isinstance(admitted, TurnedAway):
            self._turn_away(admitted, address)
        else:
            session, answer = self._open(head, address, admitted)
            session.guard(partial(session.begin, answer, path(head), rest, more=more, hung_up=self._hung_up))

    def _open(self, head: Head, address: str, place: AddressEntry) -> tuple[Session, bytes]:
        """Accept the handshake. Return a new session, which owns the stream from now on, and the answer."""
        sessions, stream = self._sessions, self.stream
        sessions.handshakes.remove(self)
        protocol = choose(subprotocols(head))
        session = Session(self.id, stream, sessions, protocol, address, place, self._began_at)
        stream.attach(session)
        sessions.watcher.replace(stream.descriptor, session)
        return session, switching_protocols(head, protocol.name)

    def _turn_away(self, why: TurnedAway, address: str) -> None:
        """Refuse a valid handshake because there is no place. An address's refusals are logged only once in a while."""
        status = HTTPStatus.SERVICE_UNAVAILABLE
        if why.limit == "max_connections":
            self._note_refusal(status, why.sentence, address)
        else:
            self._sessions.count_refusal(status)
            if why.unlogged:
                log.warning(Event("address refused", address=address, reason=why.sentence, handshakes=why.unlogged))
        self._write_answer(status, why.sentence, f"Connection: close\r\nRetry-After: {why.retry_after}\r\n")

    def _respond(
        self,
        status: HTTPStatus,
        sentence: str,
        headers: str = "Connection: close\r\n",
        header: str = "",
        address: str = "",
    ) -> None:
        """Refuse the request with an HTTP answer, which ends the connection."""
        self._note_refusal(status, sentence, address, header)
        self._write_answer(status, sentence, headers)

    def _write_answer(self, status: HTTPStatus, sentence: str, headers: str) -> None:
        self._buffer = None
        self._sessions.handshakes.remove(self)
        self._sessions.closings.add(self)
        self.stream.write(http_answer(status, sentence, headers))
        self.stream.seal()
        self.drained()

    def _note_refusal(self, status: HTTPStatus, reason: str, address: str = "", header: str = "") -> None:
        """Count and log a refusal. `header` is the name of the wrong header, "" if none is wrong."""
        self._sessions.count_refusal(status.value)
        log.info(
            Event(
                "handshake refused",
                client=self.id,
                status=status.value,
                reason=reason,
                header=header or None,
                address=address or self.stream.peer_address(),
            )
        )

    # The stream's owner.

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.outbound.Owner`: the peer takes no more bytes, or has not read its refusal in time."""
        self._sessions.departing.add(self)

    def drained(self) -> None:
        """See `realtimed.websocket.stream.ClientOwner`."""
        if not self.stream.pending:
            self.over()

    def replay_sent(self) -> None:
        """See `realtimed.websocket.stream.ClientOwner`."""

    def over(self) -> None:
        """Shut the stream and forget the connection."""
        if not self._over:
            self._over = True
            self._sessions.handshakes.remove(self)
            self._sessions.release(self, self.stream)
