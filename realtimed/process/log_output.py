"""Writes the lines of the log to a file descriptor, which may be full, or closed, or have no reader.

The daemon is one thread: a write that waits would hold up every client. So a line is written only if that does not
wait. Lines that the reader does not take are kept, up to a bound. Lines beyond it, and lines that cannot be written at
all, are lost, and counted.
"""

from __future__ import annotations

import os
import select
from collections import deque
from typing import Final

__all__ = ["LogOutput", "open_standard_descriptors"]

_AT_ONCE: Final = select.PIPE_BUF
"""Bytes that a pipe, a socket or a terminal takes without waiting when poll(2) says that it is writable."""

_KEPT: Final = 2**18
"""Bytes of lines that are kept for a slow reader: some 2,000 lines."""


class LogOutput:
    """The stream of a `logging.StreamHandler` that writes to the file descriptor `fd`."""

    # Invariants: `_lines` has the lines still to be written, in order; of the first, `_sent` bytes are written.
    # `_size` is the sum of their lengths. `_torn` says that the last write left a part of a line whose rest is lost.
    # `lost` counts lines that will never be written, `reported` those that the log has told about.

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
        """Bytes of lines that wait for the reader; bytes already written of the first line count too."""
        return self._size

    def write(self, text: str) -> None:
        """Write a line, keep it for later, or lose it. Returns at once, and raises nothing."""
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
        """Write as much as the reader takes now."""
        try:
            while self._lines and self._poll.poll(0):
                self._write_some()
        except BlockingIOError:
            pass  # another process made it non-blocking; then poll(2) may find it writable when it has too little room
        except OSError:
            # The disk is full, or the reader is gone: these lines will never be read.
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

    Otherwise the next sockets would get their numbers, and lines of the log would go to a client.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # All lower ones are open, so open(2) takes this one: the lowest that is free.
            os.open(os.devnull, os.O_RDWR)
