"""What broadcasts with an idempotency key were answered, so that one who asks again gets the same answer.

A publisher whose connection broke before the answer came does not know whether its message went out. With a key it may
just try again: the first command that arrives is carried out, and those that repeat its key are only answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Final, NamedTuple, TypeAlias

from realtimed.errors import RefusedError
from realtimed.hub.position import Receipt

__all__ = ["KEY_LIMIT", "Answered", "Channels", "checked_key"]

KEY_LIMIT: Final = 200
"""Characters of a key: enough for any identifier, and a bound for what is remembered of it."""

_REMEMBERED: Final = 100_000
"""Keys that are remembered at most. Beyond that the oldest is forgotten before its time."""

_FORGOTTEN_AT_ONCE: Final = 8000
"""Keys forgotten for one new key: some milliseconds. They take more memory than any new key does."""

_KEY_COST: Final = 470
"""Bytes that a key takes beside its text and its names: its places in the table, tuples, a list, a float."""

_RECEIPT_COST: Final = 170
"""Bytes that a receipt takes, its epoch and offset included."""

_PLACE_COST: Final = 16
"""Bytes that a channel and its receipt take as elements of a tuple and a list."""

Channels: TypeAlias = str | tuple[str, ...]
"""A channel, or a list of channels, which is another thing even if it has only one."""


class _Entry(NamedTuple):
    time: float
    receipts: Sequence[Receipt]
    cost: int


class Answered:
    """The receipts of broadcasts that had a key, for `age` seconds and in at most `limit` bytes of memory.

    Beyond the limit the oldest are forgotten first, but never the newest. `clock` returns seconds.
    """

    # Invariants: `_entries`, by channels and key, is in the order of time. `bytes` is the sum of their costs, and
    # `_under_way` has the channels and keys of commands that have begun to publish and not ended.

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

        Raises `RefusedError` for what is no key.
        """
        entry = self._entries.get((channels, checked_key(key)))
        return entry.receipts if entry is not None and entry.time > self._clock() - self.age else None

    def is_under_way(self, channels: Channels, key: str) -> bool:
        """Return whether a command with these channels and this key is just being carried out."""
        return (channels, key) in self._under_way

    def begin(self, channels: Channels, key: str) -> None:
        """Note that a command is being carried out. `end` follows, whatever happens."""
        self._under_way.add((channels, key))

    def end(self, channels: Channels, key: str) -> None:
        """Note that a command is no longer being carried out."""
        self._under_way.discard((channels, key))

    def remember(self, channels: Channels, key: str, receipts: Sequence[Receipt]) -> None:
        """Remember what a command was answered."""
        cost = _cost(channels, key, receipts)
        old = self._entries.pop((channels, key), None)
        self.bytes += cost - (old.cost if old is not None else 0)
        self._entries[channels, key] = _Entry(self._clock(), receipts, cost)
        self.forget()

    def forget(self) -> bool:
        """Forget some of what is too old or too much, but not the newest; return whether there may be more."""
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
    """Return what is a key, or raise `RefusedError`."""
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_LIMIT:
        raise RefusedError("invalid_params", f"an idempotency key is a str of 1 to {KEY_LIMIT} characters")
    return key


def _cost(channels: Channels, key: str, receipts: Sequence[Receipt]) -> int:
    """Return how many bytes of memory an entry takes."""
    names = (channels,) if isinstance(channels, str) else channels
    of_names = sum(map(getsizeof, names))
    return _KEY_COST + getsizeof(key) + of_names + len(names) * _PLACE_COST + len(receipts) * _RECEIPT_COST
