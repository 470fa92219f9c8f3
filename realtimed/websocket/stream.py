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
"""About how many frames the library is given at once. It takes 20 µs for each."""

_MANY_MORE: Final = 3
"""Clients that send few frames wait for their turn only when this many times its frames have been handed over."""

_NO_FRAME: Final = b"\xff\xff"


class ClientStream(QueuedStream):
    """The stream under one WebSocket: what the hub writes and what trio-websocket writes, in order.

    Incoming bytes are metered before the library sees them. Once a Close has been written, by us or by the library,
    nothing follows it, and the library sees nothing more: `receive_some` itself reads on until the peer's Close or end
    of file, and then reports end of file. So the library does not fail on a peer that pings while it is being closed.

    The library's parser waits for more bytes in a generator that refers to the parser. In that state only a full
    garbage collection could free it, and the daemon does without. So the last bytes that the library reads are not a
    frame: the parser fails on them and is finished.
    """

    __slots__ = (
        "_dropping", "_gate", "_head", "_inspected", "_meter", "_piece", "_piece_frames", "_rest", "_tokens",
        "_tokens_at", "_turns", "burst", "cut_off", "http_status", "library_done", "parser_finished", "rate",
    )  # fmt: skip

    # `_head`, `_inspected` and `_rest` are bytes that the library has not received yet. `_head` is the request.
    # `_inspected` is handed over in pieces of `_piece` bytes, which are about `_piece_frames` frames. `_rest` was read
    # behind the request and is not metered yet. There is a `_gate` until the handshake is answered: the library would
    # take what a hasty client sends before that for bad HTTP. `http_status` is that of the library's answer to the
    # handshake, 0 before. `parser_finished` says that the library has been given what ends its parser, `cut_off`
    # that this was not a Close of the peer. `_dropping` is set when something was read that the library does not get.
    # `library_done` is called when trio-websocket is done with the stream; the owner sets it.

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
        self.parser_finished = False
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
        """Forget the nursery and the owner, after `shut`."""
        super().detach()
        del self.library_done

    async def receive_head(self, limit: int, deadline: float) -> bytes:
        """Read the head of an HTTP request; see `hand_on`. Returns b"" if the peer hangs up before its end.

        Raises `OverflowError` if it has more than `limit` bytes, and `trio.TooSlowError` if its end has not arrived by
        `deadline`, on trio's clock. A head that has arrived is in time, even if this process stood still meanwhile.
        """
        collected = HeadBuffer(limit)
        timed_out = False
        while True:
            more = self._receive_now(None)  # when many clients connect at once, most heads are there already
            if more == b"":
                return b""
            if more is not None:
                if collected.feed(more):
                    break
            elif timed_out:
                raise trio.TooSlowError
            else:
                with trio.CancelScope(deadline=deadline) as patience:
                    await trio.lowlevel.wait_readable(self._socket)
                timed_out = patience.cancelled_caught
        self._rest = collected.rest
        return collected.head

    def hand_on(self, head: bytes) -> None:
        """Give the library `head` as the first bytes that it receives."""
        self._head = head

    def open_gate(self) -> None:
        """Allow the library to read what comes after the handshake."""
        if self._gate is not None:
            self._gate.set()
            self._gate = None

    def finish(self, close: bytes, *, drop_unsent: bool = False) -> None:
        """Write a Close frame as the last frame. With `drop_unsent`, drop the frames that are not begun yet."""
        if self.sealed:
            return
        if drop_unsent and self._backlog is not None:
            self._backlog.drop_unsent(frame_boundary)
            self._backlogs.freed()
        self.write(close)
        self.seal()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write what the library sends. Nothing follows its Close."""
        if not self.http_status:
            self.http_status = int(data[9:12])  # HTTP/1.1 101
        self.write(bytes(data))
        if data[0] == _CLOSE_BYTE:
            self.seal()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what the peer sent, if it is within the limits and before the end of its Close."""
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
        """Return the next piece of `_inspected` when it is this stream's turn; b"" if the stream is sealed then."""
        # A client that sends little does not wait behind those that send all they may, unless there are very many.
        if self._turns.used_up(1 if self._piece_frames == _FRAMES_A_PIECE else _MANY_MORE):
            async with self._turns:
                pass
        if self.sealed:  # for the library this may be in the middle of a frame
            self._inspected = b""
            self.cut_off = True
            return b""
        self._turns.spend(self._piece_frames)
        piece, self._inspected = self._inspected[: self._piece], self._inspected[self._piece :]
        self.parser_finished = self._meter.closing and not self._inspected
        return piece

    def _last_words(self) -> bytes:
        """Return what ends the library's parser; b"" if it has ended, or would take that for a part of a frame."""
        if (
            self.parser_finished
            or self.cut_off
            or self.http_status != HTTPStatus.SWITCHING_PROTOCOLS
            or not self._meter.between_frames
        ):
            return b""
        self.cut_off = self.parser_finished = True
        self.seal()  # the library's answer to that must not go out
        return _NO_FRAME

    async def aclose(self) -> None:
        """Call `library_done`. The owner shuts the socket."""
        self.library_done()
        self.open_gate()
        await trio.lowlevel.checkpoint()

    def _inspect(self, data: bytes) -> int:
        """Meter incoming bytes. Return how many of them the library may see."""
        before = self._meter.frames
        passed = self._meter.walk(data)
        # The library handles all it is given in one go, and an empty frame takes hardly less time than a message.
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
