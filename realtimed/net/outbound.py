"""A socket whose sends never wait, with a bounded backlog.

A stream is in one of four states:

    open        the kernel takes each write whole, in one call, without a queue; `fd` is the socket's descriptor
    backlogged  the kernel took less; the rest waits in a queue, which is drained as the peer reads; `fd` is -1
    sealed      further writes are discarded, as after a WebSocket's Close; the queue still drains; `fd` is -1
    shut        the socket is closed; `fd` is -1

So a client that keeps up costs one call a message: no queue, no allocation. How a queue is drained, subclasses say.
"""

from __future__ import annotations

import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from typing import Final, Protocol

import trio

from realtimed.hub.channel import Channel
from realtimed.hub.publication import Ending, Frames, WireFormat
from realtimed.hub.replays import Pieces
from realtimed.net.backlog import Backlog
from realtimed.net.backlogs import Backlogs
from realtimed.net.waiting import Blobs, ReceivedBlobs, Waiting

__all__ = ["READ_BYTES", "OutboundStream", "Owner"]

READ_BYTES: Final = 4096
"""Bytes that a read takes at most, if the caller does not ask for more."""

_received: Final = memoryview(bytearray(64 * 2**10))


class Owner(Protocol):
    """The object that owns a stream and decides how its connection ends."""

    def end(self, ending: Ending, reason: str) -> None:
        """End the connection. Returns at once.

        Here the reasons are ``SLOW``, if too much waits for the peer, and ``GONE``, if the peer takes no more bytes.
        The stream of a WebSocket has further ones.
        """


class _State(Enum):
    OPEN = "open"
    BACKLOGGED = "backlogged"
    SEALED = "sealed"
    SHUT = "shut"


_OPEN, _BACKLOGGED, _SEALED, _SHUT = _State  # members of an Enum take 0.2 µs to look up in Python 3.11


class OutboundStream(ABC):
    """A stream whose sends never wait. It keeps what the kernel does not take, in order and within limits.

    It is also a `realtimed.hub.channel.Subscriber`. Before the first write it needs an owner.
    """

    __slots__ = ("_backlog", "_backlogs", "_owner", "_socket", "_state", "_timer", "channels", "fd", "form", "heard_at")

    # Invariants: there is a `_backlog` while something waits: always in the state BACKLOGGED, perhaps in SEALED, and in
    # no other. `fd` is the socket's descriptor in the state OPEN, otherwise -1. `_timer` is when the stream looks next
    # whether the peer is too slow, at the latest: no later than the backlog's deadline.

    channels: set[Channel]
    fd: int
    form: WireFormat

    def __init__(self, sock: socket.socket, backlogs: Backlogs) -> None:
        self._socket = sock
        self._backlogs = backlogs
        self._owner: Owner
        self._backlog: Backlog | None = None
        self._state = _OPEN
        self._timer = math.inf
        self.channels = set()
        self.fd = sock.fileno()
        self.heard_at = trio.current_time()
        """When the peer last sent something or took some of its backlog, on trio's clock."""

    def peer_address(self) -> str:
        """Return the peer's network address; "" on a Unix socket."""
        try:
            name = self._socket.getpeername()
        except OSError:  # it has already reset the connection
            return ""
        return str(name[0]) if isinstance(name, tuple) else ""

    @property
    def tcp(self) -> bool:
        """Whether the socket is one of TCP, not a Unix socket."""
        return self._socket.family != socket.AF_UNIX

    @property
    def descriptor(self) -> int:
        """The socket's descriptor, whatever the state; -1 once it is shut."""
        return self._socket.fileno()

    @property
    def replaying(self) -> bool:
        """Whether something that the peer has asked for waits to be sent. Then it may not ask for more."""
        return self._backlog is not None and self._backlog.replaying

    @property
    def pending(self) -> int:
        """The number of bytes that wait for the peer."""
        return self._backlog.size if self._backlog is not None else 0

    @property
    def burden(self) -> int:
        """The bytes of memory that may become free without this stream."""
        return self._backlog.size + self._backlog.retained if self._backlog is not None else 0

    @property
    def retained(self) -> int:
        """The bytes of history that may be retained for this stream alone."""
        return self._backlog.retained if self._backlog is not None else 0

    @property
    def sealed(self) -> bool:
        """Whether writes are discarded."""
        return self._state in (_SEALED, _SHUT)

    def write(self, data: bytes, sent: int = 0) -> None:
        """See `realtimed.hub.channel.Subscriber`."""
        if self._state is _OPEN:
            if not sent:
                try:
                    sent = self._socket.send(data)
                except BlockingIOError:
                    pass
                except OSError:
                    self._break()
                    return
                if sent == len(data):
                    return
            self._begin_backlog()
        if self._state is _BACKLOGGED:
            self._append(data, sent)

    def write_frames(self, frames: Iterable[Frames]) -> None:
        """Write an answer that the peer has asked for: the first piece at once, the others as the peer reads.

        A list or a tuple counts as short and is written in one go. The waiting part of a long answer does not count
        against `Backlogs.limit`.
        """
        if not isinstance(frames, (list, tuple)):
            self._write_pieces(Pieces(frames))
        elif frames:
            self.write(b"".join(frames))

    def _write_pieces(self, pieces: Pieces) -> None:
        begun, sent = b"", 0
        if self._state is _OPEN and self._backlogs.may_replay:
            begun = b"".join(pieces.take())
            sent = self._send_now(begun)
            if sent == len(begun):
                begun, sent = b"", 0
        if self.sealed:
            pieces.close()
        elif begun or pieces.more():
            backlog = self._backlog or self._begin_backlog()
            backlog.add_replay(begun, sent, pieces, self._backlogs.pace)
            self._check_deadline(backlog)
            self._backlogs.check()

    def _send_now(self, data: bytes) -> int:
        """Return how many bytes the kernel takes. If the peer takes no more bytes, seal the stream and return 0."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._break()
            return 0

    def waiting(self, blobs: Blobs) -> Waiting | None:
        """Return what waits for the peer, to pass it to another process; None if nothing does. Nothing changes."""
        return self._backlog.waiting(blobs) if self._backlog is not None else None

    def resume(self, waiting: Waiting, blobs: ReceivedBlobs) -> bool:
        """Go on with what waited in another process, from `resume_draining` on. This has to be open, and have a `form`.

        Return False if something is missing here: then the connection has to end. Raises `HandOverError`.
        """
        self._backlog = Backlog(self._backlogs)
        self._backlogs.streams += 1
        self._enter(_BACKLOGGED)
        return self._backlog.resume(waiting, blobs, self.form)

    def resume_draining(self) -> None:
        """Begin to send what `resume` has put into the backlog, if it has."""
        if self._backlog is not None:
            self._begin_draining(self._backlog)
            self._check_deadline(self._backlog)
            self._backlogs.check()

    def seal(self) -> None:
        """Discard further writes. What has been written still goes out."""
        if not self.sealed:
            self._enter(_SEALED)

    def hang_up(self) -> None:
        """Let the peer find the end, whoever else has the socket open."""
        with suppress(OSError):  # the peer may be gone
            self._socket.shutdown(socket.SHUT_RDWR)

    def shut(self) -> None:
        """Close the socket, whatever still waits to be sent."""
        if self._state is _SHUT:
            return
        self._enter(_SHUT)
        self._forget_backlog()
        self._socket.close()

    def receive_now(self, max_bytes: int | None = None) -> bytes | None:
        """Return what has arrived, b"" at end of file, or None if nothing has. Raises `trio.BrokenResourceError`.

        Callers in a loop wait in between, so that other tasks run however much this peer sends.
        """
        size = max_bytes or READ_BYTES
        try:
            if size <= READ_BYTES:
                data = self._socket.recv(size)
            else:  # `recv` allocates `size` bytes: if that is much, to copy what came costs less
                data = bytes(_received[: self._socket.recv_into(_received, min(size, len(_received)))])
        except BlockingIOError:
            return None
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error
        self.heard_at = trio.current_time()
        return data

    def _begin_backlog(self) -> Backlog:
        self._backlog = Backlog(self._backlogs)
        self._backlogs.streams += 1
        self._enter(_BACKLOGGED)
        self._begin_draining(self._backlog)
        return self._backlog

    def _append(self, data: bytes, sent: int) -> None:
        """Queue `data`, of which the first `sent` bytes have been sent."""
        backlog = self._backlog
        assert backlog is not None, "a backlogged stream has a backlog"
        backlog.add(data, sent)
        self._check_size(backlog, len(data) - sent)
        self._backlogs.check()

    def _check_size(self, backlog: Backlog, newest: int) -> None:
        """Tell the owner if far too much waits. The `newest` bytes may exceed any limit if nothing else waits."""
        if backlog.is_far_over() and backlog.live > newest:  # a peer that has read all before them is not slow
            self._say_slow(backlog)
        else:
            self._check_deadline(backlog)

    def _check_deadline(self, backlog: Backlog) -> None:
        """Look at the backlog again when its deadline is earlier than that was going to be."""
        if backlog.deadline < self._timer:
            self._timer = backlog.deadline
            self._set_timer()

    def limits_changed(self) -> None:
        """Apply `Backlogs.limit` and `Backlogs.timeout`, which may have been lowered, to what already waits."""
        backlog = self._backlog
        if self._state is _BACKLOGGED and backlog is not None:
            backlog.is_far_over()
            self._check_deadline(backlog)

    @abstractmethod
    def _begin_draining(self, backlog: Backlog) -> None:
        """Send the backlog as fast as the peer reads, from now on, with `_send_backlog`."""

    @abstractmethod
    def _set_timer(self) -> None:
        """Look at `_timer` whether the peer is too slow."""

    @abstractmethod
    def _note_progress(self, backlog: Backlog) -> None:
        """Do what has to wait until less waits. The backlog may have been forgotten."""

    def _say_slow(self, backlog: Backlog) -> None:
        """Tell the owner why the peer is too slow."""
        limit, timeout = self._backlogs.limit, self._backlogs.timeout
        if backlog.live > limit:
            self._owner.end(Ending.SLOW, f"{backlog.live} bytes are waiting; the limit, max-backlog, is {limit}")
        else:
            self._owner.end(Ending.SLOW, f"a message has waited for {timeout:g} s; the limit is backlog-timeout")

    def _send_backlog(self, backlog: Backlog) -> bool:
        """Send what the kernel takes now. Return whether it took everything that it was offered."""
        buffers = backlog.buffers()
        try:
            sent = self._socket.sendmsg(buffers)
        except BlockingIOError:
            return False
        except OSError:
            self._break()
            return False
        self.heard_at = trio.current_time()  # a peer that reads is alive, even if it sends nothing
        took_all = sent == sum(map(len, buffers))
        del buffers
        backlog.took(sent)
        self._backlogs.freed()
        self._note_progress(backlog)
        return took_all

    def _break(self) -> None:
        """Give up on a peer that takes no more bytes."""
        owner = self._owner  # it may have waited for the end of the backlog
        self.seal()
        self._forget_backlog()
        owner.end(Ending.GONE, "the peer takes nothing any more")

    def _forget_backlog(self) -> None:
        """Drop the backlog, whether it is drained or not."""
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            self._backlogs.streams -= 1
            backlog.clear()
            self._backlogs.freed()
        if self._state is _BACKLOGGED:
            self._enter(_OPEN)
        if backlog is not None:
            self._note_progress(backlog)

    def _enter(self, state: _State) -> None:
        """Change the state, and tell the channels, whose rosters cache `fd`."""
        self._state = state
        self.fd = self._socket.fileno() if state is _OPEN else -1
        for channel in self.channels:
            channel.descriptor_changed(self.form)
