"""The stream between the hub and a WebSocket client, which meters what the client sends."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, NamedTuple, Protocol

import trio

from realtimed.hub.publication import Ending, Frames
from realtimed.net.backlog import Backlog
from realtimed.net.backlogs import Backlogs
from realtimed.net.drains import Drains
from realtimed.net.outbound import OutboundStream, Owner
from realtimed.net.watcher import Watcher
from realtimed.websocket.frames import frame_boundary
from realtimed.websocket.meter import InboundMeter, is_lone_pong

__all__ = ["ClientOwner", "ClientStream", "Inbound", "InboundLimits"]

_TOLERANCE: Final = 1e-6
"""Seconds that rounding errors may amount to."""


class InboundLimits(NamedTuple):
    """What a client may send: bytes a message, frames a second, and frames at once."""

    message: int
    rate: float
    burst: int


class Inbound(NamedTuple):
    """What the library has to read.

    `data` is about `frames` frames, and `messages` messages end in it. `between_frames` says whether it ends between
    two frames.
    """

    data: bytes
    frames: int
    messages: int
    between_frames: bool


class ClientOwner(Owner, Protocol):
    """The owner of a client's stream."""

    def guard(self, step: Callable[[], None]) -> None:
        """Call `step`, and end this connection if it raises an exception, which is a bug."""

    def drained(self) -> None:
        """Do what has to wait until everything is sent. The stream may also have broken."""

    def replay_sent(self) -> None:
        """Do what has to wait until all is sent that the client has asked for."""


class ClientStream(OutboundStream):
    """The stream under one WebSocket.

    It has no task. What owns it calls `send_more` when the watcher says that the socket takes more.
    """

    __slots__ = ("_drains", "_full_at", "_limits", "_meter", "_watcher")

    # `_meter` is there from the first byte of a message, or of a frame, to the end of the last one; and after a Close
    # of ours. `_full_at` is when the client may send a whole burst again, on trio's clock.

    _owner: ClientOwner

    def __init__(
        self, sock: socket.socket, backlogs: Backlogs, limits: InboundLimits, watcher: Watcher, drains: Drains
    ) -> None:
        super().__init__(sock, backlogs)
        self._watcher = watcher
        self._drains = drains
        self._limits = limits
        self._meter: InboundMeter | None = None
        self._full_at = -math.inf

    def attach(self, owner: ClientOwner) -> None:
        """Set the owner."""
        self._owner = owner

    def detach(self) -> None:
        """Forget the owner, after `shut`."""
        del self._owner

    def finish(self, close: bytes, *, drop_unsent: bool = False) -> None:
        """Write a Close frame as the last frame. With `drop_unsent`, drop the frames that are not begun yet."""
        if self.sealed:
            return
        if drop_unsent and self._backlog is not None:
            self._backlog.drop_unsent(frame_boundary)
            self._backlogs.freed()
        self.write(close)
        self.seal()

    @property
    def between_messages(self) -> bool:
        """Whether the next byte from the client begins a message, or a control frame between messages."""
        return self._meter is None or self._meter.between_messages

    @property
    def peer_has_closed(self) -> bool:
        """Whether the end of a Close from the client has been metered."""
        return self._meter is not None and self._meter.closing

    def inspect(self, data: bytes) -> Inbound | None:
        """Meter incoming bytes. Return what the library has to read of them, if anything.

        It does not get a Pong that comes alone: the client has been heard, and that is all there is to it.
        """
        meter = self._meter
        if is_lone_pong(data) if meter is None else meter.is_pong(data):
            if meter is not None:
                meter.walk(data)
            self._take_tokens(1)
            return None
        if meter is None:
            meter = self._meter = InboundMeter(self._limits.message)
        frames, messages = meter.frames, meter.messages
        passed = meter.walk(data)
        frames = meter.frames - frames
        if meter.too_big:
            self._owner.end(Ending.TOO_BIG, f"the limit, max-inbound, is {meter.limit} bytes a message")
            return None
        if not self._take_tokens(frames):
            return None
        if meter.between_messages:
            self._meter = None
        else:
            meter.keep(data[:passed])
        return Inbound(data[:passed], frames, meter.messages - messages, meter.between_frames)

    # For another process, in which the client goes on.

    @property
    def limits(self) -> InboundLimits:
        """What the client may send."""
        return self._limits

    def set_limits(self, limits: InboundLimits) -> None:
        """Set what the client may send: what it might send before."""
        self._limits = limits

    @property
    def full_at(self) -> float:
        """When the client may send a whole burst again, on trio's clock."""
        return self._full_at

    @property
    def unfinished(self) -> bytes:
        """What has come of a message, or of a frame, that has not come in full."""
        meter = self._meter
        return meter.unfinished.data() if meter is not None and meter.unfinished is not None else b""

    def go_on_from(self, heard_at: float, full_at: float) -> None:
        """Go on with a client that was heard, and may send a whole burst, at these times."""
        self.heard_at, self._full_at = heard_at, full_at

    def resume_message(self, unfinished: bytes) -> Inbound:
        """Go on with a message of which this has come; return it for the library."""
        meter = self._meter = InboundMeter(self._limits.message)
        meter.walk(unfinished)
        meter.keep(unfinished)
        return Inbound(unfinished, meter.frames, 0, meter.between_frames)

    def finds_close(self, data: bytes) -> bool:
        """Walk over bytes that come after a Close of ours. Return whether they have the end of the client's Close."""
        if self._meter is None:
            self._meter = InboundMeter(self._limits.message)
        self._meter.walk(data)
        return self._meter.closing

    def _take_tokens(self, frames: int) -> bool:
        """Count incoming frames. Return False if they are too many; the owner is told."""
        _, rate, burst = self._limits
        self._full_at = max(self._full_at, self.heard_at) + frames / rate
        if self._full_at <= self.heard_at + burst / rate + _TOLERANCE:
            return True
        self._owner.end(
            Ending.TOO_MANY, f"the limit is {rate:g} frames a second (inbound-rate), {burst} at once (inbound-burst)"
        )
        return False

    # Draining.

    def write_frames(self, frames: Iterable[Frames]) -> None:
        """See `OutboundStream`."""
        super().write_frames(frames)
        if self._backlog is not None and not self._backlog.entries:
            # Do not wait until the socket takes more: it may never, and only a piece that is made has a deadline.
            self._drains.replay_soon(self)

    def resume_draining(self) -> None:
        """See `OutboundStream`."""
        super().resume_draining()
        if self._backlog is not None and not self._backlog.entries:
            self._drains.replay_soon(self)

    def _begin_draining(self, backlog: Backlog) -> None:
        self._watcher.watch_writable(self.descriptor, True)

    def _set_timer(self) -> None:
        self._drains.set_timer(self, self._timer)

    def _note_progress(self, backlog: Backlog) -> None:
        owner = self._owner
        if not backlog.replaying:
            owner.replay_sent()
        if self._backlog is None:
            if self.descriptor in self._watcher:
                self._watcher.watch_writable(self.descriptor, False)
            owner.drained()  # last: it may end the connection

    def send_more(self) -> None:
        """Send what the kernel takes of the backlog. The owner is told when there is nothing left."""
        if self._backlog is not None:
            self._owner.guard(self._send_more)

    def next_piece(self, waited: float) -> None:
        """See `realtimed.net.drains`."""
        if self._backlog is not None:
            self._owner.guard(partial(self._next_piece, self._backlog, waited))

    def time_is_up(self, timer: float) -> None:
        """See `realtimed.net.drains`."""
        if timer == self._timer:  # otherwise there is another one
            self._timer = math.inf
            if self._backlog is not None and not self.sealed:
                self._owner.guard(partial(self._look_at_time, self._backlog))

    def _send_more(self) -> None:
        backlog = self._backlog
        if backlog is None or (backlog.entries and not self._send_backlog(backlog)):
            return  # when the kernel takes more, the watcher says so
        if backlog.entries:
            self._drains.send_soon(self)
        elif backlog.more:
            self._drains.replay_soon(self)
        elif self._backlog is backlog:
            self._forget_backlog()

    def _next_piece(self, backlog: Backlog, waited: float) -> None:
        backlog.next_piece(waited, self._backlogs.pace)
        self._check_deadline(backlog)
        self._backlogs.check()
        self._send_more()

    def _look_at_time(self, backlog: Backlog) -> None:
        if backlog.deadline <= trio.current_time():
            self._say_slow(backlog)
        else:
            self._check_deadline(backlog)
