"""A socket whose sends never wait, with a bounded backlog.

A stream is in one of four states:

    open        the kernel takes each write whole, in one call, without a queue; `fd` is the socket's descriptor
    backlogged  the kernel took less; the rest waits in a queue, and one task drains it; `fd` is -1
    sealed      further writes are discarded, as after a WebSocket's Close; the queue still drains; `fd` is -1
    shut        the socket is closed; `fd` is -1

So a client that keeps up costs one call a message: no queue, no task, no allocation.
"""

from __future__ import annotations

import math
import socket
import sys
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

__all__ = ["READ_BYTES", "Owner", "QueuedStream"]

READ_BYTES: Final = 4096
"""Bytes that a read takes at most, if the caller does not ask for more."""

_received: Final = memoryview(bytearray(64 * 2**10))

_SO_PEERGROUPS: Final = 59
"""The socket option that returns the peer's supplementary groups (socket(7)); Python has no name for it."""


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


class QueuedStream(trio.abc.Stream):
    """A stream whose sends never wait. It keeps what the kernel does not take, in order and within limits.

    It is also a `realtimed.hub.channel.Subscriber`. Before the first write it needs a nursery and an owner; see
    `attach`.
    """

    __slots__ = (
        "_backlog",
        "_backlogs",
        "_nursery",
        "_owner",
        "_socket",
        "_state",
        "channels",
        "fd",
        "form",
        "heard_at",
    )

    # Invariants: there is a `_backlog`, and its drain task, while something waits: always in the state BACKLOGGED,
    # perhaps in SEALED, and in no other. `fd` is the socket's descriptor in the state OPEN, otherwise -1.

    channels: set[Channel]
    fd: int
    form: WireFormat

    def __init__(self, sock: socket.socket, backlogs: Backlogs) -> None:
        self._socket = sock
        self._backlogs = backlogs
        self._owner: Owner
        self._nursery: trio.Nursery
        self._backlog: Backlog | None = None
        self._state = _OPEN
        self.channels = set()
        self.fd = sock.fileno()
        self.heard_at = trio.current_time()
        """When the peer last sent something or took some of its backlog, on trio's clock."""

    def attach(self, nursery: trio.Nursery, owner: Owner) -> None:
        """Set the nursery in which the drain task runs, and the owner."""
        self._nursery = nursery
        self._owner = owner

    def limits_changed(self) -> None:
        """Apply `Backlogs.limit` and `Backlogs.timeout`, which may have been lowered, to what already waits."""
        if self._state is _BACKLOGGED and self._backlog is not None:
            self._backlog.limits_changed()

    def detach(self) -> None:
        """Forget the nursery and the owner, after `shut`."""
        del self._nursery, self._owner

    def peer(self) -> tuple[str, tuple[int, int, int] | None]:
        """Return the peer's network address ("" on a Unix socket) and its (pid, uid, gid) (None on TCP)."""
        if self._socket.family == socket.AF_UNIX:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, gid = (int.from_bytes(raw[at : at + 4], "little", signed=True) for at in (0, 4, 8))
            return "", (pid, uid, gid)
        try:
            return str(self._socket.getpeername()[0]), None
        except OSError:  # it has already reset the connection
            return "", None

    def peer_groups(self) -> frozenset[int]:
        """Return the groups of the process at the other end of a Unix socket, supplementary groups included.

        If it has more than 256 supplementary groups, none of these is returned: Python cannot ask the kernel for them.
        """
        credentials = self.peer()[1]
        if credentials is None:
            return frozenset()
        raw = b""
        with suppress(OSError):
            raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        groups = (int.from_bytes(raw[at : at + 4], sys.byteorder) for at in range(0, len(raw), 4))
        return frozenset([credentials[2], *groups])

    @property
    def descriptor(self) -> int:
        """The socket's descriptor, whatever the state; -1 once it is shut."""
        return self._socket.fileno()

    @property
    def replaying(self) -> bool:
        """Whether something that the peer has asked for waits to be sent. Then it may not ask for more."""
        return self._backlog is not None and not self._backlog.replayed.is_set()

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

    def seal(self) -> None:
        """Discard further writes. What has been written still goes out."""
        if not self.sealed:
            self._enter(_SEALED)

    async def flush_replay(self) -> None:
        """Wait until everything that the peer has asked for is sent. Then it may ask for more."""
        if self._backlog is not None:
            await self._backlog.replayed.wait()

    async def flush(self) -> None:
        """Wait until nothing waits to be sent."""
        if self._backlog is not None:
            await self._backlog.drained.wait()

    def shut(self) -> None:
        """Close the socket, whatever still waits to be sent."""
        if self._state is _SHUT:
            return
        self._enter(_SHUT)
        self._forget_backlog()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def stop_receiving(self) -> None:
        """Refuse further bytes from the peer. What it has sent can still be received; then comes end of file.

        On a Unix socket the peer's next send fails, and no byte of it is taken. So the peer knows that nothing of it
        was carried out.
        """
        with suppress(OSError):  # the peer may be gone
            self._socket.shutdown(socket.SHUT_RD)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write without waiting; the backlog's limits apply."""
        self.write(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once, as `send_all` never blocks."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            data = self.receive_now(max_bytes)
            if data is not None:
                return data

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

    async def aclose(self) -> None:
        """Close at once."""
        self.shut()
        await trio.lowlevel.checkpoint()

    def _begin_backlog(self) -> Backlog:
        self._backlog = Backlog(self._backlogs)
        self._backlogs.streams += 1
        self._enter(_BACKLOGGED)
        self._nursery.start_soon(self._drain, self._backlog)
        return self._backlog

    def _append(self, data: bytes, sent: int) -> None:
        """Queue `data`, of which the first `sent` bytes have been sent."""
        backlog = self._backlog
        assert backlog is not None, "a backlogged stream has a backlog"
        backlog.add(data, sent)
        # One write may exceed any limit: a peer that has read everything before it is not slow.
        if backlog.is_far_over() and backlog.live > len(data) - sent:
            self._say_slow(backlog)
        self._backlogs.check()

    async def _drain(self, backlog: Backlog) -> None:
        """Send the backlog as fast as the peer reads. Raises `trio.ClosedResourceError` if the stream is shut then."""
        while backlog.entries or backlog.more:
            if not backlog.entries:
                await self._go_on(backlog)
                continue
            deadline = math.inf if self.sealed else backlog.deadline
            with trio.CancelScope(deadline=deadline) as backlog.patience:
                await trio.lowlevel.wait_writable(self._socket)
            if backlog.patience.cancelled_caught:
                async with self._backlogs.endings:
                    if self._backlog is backlog:  # the stream may have been shut meanwhile
                        self._say_slow(backlog)
                    await trio.lowlevel.checkpoint()
            else:
                self._send_backlog(backlog)
        self._forget_backlog()

    def _say_slow(self, backlog: Backlog) -> None:
        """Tell the owner why the peer is too slow."""
        limit, timeout = self._backlogs.limit, self._backlogs.timeout
        if backlog.live > limit:
            self._owner.end(Ending.SLOW, f"{backlog.live} bytes are waiting; the limit, max-backlog, is {limit}")
        else:
            self._owner.end(Ending.SLOW, f"a message has waited for {timeout:g} s; the limit is backlog-timeout")

    async def _go_on(self, backlog: Backlog) -> None:
        """Make the next piece of a replay when it is this stream's turn."""
        asked_at = trio.current_time()
        await self._backlogs.turn()
        backlog.next_piece(trio.current_time() - asked_at, self._backlogs.pace)
        self._backlogs.check()

    def _send_backlog(self, backlog: Backlog) -> None:
        """Send what the kernel takes now."""
        try:
            sent = self._socket.sendmsg(backlog.buffers())
        except BlockingIOError:
            return
        except OSError:
            self._break()
            return
        self.heard_at = trio.current_time()  # a peer that reads is alive, even if it sends nothing
        backlog.took(sent)
        self._backlogs.freed()

    def _break(self) -> None:
        """Give up on a peer that takes no more bytes."""
        self.seal()
        self._forget_backlog()
        self._owner.end(Ending.GONE, "the peer takes nothing any more")

    def _forget_backlog(self) -> None:
        """Drop the backlog, whether it is drained or not."""
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            self._backlogs.streams -= 1
            backlog.clear()
            backlog.drained.set()
            self._backlogs.freed()
        if self._state is _BACKLOGGED:
            self._enter(_OPEN)

    def _enter(self, state: _State) -> None:
        """Change the state, and tell the channels, whose rosters cache `fd`."""
        self._state = state
        self.fd = self._socket.fileno() if state is _OPEN else -1
        for channel in self.channels:
            channel.descriptor_changed(self.form)
