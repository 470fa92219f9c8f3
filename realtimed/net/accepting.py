"""Accepting connections for ever, whatever the process or the system runs out of."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from realtimed.net.listener import SocketListener
from realtimed.process.logs import Event

__all__ = ["ClientRoom", "accept"]

_PAUSE: Final = 0.1
"""Seconds to wait before accepting again when there are no more open files or memory to be had."""

_CALM: Final = 1.0
"""Seconds without trouble after which it is over. Where each file that is closed is opened again at once, it is not."""

_BATCH: Final = 8
"""Connections that are accepted in one go before other tasks get their turn. A handshake takes about half a millisecond
in all, so this bounds a turn to a few milliseconds however many connect."""

log = logging.getLogger(__name__)

_S = TypeVar("_S", bound=trio.abc.Stream)


class ClientRoom:
    """The open files that WebSockets may take, those whose handshake is not over included.

    Without a limit to them, whoever connects and says nothing could take every file there is, and no publisher would
    get one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @property
    def obstacle(self) -> str | None:
        """What keeps newcomers out, if anything does."""
        if self.taken < self.limit:
            return None
        return f"the limit of open files leaves room for {self.limit} WebSockets and handshakes"

    async def room(self) -> int:
        """Return how many may be accepted now. Raises `OSError` if none."""
        obstacle = self.obstacle
        if obstacle is not None:
            raise OSError(errno.EMFILE, obstacle)
        return self.limit - self.taken


async def accept(
    listener: SocketListener[_S],
    handler: Callable[[_S], Awaitable[None]],
    nursery: trio.Nursery,
    room: Callable[[], Awaitable[int]] | None = None,
) -> None:
    """Start a task in `nursery` for each connection, for ever, and as many at a time as there is `room` for."""
    trouble: str | None = None
    calm_at = math.inf  # when the trouble is over unless there is more of it
    while True:
        try:
            with trio.move_on_at(calm_at) as calm:
                await listener.ready()
            if calm.cancelled_caught or trio.current_time() >= calm_at:
                trouble, calm_at = None, math.inf
                log.info(Event("accepting again", listener=listener.name))
            if calm.cancelled_caught:
                continue
            streams = listener.accept(_BATCH if room is None else min(await room(), _BATCH))
        except OSError as error:
            # The connection stays in the kernel's queue. Trying again at once would only burn the processor.
            if error.strerror != trouble:
                trouble = error.strerror
                log.warning(Event("cannot accept", reason=trouble, listener=listener.name))
            await trio.sleep(_PAUSE)
            calm_at = trio.current_time() + _CALM
        else:
            for stream in streams:
                nursery.start_soon(handler, stream)
