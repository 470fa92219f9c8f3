"""One task that waits until any of many sockets has something to read.

A task that waits for one socket takes kilobytes. So the sockets of clients share one epoll object, and the task waits
for that. Each socket is registered once, edge-triggered: the kernel reports a change once, and never repeats it. So a
reader that stops before everything is read has to ask for another look (`Watcher.again`).
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import Final, Protocol

import trio

from realtimed.net.gate import Gate

__all__ = ["Reader", "Watcher"]

_EVENTS: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_ENDS: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

_READABLE: Final = select.EPOLLIN | _ENDS

_BATCH: Final = 256
"""Events that are taken from the kernel at a time."""

_SLICE: Final = 32
"""Readers called before other tasks get their turn: about two milliseconds if all of them have to work."""


class Reader(Protocol):
    """What reads from a watched socket."""

    def readable(self, *, hung_up: bool = False) -> None:
        """Read once. There may be something to read, or not.

        `hung_up` says that an end of file, or an error, stands behind all bytes, for which there will be no other call.
        So the reader reads on until it finds it. Must not raise: the watcher serves all clients.
        """

    def writable(self) -> None:
        """Send more; see `Watcher.watch_writable`. Must not raise."""


class Watcher:
    """Calls readers when there may be something to read, unless `gate` is closed.

    Others get their turn after every few readers, and all that are ready are called once before any is called again.
    """

    # Invariants: `_readers` has the reader of each registered descriptor. `_again` has the readers to call though the
    # kernel reports nothing, each once. `_alarm` is an eventfd that interrupts the wait for the kernel; `_waiting` says
    # that there is such a wait and that it has not been interrupted. An event may be older than its descriptor, which
    # another connection has got since: then the reader is called for nothing.

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._epoll = select.epoll()
        self._readers: dict[int, Reader] = {}
        self._again: dict[Reader, None] = {}
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._alarm, select.EPOLLIN)
        self._waiting = False

    def close(self) -> None:
        """Watch nothing any more."""
        self._readers.clear()
        self._epoll.close()
        os.close(self._alarm)

    def add(self, fd: int, reader: Reader) -> None:
        """Watch a socket. `reader` is called soon if there is something to read already.

        To change the reader of a socket, call `replace`. Raises `OSError` if the system has no memory for it, or has a
        limit (``/proc/sys/fs/epoll/max_user_watches``, epoll(7)). Then nothing is watched.
        """
        self._epoll.register(fd, _EVENTS)
        self._readers[fd] = reader

    def replace(self, fd: int, reader: Reader) -> None:
        """Call another reader for a watched socket from now on."""
        before, self._readers[fd] = self._readers[fd], reader
        if before in self._again:
            del self._again[before]
            self.again(reader)

    def remove(self, fd: int) -> None:
        """Watch a socket no longer. Call this before the socket is closed."""
        reader = self._readers.pop(fd)
        self._again.pop(reader, None)
        # Closing would be enough only if no other process had the socket open, too.
        self._epoll.unregister(fd)

    def __contains__(self, fd: int) -> bool:
        """Whether a descriptor is watched."""
        return fd in self._readers

    def watch_writable(self, fd: int, wanted: bool) -> None:
        """Call `writable` from now on, or no more, when a watched socket begins to take more; soon if it does now."""
        self._epoll.modify(fd, _EVENTS | select.EPOLLOUT if wanted else _EVENTS)

    def again(self, reader: Reader) -> None:
        """Call `reader` in the next turn of the event loop, whatever the kernel reports."""
        self._again[reader] = None
        if self._waiting:
            self._waiting = False
            os.eventfd_write(self._alarm, 1)

    async def run(self) -> None:
        """Call readers forever."""
        while True:
            if not self._again:
                await self._wait()
            if self._gate.closed:
                await self._gate.passed()
            called = 0
            for reader, flags in self._ready():
                if flags & select.EPOLLOUT:
                    reader.writable()
                if flags & _READABLE:
                    reader.readable(hung_up=bool(flags & _ENDS))
                called += 1
                if called == _SLICE:
                    called = 0
                    await trio.lowlevel.checkpoint()
                    await self._gate.passed()  # the rest of this round has been taken from the kernel, and comes later
            await trio.lowlevel.checkpoint()

    async def _wait(self) -> None:
        self._waiting = True
        try:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
        finally:
            self._waiting = False

    def _ready(self) -> Iterator[tuple[Reader, int]]:
        """Yield the readers to call in this round, and what the kernel reports."""
        again, self._again = self._again, {}
        for fd, flags in self._epoll.poll(0, _BATCH):
            if fd == self._alarm:
                os.eventfd_read(fd)
                continue
            reader = self._readers.get(fd)
            if reader is not None:
                asked = reader in again
                if asked:
                    del again[reader]
                yield reader, flags | select.EPOLLIN if asked else flags
        for reader in again:
            yield reader, select.EPOLLIN
