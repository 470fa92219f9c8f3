"""What a connection has at every stage of its life: a stream, and a boundary around each call into it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import trio

from realtimed.process.logs import Event
from realtimed.websocket.stream import ClientStream

__all__ = ["Connection"]

log = logging.getLogger(__name__)


class Connection(ABC):
    """One client's connection, to the watcher and to its stream. It has an `id`, and owns its `stream`."""

    __slots__ = ("_hung_up", "id", "stream")

    # Invariant: `_hung_up` says that the kernel has reported an end of file, which stands behind all bytes.

    def __init__(self, id: str, stream: ClientStream) -> None:
        self.id = id
        self.stream = stream
        self._hung_up = False

    def readable(self, *, hung_up: bool = False) -> None:
        """See `realtimed.net.watcher.Reader`."""
        self._hung_up = self._hung_up or hung_up
        self.guard(self._read)

    def writable(self) -> None:
        """See `realtimed.net.watcher.Reader`."""
        self.stream.send_more()

    def guard(self, step: Callable[[], object]) -> None:
        """See `realtimed.websocket.stream.ClientOwner`. This is the exception boundary of the connection."""
        try:
            step()
        except Exception:
            log.exception(Event("internal error", client=self.id))
            self.over()

    def _receive(self) -> bytes | None:
        """Return what has arrived, b"" if the peer has hung up or reset the connection, or None if nothing has."""
        try:
            return self.stream.receive_now()
        except trio.BrokenResourceError:
            return b""

    @abstractmethod
    def _read(self) -> object:
        """Read once: others get their turn before the next time."""

    @abstractmethod
    def over(self) -> None:
        """Shut the stream and forget the connection."""
