"""The client for programs that block: scripts, Django and Flask, queue workers."""

from __future__ import annotations

import atexit
import math
import os
import select
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import realtimed.client.calls as calls
from realtimed.client.calls import Call, ChannelInfo, ChannelMessage, ClientInfo, History, Pages, Position, Receipt
from realtimed.client.connection import DEFAULT_TIMEOUT, Deadline, Steps, Wait, check_timeout, socket_path
from realtimed.client.feed import Feed
from realtimed.client.line import Line
from realtimed.errors import RefusedError

__all__ = ["Client", "Subscription", "broadcast"]

_T = TypeVar("_T")

_LONGEST_POLL: Final = 86_400.0
"""Seconds of one poll(2), which counts milliseconds in an int. A longer wait takes several."""


class Client:
    """Talks to the daemon through its control socket.

        with Client() as client:
            client.broadcast("news", "hello")

    `socket` is the path of the control socket; the default is REALTIME_SOCKET, or else /run/realtime.sock. `timeout` is
    how many seconds a call may take in all: for the connection and the answer.

    The first call opens a connection, which is kept for the next calls. After a restart of the daemon, or after
    `close`, the next call opens another. Without a key a request is never sent twice: if part of it may have arrived,
    the call raises an error.

    Many threads may use a client at a time. So may signal handlers, finalizers, and the `pairs` of `broadcast_each` in
    the middle of a call. No call waits for another: as many connections are open as calls are under way, and eight at
    most are kept. A call that an exception interrupts, from a signal handler for instance, closes its connection. No
    other call gets its answer, but the daemon may have carried out what it asked for. After a fork the child opens its
    own connections.

    Every method may raise these children of `RealtimeError`:

    - `NoDaemonError`: nothing answers at the socket; nothing was sent.
    - `RefusedError`: the daemon said no, and why. Nothing was done.
    - `RequestTimeoutError`: no answer in time. The daemon may still carry the request out.
    - `ProtocolError`: the connection broke before the answer came, or the answer is not one. The daemon may have
      carried the request out, or not.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._line = Line(socket_path(socket))
        self._timeout = check_timeout(timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.socket!r}, timeout={self._timeout:g})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def socket(self) -> str:
        """The path of the control socket."""
        return self._line.path

    def close(self) -> None:
        """Close the connections that are kept. A call that is under way closes its connection when it ends."""
        self._line.close()

    def broadcast(self, channel: str, message: str | bytes, *, key: str | None = None, retry: bool = False) -> Receipt:
        """Send `message` to all clients that are subscribed to `channel`: a str as text, bytes as binary.

        A `key` of 1 to 200 characters makes the broadcast safe to repeat (``docs/protocol.md``, 6.7). Of all broadcasts
        with this key and this channel the daemon carries out the first. It answers the others with the receipt of the
        first, `repeated`, whatever their messages are. So when the daemon hangs up before it answers, the call repeats
        itself, on another connection, until the timeout. After an error the caller may repeat it, in another process
        too, as long as the daemon knows the key (``retry-window``, 300 s).

        `retry=True` has the same effect for this call alone, with a generated key, or with `key` if there is one.

        A daemon that is killed forgets its keys. If it had carried out the broadcast, the next daemon does so again, in
        another epoch and not `repeated`. Only in this case may clients get the message twice.
        """
        return self._call(calls.broadcast(channel, message, key, retry=retry))

    def broadcast_many(
        self, channels: Iterable[str], message: str | bytes, *, key: str | None = None, retry: bool = False
    ) -> list[Receipt]:
        """Send `message` to all clients that are subscribed to any of `channels`; return a receipt for each, in order.

        A client that is subscribed to several of them gets it once for each. If one channel is refused, or there are
        more than 5,000, nothing is sent. `key` and `retry` are as for `broadcast`; a key belongs to this list of
        channels, in this order.
        """
        return self._call(calls.broadcast_many(channels, message, key, retry=retry))

    def broadcast_each(self, pairs: Iterable[tuple[str, str | bytes]]) -> list[Receipt | RefusedError]:
        """Send many messages, each a pair of channel and message, as fast as the daemon takes them.

        Requests are sent without waiting for answers. Returns, for each pair and in order, its receipt, or the
        `RefusedError` that says why it was not sent; a refusal does not stop the others:

            for outcome in client.broadcast_each(pairs):
                if isinstance(outcome, RefusedError): ...

        The timeout applies to each answer, not to all together. An error of the connection, or one that `pairs` raises,
        ends the call; some broadcasts that have been sent by then may not be carried out. A note on the exception says
        how many had been answered (see `BaseException.add_note`).
        """
        return _run(self._line.broadcast_each(pairs, Deadline(self._timeout)))

    def history(self, channel: str, count: int = calls.HISTORY_SHOWN) -> History:
        """Return the last `count` messages of `channel` that the daemon keeps, and the position of the channel.

        The daemon keeps messages within limits of number, age and bytes (``docs/protocol.md``, 1.4). `count` is 0 or
        more.
        """
        return self._call(calls.history(channel, count))

    def channels(self, prefix: str = "", *, limit: int | None = None) -> dict[str, ChannelInfo]:
        """Return the channels that have subscribers and whose names begin with `prefix`, `limit` of them at most.

        They come page by page, and the timeout applies to each page. A channel that comes or goes meanwhile may be
        among them or not.
        """
        return dict(self._pages(calls.channels(prefix, limit)))

    def count_channels(self, prefix: str = "") -> int:
        """Return how many channels have subscribers and names that begin with `prefix`."""
        return self._call(calls.count_channels(prefix))

    def clients(
        self, *, channel: str | None = None, address: str | None = None, limit: int | None = None
    ) -> list[ClientInfo]:
        """Return the connected clients, the first to come first: all, or those on a channel or from an address.

        `limit` is how many at most. They come page by page, like `channels`.
        """
        return self._pages(calls.clients(channel, address, limit))

    def count_clients(self, *, channel: str | None = None, address: str | None = None) -> int:
        """Return how many clients are connected: of all, or of those on a channel or from an address."""
        return self._call(calls.count_clients(channel, address))

    def disconnect(self, client_id: str, code: int = calls.NOT_ALLOWED, reason: str | None = None) -> bool:
        """Close a client's WebSocket with a close code (RFC 6455 section 7.4) and a reason.

        Returns whether there was such a client. `client_id` is an `id` from `clients`. The code is 1000, 1001 or 3000
        to 4999; the default, 4403, tells the client not to come back by itself.
        """
        return self._call(calls.disconnect(client_id, code, reason))

    def stats(self) -> dict[str, Any]:
        """Return the daemon's counters; ``docs/protocol.md`` explains them."""
        return self._call(calls.stats())

    def info(self) -> dict[str, Any]:
        """Return the daemon's version, limits and start time (``started``, in seconds since 1970)."""
        return self._call(calls.info())

    def upgrade(self) -> dict[str, Any]:
        """Leave everything that the daemon holds to a new process, which it starts, and return what happened.

        Only root and the daemon's own user may. Nobody's connection ends. It may take some seconds: see the
        `timeout` of this client. Raises `RefusedError`, ``upgrade_failed``, if the daemon goes on as before.
        """
        return self._call(calls.upgrade())

    def ping(self) -> None:
        """Return if the daemon answers; raise if it does not."""
        self._call(calls.ping())

    @contextmanager
    def subscribe(
        self, *channels: str, since: Mapping[str, Position] | None = None, last: int | None = None
    ) -> Iterator[Subscription]:
        """Subscribe to channels like a client, on a new connection.

        with client.subscribe("news", "sport") as subscription:
            for message in subscription:
                print(message.channel, message.message)

        `since` has positions in some of these channels, from an earlier subscription's `seen` for example. For each
        position the daemon sends all messages that came after it, before any newer one. If it no longer keeps all of
        them, it sends none: see `Subscription.recovered`.

        Each of the other channels begins with the newest `last` messages that the daemon keeps, or fewer if it does not
        keep that many.
        """
        feed = Feed(self.socket)
        try:
            _run(feed.open(channels, Deadline(self._timeout), since, last))
            yield Subscription(feed)
        finally:
            feed.close()

    @contextmanager
    def watch(self, *patterns: str) -> Iterator[Subscription]:
        """Receive all messages of channels that match any of `patterns`, in which ``*`` stands for any characters:

        with client.watch("chat:*") as subscription:
            for message in subscription:
                print(message.channel, message.message)

        Unlike `subscribe` it makes no channel exist and does not count as a recipient, and it receives messages of
        channels without subscribers too. There are no `positions`. It is for debugging and supervision: a daemon allows
        only a few watchers.
        """  # noqa: D400
        feed = Feed(self.socket)
        try:
            _run(feed.open_watching(patterns, Deadline(self._timeout)))
            yield Subscription(feed)
        finally:
            feed.close()

    def _call(self, call: Call[_T]) -> _T:
        return _run(self._line.call(call, Deadline(self._timeout)))

    def _pages(self, pages: Pages[_T]) -> list[_T]:
        while (call := pages.next()) is not None:
            pages.take(self._call(call))
        return pages.found

    def after_fork(self) -> None:
        """Forget the parent's connections. A forked child need not call this: it uses none of them."""
        self._line.close()


class Subscription:
    """The messages of some channels as they come: iterate over it, or call `receive`.

    `positions` says, for each channel, which message was its newest when the subscription began. Every later message
    comes, with the offsets that follow. Messages that were missed after a `since` come before them, with lower offsets,
    if `recovered` says so; the `last` messages come before them too. When the daemon hangs up, because it stops or
    because the messages were read too slowly, `NoDaemonError` is raised: the iteration does not just end. Only one
    thread at a time may use a subscription.

    An exception from a signal handler loses no message while one is awaited, only one that is being returned. If it
    comes while messages are read, some may be lost, and the next `receive` raises `ProtocolError`; `seen` says from
    where to subscribe again.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    @property
    def positions(self) -> dict[str, Position]:
        """The position of each channel when the subscription began."""
        return self._feed.positions

    @property
    def recovered(self) -> dict[str, bool]:
        """For each channel with a `since`: True if all messages after it come, in order; False if none of them does."""
        return self._feed.recovered

    @property
    def seen(self) -> dict[str, Position]:
        """The position of the last message received from each channel, for a later `since`."""
        return dict(self._feed.seen)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ChannelMessage:
        message = self.receive()
        while message is None:
            message = self.receive()
        return message

    def receive(self, timeout: float | None = None) -> ChannelMessage | None:
        """Return the next message, or None if none has come after `timeout` seconds; without it, wait without limit."""
        return _run(self._feed.receive(Deadline(math.inf if timeout is None else timeout)))


def _run(steps: Steps[_T]) -> _T:
    """Take steps until they return a result, and block while they wait."""
    with closing(steps):
        while True:
            try:
                wait = next(steps)
            except StopIteration as end:
                result: _T = end.value
                return result
            _block(wait)


def _block(wait: Wait) -> None:
    if wait.sock is None:
        time.sleep(wait.seconds)
        return
    seconds = min(wait.seconds, _LONGEST_POLL)
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(wait.sock, select.POLLIN | (select.POLLOUT if wait.writable else 0))
        poll.poll(math.ceil(seconds * 1000))
    else:  # eventlet has removed it, and its select lets other greenlets go on
        select.select([wait.sock], [wait.sock] if wait.writable else [], [], seconds)


_shared: dict[str, Client] = {}


def broadcast(
    channel: str,
    message: str | bytes,
    *,
    key: str | None = None,
    retry: bool = False,
    socket: str | os.PathLike[str] | None = None,
) -> Receipt:
    """Send `message` to all clients that are subscribed to `channel`; return once the daemon has accepted it.

    `key`, `retry` and the errors are those of `Client.broadcast`, and `socket` is that of `Client`. The connection is
    kept for the next call; threads that call at the same time have one each (see `Client`).
    """
    path = socket_path(socket)
    client = _shared.get(path) or _shared.setdefault(path, Client(path))
    return client.broadcast(channel, message, key=key, retry=retry)


def _close_shared() -> None:
    for client in _shared.values():
        client.close()


atexit.register(_close_shared)
