"""A queue that is small while it is short: an empty deque takes 760 bytes, which is half of an idle connection."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, Generic, TypeVar

__all__ = ["Fifo"]

_LONG: Final = 64
"""Items that have gone until the others are moved to the front, once they are the fewer."""

T = TypeVar("T")


class Fifo(Generic[T]):
    """Items in order: appended at the end, removed at the front, in constant time on average."""

    __slots__ = ("_first", "_items")

    # Invariant: the items before the index `_first` have been removed; None stands in their places.

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._first = 0

    def __len__(self) -> int:
        return len(self._items) - self._first

    def __iter__(self) -> Iterator[T]:
        return islice(self._items, self._first, None)

    @property
    def head(self) -> T:
        """The first item. Raises `IndexError` if there is none."""
        item: T = self._items[self._first]
        return item

    @property
    def last(self) -> T:
        """The last item. Raises `IndexError` if there is none."""
        if not self:
            raise IndexError("the queue is empty")
        item: T = self._items[-1]
        return item

    def append(self, item: T) -> None:
        """Add an item at the end."""
        self._items.append(item)

    def popleft(self) -> T:
        """Remove the first item and return it. Raises `IndexError` if there is none."""
        item: T = self._items[self._first]
        self._items[self._first] = None
        self._first += 1
        if self._first >= _LONG and 2 * self._first >= len(self._items):
            del self._items[: self._first]
            self._first = 0
        elif self._first == len(self._items):
            self._items.clear()
            self._first = 0
        return item
