"""A walk over a MessagePack value finds where it ends, how many values it contains, and how deep they are nested.

The walk reads only headers and keeps one number for each level. It goes on where it stopped when more bytes come.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple, Self

__all__ = ["DEPTH_LIMIT", "TOO_DEEP", "Walker", "WalkerState"]

DEPTH_LIMIT: Final = 32
"""How deep arrays and maps may be nested, counting the outermost. Empty ones do not count."""

TOO_DEEP: Final = (
    f"nested too deeply, or not MessagePack: arrays and maps of a command may be nested {DEPTH_LIMIT} deep"
)

# Tables by the first byte of a value. `_SIZES` has the length of a value that this byte alone determines and that
# contains no other values, else 0; one byte of a fixext is its type. `_WIDTHS` has how many bytes of length follow.
_FIXED: Final = {
    0xC0: 1, 0xC2: 1, 0xC3: 1,  # nil, false, true
    0xCA: 5, 0xCB: 9,  # float
    0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9,  # uint
    0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9,  # int
    0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18,  # fixext
    0x80: 1, 0x90: 1,  # fixmap and fixarray without anything in them
    **dict.fromkeys([*range(0x80), *range(0xE0, 0x100)], 1),  # fixint
    **{0xA0 + length: 1 + length for length in range(0x20)},  # fixstr
}  # fmt: skip
_SIZES: Final = tuple(_FIXED.get(first, 0) for first in range(0x100))
_WIDTHS: Final = {
    **dict.fromkeys([*range(0x81, 0x90), *range(0x91, 0xA0)], 0),  # fixmap and fixarray with something in them
    0xC4: 1, 0xC5: 2, 0xC6: 4,  # bin
    0xC7: 1, 0xC8: 2, 0xC9: 4,  # ext, with one more byte for its type
    0xD9: 1, 0xDA: 2, 0xDB: 4,  # str
    0xDC: 2, 0xDD: 4,  # array
    0xDE: 2, 0xDF: 4,  # map
}  # fmt: skip
_NO_MEANING: Final = 0xC1
_MAPS: Final = frozenset([*range(0x81, 0x90), 0xDE, 0xDF])
_CONTAINERS: Final = _MAPS.union(range(0x91, 0xA0), [0xDC, 0xDD])
_EXTENSIONS: Final = frozenset([0xC7, 0xC8, 0xC9])

_number: Final = partial(int.from_bytes, byteorder="big")


class WalkerState(NamedTuple):
    """Where a walk stands; see the invariants of `Walker`."""

    values: int
    missing: int
    outer: list[int]
    payload: int
    cut: bytes
    passed: int


class Walker:
    """Walks over the headers of one MessagePack value without keeping it, to find where it ends and what it contains.

    `values` is how many values have come, counting the outermost, and `owed` how many more have been announced. `size`
    is how many bytes the whole has at least: each value that is owed has one or more. `wrong` says what is wrong with
    the value at which the walk stopped; "" if nothing is. `done` is set when the walk has reached the end.
    """

    # Invariants: `_missing` is how many values are still to come in the innermost incomplete array or map, and `_outer`
    # has the same number for each array or map around it, outermost first. `_payload` is how many bytes are still to
    # come of the last value, and `_cut` is the beginning of a header that has not come in full: at most one of them is
    # set. `_passed` is how many bytes the walk has passed.

    __slots__ = ("_cut", "_missing", "_outer", "_passed", "_payload", "done", "owed", "size", "values", "wrong")

    def __init__(self) -> None:
        self.values = 0
        self.owed = 1
        self.size = 1
        self.wrong = ""
        self.done = False
        self._missing = 1
        self._outer: list[int] = []
        self._payload = 0
        self._cut = b""
        self._passed = 0

    def state(self) -> WalkerState:
        """Return where the walk stands, for another process."""
        return WalkerState(self.values, self._missing, list(self._outer), self._payload, self._cut, self._passed)

    @classmethod
    def resumed(cls, state: WalkerState) -> Self:
        """Return a walk that stands where one of another process has stood. It was not done."""
        walker = cls()
        walker.values, walker._missing, walker._outer = state.values, state.missing, state.outer
        walker._payload, walker._cut, walker._passed = state.payload, state.cut, state.passed
        walker.owed = state.missing + sum(state.outer)
        walker.size = state.passed + state.payload + walker.owed
        return walker

    def feed(self, data: bytes, at: int, budget: int) -> int:
        """Walk over `data` from index `at`, over no more than `budget` values; return the index where the walk stopped.

        It stops at the end of the value or of `data`, when the budget is spent, or when something is wrong. Each value
        takes 0.1 to 0.5 µs, however long it is.
        """
        began = at
        if self._cut:
            at = self._mend(data, at)
        if self._payload:
            step = min(self._payload, len(data) - at)
            self._payload -= step
            at += step
        if at < len(data) and self._missing:
            at = self._walk(data, at, budget)
        self._passed += at - began
        self.owed = owed = self._missing + sum(self._outer)
        self.size = size = self._passed + self._payload
        if owed:
            self.size = size + owed
        else:
            self.done = not self._payload
        return at

    def _mend(self, data: bytes, at: int) -> int:
        """Add to a header that arrives in pieces, and walk over it if it is complete; return the index behind it."""
        end = at + _WIDTHS[self._cut[0]] + 1 - len(self._cut)
        head, self._cut = self._cut + data[at:end], b""
        if end > len(data):
            self._cut = head
            return len(data)
        self._walk(head, 0, 1)
        return end

    def _walk(self, data: bytes, at: int, budget: int) -> int:
        # One long function without calls, as every byte that has to be skipped passes here.
        missing, outer, end = self._missing, self._outer, len(data)
        values, stop = self.values, self.values + budget
        while missing and at < end and values < stop:
            first = data[at]
            if size := _SIZES[first]:
                at += size
                missing -= 1
            elif first == _NO_MEANING:
                self.wrong = "not MessagePack: there is the byte 0xc1, which has no meaning"
                break
            else:
                width = _WIDTHS[first]
                behind = at + 1 + width
                if behind > end:
                    self._cut = data[at:]
                    at = end
                    break
                count = first & 0x0F if not width else data[at + 1] if width == 1 else _number(data[at + 1 : behind])
                at = behind
                missing -= 1
                if first not in _CONTAINERS:
                    at += count + (first in _EXTENSIONS)
                elif count:
                    outer.append(missing)
                    missing = 2 * count if first in _MAPS else count
                    if len(outer) > DEPTH_LIMIT:
                        self.wrong = TOO_DEEP
                        stop = 0
            values += 1
            while not missing and outer:
                missing = outer.pop()
        self._missing, self.values = missing, values
        if at > end:
            self._payload = at - end
            at = end
        return at
