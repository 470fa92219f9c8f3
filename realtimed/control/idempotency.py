"""What broadcasts with an idempotency key were answered, so that one who asks again gets the same answer.

A publisher whose connection broke before the answer came does not know whether its message went out. With a key it may
just try again: the first command that arrives is carried out, and those that repeat its key are only answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeAlias

from realtimed.errors import RefusedError
from realtimed.hub import Receipt

__all__ = ["KEY_LIMIT", "Answered"]

KEY_LIMIT: Final = 200
"""Characters of a key: enough for any identifier, and a bound for what is remembered of it."""

_REMEMBERED: Final = 100_000
"""Keys that are remembered at most: some 50 MB. Beyond that the oldest is forgotten before its time."""

_Channels: TypeAlias = str | tuple[str, ...]


class Answered:
    """The receipts of broadcasts that had a key, for `age` seconds; `clock` returns seconds."""

    # Invariant: `_receipts` is in the order of time, and holds (time, receipts) for the channels and the key of each
    # command.

    def __init__(self, age: float, clock: Callable[[], float]) -> None:
        self.age = age
        self._clock = clock
        self._receipts: OrderedDict[tuple[_Channels, str], tuple[float, list[Receipt]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._receipts)

    def once(
        self, channels: _Channels, key: object, publish: Callable[[], list[Receipt]]
    ) -> tuple[list[Receipt], bool]:
        """Return what `publish` returned for these channels and this key, and whether that was earlier.

        Raises `RefusedError` for what is no key, and what `publish` raises; then nothing is remembered.
        """
        if not isinstance(key, str) or not 1 <= len(key) <= KEY_LIMIT:
            raise RefusedError("invalid_params", f"an idempotency key is a str of 1 to {KEY_LIMIT} characters")
        self._forget_old()
        known = self._receipts.get((channels, key))
        if known is not None:
            return known[1], True
        receipts = publish()
        self._receipts[channels, key] = self._clock(), receipts
        if len(self._receipts) > _REMEMBERED:
            self._receipts.popitem(last=False)
        return receipts, False

    def _forget_old(self) -> None:
        oldest = self._clock() - self.age
        while self._receipts and next(iter(self._receipts.values()))[0] <= oldest:
            self._receipts.popitem(last=False)
