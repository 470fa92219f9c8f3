"""The receipts of broadcasts that had an idempotency key. A broadcast that repeats a key gets the same receipts.

A publisher whose connection broke before the answer came does not know whether its message was published. With a key it
may try again: the daemon carries out the first command, and only answers those that repeat its key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from sys import getsizeof
from typing import Final, NamedTuple, TypeAlias

from realtimed.errors import RefusedError
from realtimed.hub.position import Receipt

__all__ = ["KEY_LIMIT", "Channels", "KeyedReceipts", "Known", "checked_key"]

KEY_LIMIT: Final = 200
"""Characters of a key: enough for any identifier, and a bound on the memory that a key takes."""

_REMEMBERED: Final = 100_000
"""Keys that are remembered at most. Beyond that the oldest is forgotten, however young it is."""

_FORGOTTEN_AT_ONCE: Final = 8000
"""Keys that may be forgotten when a new one comes: some milliseconds. They take more memory than any new key does."""

_KEY_COST: Final = 470
"""Bytes that a key takes beside its text and its channels' names: its place in the table, tuples, a list, a float."""

_RECEIPT_COST: Final = 170
"""Bytes that a receipt takes, its epoch and offset included."""

_PLACE_COST: Final = 16
"""Bytes that a channel and its receipt take as elements of a tuple and a list."""

Channels: TypeAlias = str | tuple[str, ...]
"""A channel, or a list of channels. A list of one channel has keys of its own."""


class Known(NamedTuple):
    """A command with a key: its time by the clock, and its receipts."""

    channels: Channels
    key: str
    time: float
    receipts: Sequence[Receipt]


class _Entry(NamedTuple):
    time: float
    receipts: Sequence[Receipt]
    cost: int


class KeyedReceipts:
    """The receipts of broadcasts that had a key, for `age` seconds and in at most `limit` bytes of memory.

    Beyond the limit the oldest are forgotten first, but never the newest. `clock` returns seconds.
    """

    # Invariants: `_entries`, by channels and key, is in the order of time. `bytes` is the sum of the entries' costs.
    # `_under_way` has the channels and keys of commands that have begun to publish and have not ended.

    def __init__(self, age: float, clock: Callable[[], float], limit: int = 2**63) -> None:
        self.age = age
        self.limit = limit
        self.bytes = 0
        self._clock = clock
        self._entries: OrderedDict[tuple[Channels, str], _Entry] = OrderedDict()
        self._under_way: set[tuple[Channels, str]] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, channels: Channels, key: object) -> Sequence[Receipt] | None:
        """Return the receipts of the command with these channels and this key, or None if it is new.

        Raises `RefusedError` if `key` is not a key.
        """
        entry = self._entries.get((channels, checked_key(key)))
        return entry.receipts if entry is not None and entry.time > self._clock() - self.age else None

    def is_under_way(self, channels: Channels, key: str) -> bool:
        """Return whether a command with these channels and this key is being carried out."""
        return (channels, key) in self._under_way

    def begin(self, channels: Channels, key: str) -> None:
        """Record that a command is being carried out. The caller has to call `end` afterwards, whatever happens."""
        self._under_way.add((channels, key))

    def end(self, channels: Channels, key: str) -> None:
        """Record that a command is no longer being carried out."""
        self._under_way.discard((channels, key))

    # For another process, which goes on remembering.

    def now(self) -> float:
        """Return the time of the clock."""
        return self._clock()

    def until(self, time: float) -> Iterator[Known]:
        """Yield what is known now and not younger than a time, the oldest first."""
        for (channels, key), entry in list(self._entries.items()):
            if entry.time > time:
                return
            yield Known(channels, key, entry.time, entry.receipts)

    def since(self, time: float) -> list[Known]:
        """Return what is younger than a time, the oldest first."""
        found = []
        for (channels, key), entry in reversed(self._entries.items()):
            if entry.time <= time:
                break
            found.append(Known(channels, key, entry.time, entry.receipts))
        return found[::-1]

    def remember(self, channels: Channels, key: str, receipts: Sequence[Receipt], age: float = 0.0) -> None:
        """Remember the receipts of a command, from now or from `age` seconds ago; then all others have to be older."""
        cost = _cost(channels, key, receipts)
        old = self._entries.pop((channels, key), None)
        self.bytes += cost - (old.cost if old is not None else 0)
        self._entries[channels, key] = _Entry(self._clock() - age, receipts, cost)
        self.forget()

    def forget(self) -> bool:
        """Forget some receipts that are too old or too many, but not the newest; return whether there may be more."""
        oldest = self._clock() - self.age
        for _ in range(_FORGOTTEN_AT_ONCE):
            if len(self._entries) < 2:
                return False
            first = next(iter(self._entries.values()))
            if first.time > oldest and len(self._entries) <= _REMEMBERED and self.bytes <= self.limit:
                return False
            self._entries.popitem(last=False)
            self.bytes -= first.cost
        return True


def checked_key(key: object) -> str:
    """Return `key` if it is a key, or raise `RefusedError`."""
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_LIMIT:
        raise RefusedError("invalid_params", f"an idempotency key is a str of 1 to {KEY_LIMIT} characters")
    return key


def _cost(channels: Channels, key: str, receipts: Sequence[Receipt]) -> int:
    """Return how many bytes of memory an entry takes."""
    names = (channels,) if isinstance(channels, str) else channels
    of_names = sum(map(getsizeof, names))
    return _KEY_COST + getsizeof(key) + of_names + len(names) * _PLACE_COST + len(receipts) * _RECEIPT_COST
