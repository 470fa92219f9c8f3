"""A network between client and server that can fail: a TCP proxy with a plug to pull."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.kit.sockets import RESET_AT_CLOSE

__all__ = ["Plug", "running_plug"]


class Plug:
    """A proxy from a port of its own to the `target` port, both on 127.0.0.1."""

    # Invariant: `_flowing` is set except between `clog` and `put_back`.

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.target = target
        self._pulled = False
        self._allowance: int | None = None
        self._flowing = trio.Event()
        self._flowing.set()
        self._open: dict[trio.SocketStream, trio.CancelScope] = {}

    def pull(self) -> None:
        """Reset all connections, and new ones at once, until the plug is put back."""
        self._pulled = True
        self._reset_all()

    def pull_after(self, size: int) -> None:
        """Pull the plug after `size` more bytes to clients, even in the middle of a message."""
        self._allowance = size

    def clog(self) -> None:
        """Let nothing through, without closing anything, as in a tunnel."""
        self._flowing = trio.Event()

    def put_back(self) -> None:
        """Let everything through again."""
        self._pulled = False
        self._allowance = None
        self._flowing.set()

    @property
    def pulled(self) -> bool:
        return self._pulled

    def _reset_all(self) -> None:
        for client, scope in self._open.items():
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            scope.cancel()

    async def handle(self, client: trio.SocketStream) -> None:
        """Serve one client until either side ends the connection, or the plug is pulled."""
        async with client:
            with trio.CancelScope() as scope:
                self._open[client] = scope
                if self._pulled:
                    self._reset_all()
                try:
                    await self._connect_through(client)
                except* (OSError, trio.BrokenResourceError):
                    pass  # the server is not there, or one side has hung up: so the other is hung up on
                finally:
                    del self._open[client]

    async def _connect_through(self, client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", self.target) as server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server)
            while data := await server.receive_some():
                await self._flowing.wait()
                if self._allowance is not None and len(data) >= self._allowance:
                    await client.send_all(data[: self._allowance])
                    self._allowance = None
                    self.pull()
                    await trio.lowlevel.checkpoint()
                if self._allowance is not None:
                    self._allowance -= len(data)
                await client.send_all(data)
            nursery.cancel_scope.cancel()

    async def _pump(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        while data := await client.receive_some():
            await self._flowing.wait()
            await server.send_all(data)
        await server.send_eof()


@asynccontextmanager
async def running_plug(port: int, target: int) -> AsyncIterator[Plug]:
    """Proxy from `port` to `target`."""
    plug = Plug(port, target)
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, plug.handle, listeners)
        yield plug
        nursery.cancel_scope.cancel()
