"""The life of one WebSocket after its handshake: conversation, end.

A session is a record, not a task. The watcher calls it when there is something to read, an engine when the client's
message has been read, and others when it has to end.

We write our Closes ourselves, to the stream. So the library is never in its state "closing", in which it fails on
frames that a peer may still send.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from realtimed.hub.channel import Channel
from realtimed.hub.publication import Ending
from realtimed.net.admission import AddressEntry
from realtimed.net.outbound import READ_BYTES
from realtimed.process.logs import Event
from realtimed.text import quoted
from realtimed.websocket.connection import Connection
from realtimed.websocket.engines import Engine
from realtimed.websocket.frames import CLOSE_BYTE, CloseCode, close_frame, lone_close
from realtimed.websocket.protocols import Conversation, ViolationError
from realtimed.websocket.stream import ClientStream

if TYPE_CHECKING:
    from realtimed.websocket.sessions import Sessions

__all__ = ["Session"]

_PATH: Final = "/ws"

_OF_THE_LIBRARY: Final[Mapping[int, Ending]] = {
    CloseCode.PROTOCOL_ERROR: Ending.PROTOCOL_ERROR,
    CloseCode.INVALID_DATA: Ending.INVALID_DATA,
}
"""The close codes with which trio-websocket ends a connection."""

_ANSWERED_AT_ONCE: Final = 8
"""Messages that have waited for a replay and are answered before other clients get their turn."""

_NO_CLOSE: Final = 1006
"""Stands for a close code where there was no Close (RFC 6455 section 7.4.1)."""

log = logging.getLogger(__name__)


class Session(Connection):
    """One client, from the answer to its handshake to its last byte. Owns its stream.

    A connection ends in one of four ways, and `_note_end` counts and logs the first of them:
    - `close`: publications from before go out, then a Close with a code and a reason of ours.
    - `send_away`: the same, with advice on when to come back.
    - `end`: the stream has found a reason; without a Close if the client would not get it.
    - the client has closed, or hung up, or trio-websocket has found a protocol error.
    Then the peer has `close-timeout` for its part, and `over` releases everything.
    """

    __slots__ = (
        "_address", "_conversation", "_ending", "_inbox", "_over", "_peer_done", "_place", "_sessions",
        "_unread", "began_at", "connected_since", "engine", "expires_at", "queued", "rank",
    )  # fmt: skip

    # Invariants: `_ending` is the first reason to end the connection. `_peer_done` says that the peer's Close, or the
    # end of file, has been read: nothing more is. `_unread` says that there may be something to read, which must wait
    # while `_busy`. `_inbox` has the messages that wait until all is sent that the client has asked for.

    def __init__(
        self,
        id: str,
        stream: ClientStream,
        sessions: Sessions,
        protocol: type[Conversation],
        address: str,
        place: AddressEntry,
        began_at: float,
    ) -> None:
        super().__init__(id, stream)
        self.connected_since = time.time()
        self.expires_at = sessions.expiry()
        self.rank = sessions.connections
        self.engine: Engine | None = None
        self.queued = False
        self.began_at = began_at  # for durations: the time of day may be set meanwhile
        self._sessions = sessions
        self._address = place.name if place.name == address else address  # one string for all of an address
        self._place = place
        self._conversation = protocol(sessions.hub, stream)
        self._ending: Ending | None = None
        self._inbox: deque[str | bytes] | None = None
        self._unread = False
        self._peer_done = False
        self._over = False

    def begin(self, answer: bytes, path: str, rest: bytes, *, more: bool, hung_up: bool) -> None:
        """Write the `answer` to the handshake, and greet the client, which has asked for `path`.

        `rest` came behind the request. `more` says that there may be more to read, and `hung_up` that there is an end
        of file behind that.
        """
        sessions, conversation = self._sessions, self._conversation
        self.stream.form = conversation.form
        sessions.connections += 1
        sessions.members[self.id] = self
        if log.isEnabledFor(logging.DEBUG):
            protocol = conversation.name or "plain"
            log.debug(Event("client connected", client=self.id, address=self._address, protocol=protocol))
        if path != _PATH:
            self.stream.write(answer)
            self.close(Ending.NO_SUCH_PATH, f"no such path: {quoted(path)}; WebSockets are served at {_PATH}")
        else:
            self.stream.write(answer + conversation.greeting(self.id, sessions.config.heartbeat))
            if sessions.send_away is not None:
                sessions.send_away(self)
        self._hung_up = hung_up
        if more or hung_up:
            sessions.watcher.again(self)
        if rest:
            self._take(rest)

    # For another process, or from one.

    @property
    def protocol(self) -> str:
        """The name of the client's protocol, "" for the plain one."""
        return self._conversation.name

    @property
    def inbox(self) -> list[str | bytes] | None:
        """The messages that wait until all is sent that the client has asked for."""
        return list(self._inbox) if self._inbox is not None else None

    def resume(self, rank: int, connected_since: float, expires_at: float) -> None:
        """Go on as a member; see `Sessions.members`."""
        self.rank, self.connected_since, self.expires_at = rank, connected_since, expires_at
        self.stream.form = self._conversation.form
        self._sessions.members[self.id] = self

    def resume_inbox(self, messages: Iterable[str | bytes]) -> None:
        """Go on with messages that wait."""
        self._inbox = deque(messages)

    def leave_to_another_process(self) -> None:
        """Forget a connection that goes on elsewhere: it has not ended."""
        self._over = True
        self._return_engine()
        self._sessions.hub.leave(self.stream)
        self._sessions.members.pop(self.id, None)
        self._sessions.admission.leave(self._place)
        self._sessions.release(self, self.stream)

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
            "protocol": self._conversation.name or "plain",
            "channels": sorted(channel.name for channel in self.stream.channels),
            "address": self._address,
            "connected_since": self.connected_since,
            "pending": self.stream.pending,
        }

    # Ending.

    def close(self, ending: Ending, reason: str, code: int | None = None) -> bool:
        """End the connection. What was published before still goes out before the Close. Returns at once.

        `code` replaces the protocol's close code for the ending. Returns False if the connection was already ending.
        """
        if self._ending is not None:
            return False
        self._sessions.hub.catch_up(self.stream)
        return self._close(ending, reason, code)

    def send_away(self, ending: Ending, retry_after: float) -> None:
        """Close a connection without a fault of the client, and ask it to come back after `retry_after` seconds.

        `ending` is ``RESTART`` or ``MAX_AGE``.
        """
        if self._ending is None:
            conversation = self._conversation
            self._sessions.hub.catch_up(self.stream)
            self.stream.write(conversation.farewell(ending, retry_after))
            self._close(ending, conversation.farewell_reason(ending, retry_after))

    def end(self, ending: Ending, reason: str) -> None:
        """See `realtimed.net.outbound.Owner`."""
        if ending in (Ending.GONE, Ending.FAULT):  # without a Close
            self._note_end(ending, reason)
            self.stream.seal()
            self._sessions.departing.add(self)  # not now: a round of the fan-out may be under way
        elif ending is Ending.SLOW:
            self._close(ending, reason, drop_unsent=True)
        else:
            self.close(ending, reason)

    def _close(self, ending: Ending, reason: str, code: int | None = None, *, drop_unsent: bool = False) -> bool:
        """Write the Close, unless the connection is already ending, and give the peer until the deadline to answer."""
        if self._ending is not None:
            return False
        code = code or self._conversation.close_code(ending)
        self._note_end(ending, reason, code)
        self._sessions.hub.leave(self.stream)
        self.stream.finish(close_frame(code, reason), drop_unsent=drop_unsent)
        self._sessions.closings.add(self)
        # What an engine has begun to read, it reads to its end. Nothing more is passed on.
        if self.queued:
            self._return_engine()
        self._unread = self._unread or self.stream.peer_has_closed
        self.read_on()
        return True

    def _note_end(self, ending: Ending, reason: str, code: int = _NO_CLOSE) -> None:
        """Count and log why the connection ends, unless that is already done."""
        if self._ending is not None:
            return
        self._ending = ending
        self._sessions.count_end(ending, code)
        seconds = round(trio.current_time() - self.began_at, 1)
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

    def _peer_is_done(self) -> None:
        """Send the rest of what waits for the peer, which has closed or hung up, and end."""
        self._peer_done = True
        self.stream.seal()
        self._return_engine()
        if self.stream.pending or self.stream.replaying:
            self._sessions.closings.add(self)
        else:
            self.over()

    def drained(self) -> None:
        """See `realtimed.websocket.stream.ClientOwner`."""
        if self._peer_done and not self.stream.pending:
            self.over()

    def over(self) -> None:
        """Shut the stream and release everything that the connection holds."""
        if self._over:
            return
        self._note_end(Ending.GONE, "the peer has gone")  # unless an end is already noted
        self._over = True
        sessions = self._sessions
        self._return_engine()
        self._inbox = None
        sessions.hub.leave(self.stream)
        sessions.members.pop(self.id, None)
        sessions.admission.leave(self._place)
        sessions.release(self, self.stream)

    # Reading.

    @property
    def _busy(self) -> bool:
        """Whether what has been read must be handled before more is: an end of file would overtake a Close."""
        return self.queued or self._inbox is not None or (self.engine is not None and not self.engine.held)

    @property
    def between_messages(self) -> bool:
        """See `realtimed.websocket.engines.Borrower`."""
        return self.stream.between_messages

    def _read(self) -> None:
        """Read once: others get their turn before the next time."""
        if self._over or self._peer_done:
            return
        if self._inbox is not None and not self.stream.replaying:
            self._answer_inbox(self._inbox)
            return
        if self._busy:
            self._unread = True
            return
        if self.stream.peer_has_closed:  # before a Close of ours: nothing follows
            self._peer_is_done()
            return
        data = self._receive()
        if data is None:
            return
        if not data:
            self._note_end(Ending.GONE, "")
            self._peer_is_done()
            return
        if len(data) == READ_BYTES or self._hung_up:
            self._sessions.watcher.again(self)
        self._take(data)

    def _take(self, data: bytes) -> None:
        """Handle bytes of the client."""
        stream = self.stream
        if not stream.sealed:
            if data[0] == CLOSE_BYTE and stream.between_messages and (closed := lone_close(data)) is not None:
                # What follows is what the library would have us do.
                self._note_end(Ending.BY_CLIENT, closed.reason, closed.code)  # first, as the answer may find it gone
                self.stream.write(closed.answer)
                self._peer_is_done()
                return
            inbound = stream.inspect(data)
            if inbound is not None:
                self._sessions.engines.feed(self, inbound)
            elif stream.peer_has_closed:
                self._peer_is_done()
        elif stream.finds_close(data):
            self._peer_is_done()

    def received(self, message: str | bytes) -> None:
        """See `realtimed.websocket.engines.Borrower`."""
        if self._inbox is not None:
            self._inbox.append(message)
        elif self.stream.replaying:
            self._inbox = deque([message])
        else:
            self.guard(partial(self._answer, message))

    def _answer(self, message: str | bytes) -> None:
        if self._ending is not None:
            return
        try:
            self.stream.write_frames(self._conversation.receive(message))
        except ViolationError as violation:
            self.close(violation.ending, violation.reason)

    def _answer_inbox(self, inbox: deque[str | bytes]) -> None:
        """Answer some of the messages that have waited for a replay, and then read on."""
        for _ in range(min(_ANSWERED_AT_ONCE, len(inbox))):
            if self.stream.replaying:
                return  # the answer before this one has begun another
            self._answer(inbox.popleft())
        if inbox:
            self._sessions.watcher.again(self)
        else:
            self._inbox = None
            self._unread = True
            self.read_on()

    def replay_sent(self) -> None:
        """See `realtimed.websocket.stream.ClientOwner`."""
        if self._inbox is not None:
            self._sessions.watcher.again(self)

    def read_on(self) -> None:
        """See `realtimed.websocket.engines.Borrower`."""
        if self._ending is not None and self.engine is not None and self.engine.held:
            self._return_engine()  # it gets nothing more
        if self._unread and not self._busy and not self._over:
            self._unread = False
            self._sessions.watcher.again(self)

    def library_wrote(self, data: bytes) -> None:
        """See `realtimed.websocket.engines.Borrower`. Nothing follows a Close."""
        self.stream.write(data)
        if data[0] == CLOSE_BYTE:
            self.stream.seal()

    def library_closed(self, code: int, reason: str) -> None:
        """See `realtimed.websocket.engines.Borrower`."""
        if code in _OF_THE_LIBRARY:
            self.close(_OF_THE_LIBRARY[code], reason)
        else:
            self._note_end(Ending.BY_CLIENT, reason, code)
        self._peer_is_done()

    def _return_engine(self) -> None:
        """Give up the engine, or the place in the queue for one."""
        self._sessions.engines.forget(self)
