"""A client's connection to the daemon, for callers that block and callers that await alike.

The socket never blocks. A function that may have to wait is written as *steps*: a generator that yields a `Wait`
whenever it cannot go on, and returns its result in the end. `Client` waits with poll(2), `AsyncClient` with its event
loop. All else, deadlines included, is here and the same for both. An interrupt or a cancellation closes the generator
in the middle, and with it the connection: one on which an answer is owed is never used again.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import time
import weakref
from collections.abc import Generator
from contextlib import suppress
from enum import Enum, auto
from typing import Final, NamedTuple, TypeAlias, TypeVar

from realtimed.errors import NoDaemonError, ProtocolError, RequestTimeoutError
from realtimed.rpc import address
from realtimed.rpc.wire import Decoder, Message
from realtimed.text import quoted

__all__ = [
    "ANSWER_LIMIT",
    "DEFAULT_TIMEOUT",
    "VALUES_LIMIT",
    "Connection",
    "Deadline",
    "State",
    "Steps",
    "Wait",
    "check_timeout",
    "connect",
    "connect_again",
    "socket_path",
]

_T = TypeVar("_T")

DEFAULT_TIMEOUT: Final = 5.0
"""Seconds a call may take in all, from the connection to the answer."""

ANSWER_LIMIT: Final = 64 * 2**20
"""Bytes of one answer or notification. Those of the daemon have at most half as many."""

VALUES_LIMIT: Final = 2 * 2**20
"""MessagePack values in one answer. Each may take one byte to send and 72 in memory."""

_READ_BYTES: Final = 256 * 2**10

_TAKEN_AT_ONCE: Final = 512
"""Messages that are decoded before other tasks have their turn and the deadline is checked: one or two milliseconds."""

_FEW: Final = 64
"""Connections that are registered between two searches for those that interrupted calls left behind."""

_RETRY_SECONDS: Final = 0.01
"""Seconds until the next attempt to connect to a daemon whose queue of new connections is full."""

_REPEAT_SECONDS: Final = 0.05
"""Seconds until a call is repeated on another connection after one broke: the daemon may be restarting."""


class Wait(NamedTuple):
    """Wait until `sock` can be read, or written if `writable`, but no longer than `seconds`.

    Without a socket, wait for `seconds`.
    """

    sock: socket.socket | None
    writable: bool
    seconds: float


Steps: TypeAlias = Generator[Wait, None, _T]


class Deadline:
    """A moment `seconds` from now that can be put off."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds until then, or 0."""
        return max(0.0, self._at - time.monotonic())

    def renew(self) -> None:
        """Put the moment off: it is `seconds` from now."""
        self._at = time.monotonic() + self.seconds


def socket_path(path: str | os.PathLike[str] | None) -> str:
    """Return the path of the control socket: `path`, else what REALTIME_SOCKET says, else /run/realtime.sock.

    Each may be written PATH or unix:PATH.
    """
    return address.plain(os.fspath(path) if path is not None else os.environ.get("REALTIME_SOCKET", address.DEFAULT))


def check_timeout(timeout: float) -> float:
    """Return `timeout`, a number of seconds above 0, or raise `ValueError`."""
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, not {timeout}")
    return timeout


class State(Enum):
    """What a connection is good for."""

    IDLE = auto()
    """No answer is owed on it, so the next call may use it."""
    BUSY = auto()
    """A call uses it."""
    DEAF = auto()
    """The daemon takes no more bytes. What it sent before may still be there to read."""
    HUNG_UP = auto()
    """The daemon has hung up, or has died. Nothing more comes."""
    SPOILED = auto()
    """The daemon has sent what is not its protocol, or its last words. Nothing more is read."""


class Connection:
    """A connected socket, and the decoder of what comes in.

    `pid` is the process that opened it. A forked child inherits the socket and closes its copy: otherwise both would
    read the same answers.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pid = os.getpid()
        self.state = State.BUSY
        self._decoder = Decoder(ANSWER_LIMIT, VALUES_LIMIT)
        _register(self)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.state is State.HUNG_UP or self.state is State.SPOILED

    def occupy(self) -> None:
        """Become `BUSY`, if idle."""
        if self.state is State.IDLE:
            self.state = State.BUSY

    def rest(self) -> None:
        """Become `IDLE` after the last answer of a call, unless the daemon has ended the connection or said more."""
        if self.state is State.BUSY and not self._decoder.mid_message and not self._decoder.pending:
            self.state = State.IDLE

    def close(self) -> None:
        """Close the connection; in a forked child, only the child's copy."""
        if self.pid == os.getpid():
            with suppress(OSError):  # the daemon may have gone first
                self.sock.shutdown(socket.SHUT_RDWR)  # otherwise a child forked meanwhile would keep it open
        self.sock.close()
        _opened.pop(id(self), None)

    def send(self, data: memoryview) -> int:
        """Send what the socket takes now and return how many bytes that was: none if the daemon takes no more."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # a failed send has taken nothing; a partial one returns its count
            self.state = State.DEAF
            return 0

    def begin(self, data: memoryview) -> int | None:
        """Begin a call on an idle connection: send as `send` does. Returns None if it is of no use and took nothing."""
        if not self._is_silent():
            return None
        self.occupy()
        sent = self.send(data)
        return sent if self.state is State.BUSY else None

    def _is_silent(self) -> bool:
        """Return whether this connection belongs to this process, is open, and holds nothing to read."""
        if self.pid != os.getpid():
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # the end of the stream, or last words before it

    def wait(self, deadline: Deadline, *, writable: bool = False) -> Wait:
        """Return what to wait for until `receive` may have something, or `writable` until more may be sent."""
        if self._decoder.pending:
            return Wait(None, writable=False, seconds=0)
        return Wait(self.sock, writable, deadline.remaining)

    def receive(self) -> list[Message]:
        """Return some of the messages that have come. `state` says whether more may come.

        Raises `ProtocolError` for bytes that are not the protocol, if no message came before them.
        """
        if not self._decoder.pending:
            try:
                data = self.sock.recv(_READ_BYTES)
            except BlockingIOError:
                return []
            except OSError:  # reset: the daemon ended with commands unread
                data = b""
            if not data:
                self.state = State.HUNG_UP
                return []
            self._decoder.receive(data)
        messages: list[Message] = []
        try:
            while self._decoder.pending and len(messages) < _TAKEN_AT_ONCE:
                message = self._decoder.next_message()
                if message is None:
                    break  # a part of a long one has been looked at
                messages.append(message)
        except ProtocolError as error:
            self.state = State.SPOILED
            if not messages:
                raise ProtocolError(f"the daemon sent what is not its protocol: {error}") from None
        return messages


_Opened: TypeAlias = dict[int, weakref.ref[Connection]]

_opened: Final[_Opened] = {}
"""All connections of this process that are not closed, and a few of those that ended without it.

The references have no callbacks, in which an exception from a signal handler would be lost.
"""


def _register(connection: Connection) -> None:
    """Remember that a connection is open. From time to time forget those that ended without being closed."""
    _opened[id(connection)] = weakref.ref(connection)
    if len(_opened) % _FEW == 0:
        for number, reference in _opened.copy().items():
            if reference() is None and _opened.get(number) is reference:
                _opened.pop(number, None)


def _close_those_of_the_parent() -> None:
    for reference in list(_opened.values()):
        connection = reference()
        if connection is not None and connection.pid != os.getpid():
            connection.close()


os.register_at_fork(after_in_child=_close_those_of_the_parent)


def connect(path: str, deadline: Deadline) -> Steps[Connection]:
    """Open a connection, or raise `NoDaemonError`."""
    fault = address.fault(path)
    if fault is not None:
        raise NoDaemonError(f"no daemon can be at {quoted(path)}: {fault}; see REALTIME_SOCKET")
    try:
        sock = socket.socket(socket.AF_UNIX)
    except OSError as error:
        raise NoDaemonError(f"cannot open a socket: {error.strerror}") from error
    connected = False
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                # The daemon's queue of new connections is full, and the kernel does not tell when it no longer is.
                if not deadline.remaining:
                    raise RequestTimeoutError(
                        f"the daemon at {path} did not accept the connection within {deadline.seconds:g} s;"
                        " nothing was sent"
                    ) from None
                yield Wait(None, writable=False, seconds=min(_RETRY_SECONDS, deadline.remaining))
            except OSError as error:
                raise NoDaemonError(_why_not(path, error)) from error
            else:
                break
        connected = True
        return Connection(sock)
    finally:
        if not connected:
            sock.close()


def connect_again(path: str, deadline: Deadline, broken: str) -> Steps[Connection]:
    """Open a connection in place of one that broke; wait for a daemon until the deadline. `broken` says why it broke.

    Raises `ProtocolError` at the deadline: what was asked on the first connection may have been carried out.
    """
    why = "the connection broke each time"
    while True:
        yield Wait(None, writable=False, seconds=min(_REPEAT_SECONDS, deadline.remaining))
        if not deadline.remaining:
            raise ProtocolError(f"{broken}. It could not be repeated within {deadline.seconds:g} s: {why}")
        try:
            return (yield from connect(path, deadline))
        except (NoDaemonError, RequestTimeoutError):
            why = "no connection could be made"


def _why_not(path: str, error: OSError) -> str:
    """Return why nothing could be reached at `path`, and what to look at."""
    if error.errno == errno.ENOENT:
        return (
            f"no daemon at {path}: there is no such file. Is realtimed running, and is this its --socket?"
            " Clients look where REALTIME_SOCKET says"
        )
    try:
        status = os.stat(path)  # noqa: PTH116  (pathlib is slow to import)
    except OSError:
        status = None
    refused = error.errno in (errno.ECONNREFUSED, errno.EACCES)
    if refused and status is not None and not stat.S_ISSOCK(status.st_mode):
        return f"no daemon at {path}: this file is not a socket"
    if error.errno == errno.ECONNREFUSED:
        if status is None:
            return f"no daemon at {path}: nothing listens there"
        return f"no daemon at {path}: the socket is left from one that has ended. Start realtimed, which replaces it"
    if error.errno == errno.EACCES:
        if status is None:
            return f"cannot reach {path}: user {_user(os.geteuid())} may not enter a directory on the way"
        return (
            f"cannot open {path}: user {_user(os.geteuid())} may not write to this socket, which has mode"
            f" {stat.S_IMODE(status.st_mode):04o}, owner {_user(status.st_uid)} and group {_group(status.st_gid)}."
            " Add the user to the group, or start realtimed with another --socket-group or --socket-mode"
        )
    return f"cannot connect to {path}: {error.strerror}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
