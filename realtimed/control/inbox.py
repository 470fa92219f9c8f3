"""What has come in on a connection and is not carried out yet. Pure: it knows no socket."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from sys import getsizeof
from typing import Final

from realtimed.control.wire import BadBytesError, Decoder, Message
from realtimed.errors import ProtocolError

__all__ = ["Inbox"]

_DECODED_AT_ONCE: Final = 16 * 2**10
"""Bytes that are decoded before the commands in them are carried out: decoded they may take many times as much."""


class Inbox:
    """Bytes as they come in, and the commands in them as they are wanted.

    `limit` is the largest command that is taken, in bytes, and may change at any time.
    """

    # Invariant: first come the `_messages`, then those in `_rest`. Behind `_bad` nothing is read. `_weight` is what the
    # messages take, or -1 if that is not known.

    def __init__(self, limit: int) -> None:
        self._decoder = Decoder(limit)
        self._rest = b""
        self._messages: deque[Message] = deque()
        self._weight = 0
        self._bad: BadBytesError | None = None

    @property
    def limit(self) -> int:
        """The largest command that is taken, in bytes."""
        return self._decoder.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        if limit != self._decoder.limit:
            self._decoder.limit = limit

    @property
    def mid_message(self) -> bool:
        """Whether a command has begun to arrive and not ended."""
        return self._decoder.mid_message

    @property
    def waiting(self) -> bool:
        """Whether there is something left to be carried out or decoded."""
        return bool(self._messages or self._rest or self._bad is not None)

    @property
    def held(self) -> int:
        """How many bytes of memory this takes. The first to ask looks at all that waits."""
        if self._weight < 0:
            self._weight = _weight(self._messages)
        return self._decoder.held + len(self._rest) + self._weight

    def put(self, data: bytes) -> None:
        """Take what has come in. Nothing may be waiting."""
        assert not self.waiting, "one read is worked off before the next"
        self._rest = data

    def next(self) -> Message | None:
        """Return the next command, or None if there is no other yet.

        Raises `ProtocolError` for bytes that are not MessagePack-RPC, after all that came before them.
        """
        while not self._messages:
            if self._bad is not None:
                bad, self._bad = self._bad, None
                self._rest = b""
                raise ProtocolError(str(bad))
            if not self._rest:
                return None
            data, self._rest = self._rest[:_DECODED_AT_ONCE], self._rest[_DECODED_AT_ONCE:]
            try:
                self._messages.extend(self._decoder.feed(data))
            except BadBytesError as error:
                self._messages.extend(error.messages)
                error.messages = []
                self._bad = error
        self._weight = -1 if len(self._messages) > 1 else 0
        return self._messages.popleft()


def _weight(messages: Iterable[object]) -> int:
    """Return how many bytes of memory messages take, with all that is in them."""
    total = 0
    stack = list(messages)
    while stack:
        value = stack.pop()
        total += getsizeof(value)
        if isinstance(value, (list, tuple)):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value.keys())
            stack.extend(value.values())
    return total
