"""All listening sockets of the daemon: opened by it, by a service manager, or inherited from a process that ends."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

from realtimed.config.readers import Address
from realtimed.config.settings import Config
from realtimed.net.listener import SocketListener, inherit_listener, listen
from realtimed.net.stream import QueuedStream

__all__ = ["Listeners", "Places", "Wraps", "open_listeners"]

_S = TypeVar("_S")

Place = Address | socket.socket | tuple[socket.socket, Path | None]
"""Where to listen: at an address, at a service manager's socket, or at that of a process that ends, with its file if
that is the daemon's own."""


class Places(NamedTuple):
    """Where to listen. In the order of their fields HTTP is the last, but it is opened first."""

    websocket: Sequence[Place]
    control: Place
    http: Place | None


class Wraps(NamedTuple):
    """What makes a stream of an accepted connection."""

    websocket: Callable[[socket.socket], Any]
    control: Callable[[socket.socket], QueuedStream]
    http: Callable[[socket.socket], trio.SocketStream]


class Listeners(NamedTuple):
    """The listening sockets."""

    websocket: list[SocketListener[Any]]
    control: SocketListener[QueuedStream]
    http: SocketListener[trio.SocketStream] | None

    def by_role(self) -> Iterator[tuple[str, SocketListener[Any]]]:
        """Yield all listeners with their roles."""
        for each in self.websocket:
            yield "websocket", each
        yield "control", self.control
        if self.http is not None:
            yield "http", self.http


async def open_listeners(places: Places, config: Config, wraps: Wraps, resources: AsyncExitStack) -> Listeners:
    """Listen everywhere. The listeners end with `resources`. Raises `ConfigurationError`."""

    async def begin(where: Place, wrap: Callable[[socket.socket], _S]) -> SocketListener[_S]:
        mode, group = config.socket_mode, config.socket_group
        if isinstance(where, tuple):
            listener = inherit_listener(*where, wrap, mode=mode, group=group)
        else:
            listener = await listen(where, wrap, mode=mode, group=group)
        return await resources.enter_async_context(listener)

    # HTTP starts before the others and ends after them, so that a supervisor sees the daemon stop.
    http = await begin(places.http, wraps.http) if places.http is not None else None
    websocket = [await begin(place, wraps.websocket) for place in places.websocket]
    control = await begin(places.control, wraps.control)
    return Listeners(websocket, control, http)
