"""Accepting connections forever, even while the process or the system has no open files or memory left."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from realtimed.net.gate import Gate
from realtimed.net.listener import SocketListener
from realtimed.process.logs import Event

__all__ = ["ClientFiles", "accept"]

_PAUSE: Final = 0.1
"""Seconds to wait before accepting again when there are no more open files or no more memory."""

_CALM: Final = 1.0
"""Seconds after the last error when the trouble is over. It lasts while each closed file is opened again at once."""

_BATCH: Final = 32
"""Connections accepted before other tasks get their turn. A handshake takes less than 0.1 ms, so this bounds a turn to
a few milliseconds, however many clients connect."""

log = logging.getLogger(__name__)

_S = TypeVar("_S")


class ClientFiles:
    """The open files for WebSockets and for connections that may become WebSockets.

    Without a limit, peers that connect and send nothing could take all open files, and publishers could not connect.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @property
    def obstacle(self) -> str | None:
        """A clause that says why all are taken, or None while some are free."""
        if self.taken < self.limit:
            return None
        return f"the limit of open files leaves room for {self.limit} WebSockets and handshakes"

    async def places(self) -> int:
        """Return how many connections may be accepted now. Raises `OSError` if none may."""
        obstacle = self.obstacle
        if obstacle is not None:
            raise OSError(errno.EMFILE, obstacle)
        return self.limit - self.taken

    def release(self) -> None:
        """Count a file that has been closed."""
        self.taken -= 1


class _Trouble:
    """The reason why a listener accepts nothing. The log says when it begins, changes and ends."""

    def __init__(self, listener: str) -> None:
        self.over_at = math.inf
        """The time at which the trouble is over, unless an error comes first; infinite while there is no trouble."""
        self._listener = listener
        self._reason: str | None = None

    def note(self, error: OSError) -> None:
        if error.strerror != self._reason:
            self._reason = error.strerror
            log.warning(Event("cannot accept", reason=self._reason, listener=self._listener))

    def calm_from(self, now: float) -> None:
        self.over_at = now + _CALM

    def end(self) -> None:
        self._reason, self.over_at = None, math.inf
        log.info(Event("accepting again", listener=self._listener))


async def accept(
    listener: SocketListener[_S],
    serve: Callable[[_S], None],
    places: Callable[[], Awaitable[int]] | None = None,
    gate: Gate | None = None,
) -> None:
    """Accept connections forever, and call `serve` with each. It returns at once.

    `places` waits if it has to, and returns how many may be accepted now; it may raise `OSError`. Nobody is accepted
    while `gate` is closed.
    """
    trouble = _Trouble(listener.name)
    while True:
        try:
            await _ready(listener, trouble)
            free = _BATCH if places is None else await places()
            if gate is not None and gate.closed:
                await gate.passed()
                continue
            streams = listener.accept(min(free, _BATCH))
        except OSError as error:
            # The connection stays in the kernel's queue. Another try at once would only burn processor time.
            trouble.note(error)
            await trio.sleep(_PAUSE)
            trouble.calm_from(trio.current_time())
        else:
            for stream in streams:
                serve(stream)


async def _ready(listener: SocketListener[_S], trouble: _Trouble) -> None:
    """Wait for a connection. The trouble may end meanwhile."""
    with trio.move_on_at(trouble.over_at) as calm:
        await listener.ready()
    if trio.current_time() >= trouble.over_at:
        trouble.end()
    if calm.cancelled_caught:
        await listener.ready()
