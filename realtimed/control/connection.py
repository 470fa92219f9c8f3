"""A client's connection to the daemon, for callers that block and callers that await alike.

The socket never blocks. What may have to wait is written as *steps*: a generator that yields a `Wait` whenever it can
go no further, and returns the result in the end. `Client` waits with poll(2), `AsyncClient` with its event loop; all
else, deadlines included, is here and the same for both. Closing the generator in the middle, which is what an
interrupt or a cancellation comes to, closes the connection: one on which an answer is owed is never used again.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from realtimed import paths
from realtimed.control.calls import (
    Batch,
    Call,
    ChannelMessage,
    Position,
    Receipt,
    broadcast,
    goodbye,
    published,
    request_ids,
    subscribe,
    watch,
)
from realtimed.control.wire import BadBytesError, Decoder, Message, Notification, Oversized, Request, Response
from realtimed.errors import NoDaemonError, ProtocolError, RealtimeError, RefusedError, RequestTimeoutError, quoted

__all__ = ["DEFAULT_TIMEOUT", "Deadline", "Feed", "Line", "Steps", "Wait", "check_timeout", "socket_path"]

_T = TypeVar("_T")

DEFAULT_TIMEOUT: Final = 5.0
"""Seconds a call may take in all, from the connection to the answer."""

_DEFAULT_PATH: Final = "/run/realtime.sock"

_ANSWER_LIMIT: Final = 2**30
"""Bytes of one answer. The list of all clients of a large daemon may be long; it is no place to be strict."""

_READ_BYTES: Final = 256 * 2**10

_RETRY_SECONDS: Final = 0.01
"""How long to wait before knocking again at a daemon whose queue of new connections is full."""

_REPEAT_SECONDS: Final = 0.05
"""How long to wait, after a connection broke, before a call is repeated on another: it may be a restart."""


class Wait(NamedTuple):
    """Wait until `sock` can be read, or written if `writable`, but no longer than `seconds`.

    Without a socket it is the time alone that has to pass.
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
    def left(self) -> float:
        """Seconds until then, or 0."""
        return max(0.0, self._at - time.monotonic())

    def renew(self) -> None:
        """Begin anew."""
        self._at = time.monotonic() + self.seconds


def socket_path(path: str | os.PathLike[str] | None) -> str:
    """Return the path of the control socket: `path`, else what REALTIME_SOCKET says, else /run/realtime.sock.

    Each may be written PATH or unix:PATH.
    """
    return paths.plain(os.fspath(path) if path is not None else os.environ.get("REALTIME_SOCKET", _DEFAULT_PATH))


def check_timeout(timeout: float) -> float:
    """Return `timeout`, a number of seconds above 0, or raise `ValueError`."""
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, not {timeout}")
    return timeout


class _Connection:
    """A connected socket, and the decoder of what comes in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ended = False
        """Nothing more comes: the daemon has hung up, or has sent what is not its protocol."""
        self.hung_up = False
        """The daemon has hung up, or has died."""
        self.deaf = False
        """The daemon takes no more bytes. What it sent before may still be there to read."""
        self._decoder = Decoder(_ANSWER_LIMIT)
        self._pid = os.getpid()

    def close(self) -> None:
        self.sock.close()

    def send(self, data: memoryview) -> int:
        """Send what the socket takes at once and return how much that was. After an error `deaf` is set."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # a send that fails has taken nothing; one that is cut short returns its count
            self.deaf = True
            return 0

    def begin(self, data: memoryview) -> int | None:
        """Send as `send` does, on a connection kept from before; return None if it is of no use and took nothing."""
        if self._is_idle():
            sent = self.send(data)
            if not self.deaf:
                return sent
        return None

    def _is_idle(self) -> bool:
        """Whether this connection is ours and open, and nothing lies in it to be read."""
        if self._pid != os.getpid() or self._decoder.mid_message:
            return False  # after a fork it is the parent's
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # the end of the stream, or last words before it

    def receive(self) -> list[Message]:
        """Return the messages that have come. When they were the last ones, `ended` is set.

        Raises `ProtocolError` for bytes that are not the protocol, if no message came before them.
        """
        try:
            data = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:  # reset: the daemon ended with commands unread
            data = b""
        self.ended = self.hung_up = not data
        try:
            return self._decoder.feed(data)
        except BadBytesError as error:
            self.ended = True
            if error.messages:
                return error.messages
            raise ProtocolError(f"the daemon sent what is not its protocol: {error}") from None


def _connect(path: str, deadline: Deadline) -> Steps[_Connection]:
    """Open a connection, or raise `NoDaemonError`."""
    fault = paths.fault(path)
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
                # The daemon's queue of new connections is full, and the kernel tells nobody when there is room.
                if not deadline.left:
                    raise RequestTimeoutError(
                        f"the daemon at {path} did not accept the connection within {deadline.seconds:g} s;"
                        " nothing was sent"
                    ) from None
                yield Wait(None, writable=False, seconds=min(_RETRY_SECONDS, deadline.left))
            except OSError as error:
                raise NoDaemonError(_why_not(path, error)) from error
            else:
                break
        connected = True
        return _Connection(sock)
    finally:
        if not connected:
            sock.close()


def _connect_again(path: str, deadline: Deadline, broken: ProtocolError) -> Steps[_Connection]:
    """Open a connection in place of one that broke; if there is no daemon, wait for one until the deadline.

    Raises `ProtocolError` then: what was asked on the first connection may have been carried out.
    """
    cause: NoDaemonError | RequestTimeoutError | None = None
    while True:
        yield Wait(None, writable=False, seconds=min(_REPEAT_SECONDS, deadline.left))
        if not deadline.left:
            why = "the connection broke each time" if cause is None else "no connection was to be had"
            raise ProtocolError(f"{broken}. It could not be repeated within {deadline.seconds:g} s: {why}") from cause
        try:
            return (yield from _connect(path, deadline))
        except (NoDaemonError, RequestTimeoutError) as error:
            cause = error


def _why_not(path: str, error: OSError) -> str:
    """Say why nothing could be reached at `path`, and what to look at."""
    if error.errno == errno.ENOENT:
        return (
            f"no daemon at {path}: there is no such file. Is realtimed running, and is this its --socket?"
            " Clients look where REALTIME_SOCKET says"
        )
    try:
        status = os.stat(path)  # noqa: PTH116  (pathlib is slow to import)
    except OSError:
        status = None
    if error.errno == errno.ECONNREFUSED:
        if status is not None and not stat.S_ISSOCK(status.st_mode):
            return f"no daemon at {path}: this file is not a socket"
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


class Line:
    """One client's way to the daemon: a connection that is kept from call to call, and opened when there is none.

    Not for two callers at a time: the client sees to that.
    """

    # Invariant: `_kept` is set only between calls, and owes no answer.

    def __init__(self, path: str) -> None:
        self.path = path
        self._ids = request_ids()
        self._kept: _Connection | None = None

    def close(self) -> None:
        """Close the connection. The next call opens another."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def call(self, call: Call[_T], deadline: Deadline) -> Steps[_T]:
        """Make one call and return its result. Raises `RealtimeError`.

        If the daemon hangs up before it answers, a repeatable call is made again until `deadline`.
        """
        [outcome] = yield from self._run(Batch([call], self._ids), deadline, repeatable=call.repeatable)
        if (older := call.in_place_of(outcome)) is not None:
            return (yield from self.call(older, deadline))
        if isinstance(outcome, RefusedError):
            raise outcome
        return outcome

    def broadcast_each(
        self, pairs: Iterable[tuple[str, str | bytes]], deadline: Deadline
    ) -> Steps[list[Receipt | RefusedError]]:
        """Make many broadcasts. `deadline` is put off whenever `pairs` has yielded or an answer has come."""

        def each() -> Iterator[Call[Receipt]]:
            for channel, message in pairs:
                deadline.renew()  # what the caller's own code takes is not for the daemon to answer for
                yield broadcast(channel, message)
            deadline.renew()

        batch = Batch(each(), self._ids)
        try:
            return (yield from self._run(batch, deadline))
        except RealtimeError as error:
            error.add_note(f"{len(batch.outcomes) - batch.unanswered} broadcasts had been answered before.")
            raise

    def _run(self, batch: Batch[_T], deadline: Deadline, *, repeatable: bool = False) -> Steps[list[_T | RefusedError]]:
        """Carry out a batch. One that is `repeatable` has a single call."""
        requests = unsent = memoryview(batch.requests())
        if batch.done:
            return batch.results()  # all were refused before they were sent
        connection, self._kept = self._kept, None
        if connection is not None:
            # The daemon may have been restarted since the last call. A connection that takes not a byte of the requests
            # is replaced: they are sent again, but cannot arrive twice. Once a byte has left there is no such
            # certainty, and no second try but for what is repeatable.
            sent = connection.begin(unsent)
            if sent is None:
                connection.close()
                connection = None
            else:
                unsent = unsent[sent:]
        if connection is None:
            connection = yield from _connect(self.path, deadline)
        while True:
            reusable = False
            try:
                reusable = yield from _exchange(connection, self.path, batch, unsent, deadline, deque())
            except ProtocolError as error:
                if not (repeatable and connection.hung_up):
                    raise
                broken = error
            else:
                return batch.results()
            finally:
                if reusable:
                    self._kept = connection
                else:
                    connection.close()
            connection = yield from _connect_again(self.path, deadline, broken)
            unsent = requests


def _exchange(
    connection: _Connection,
    path: str,
    batch: Batch[_T],
    unsent: memoryview,
    deadline: Deadline,
    notifications: deque[Notification],
) -> Steps[bool]:
    """Send the requests of `batch`, beginning with `unsent`, and take answers until it is done.

    Returns whether the connection may be used again: not if it has ended, nor if a request was refused before it was
    sent in full.

    Answers are read while requests are written, so that a daemon that stops reading because its own answers are not
    read can go on. Notifications that come in between are added to `notifications`.
    """
    while True:
        while not connection.deaf:
            if not unsent:
                unsent = memoryview(batch.requests())
            sent = connection.send(unsent) if unsent else 0
            if not sent:
                break
            unsent = unsent[sent:]
        if batch.done:
            return not unsent and not connection.ended
        yield Wait(connection.sock, writable=bool(unsent) and not connection.deaf, seconds=deadline.left)
        unanswered = batch.unanswered
        _take_answers(connection, batch, notifications)
        if connection.ended and not batch.done:
            raise ProtocolError(
                f"the daemon at {path} hung up before it answered; what was asked may have been carried out, or not"
            )
        if batch.unanswered < unanswered:
            deadline.renew()
        elif not deadline.left:
            raise RequestTimeoutError(
                f"the daemon at {path} did not answer within {deadline.seconds:g} s; what was asked may still be"
                " carried out"
            )


def _take_answers(connection: _Connection, batch: Batch[Any], notifications: deque[Notification]) -> None:
    for message in connection.receive():
        match message:
            case Notification():
                notifications.append(message)
            case Response() if batch.done:
                connection.ended = True  # last words, behind answers that count nevertheless
            case Response():
                batch.answer(message)
            case Request() | Oversized():
                raise ProtocolError("the daemon sent a request; it is to answer them")


class Feed:
    """The messages of some channels, on a connection of their own."""

    # Invariant: once open, `positions` and `seen` have every channel, and `recovered` those that had a `since`.

    def __init__(self, path: str) -> None:
        self.positions: dict[str, Position] = {}
        self.recovered: dict[str, bool] = {}
        self.seen: dict[str, Position] = {}
        self._path = path
        self._connection: _Connection | None = None
        self._notifications: deque[Notification] = deque()

    def open(
        self,
        channels: Sequence[str],
        deadline: Deadline,
        since: Mapping[str, Position] | None = None,
        last: int | None = None,
    ) -> Steps[None]:
        """Connect and subscribe. Raises `RealtimeError`; if one channel is refused, that of the refusal.

        Channels that are not in `since` begin with their `last` messages. Whatever comes of it, `close` has to follow.
        """
        if not channels:
            raise ValueError("subscribe needs at least one channel")
        names = list(dict.fromkeys(channels))
        since = since or {}
        strangers = [name for name in since if name not in names]
        if strangers:
            raise ValueError(f"since has {quoted(strangers[0])}, which is none of the channels to subscribe to")
        asked = [subscribe(name, since.get(name), last) for name in names]
        subscribed = yield from self._ask(asked, deadline)
        for name, (position, recovered, following) in zip(names, subscribed, strict=True):
            self.positions[name] = position
            # What was missed, and the last messages, are still to be received.
            self.seen[name] = position._replace(offset=max(position.offset - following, 0))
            if recovered is not None:
                self.recovered[name] = recovered
            if recovered:
                self.seen[name] = Position(*since[name])

    def open_watching(self, patterns: Sequence[str], deadline: Deadline) -> Steps[None]:
        """Connect and watch by pattern: as `open`, without positions."""
        if not patterns:
            raise ValueError("watch needs at least one pattern")
        yield from self._ask([watch(pattern) for pattern in dict.fromkeys(patterns)], deadline)

    def _ask(self, asked: Sequence[Call[_T]], deadline: Deadline) -> Steps[list[_T]]:
        """Connect, make the calls and return their results. Raises `RealtimeError`; of refusals, the first."""
        self._connection = connection = yield from _connect(self._path, deadline)
        ids = request_ids()
        while True:
            batch = Batch(asked, ids)
            yield from _exchange(connection, self._path, batch, memoryview(b""), deadline, self._notifications)
            outcomes = batch.results()
            older = [call.in_place_of(outcome) for call, outcome in zip(asked, outcomes, strict=True)]
            if not any(older):
                break
            # All again: to subscribe twice changes nothing.
            asked = [former or call for former, call in zip(older, asked, strict=True)]
        results: list[_T] = []
        for outcome in outcomes:
            if isinstance(outcome, RefusedError):
                raise outcome
            results.append(outcome)
        return results

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()

    def receive(self, deadline: Deadline) -> Steps[ChannelMessage | None]:
        """Return the next message, or None at the deadline. Raises `NoDaemonError` when the daemon hangs up."""
        connection = self._connection
        if connection is None:
            raise ValueError("this feed is not open")
        while True:
            while self._notifications:
                message = published(self._notifications.popleft())
                if message is not None:
                    if message.channel in self.seen:
                        self.seen[message.channel] = self.seen[message.channel]._replace(offset=message.offset)
                    return message
            if connection.ended:
                raise NoDaemonError(
                    f"the daemon at {self._path} hung up: it has stopped, or these messages were read too slowly"
                )
            yield Wait(connection.sock, writable=False, seconds=deadline.left)
            for arrived in connection.receive():
                match arrived:
                    case Notification():
                        self._notifications.append(arrived)
                    case Response(None, error, _):
                        raise goodbye(error)
                    case _:
                        raise ProtocolError("the daemon sent something else than messages")
            if not self._notifications and not deadline.left:
                return None
