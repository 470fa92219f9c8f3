"""The line between a process and its successor: messages with open files, over a pair of Unix sockets.

A message is a header (its kind, the number of its bytes, the number of its files), then the files, as ancillary data of
single bytes (unix(7), SCM_RIGHTS), then its bytes. The line is a stream: a message has no limit but the memory.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Final

from realtimed.process.portions import HandOverError, TakenPortion

__all__ = ["EndOfLineError", "Kind", "Line", "Piece", "pieces"]

_HEADER: Final = struct.Struct("!BQI")

_FILES: Final = 250
"""Files that go with one byte. The kernel takes 253 (SCM_MAX_FD)."""

_READ: Final = 2**20

_CREDENTIALS: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid (unix(7))."""

Piece = tuple[bytes | memoryview, Sequence[int]]
"""Bytes to be sent, and files that go with the first of them."""


class Kind(IntEnum):
    """What a message says."""

    HELLO = 1
    """From the successor: it runs, and which versions of the state it reads."""
    FAILED = 2
    """From either: nothing is handed over. The bytes are a sentence."""
    SOCKETS = 3
    """The listening sockets, and what the hand-over is about."""
    FIRST = 4
    """A portion of a part, whose number is the first byte."""
    PREPARE = 5
    """All first portions have been sent. The successor answers `PREPARED` once it has taken them."""
    PREPARED = 6
    REST = 7
    """The last portion of a part, whose number is the first byte."""
    READY = 8
    """From the successor: everything is taken, and nothing is touched."""
    GO = 9
    """All of it belongs to the successor."""


def pieces(kind: Kind, data: bytes = b"", files: Sequence[int] = ()) -> Iterator[Piece]:
    """Yield a message as what is to be sent, in order."""
    yield _HEADER.pack(kind, len(data), len(files)), ()
    for at in range(0, len(files), _FILES):
        yield b"\0", files[at : at + _FILES]
    if data:
        yield memoryview(data), ()


class EndOfLineError(HandOverError):
    """The process at the other end has ended, or closed its end."""


class Line:
    """One end of the line.

    Its methods wait for the other end, but no longer than `patience` seconds for each step, unless that is None.
    """

    def __init__(self, sock: socket.socket, other: str, patience: float | None) -> None:
        self._socket = sock
        self._other = other  # the process at the other end, in a sentence
        self.patience = patience

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def learn_credentials(self) -> None:
        """Have the kernel say who sends, from now on; see `sender`."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def sender(self) -> tuple[int, int]:
        """Return pid and uid of the process that has sent what is received next. It has to be there already."""
        self._socket.settimeout(self.patience)
        try:
            _, ancillary, _, _ = self._socket.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_PEEK)
        except OSError as error:
            raise EndOfLineError(f"{self._other} has gone ({error.strerror})") from error
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid, uid, _ = _CREDENTIALS.unpack(data)
                return pid, uid
        raise EndOfLineError(f"{self._other} has ended")

    def send_some(self, piece: Piece) -> int:
        """Send as much of a piece as the kernel takes at once; return how many bytes that were, perhaps 0.

        Raises `HandOverError` if the other end has gone.
        """
        self._socket.setblocking(False)
        try:
            return self._send(piece)
        except BlockingIOError:
            return 0

    def send(self, kind: Kind, data: bytes = b"", files: Sequence[int] = ()) -> None:
        """Send a message. Raises `HandOverError` if the other end has gone, or does not read it."""
        self._socket.settimeout(self.patience)
        for piece, descriptors in pieces(kind, data, files):
            sent = 0
            while sent < len(piece):
                sent += self._send((piece[sent:], () if sent else descriptors))

    def _send(self, piece: Piece) -> int:
        data, files = piece
        try:
            if files:
                return socket.send_fds(self._socket, [data], list(files))
            return self._socket.send(data)
        except TimeoutError:
            raise HandOverError(f"{self._other} has read nothing for {self.patience:g} s") from None
        except BlockingIOError:
            raise
        except OSError as error:
            raise EndOfLineError(f"{self._other} has gone ({error.strerror})") from error

    def receive(self) -> tuple[Kind, TakenPortion]:
        """Return the next message.

        Raises `HandOverError` if the other end has gone or says nothing for too long, if it says that it has failed, or
        if this process may not open the files that came.
        """
        self._socket.settimeout(self.patience)
        number, size, count = _HEADER.unpack(self._exactly(_HEADER.size))
        files: list[int] = []
        try:
            while len(files) < count:
                files += self._receive_files(min(count - len(files), _FILES))
            data = self._exactly(size)
            kind = Kind(number)
        except HandOverError:
            _close(files)
            raise
        except ValueError:
            _close(files)
            raise HandOverError(f"{self._other} has sent a message of kind {number}, which is unknown") from None
        if kind is Kind.FAILED:
            raise HandOverError(data.decode(errors="replace"))
        return kind, TakenPortion(data, files)

    def expect(self, kind: Kind) -> TakenPortion:
        """Return the next message, which has to be of a kind. Raises `HandOverError`, as `receive` does."""
        found, portion = self.receive()
        if found is not kind:
            raise HandOverError(f"{self._other} has said {found.name} in place of {kind.name}")
        return portion

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self._receive(min(size - len(data), _READ), 0)[0]
        return bytes(data)

    def _receive_files(self, count: int) -> Sequence[int]:
        _, ancillary, flags = self._receive(1, socket.CMSG_SPACE(count * array.array("i").itemsize))
        files = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                files.frombytes(data[: len(data) - len(data) % files.itemsize])
        if flags & socket.MSG_CTRUNC or len(files) != count:
            _close(files)
            raise HandOverError(f"of {count} open files only {len(files)} arrived: its limit of open files is too low")
        return files

    def _receive(self, size: int, ancillary: int) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        try:
            data, found, flags, _ = self._socket.recvmsg(size, ancillary, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise HandOverError(f"{self._other} has said nothing for {self.patience:g} s") from None
        except OSError as error:
            raise EndOfLineError(f"{self._other} has gone ({error.strerror})") from error
        if not data:
            raise EndOfLineError(f"{self._other} has ended")
        return data, found, flags


def _close(files: Iterable[int]) -> None:
    for each in files:
        os.close(each)
