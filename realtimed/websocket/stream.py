"""The stream between the hub, a WebSocket client and trio-websocket."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import trio

from realtimed.hub.publication import Ending
from realtimed.net.backlogs import Backlogs
from realtimed.net.head import HeadBuffer
from realtimed.net.stream import QueuedStream
from realtimed.process.turns import Turns
from realtimed.websocket.frames import frame_boundary
from realtimed.websocket.meter import InboundMeter

__all__ = ["ClientStream"]

_CLOSE_BYTE: Final = 0x88

_FRAMES_A_PIECE: Final = 8
"""About how many frames the library is given at once: it takes 20 µs for each."""

_MANY_MORE: Final = 3
"""How many times as many frames clients that send few of them may send in one turn."""

_NO_FRAME: Final = b"\xff\xff"


class ClientStream(QueuedStream):
    """The stream under one WebSocket: what the hub writes and what trio-websocket writes, in order.

    What comes in is metered before the library sees it. Once a Close has been written, by us or by the library,
    nothing follows it, and the library sees nothing more: `receive_some` reads on by itself until the peer's Close or
    end of file, and reports the latter. So a peer that pings while it is being closed finds nobody to trip over it.

    The library's parser waits for more in a generator that refers to the parser: left so, only a full garbage
    collection would find it, and that is what the daemon does without. So the last that the library reads is no frame:
    then the parser fails, and is through.
    """

    __slots__ = (
        "_dropping",
        "_gate",
        "_head",
        "_inspected",
        "_meter",
        "_piece",
        "_piece_frames",
        "_rest",
        "_tokens",
        "_tokens_at",
        "_turns",
        "burst",
        "cut_off",
        "http_status",
        "library_done",
        "parser_is_through",
        "rate",
    )  # fmt: skip

    # `_head`, `_inspected` and `_rest` are bytes the library has not received yet: the request, what is handed over in
    # pieces of `_piece` bytes, which are about `_piece_frames` frames, and what was read behind the request and has not
    # been looked at. `_gate` is there until the handshake has been answered: the library would take what a hasty client
    # sends before it for bad HTTP. `http_status` is that with which the library has answered the handshake, 0
    # before. `parser_is_through` says that the library has been given what its parser ends with, `cut_off` that this
    # was not a Close of the peer. `_dropping` is set when something has been read that the library does not get.
    # `library_done` is called when trio-websocket is through with the stream; the owner sets it.

    def __init__(
        self,
        sock: socket.socket,
        backlogs: Backlogs,
        *,
        max_inbound: int,
        rate: float,
        burst: int,
        turns: Turns | None = None,
    ) -> None:
        super().__init__(sock, backlogs)
        self.rate = rate
        self.burst = burst
        self.http_status = 0
        self.library_done: Callable[[], None]
        self.cut_off = False
        self.parser_is_through = False
        self._head = b""
        self._inspected = b""
        self._dropping = False
        self._piece = self._piece_frames = 0
        self._rest = b""
        self._turns = turns or Turns(math.inf, 1)
        self._gate: trio.Event | None = trio.Event()
        self._meter = InboundMeter(max_inbound)
        self._tokens = float(burst)
        self._tokens_at = self.heard_at

    def detach(self) -> None:
        """Forget nursery and owner, after `shut`."""
        super().detach()
        del self.library_done

    async def receive_head(self, limit: int, deadline: float) -> bytes:
        """Read an HTTP request's head; see `hand_on`. Returns b"" if the peer hangs up before its end.

        Raises `OverflowError` if it has more than `limit` bytes, and `trio.TooSlowError` if its end has not arrived by
        `deadline`, on trio's clock: one that has is not too late because this process stood still meanwhile.
        """
        collected = HeadBuffer(limit)
        late = False
        while True:
            more = self._receive_now(None)  # of many who connect at once, most have said all by the time it is read
            if more == b"":
                return b""
            if more is not None:
                if collected.feed(more):
                    break
            elif late:
                raise trio.TooSlowError
            else:
                with trio.CancelScope(deadline=deadline) as patience:
                    await trio.lowlevel.wait_readable(self._socket)
                late = patience.cancelled_caught
        self._rest = collected.rest
        return collected.head

    def hand_on(self, head: bytes) -> None:
        """Let the library receive `head` first of all."""
        self._head = head

    def open_gate(self) -> None:
        """Let the library read what comes after the handshake."""
        if self._gate is not None:
            self._gate.set()
            self._gate = None

    def finish(self, close: bytes, *, drop_unsent: bool = False) -> None:
        """Write a Close frame as the last of all frames. With `drop_unsent`, frames not begun yet are dropped."""
        if self.sealed:
            return
        if drop_unsent and self._backlog is not None:
            self._backlog.drop_unsent(frame_boundary)
            self._backlogs.freed()
        self.write(close)
        self.seal()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write what the library has to say; its Close is the last word."""
        if not self.http_status:
            self.http_status = int(data[9:12])  # HTTP/1.1 101
        self.write(bytes(data))
        if data[0] == _CLOSE_BYTE:
            self.seal()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Hand the library what the peer sent, as long as it is within the limits and before its Close's end."""
        if self._head:
            head, self._head = self._head, b""
            return head
        if self._gate is not None:
            await self._gate.wait()
        while self._inspected or not (self.sealed and self._meter.closing):
            data: bytes | None
            if self._inspected:
                if piece := await self._next_piece():
                    return piece
                continue
            if self._rest:
                data, self._rest = self._rest, b""
            else:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.Cancelled:
                    if last_words := self._last_words():
                        return last_words  # after them there is another checkpoint
                    raise
                try:
                    data = self._receive_now(max_bytes)
                except trio.BrokenResourceError:
                    break
            if data is None:
                continue
            if not data:
                break
            # The answer to a heartbeat: it has been heard, and would cost the library more than everything so far.
            is_pong = self._meter.is_pong(data)
            in_a_frame = not self._meter.between_frames
            passed = self._inspect(data)
            if not self.sealed and not is_pong:
                self._inspected = data[:passed]
            elif self.sealed and not self._dropping:
                self._dropping = True
                self.cut_off = self.cut_off or in_a_frame  # the library does not see the end of that frame
        return self._last_words()

    async def _next_piece(self) -> bytes:
        """Return the next piece of what has been inspected, when it is this stream's turn; b"" if it is sealed then."""
        # Who has little to say does not wait behind those who send as much as they may, unless there are very many.
        if self._turns.used_up(1 if self._piece_frames == _FRAMES_A_PIECE else _MANY_MORE):
            async with self._turns:
                pass
        if self.sealed:  # in the middle of a frame, perhaps, as far as the library knows
            self._inspected = b""
            self.cut_off = True
            return b""
        self._turns.spend(self._piece_frames)
        piece, self._inspected = self._inspected[: self._piece], self._inspected[self._piece :]
        self.parser_is_through = self._meter.closing and not self._inspected
        return piece

    def _last_words(self) -> bytes:
        """Return what ends the library's parser, or b"" if that has been said, or would be part of a frame."""
        if (
            self.parser_is_through
            or self.cut_off
            or self.http_status != HTTPStatus.SWITCHING_PROTOCOLS
            or not self._meter.between_frames
        ):
            return b""
        self.cut_off = self.parser_is_through = True
        self.seal()  # what the library answers is nobody's business
        return _NO_FRAME

    async def aclose(self) -> None:
        """Call `library_done`; the socket is the owner's to shut."""
        self.library_done()
        self.open_gate()
        await trio.lowlevel.checkpoint()

    def _inspect(self, data: bytes) -> int:
        """Meter what came in; return how much of it the library may see."""
        before = self._meter.frames
        passed = self._meter.walk(data)
        # The library takes all that it is given in one go, and hardly less for a frame of no bytes than for a message.
        frames = self._meter.frames - before
        self._piece = passed if frames <= _FRAMES_A_PIECE else max(passed * _FRAMES_A_PIECE // frames, 1)
        self._piece_frames = min(max(frames, 1), _FRAMES_A_PIECE)
        if self.sealed:
            return passed
        self._tokens = min(self._tokens + (self.heard_at - self._tokens_at) * self.rate, self.burst)
        self._tokens -= self._meter.frames - before
        self._tokens_at = self.heard_at
        if self._meter.too_big:
            self._owner.end(Ending.TOO_BIG, f"the limit, max-inbound, is {self._meter.limit} bytes a message")
        elif self._tokens < 0:
            self._owner.end(
                Ending.TOO_MANY,
                f"the limit is {self.rate:g} frames a second (inbound-rate), {self.burst} at once (inbound-burst)",
            )
        return passed
