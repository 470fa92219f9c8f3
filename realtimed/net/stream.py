"""Sockets as the hub and trio-websocket see them: sends that never wait, and a bounded backlog.

A stream is in one of four states, and `transmit` is the function that fits it (`fd` is -1 in all but the first):

    open        `socket.send`: what the kernel takes now is gone in one call, without a queue
    backlogged  `_append`: the kernel took less; the rest waits in the queue, and one task drains it
    sealed      `len`: a Close has been written, and nothing may follow it; the queue still drains
    shut        `len`: the socket is closed

So a fan-out costs one call a subscriber, and nobody who reads has a queue, a task or an allocation.
"""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, Protocol

import trio

from realtimed.hub.channel import Channel
from realtimed.hub.publication import Frame, WireFormat
from realtimed.hub.replays import Pieces
from realtimed.net.backlog import Backlog, Backlogs
from realtimed.websocket.frames import CloseCode

__all__ = ["Owner", "QueuedStream"]

_RECEIVE_BYTES: Final = 4096
_received: Final = memoryview(bytearray(64 * 2**10))
_CLOSE_BYTE: Final = 0x88

_FRAMES_A_PIECE: Final = 8
"""About how many frames the library is given at once: it takes 20 µs for each."""

_MANY_MORE: Final = 3
"""How many times as many frames clients that send few of them may send in one turn."""

_NO_FRAME: Final = b"\xff\xff"
_SO_PEERGROUPS: Final = 59
"""The socket option that returns the peer's supplementary groups (socket(7)); Python has no name for it."""


class Owner(Protocol):
    """Who is told what happens to a stream. All calls return at once."""

    def slow(self, reason: str) -> None:
        """Deal with a backlog that has outgrown its limit or its deadline."""

    def broken(self) -> None:
        """Deal with a peer that takes no more bytes."""

    def misbehaved(self, code: CloseCode, reason: str) -> None:
        """Deal with a peer that has sent more than it may."""

    def library_done(self) -> None:
        """Take note that trio-websocket is through with the stream."""


class QueuedStream(trio.abc.Stream):
    """A stream whose sends never wait: what the kernel does not take is kept in order, within limits.

    It is a `realtimed.hub.channel.Subscriber` as well. Writing needs a nursery and an owner; see `attach`.
    """

    __slots__ = (
        "_backlog",
        "_backlogs",
        "_nursery",
        "_owner",
        "_sealed",
        "_socket",
        "channels",
        "fd",
        "form",
        "heard_at",
        "transmit",
    )

    # Invariants: `_backlog` is there while something waits, and so is its drain task. `fd` is the socket's descriptor
    # while `transmit` is the socket's `send`, otherwise -1.

    channels: set[Channel]
    fd: int
    form: WireFormat
    transmit: Callable[[bytes], int]

    def __init__(self, sock: socket.socket, backlogs: Backlogs) -> None:
        self._socket = sock
        self._backlogs = backlogs
        self._owner: Owner
        self._nursery: trio.Nursery
        self._backlog: Backlog | None = None
        self._sealed = False
        self.channels = set()
        self.heard_at = trio.current_time()
        self._open_up()

    def attach(self, nursery: trio.Nursery, owner: Owner) -> None:
        """Give the stream the nursery its drain task runs in, and who is told of its troubles."""
        self._nursery = nursery
        self._owner = owner

    def limits_changed(self) -> None:
        """Apply `Backlogs.limit` and `Backlogs.timeout`, which may be lower now, to what waits already."""
        backlog = self._backlog
        if backlog is not None and not self._sealed:
            backlog.limits_changed()

    def detach(self) -> None:
        """Forget nursery and owner, after `shut`."""
        del self._nursery, self._owner

    def peer(self) -> tuple[str, tuple[int, int, int] | None]:
        """Return the peer's network address ("" on a Unix socket) and its (pid, uid, gid) (None on TCP)."""
        if self._socket.family == socket.AF_UNIX:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, gid = (int.from_bytes(raw[at : at + 4], "little", signed=True) for at in (0, 4, 8))
            return "", (pid, uid, gid)
        try:
            return str(self._socket.getpeername()[0]), None
        except OSError:  # it has reset the connection already
            return "", None

    def peer_groups(self) -> frozenset[int]:
        """Return the groups of the process at the other end of a Unix socket, the supplementary ones among them.

        Of more than 256 supplementary groups, which is more than Python can ask the kernel for, none is returned.
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
    def pending(self) -> int:
        """How many bytes wait for the peer."""
        return self._backlog.size if self._backlog is not None else 0

    @property
    def burden(self) -> int:
        """How many bytes of memory may be free again without this stream."""
        return self._backlog.size + self._backlog.retained if self._backlog is not None else 0

    @property
    def retained(self) -> int:
        """How many bytes of history may be retained for this stream alone."""
        return self._backlog.retained if self._backlog is not None else 0

    def write(self, data: bytes) -> None:
        """Send `data`, or keep what cannot be sent at once. Never waits."""
        try:
            sent = self.transmit(data)
        except OSError as error:
            self.transmit_failed(data, error)
        else:
            if sent != len(data):
                self.hold(data, sent)

    def write_frames(self, frames: Iterable[Frame]) -> None:
        """Write what the peer has asked for: the beginning at once, more and more as it reads.

        What is neither a list nor a tuple may be long: what of it must wait does not count against `Backlogs.limit`.
        """
        if isinstance(frames, (list, tuple)):
            if frames:
                self.write(b"".join(frames))
            return
        pieces = Pieces(frames)
        begun, sent = b"", 0
        if self._backlog is None and self._backlogs.may_replay:
            begun = b"".join(pieces.take())
            sent = self._send_now(begun)
            if sent == len(begun):
                begun, sent = b"", 0
        if self._sealed:
            pieces.close()
        elif begun or pieces.more():
            backlog = self._backlog or self._begin_backlog()
            backlog.add_replay(begun, sent, pieces, self._backlogs.pace)
            self._backlogs.check()

    def _send_now(self, data: bytes) -> int:
        """Return how much of `data` the kernel takes; all of it if it does not matter any more."""
        try:
            return self.transmit(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._break()
            return len(data)

    def transmit_failed(self, data: bytes, error: OSError) -> None:
        """See `realtimed.hub.channel.Subscriber`."""
        if isinstance(error, BlockingIOError):
            self.hold(data, 0)
        else:
            self._break()

    def hold(self, data: bytes, sent: int) -> None:
        """See `realtimed.hub.channel.Subscriber`."""
        self._begin_backlog()
        self._append(data, sent)

    def _begin_backlog(self) -> Backlog:
        self._backlog = Backlog(self._backlogs)
        self._backlogs.streams += 1
        self._lead_to(-1, self._append)
        self._nursery.start_soon(self._drain, self._backlog)
        return self._backlog

    def seal(self) -> None:
        """Take nothing more: what has been written still goes out."""
        self._sealed = True
        self._lead_to(-1, len)

    async def flush_replay(self) -> None:
        """Wait until nothing is left of what the peer has asked for: it may ask for more then."""
        if self._backlog is not None:
            await self._backlog.replayed.wait()

    async def flush(self) -> None:
        """Wait until nothing is left to send."""
        if self._backlog is not None:
            await self._backlog.drained.wait()

    def shut(self) -> None:
        """Close the socket, whatever is left to send."""
        if self._socket.fileno() < 0:
            return
        self.seal()
        self._forget()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    def stop_receiving(self) -> None:
        """Refuse what the peer sends from now on; what it has sent can still be received, and then end of file.

        On a Unix socket the peer's next send fails without a byte taken, so it knows that nothing was carried out.
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
            data = self._receive_now(max_bytes)
            if data is not None:
                return data

    def _receive_now(self, max_bytes: int | None) -> bytes | None:
        """Receive what is there, or None if there is nothing.

        Whoever calls this again and again waits in between, which lets other tasks run however much this peer sends.
        """
        size = max_bytes or _RECEIVE_BYTES
        try:
            if size <= _RECEIVE_BYTES:
                data = self._socket.recv(size)
            else:  # `recv` allocates all it might need: for a lot, that costs more than to copy what came
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

    def _append(self, data: bytes, sent: int = 0) -> int:
        """Queue what was sent in part or not at all; take it all, as far as the caller is concerned."""
        backlog = self._backlog
        if backlog is not None:
            backlog.add(data, sent)
            # However large one write is, who has read all before it is not slow.
            if backlog.is_far_over() and backlog.live > len(data) - sent:
                self._say_slow(backlog)
            self._backlogs.check()
        return len(data)

    async def _drain(self, backlog: Backlog) -> None:
        """Send the backlog as the peer makes room."""
        while backlog.entries or backlog.more:
            if not backlog.entries:
                await self._go_on(backlog)
                continue
            deadline = math.inf if self._sealed else backlog.deadline
            with trio.CancelScope(deadline=deadline) as backlog.patience:
                await trio.lowlevel.wait_writable(self._socket)
            if backlog.patience.cancelled_caught:
                async with self._backlogs.endings:
                    self._say_slow(backlog)
                    await trio.lowlevel.checkpoint()
            else:
                self._send_backlog(backlog)
        self._forget()

    def _say_slow(self, backlog: Backlog) -> None:
        """Tell the owner in which way the peer is too slow."""
        limit, timeout = self._backlogs.limit, self._backlogs.timeout
        if backlog.live > limit:
            self._owner.slow(f"{backlog.live} bytes are waiting; the limit, max-backlog, is {limit}")
        else:
            self._owner.slow(f"a message has waited for {timeout:g} s; the limit is backlog-timeout")

    async def _go_on(self, backlog: Backlog) -> None:
        """Let the next piece of a replay follow when it is this stream's turn."""
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
        self.heard_at = trio.current_time()  # who reads is alive, even if it has nothing to say
        backlog.took(sent)
        self._backlogs.freed()

    def _break(self) -> None:
        """Give up on a peer that takes nothing any more."""
        self.seal()
        self._forget()
        self._owner.broken()

    def _forget(self) -> None:
        """Let go of the backlog, drained or not."""
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            self._backlogs.streams -= 1
            backlog.clear()
            backlog.drained.set()
            self._backlogs.freed()
        if not self._sealed:
            self._open_up()

    def _open_up(self) -> None:
        """Let what is written go straight to the socket."""
        self._lead_to(self._socket.fileno(), self._socket.send)

    def _lead_to(self, fd: int, transmit: Callable[[bytes], int]) -> None:
        """Let what is written go somewhere else, and have those know who send to descriptors."""
        self.fd = fd
        self.transmit = transmit
        for channel in self.channels:
            channel.descriptor_changed(self.form)
