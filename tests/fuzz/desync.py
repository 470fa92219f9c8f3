"""Wherever the meter says that a message ends, the library's parser is ready for another client.

An input is a recipe for what a client sends, see `tests.fuzz.recipes`. It goes through the meter as the daemon uses it:
a lone Pong is withheld, a meter is dropped between two messages, and nothing is passed on behind a Close or a message
that is too big. It goes to wsproto as trio-websocket drives it. Between two messages another client speaks, through the
same parser, and has to be understood. The first client, too, must hear what a parser of its own would say.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Final

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from realtimed.websocket.meter import InboundMeter, is_lone_pong
from tests.fuzz.recipes import RECIPES, Sent, random_recipe, sent_by

__all__ = ["COVERED", "SEEDS", "TALLY", "Library", "check", "generate"]

COVERED: Final = ("wsproto",)
"""Whose lines count beside realtimed's when it is asked what an input reaches."""

TALLY: Final = Counter[str]()
"""Frames, messages and boundaries that were checked, and how clients ended."""

SEEDS: Final = RECIPES
generate = random_recipe

_NO_FRAME: Final = b"\xff\xff"
"""What the daemon gives a parser between two frames so that it ends."""


class Library:
    """wsproto's parser behind a handshake, driven as trio-websocket drives it.

    `heard` is the messages, and `written` its answers to Pings and a Close. `closed` is the Close or the protocol error
    that ended it. A message may have `limit` characters, which is trio-websocket's max_message_size.
    """

    def __init__(self, limit: int) -> None:
        self._connection = Connection(ConnectionType.SERVER)
        self.limit = limit
        self._parts: list[str | bytes] = []
        self._size = 0
        self.heard: list[str | bytes] = []
        self.written = bytearray()
        self.messages = 0
        self.closed: CloseConnection | None = None

    @property
    def code(self) -> int | None:
        """The code of the Close or of the error. What the error says depends on the cuts."""
        return self.closed.code if self.closed is not None else None

    @property
    def closed_by_peer(self) -> bool:
        """Whether it ended with a Close of the client, and not with an error."""
        return self._connection.state is ConnectionState.CLOSED

    def read(self, data: bytes) -> None:
        """Read more of what a client sends."""
        assert self.closed is None
        connection = self._connection
        connection.receive_data(data)
        for event in connection.events():
            assert self.closed is None, "nothing follows a Close"
            if isinstance(event, (TextMessage, BytesMessage)):
                self._parts.append(event.data if isinstance(event, TextMessage) else bytes(event.data))
                self._size += len(event.data)
                assert self._size <= self.limit, "the meter finds first that a message is too big"
                if event.message_finished:
                    kind = "" if isinstance(event, TextMessage) else b""
                    self.heard.append(kind.join(self._parts))  # type: ignore[arg-type]  # they are of one kind
                    self._parts.clear()
                    self._size = 0
                    self.messages += 1
            elif isinstance(event, Ping):
                self.written += connection.send(event.response())
            elif isinstance(event, CloseConnection):
                self.closed = event
                if connection.state is ConnectionState.REMOTE_CLOSING:
                    self.written += connection.send(event.response())
            else:
                assert isinstance(event, Pong)


class _Shared:
    """A parser for several clients, and one of them. Counts what happens."""

    def __init__(self, sent: Sent) -> None:
        self._sent = sent
        self.library = Library(sent.limit)
        self.meter: InboundMeter | None = None
        self.messages = 0
        self._boundaries = 0
        self._nonce = 0

    def pass_on(self, piece: bytes) -> bool:
        """Do with a piece what the daemon does. Return False if that ends the client."""
        meter = self.meter
        if is_lone_pong(piece) if meter is None else meter.is_pong(piece):
            TALLY["frames"] += 1
            TALLY["pongs withheld"] += 1
            if meter is not None:
                meter.walk(piece)
            return True
        if meter is None:
            meter = self.meter = InboundMeter(self._sent.limit)
        frames, messages = meter.frames, meter.messages
        passed = meter.walk(piece)
        TALLY["frames"] += meter.frames - frames
        if meter.too_big:
            TALLY["too big"] += 1
            return False
        self.messages += meter.messages - messages
        if not meter.closing:
            self._feed(piece)
            return self._compare(meter)
        self._feed(piece[: passed - 1])
        early = self.library.closed_by_peer
        self._feed(piece[passed - 1 : passed])
        assert not early, "the meter has passed on more than the Close"
        return self._compare(meter)

    def _compare(self, meter: InboundMeter) -> bool:
        library = self.library
        if library.closed is not None:
            if library.closed_by_peer:
                assert meter.closing, "the meter has missed a Close"
                assert library.messages == self.messages
            TALLY["closed" if library.closed_by_peer else "protocol errors"] += 1
            return False
        assert not meter.closing, "the library has missed a Close"
        assert library.messages == self.messages, f"{library.messages} messages have ended, not {self.messages}"
        if meter.between_messages:
            self.meter = None
            self._boundaries += 1
            TALLY["boundaries"] += 1
            if self._boundaries % self._sent.every == 0:
                assert self.serves_another(), "another client is not understood"
                TALLY["sentinels"] += 1
        return True

    def _feed(self, data: bytes) -> None:
        """Pass data to the parser, in pieces, since the daemon cuts what takes long."""
        size = self._sent.recut or len(data) or 1
        for at in range(0, len(data), size):
            if self.library.closed is None:
                self.library.read(data[at : at + size])

    def serves_another(self) -> bool:
        """Return whether another client is understood that sends a Ping and a text."""
        library, before = self.library, (self.library.heard, self.library.written, self.library.messages)
        self._nonce += 1
        nonce = self._nonce.to_bytes(4, "big")
        library.heard, library.written = [], bytearray()
        library.read(b"\x89\x84\0\0\0\0" + nonce + b"\x81\x81\0\0\0\0x")
        understood = library.heard == ["x"] and library.written == b"\x8a\x04" + nonce and library.closed is None
        library.heard, library.written, library.messages = before
        return understood


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    sent = sent_by(data)
    shared = _Shared(sent)
    passed = b""
    for piece in sent.pieces:
        if not shared.pass_on(piece):
            if shared.meter is not None and not shared.meter.too_big:
                passed += piece
            break
        passed += piece
    TALLY["clients"] += 1
    TALLY["messages"] += shared.messages
    if sent.compared:
        _compare_with_own(shared.library, passed, sent.limit)
    if shared.library.closed is None and not (shared.meter is not None and shared.meter.too_big):
        _end(shared)


def _compare_with_own(shared: Library, passed: bytes, limit: int) -> None:
    """Compare with a parser that has read all that the client sent, the Pongs too, at once."""
    own = Library(limit)
    own.read(passed)
    TALLY["compared"] += 1
    assert own.heard == shared.heard, f"heard {shared.heard}, not {own.heard}"
    assert own.written == shared.written
    assert own.code == shared.code


def _end(shared: _Shared) -> None:
    """Check what the parser is ready for when the client has sent everything."""
    between_frames = shared.meter is None or shared.meter.between_frames
    if between_frames and not shared.messages % 2:
        shared.library.read(_NO_FRAME)
        assert shared.library.closed is not None, "two bytes end the parser between two frames"
        assert shared.library.closed.code == 1002
    else:
        shared.library.limit = sys.maxsize  # no meter measures what follows, if it is read as a part of a message
        assert shared.serves_another() == (shared.meter is None), "whether the parser is between two messages"
