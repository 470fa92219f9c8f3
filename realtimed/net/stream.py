"""A stream whose sends never wait, for publishers. A task of its own drains its backlog."""

from __future__ import annotations

import math
import socket
import sys
from contextlib import suppress
from typing import Final

import trio

from realtimed.net.backlog import Backlog
from realtimed.net.backlogs import Backlogs
from realtimed.net.gate import Gate
from realtimed.net.outbound import OutboundStream, Owner

__all__ = ["QueuedStream"]

_SO_PEERGROUPS: Final = 59
"""The socket option that returns the peer's supplementary groups (socket(7)); Python has no name for it."""


class QueuedStream(OutboundStream, trio.abc.Stream):
    """An `OutboundStream` with a task for each backlog, in a nursery of its owner. See `attach`."""

    __slots__ = ("_gate", "_nursery", "_patience", "_progress")

    # Invariants: while there is a `_backlog`, its task waits for the peer within the scope `_patience`, or for its
    # turn. `_progress` wakes the tasks that wait until less waits.

    def __init__(self, sock: socket.socket, backlogs: Backlogs) -> None:
        super().__init__(sock, backlogs)
        self._nursery: trio.Nursery
        self._patience = trio.CancelScope()
        self._progress = trio.lowlevel.ParkingLot()
        self._gate: Gate | None = None

    def attach(self, nursery: trio.Nursery, owner: Owner, gate: Gate | None = None) -> None:
        """Set the nursery in which the drain task runs, and the owner. While `gate` is closed nothing is received."""
        self._gate = gate
        self._nursery = nursery
        self._owner = owner

    def detach(self) -> None:
        """Forget the nursery and the owner, after `shut`."""
        del self._nursery, self._owner

    def peer_credentials(self) -> tuple[int, int, int] | None:
        """Return the pid, uid and gid of the process at the other end of a Unix socket; None on TCP."""
        if self._socket.family != socket.AF_UNIX:
            return None
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = (int.from_bytes(raw[at : at + 4], sys.byteorder, signed=True) for at in (0, 4, 8))
        return pid, uid, gid

    def peer_groups(self) -> frozenset[int]:
        """Return the groups of the process at the other end of a Unix socket, supplementary groups included.

        If it has more than 256 supplementary groups, none of these is returned: Python cannot ask the kernel for them.
        """
        credentials = self.peer_credentials()
        if credentials is None:
            return frozenset()
        raw = b""
        with suppress(OSError):
            raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        groups = (int.from_bytes(raw[at : at + 4], sys.byteorder) for at in range(0, len(raw), 4))
        return frozenset([credentials[2], *groups])

    def shut(self) -> None:
        """See `OutboundStream`."""
        if self.descriptor >= 0:
            trio.lowlevel.notify_closing(self._socket)
        super().shut()

    async def flush_replay(self) -> None:
        """Wait until everything that the peer has asked for is sent. Then it may ask for more."""
        while self.replaying:
            await self._progress.park()

    async def flush(self) -> None:
        """Wait until nothing of what waits now waits to be sent."""
        backlog = self._backlog
        while backlog is not None and self._backlog is backlog:
            await self._progress.park()

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
            if self._gate is not None and self._gate.closed:
                await self._gate.passed()
                continue
            data = self.receive_now(max_bytes)
            if data is not None:
                return data

    async def aclose(self) -> None:
        """Close at once."""
        self.shut()
        await trio.lowlevel.checkpoint()

    def _note_progress(self, backlog: Backlog) -> None:
        self._progress.unpark_all()

    def _begin_draining(self, backlog: Backlog) -> None:
        self._nursery.start_soon(self._drain, backlog)

    def _set_timer(self) -> None:
        self._patience.deadline = self._timer

    async def _drain(self, backlog: Backlog) -> None:
        """Send the backlog as fast as the peer reads."""
        while backlog.entries or backlog.more:
            if not backlog.entries:
                await self._go_on(backlog)
                continue
            self._timer = math.inf if self.sealed else backlog.deadline
            with trio.CancelScope(deadline=self._timer) as self._patience:
                await trio.lowlevel.wait_writable(self._socket)
            if self._patience.cancelled_caught:
                async with self._backlogs.endings:
                    self._say_slow(backlog)
                    await trio.lowlevel.checkpoint()
            elif backlog.entries:  # otherwise it has been shut in the meantime
                self._send_backlog(backlog)
        self._forget_backlog()

    async def _go_on(self, backlog: Backlog) -> None:
        """Make the next piece of a replay when it is this stream's turn."""
        asked_at = trio.current_time()
        await self._backlogs.turn()
        backlog.next_piece(trio.current_time() - asked_at, self._backlogs.pace)
        self._backlogs.check()
