"""The messages of some channels, on a connection of their own, for callers that block and callers that await."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from realtimed.client.batch import Batch, request_ids
from realtimed.client.calls import Call, ChannelMessage, Position, subscribe, watch
from realtimed.client.connection import Connection, Deadline, Steps, connect
from realtimed.client.line import exchange
from realtimed.client.results import goodbye, published
from realtimed.errors import NoDaemonError, ProtocolError, RefusedError
from realtimed.rpc.wire import Notification, Response
from realtimed.text import quoted

__all__ = ["EARLY_LIMIT", "Feed"]

_T = TypeVar("_T")

EARLY_LIMIT: Final = 256 * 2**20
"""Bytes of memory for early messages: those that come before all channels have been subscribed to. A daemon keeps
64 MiB of history by default and may send all of it for many channels; a character of text takes up to four bytes."""

_MESSAGE_BYTES: Final = 100
"""About how many bytes of memory a message takes beside its channel and its text."""


class Feed:
    """The messages of some channels, on a connection of their own."""

    # Invariants: once open, `positions` and `seen` have every channel, and `recovered` those that had a `since`.
    # `_arrived` has the messages that were received and not returned; the early ones took `_early_bytes`. `_torn` is
    # set while messages are on their way from the socket to `_arrived`: if it is still set when the next receive
    # begins, some may have been lost. `_last_words` is the error to raise when all messages before it were returned.

    def __init__(self, path: str) -> None:
        self.positions: dict[str, Position] = {}
        self.recovered: dict[str, bool] = {}
        self.seen: dict[str, Position] = {}
        self._path = path
        self._connection: Connection | None = None
        self._subscribed: frozenset[str] | None = None
        self._arrived: deque[ChannelMessage] = deque()
        self._early_bytes = 0
        self._last_words: str | None = None
        self._torn = False

    def open(
        self,
        channels: Sequence[str],
        deadline: Deadline,
        since: Mapping[str, Position] | None = None,
        last: int | None = None,
    ) -> Steps[None]:
        """Connect and subscribe. Raises `RealtimeError`: a `RefusedError` if a channel is refused.

        Channels that are not in `since` begin with their `last` messages. Each answer puts off `deadline`. The caller
        has to call `close` afterwards, whatever happens.
        """
        if not channels:
            raise ValueError("subscribe needs at least one channel")
        names = list(dict.fromkeys(channels))
        since = since or {}
        strangers = [name for name in since if name not in names]
        if strangers:
            raise ValueError(f"since has {quoted(strangers[0])}, which is none of the channels to subscribe to")
        self._subscribed = frozenset(names)
        asked = [subscribe(name, since.get(name), last) for name in names]
        subscribed = yield from self._ask(asked, deadline)
        for name, (position, recovered, following) in zip(names, subscribed, strict=True):
            self.positions[name] = position
            # Messages that were missed, or the last ones, are still to come.
            self.seen[name] = position._replace(offset=max(position.offset - following, 0))
            if recovered is not None:
                self.recovered[name] = recovered
            if recovered:
                self.seen[name] = Position(*since[name])

    def open_watching(self, patterns: Sequence[str], deadline: Deadline) -> Steps[None]:
        """Connect and watch by pattern: like `open`, without positions."""
        if not patterns:
            raise ValueError("watch needs at least one pattern")
        yield from self._ask([watch(pattern) for pattern in dict.fromkeys(patterns)], deadline)

    def _ask(self, asked: Sequence[Call[_T]], deadline: Deadline) -> Steps[list[_T]]:
        """Make calls on a new connection and return their results, or raise the first refusal."""
        self._connection = connection = yield from connect(self._path, deadline)
        ids = request_ids()
        while True:
            batch = Batch(asked, ids)
            yield from exchange(connection, self._path, batch, memoryview(b""), deadline, self._hear_early)
            outcomes = batch.results()
            older = [call.in_place_of(outcome) for call, outcome in zip(asked, outcomes, strict=True)]
            if not any(older):
                break
            # All calls again: to subscribe twice changes nothing.
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
        connection = self._checked()
        while not self._arrived:
            if self._last_words is not None:
                raise ProtocolError(self._last_words)
            if connection.ended:
                raise NoDaemonError(
                    f"the daemon at {self._path} hung up: it has stopped, or these messages were read too slowly"
                )
            yield connection.wait(deadline)
            self._take(connection)
            if not self._arrived and not deadline.remaining:
                return None
        message = self._arrived[0]
        if message.channel in self.seen:
            self.seen[message.channel] = self.seen[message.channel]._replace(offset=message.offset)
        self._arrived.popleft()  # last: an interrupt before it loses no message
        return message

    def _checked(self) -> Connection:
        """Return the connection if messages can be received on it; raise `RealtimeError` if not."""
        if self._connection is None:
            raise ValueError("this feed is not open")
        if self._connection.pid != os.getpid():
            raise NoDaemonError(
                f"this subscription is that of process {self._connection.pid}, which opened it; after a fork, subscribe"
                " again"
            )
        if self._torn:
            raise ProtocolError(
                "messages may have been lost: an exception came while they were read, or another receive of this"
                " subscription is under way. Subscribe again, with since=seen"
            )
        return self._connection

    def _take(self, connection: Connection) -> None:
        """Receive messages. An error among them becomes the `_last_words`."""
        self._torn = True
        try:
            for arrived in connection.receive():
                match arrived:
                    case Notification():
                        self._hear(arrived)
                    case Response(None, error, _):
                        raise goodbye(error)
                    case _:
                        raise ProtocolError("the daemon sent something else than messages")
        except ProtocolError as error:
            self._last_words = str(error)
        self._torn = False

    def _hear(self, notification: Notification) -> ChannelMessage | None:
        """Keep a message until it is returned. Ignores notifications of unknown kinds."""
        message = published(notification)
        if message is not None:
            if self._subscribed is not None and message.channel not in self._subscribed:
                raise ProtocolError(
                    f"the daemon sent a message of {quoted(message.channel)}, which was not subscribed to"
                )
            self._arrived.append(message)
        return message

    def _hear_early(self, notification: Notification) -> None:
        """Keep an early message, within `EARLY_LIMIT`: until all calls are answered, none is returned."""
        message = self._hear(notification)
        if message is not None:
            self._early_bytes += _MESSAGE_BYTES + sys.getsizeof(message.channel) + sys.getsizeof(message.message)
        if self._early_bytes > EARLY_LIMIT:
            raise ProtocolError(
                f"messages of more than {EARLY_LIMIT} bytes, the limit, came before all channels had been subscribed"
                " to; subscribe to fewer of them at a time"
            )
