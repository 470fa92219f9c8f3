"""The client for programs that await, under trio and under asyncio."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, closing
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio

import realtimed.client.calls as calls
from realtimed.client.calls import Call, ChannelInfo, ChannelMessage, ClientInfo, History, Pages, Position, Receipt
from realtimed.client.connection import DEFAULT_TIMEOUT, Deadline, Steps, Wait, check_timeout, socket_path
from realtimed.client.feed import Feed
from realtimed.client.line import Line
from realtimed.errors import RefusedError, RequestTimeoutError

__all__ = ["AsyncClient", "AsyncSubscription"]

_T = TypeVar("_T")


class AsyncClient:
    """`realtimed.Client` for trio and asyncio: the same methods, with ``await``.

        async with AsyncClient() as client:
            await client.broadcast("news", "hello")

    Many tasks may use one client: they take turns. A call that is cancelled, by the caller's timeout for instance,
    closes the connection, and the next call opens another: it cannot get the answer of the first. The daemon may have
    carried out what the cancelled call asked for. Only one thread may use a client.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._line = Line(socket_path(socket))
        self._timeout = check_timeout(timeout)
        self._turn = anyio.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.socket!r}, timeout={self._timeout:g})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def socket(self) -> str:
        """The path of the control socket."""
        return self._line.path

    async def aclose(self) -> None:
        """Close the connection. If a call of another task is under way, wait until it has ended."""
        with anyio.CancelScope(shield=True):  # no longer than the timeout of that call
            async with self._turn:
                self._line.close()

    async def broadcast(
        self, channel: str, message: str | bytes, *, key: str | None = None, retry: bool = False
    ) -> Receipt:
        """See `Client.broadcast`."""
        return await self._call(calls.broadcast(channel, message, key, retry=retry))

    async def broadcast_many(
        self, channels: Iterable[str], message: str | bytes, *, key: str | None = None, retry: bool = False
    ) -> list[Receipt]:
        """See `Client.broadcast_many`."""
        return await self._call(calls.broadcast_many(channels, message, key, retry=retry))

    async def broadcast_each(self, pairs: Iterable[tuple[str, str | bytes]]) -> list[Receipt | RefusedError]:
        """See `Client.broadcast_each`."""
        async with self._my_turn() as deadline:
            return await _run(self._line.broadcast_each(pairs, deadline))

    async def history(self, channel: str, count: int = calls.HISTORY_SHOWN) -> History:
        """See `Client.history`."""
        return await self._call(calls.history(channel, count))

    async def channels(self, prefix: str = "", *, limit: int | None = None) -> dict[str, ChannelInfo]:
        """See `Client.channels`."""
        return dict(await self._pages(calls.channels(prefix, limit)))

    async def count_channels(self, prefix: str = "") -> int:
        """See `Client.count_channels`."""
        return await self._call(calls.count_channels(prefix))

    async def clients(
        self, *, channel: str | None = None, address: str | None = None, limit: int | None = None
    ) -> list[ClientInfo]:
        """See `Client.clients`."""
        return await self._pages(calls.clients(channel, address, limit))

    async def count_clients(self, *, channel: str | None = None, address: str | None = None) -> int:
        """See `Client.count_clients`."""
        return await self._call(calls.count_clients(channel, address))

    async def disconnect(self, client_id: str, code: int = calls.NOT_ALLOWED, reason: str | None = None) -> bool:
        """See `Client.disconnect`."""
        return await self._call(calls.disconnect(client_id, code, reason))

    async def stats(self) -> dict[str, Any]:
        """See `Client.stats`."""
        return await self._call(calls.stats())

    async def info(self) -> dict[str, Any]:
        """See `Client.info`."""
        return await self._call(calls.info())

    async def upgrade(self) -> dict[str, Any]:
        """Leave everything that the daemon holds to a new process, which it starts, and return what happened.

        Only root and the daemon's own user may. Nobody's connection ends. It may take some seconds: see the
        `timeout` of this client. Raises `RefusedError`, ``upgrade_failed``, if the daemon goes on as before.
        """
        return await self._call(calls.upgrade())

    async def ping(self) -> None:
        """See `Client.ping`."""
        await self._call(calls.ping())

    @asynccontextmanager
    async def subscribe(
        self, *channels: str, since: Mapping[str, Position] | None = None, last: int | None = None
    ) -> AsyncIterator[AsyncSubscription]:
        """Subscribe to channels like a client, on a new connection; see `Client.subscribe` for `since` and `last`.

        async with client.subscribe("news", "sport") as subscription:
            async for message in subscription:
                print(message.channel, message.message)
        """
        feed = Feed(self.socket)
        try:
            await _run(feed.open(channels, Deadline(self._timeout), since, last))
            yield AsyncSubscription(feed)
        finally:
            feed.close()

    @asynccontextmanager
    async def watch(self, *patterns: str) -> AsyncIterator[AsyncSubscription]:
        """See `Client.watch`."""
        feed = Feed(self.socket)
        try:
            await _run(feed.open_watching(patterns, Deadline(self._timeout)))
            yield AsyncSubscription(feed)
        finally:
            feed.close()

    async def _call(self, call: Call[_T]) -> _T:
        async with self._my_turn() as deadline:
            return await _run(self._line.call(call, deadline))

    async def _pages(self, pages: Pages[_T]) -> list[_T]:
        while (call := pages.next()) is not None:
            pages.take(await self._call(call))
        return pages.found

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[Deadline]:
        deadline = Deadline(self._timeout)
        try:
            self._turn.acquire_nowait()
        except anyio.WouldBlock:
            with anyio.move_on_after(self._timeout) as patience:
                await self._turn.acquire()
            if patience.cancelled_caught:
                raise RequestTimeoutError(
                    f"other calls of this client kept the connection busy for {self._timeout:g} s; nothing was sent"
                ) from None
        try:
            yield deadline
        finally:
            self._turn.release()


class AsyncSubscription:
    """`realtimed.Subscription` with ``async for`` and ``await``. A cancelled `receive` loses no message."""

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

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChannelMessage:
        return await self.receive()

    async def receive(self) -> ChannelMessage:
        """Return the next message. Waits without limit, unless the caller sets a timeout around it."""
        while True:
            message = await _run(self._feed.receive(Deadline(math.inf)))
            if message is not None:
                return message


async def _run(steps: Steps[_T]) -> _T:
    """Take steps until they return a result, and let other tasks run while they wait."""
    with closing(steps):
        while True:
            try:
                wait = next(steps)
            except StopIteration as end:
                result: _T = end.value
                return result
            with anyio.move_on_after(wait.seconds):
                await _until(wait)


async def _until(wait: Wait) -> None:
    if wait.sock is None:
        await anyio.sleep(wait.seconds)
    elif not wait.writable:
        await anyio.wait_readable(wait.sock)
    else:
        async with anyio.create_task_group() as group:

            async def first(ready: Callable[[Any], Awaitable[None]]) -> None:
                await ready(wait.sock)
                group.cancel_scope.cancel()

            group.start_soon(first, anyio.wait_readable)
            group.start_soon(first, anyio.wait_writable)
