"""A client's line to the daemon: the connections that it keeps, and calls on them. All I/O is in `connection`.

A signal handler may raise an exception between any two instructions: Ctrl-C, a soft time limit, an alarm. Signal
handlers and finalizers may also make calls in the middle of a call of the same thread. So there is no lock: it could
stay locked, or its holder could wait for it. Instead a call *takes* a connection off a list, which is one instruction,
and gives it back when no answer is owed on it. If the list is empty, it opens another. In between no other call can
reach the connection. A call that is interrupted closes its connection. If it cannot do even that, the connection ends
with the last reference to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from realtimed.client.batch import Batch, request_ids
from realtimed.client.calls import Call, Receipt, broadcast
from realtimed.client.connection import Connection, Deadline, State, Steps, connect, connect_again
from realtimed.errors import ProtocolError, RealtimeError, RefusedError, RequestTimeoutError
from realtimed.rpc.wire import Notification, Oversized, Request, Response

__all__ = ["KEPT", "Line", "exchange"]

_T = TypeVar("_T")

KEPT: Final = 8
"""Connections that are kept for the next calls. More are open only while more calls are under way."""


class Line:
    """The connections of one client. They are kept from call to call; if all are in use, another is opened."""

    # Invariant: the connections in `_kept` are idle, and no call has any of them.

    def __init__(self, path: str) -> None:
        self.path = path
        self._ids = request_ids()
        self._kept: list[Connection] = []

    def close(self) -> None:
        """Close the connections that are kept. One that a call uses is closed when that call ends.

        The next call opens another.
        """
        kept, self._kept = self._kept, []
        _close_all_but(0, kept)

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
        """Make many broadcasts. Each pair that `pairs` yields and each answer puts off `deadline`."""

        def each() -> Iterator[Call[Receipt]]:
            for channel, message in pairs:
                deadline.renew()  # the time that the caller's code takes does not count
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
        kept = self._kept
        # The daemon may have been restarted since the last call. If a connection takes not one byte of the requests,
        # they are sent on another: they cannot arrive twice. Once a byte has been taken this is no longer certain, and
        # only a repeatable call is tried again.
        connection, sent = _take(kept, unsent)
        unsent = unsent[sent:]
        if connection is None:
            connection = yield from connect(self.path, deadline)
        while True:
            try:
                yield from exchange(connection, self.path, batch, unsent, deadline, _disregard)
                return batch.results()
            except ProtocolError as error:
                if not (repeatable and connection.state is State.HUNG_UP):
                    raise
                broken = str(error)
            finally:
                self._give_back(connection, kept)
            connection = yield from connect_again(self.path, deadline, broken)
            unsent = requests

    def _give_back(self, connection: Connection, kept: list[Connection]) -> None:
        """Keep a connection that is idle, in the list that was current when it was taken; close any other."""
        if connection.state is not State.IDLE:
            connection.close()
            return
        kept.append(connection)
        _close_all_but(KEPT if kept is self._kept else 0, kept)  # `close` may have been called meanwhile


def _take(kept: list[Connection], data: memoryview) -> tuple[Connection | None, int]:
    """Take a connection that still works, and begin to send `data` on it; return how many bytes it took."""
    while True:
        try:
            connection = kept.pop()
        except IndexError:
            return None, 0
        sent = connection.begin(data)
        if sent is not None:
            return connection, sent
        connection.close()


def _close_all_but(number: int, kept: list[Connection]) -> None:
    """Close the connections that have been kept longest, until no more than `number` are kept."""
    while len(kept) > number:
        try:
            connection = kept.pop(0)
        except IndexError:  # another thread has taken it
            return
        connection.close()


def _disregard(notification: Notification) -> None:
    """Ignore a message: nothing has been subscribed to on this connection."""


def exchange(
    connection: Connection,
    path: str,
    batch: Batch[_T],
    unsent: memoryview,
    deadline: Deadline,
    heard: Callable[[Notification], None],
) -> Steps[None]:
    """Send the requests of `batch`, beginning with `unsent`, and take answers until it is done.

    The connection is idle then, unless it has ended, or a request was refused before it was sent in full.

    Answers are read while requests are written, because a daemon stops reading when its answers are not read. `heard`
    is called for notifications that come in between.
    """
    connection.occupy()
    while True:
        while connection.state is State.BUSY:
            if not unsent:
                unsent = memoryview(batch.requests())
            sent = connection.send(unsent) if unsent else 0
            if not sent:
                break
            unsent = unsent[sent:]
        if batch.done:
            if not unsent:
                connection.rest()
            return
        yield connection.wait(deadline, writable=bool(unsent) and connection.state is State.BUSY)
        unanswered = batch.unanswered
        _take_answers(connection, batch, heard)
        if connection.ended and not batch.done:
            raise ProtocolError(
                f"the daemon at {path} hung up before it answered; what was asked may have been carried out, or not"
            )
        if batch.unanswered < unanswered:
            deadline.renew()
        elif not deadline.remaining:
            raise RequestTimeoutError(
                f"the daemon at {path} did not answer within {deadline.seconds:g} s; what was asked may still be"
                " carried out"
            )


def _take_answers(connection: Connection, batch: Batch[Any], heard: Callable[[Notification], None]) -> None:
    for message in connection.receive():
        match message:
            case Notification():
                heard(message)
            case Response() if batch.done:
                connection.state = State.SPOILED  # last words, behind answers that count nevertheless
            case Response():
                batch.answer(message)
            case Request() | Oversized():
                raise ProtocolError("the daemon sent a request; it is to answer them")
