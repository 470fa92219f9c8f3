"""A few trio-websockets that take turns at reading what clients send. The only user of trio_websocket.

A trio-websocket takes 19 KB and a third of a millisecond, and most of the time it waits. Between two messages it knows
nothing of its client: we negotiate no extension, and match no pings. So an engine, which is one of them, is lent to a
client from the first byte of a message to its end. Then it is free for another client's message. The handshake that it
needs is always the same one, and nobody sees its answer.

`InboundMeter` says where messages end. An engine is given back only when the meter is between two messages and the
library has handled all of them, which the fuzzer `tests.fuzz.desync` checks. Otherwise bytes of one client would be
read as another's.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from realtimed.process.logs import Event
from realtimed.process.turns import Turns
from realtimed.websocket.stream import Inbound

__all__ = ["Borrower", "Engine", "Engines"]

_AT_WORK: Final = 16
"""Engines that are at work or free. Those in the middle of a message that has not come in full do not count."""

_FRAMES_A_PIECE: Final = 8
"""About how many frames an engine reads before other tasks get their turn. Each takes about 20 µs."""

_FEW_FIRST: Final = 4
"""One engine in so many goes to a client that sends many frames, if there are others that send few."""

_FRAMES_A_TURN: Final = 96
"""Frames that engines read in one turn of the event loop."""

_REQUEST: Final = (
    b"GET / HTTP/1.1\r\nHost: realtimed\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
"""The request of the example in RFC 6455 section 1.3."""

_NO_FRAME: Final = b"\xff\xff"
"""Bytes that no frame begins with. The library's parser waits in a generator that refers to the parser. Only a full
garbage collection could free it, and the daemon does without. The parser fails on these bytes, and is freed."""

log = logging.getLogger(__name__)


class Borrower(Protocol):
    """A client, as an engine sees it."""

    id: str
    engine: Engine | None
    """The engine that reads for it. Only this module writes this and `queued`."""
    queued: bool
    """Whether it waits for an engine. Until it has been served, it must not pass on more."""

    @property
    def between_messages(self) -> bool:
        """Whether all that it has passed on ends between two messages."""

    def received(self, message: str | bytes) -> None:
        """Handle a message. Never waits. Must not raise."""

    def library_wrote(self, data: bytes) -> None:
        """Send the library's answer to a Ping or a Close."""

    def library_closed(self, code: int, reason: str) -> None:
        """Handle a Close of the client, or what breaks RFC 6455; `code` says which. The engine is gone."""

    def read_on(self) -> None:
        """All that was passed on has been read."""

    def over(self) -> None:
        """End the connection at once: the engine has failed."""


class Engine(trio.abc.Stream):
    """One trio-websocket, and the stream under it."""

    __slots__ = (
        "_between_frames", "_engines", "_handled", "_input", "_messages", "_over", "_piece", "_piece_frames", "_reader",
        "borrower", "held", "ready",
    )  # fmt: skip

    # Invariants: `_input` is what the library has not read yet, in pieces of `_piece` bytes, which are about
    # `_piece_frames` frames. `_messages` have ended in what was passed on, and the borrower has got `_handled` of them.
    # `_between_frames` says whether all that was passed on ends between two frames, so that `_NO_FRAME` may follow.
    # `_reader` is the library's task while it waits for input. `held` says that everything was read, and that it ended
    # in the middle of a message. Once the engine is `_over`, it gets nothing new to read and ends behind its input.

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._input = _REQUEST
        self._piece = len(_REQUEST)
        self._piece_frames = 0
        self._messages = 0
        self._handled = 0
        self._between_frames = True
        self._reader: trio.lowlevel.Task | None = None
        self._over = False
        self.borrower: Borrower | None = None
        self.held = False
        self.ready = False
        """Whether the handshake is over."""

    async def run(self) -> None:
        """Read for borrowers until a Close, a protocol error or `end`."""
        async with trio.open_nursery() as nursery:
            # The meter measures every message in bytes before the library measures it in characters.
            request = await wrap_server_stream(nursery, self, max_message_size=sys.maxsize)
            websocket = await request.accept()  # no attribute: it refers to this object
            self.ready = True
            self._engines.got_ready(self)
            try:
                while True:
                    self._handle(await websocket.get_message())
            except ConnectionClosed as closed:
                self._report(closed)

    def _report(self, closed: ConnectionClosed) -> None:
        """Tell the borrower how the connection ended for the library, after all messages before the end."""
        borrower, reason = self.borrower, closed.reason
        if borrower is not None and reason is not None:  # without a reason the library has failed, and raises why
            self.borrower = borrower.engine = None
            borrower.library_closed(reason.code, reason.reason or "")

    def _handle(self, message: str | bytes) -> None:
        self._handled += 1
        if self.borrower is not None:
            self.borrower.received(message)
        if self._reader is not None:
            self._settle()

    def feed(self, inbound: Inbound) -> None:
        """Read more of what the borrower sends."""
        self._messages += inbound.messages
        self._between_frames = inbound.between_frames
        size, frames = len(inbound.data), inbound.frames
        self._input += inbound.data
        self._piece = size if frames <= _FRAMES_A_PIECE else max(size * _FRAMES_A_PIECE // frames, 1)
        self._piece_frames = min(max(frames, 1), _FRAMES_A_PIECE)
        self._set_held(False)
        self._wake()

    def end(self) -> None:
        """Read for nobody any more."""
        self._over = True
        self.borrower = None
        if self._between_frames:
            self._input += _NO_FRAME
        else:
            self._engines.parser_abandoned()
        self._set_held(False)
        self._wake()

    def _settle(self) -> None:
        """If everything has been read, give the engine back between two messages, or hold it in the middle of one."""
        borrower = self.borrower
        if borrower is None or self._over or self._input or self._handled != self._messages:
            return
        if borrower.between_messages:
            self.borrower = borrower.engine = None
            self._engines.offer(self)
        elif not self.held:
            self._set_held(True)
        else:
            return
        borrower.read_on()

    def _set_held(self, held: bool) -> None:
        if held != self.held:
            self.held = held
            self._engines.held_changed(1 if held else -1)

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            trio.lowlevel.reschedule(reader)

    # The stream, for the library.

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        self._settle()
        while not self._input:
            if self._over:
                return b""
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        turns = self._engines.turns
        if turns.used_up():
            async with turns:
                pass
        turns.spend(self._piece_frames)
        piece, self._input = self._input[: self._piece], self._input[self._piece :]
        return piece

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Pass on what the library answers, but not its answer to the handshake."""
        if self.borrower is not None:
            self.borrower.library_wrote(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once, as `send_all` never blocks."""

    async def aclose(self) -> None:
        """Give the library nothing more to read."""
        self._over = True
        self._input = b""


class _Waiting:
    """The borrowers that wait for an engine, with what they pass on.

    A client that sends a few frames does not wait behind a thousand that send all they may. Otherwise it is first come,
    first served, and those that send much get their turn as well.
    """

    def __init__(self) -> None:
        self._few: OrderedDict[Borrower, Inbound] = OrderedDict()
        self._many: OrderedDict[Borrower, Inbound] = OrderedDict()
        self._taken = 0

    def __len__(self) -> int:
        return len(self._few) + len(self._many)

    def add(self, borrower: Borrower, inbound: Inbound) -> None:
        """Let a borrower wait."""
        queue = self._few if inbound.frames <= _FRAMES_A_PIECE else self._many
        queue[borrower] = inbound

    def remove(self, borrower: Borrower) -> None:
        """Let it wait no longer."""
        if self._few.pop(borrower, None) is None:
            del self._many[borrower]

    def take(self) -> tuple[Borrower, Inbound]:
        """Remove and return the next. Raises `KeyError` if there is none."""
        self._taken += 1
        many_first = self._taken % _FEW_FIRST == 0
        queue = self._many if (many_first and self._many) or not self._few else self._few
        return queue.popitem(last=False)


class Engines:
    """All engines. They run in `nursery`, which has to be set before the first client comes."""

    # Invariants: `count` engines exist. `_held` of them are in the middle of a message, and `_starting` are not ready.
    # `_free` have no borrower. `_waiting` has borrowers only while `_free` is empty.

    def __init__(self, parser_abandoned: Callable[[], None]) -> None:
        self.parser_abandoned = parser_abandoned
        """Called for each parser that only a full garbage collection can free."""
        self.nursery: trio.Nursery
        self.turns = Turns(_FRAMES_A_TURN, _AT_WORK)
        """Spreads frames over turns of the event loop. It is an instrument of trio, which the daemon adds."""
        self.started = 0
        self.count = 0
        self._held = 0
        self._starting = 0
        self._free: list[Engine] = []
        self._waiting = _Waiting()

    @property
    def at_rest(self) -> bool:
        """Whether no engine is reading or starting, and no client waits for one."""
        return not self._waiting and self.count == self._held + len(self._free)

    def feed(self, borrower: Borrower, inbound: Inbound) -> None:
        """Read what a client sends: with its engine, or with a free one, or when there is one."""
        engine = borrower.engine
        if engine is None and self._free:
            engine = self._free.pop()
            borrower.engine, engine.borrower = engine, borrower
        if engine is not None:
            engine.feed(inbound)
            return
        borrower.queued = True
        self._waiting.add(borrower, inbound)
        self._grow()

    def forget(self, borrower: Borrower) -> None:
        """Read no more for a client."""
        if borrower.queued:
            borrower.queued = False
            self._waiting.remove(borrower)
        engine, borrower.engine = borrower.engine, None
        if engine is not None:
            engine.end()

    def got_ready(self, engine: Engine) -> None:
        """Offer an engine for the first time."""
        self._starting -= 1
        self.offer(engine)

    def offer(self, engine: Engine) -> None:
        """Lend an engine to the next client, keep it for later, or end it if there are enough."""
        if not self._waiting:
            if len(self._free) < _AT_WORK:
                self._free.append(engine)
            else:
                engine.end()
            return
        borrower, inbound = self._waiting.take()
        borrower.queued = False
        borrower.engine, engine.borrower = engine, borrower
        engine.feed(inbound)

    def held_changed(self, change: int) -> None:
        """Count an engine that is in the middle of a message, or is no more."""
        self._held += change
        if change > 0:
            self._grow()

    def _grow(self) -> None:
        """Start an engine if a client waits for one, and not too many are at work."""
        if self._starting < len(self._waiting) and self.count - self._held < _AT_WORK:
            self.count += 1
            self._starting += 1
            self.started += 1
            self.nursery.start_soon(self._run, Engine(self))

    async def _run(self, engine: Engine) -> None:
        """Run an engine. This is its exception boundary: a fault inside is a bug, and ends its borrower only."""
        try:
            await engine.run()
        except Exception:
            borrower = engine.borrower
            if borrower is None and not engine.ready and self._waiting:
                # If no engine can start, nobody will ever get one. So each that does not takes a client with it.
                borrower, _ = self._waiting.take()
                borrower.queued = False
            log.exception(Event("internal error", client=borrower.id if borrower is not None else "engine"))
            if borrower is not None:
                borrower.over()
        finally:
            self._gone(engine)

    def _gone(self, engine: Engine) -> None:
        """Forget an engine that has ended."""
        self.count -= 1
        if engine.held:
            engine.held = False
            self._held -= 1
        if not engine.ready:
            self._starting -= 1
        if engine in self._free:
            self._free.remove(engine)
        self._grow()
