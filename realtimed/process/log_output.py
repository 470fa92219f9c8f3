"""Where the lines of the log go: a file descriptor that may be full, or closed, or that nobody reads.

The daemon is one thread, and whoever holds up its log would hold up everyone. So a line is written only if that does
not wait. What the reader does not take is kept, up to a bound; beyond it, and where a line cannot be written at all,
lines are lost, and counted.
"""

from __future__ import annotations

import os
import select
from collections import deque
from typing import Final

__all__ = ["LogOutput", "open_standard_descriptors"]

_AT_ONCE: Final = select.PIPE_BUF
"""Bytes that a pipe, a socket or a terminal takes without waiting once poll(2) says that it is writable."""

_KEPT: Final = 2**18
"""Bytes of lines that are kept for a reader that is slow: some 2,000 lines."""


class LogOutput:
    """The stream of a `logging.StreamHandler` that writes to the file descriptor `fd`."""

    # Invariants: `_lines` is what is still to be written, in order; the first `_sent` bytes of its head are written.
    # `_size` is the sum of the lengths of `_lines`. `_torn` says that what was written last is a part of a line whose
    # rest is lost. `lost` counts lines that will never be written, `reported` those of them of which the log tells.

    def __init__(self, fd: int) -> None:
        self.lost = 0
        self.reported = 0
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._sent = 0
        self._size = 0
        self._torn = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def pending(self) -> int:
        """Bytes of lines that wait for the reader, or a little more."""
        return self._size

    def write(self, text: str) -> None:
        """Write a line, or keep it for later, or lose it. Returns at once, and raises nothing."""
        line = text.encode(errors="backslashreplace")
        if self._lines and self._size + len(line) > _KEPT:
            self.flush()
            if self._lines and self._size + len(line) > _KEPT:
                self.lost += 1
                return
        self._lines.append(line)
        self._size += len(line)
        self.flush()

    def flush(self) -> None:
        """Write what is taken now."""
        try:
            while self._lines and self._poll.poll(0):
                self._write_some()
        except BlockingIOError:
            pass  # somebody has made it non-blocking, for which poll(2) knows less well when there is room
        except OSError:
            # A full disk, a reader that is gone: nothing of this will ever be read.
            self.lost += len(self._lines)
            self._torn = self._torn or self._sent > 0
            self._lines.clear()
            self._sent = self._size = 0

    def _write_some(self) -> None:
        if self._torn:
            os.write(self._fd, b"\n")
            self._torn = False
        line = self._lines[0]
        self._sent += os.write(self._fd, line[self._sent : self._sent + _AT_ONCE])
        if self._sent == len(line):
            self._lines.popleft()
            self._size -= len(line)
            self._sent = 0


def open_standard_descriptors() -> None:
    """Open /dev/null in place of standard input, output and error where they are closed.

    Otherwise the next sockets to be opened would take their places, and what is meant for a log go to a client.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # All below it are open, so it is the lowest that is free, and the one to be taken: see open(2).
            os.open(os.devnull, os.O_RDWR)
