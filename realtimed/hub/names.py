"""Names of channels, and patterns for them: ``*`` stands for any characters or none, everything else for itself.

This is the only matcher: the tables ``[[channels]]`` of the configuration, `watch` and filters use it.

A pattern is cut at its stars into pieces. The first piece has to begin the name, and the last one has to end it. Each
of the others is looked for behind the one before, and its leftmost place is always right, as it leaves the most for the
following pieces: nothing is tried twice. A name has at most 200 characters, and a pattern with more of its own cannot
match: 99 pieces on the longest name take about 10 µs.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from realtimed.errors import RefusedError
from realtimed.text import quoted

__all__ = ["CHANNEL_CHARACTERS", "Marks", "Pattern", "Search", "check_channel_name", "check_pattern"]

CHANNEL_CHARACTERS: Final = r"A-Za-z0-9_\-=@,.;:/"
"""The characters of channel names, as a set in a regular expression."""

_CHANNEL_NAME: Final = re.compile(rf"[{CHANNEL_CHARACTERS}]{{1,200}}")
_PATTERN: Final = re.compile(rf"[{CHANNEL_CHARACTERS}*]{{1,200}}")


def check_channel_name(name: object) -> None:
    """Raise `RefusedError` with the code ``invalid_channel`` if `name` cannot be a channel."""
    if not isinstance(name, str) or _CHANNEL_NAME.fullmatch(name) is None:
        raise RefusedError(
            "invalid_channel",
            f"{quoted(name, 20)} is not a channel name: 1 to 200 characters of A-Z a-z 0-9 _ - = @ , . ; : /",
        )


def check_pattern(pattern: object) -> str:
    """Return `pattern` if a peer may use it; otherwise raise `RefusedError` with the code ``invalid_channel``."""
    if isinstance(pattern, str) and _PATTERN.fullmatch(pattern) is not None:
        return pattern
    raise RefusedError(
        "invalid_channel",
        f"{quoted(pattern)} is not a pattern: 1 to 200 characters of A-Z a-z 0-9 _ - = @ , . ; : / and *",
    )


class Pattern:
    """One pattern, ready to be matched with names.

    A matching name begins with `head` and ends with `tail`. In a pattern without a star `head` is the whole pattern,
    and `tail` is None.
    """

    __slots__ = ("_least", "_middle", "head", "tail", "text")

    # Invariant: `_least` is the number of characters of all pieces. No piece in `_middle` is empty.

    def __init__(self, text: str) -> None:
        pieces = text.split("*")
        self.text = text
        self.head = pieces[0]
        self.tail = pieces[-1] if len(pieces) > 1 else None
        self._middle = [piece for piece in pieces[1:-1] if piece]
        self._least = len(text) - text.count("*")

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches the whole of `name`."""
        tail = self.tail
        if tail is None:
            return name == self.head
        if len(name) < self._least or not name.startswith(self.head) or not name.endswith(tail):
            return False
        at, end = len(self.head), len(name) - len(tail)
        for piece in self._middle:
            at = name.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True


class _Marked:
    """A pattern, and the bits of the names that it matches."""

    __slots__ = ("bits", "pattern")

    def __init__(self, text: str) -> None:
        self.pattern = Pattern(text)
        self.bits = 0


class _Affixes:
    """Patterns by the beginning, or the end, of the names that they match; `lengths` counts these by their lengths."""

    __slots__ = ("groups", "lengths")

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, _Marked]] = {}
        self.lengths: Counter[int] = Counter()

    def add(self, key: str, marked: _Marked) -> None:
        self.groups.setdefault(key, {})[marked.pattern.text] = marked
        self.lengths[len(key)] += 1

    def remove(self, key: str, text: str) -> None:
        group = self.groups[key]
        del group[text]
        if not group:
            del self.groups[key]
        self.lengths[len(key)] -= 1
        if not self.lengths[len(key)]:
            del self.lengths[len(key)]


class Marks:
    """Patterns, each with bits, and the bits of a name: those of all patterns that match it.

    Patterns are found by the beginning of a name, or else by its end. Only patterns with a star at both ends have to be
    tried for every name.
    """

    # Invariants: every pattern in `_marked` has at least one bit. It is in `_exact` if it has no star, else in
    # `_heads` if it has a head, else in `_tails`, under "" if it has no tail either.

    def __init__(self) -> None:
        self._marked: dict[str, _Marked] = {}
        self._exact: dict[str, _Marked] = {}
        self._heads = _Affixes()
        self._tails = _Affixes()

    def __len__(self) -> int:
        """Return the number of patterns."""
        return len(self._marked)

    @property
    def lookups(self) -> int:
        """The number of groups of patterns that `search` looks up: about 0.1 µs each."""
        return len(self._heads.lengths) + len(self._tails.lengths)

    def add(self, text: str, bits: int) -> None:
        """Add bits to a pattern."""
        marked = self._marked.get(text)
        if marked is None:
            marked = self._marked[text] = _Marked(text)
            pattern = marked.pattern
            if pattern.tail is None:
                self._exact[text] = marked
            elif pattern.head:
                self._heads.add(pattern.head, marked)
            else:
                self._tails.add(pattern.tail, marked)
        marked.bits |= bits

    def remove(self, text: str, bits: int) -> None:
        """Remove bits from a pattern; forget it when it has none."""
        marked = self._marked[text]
        marked.bits &= ~bits
        if marked.bits:
            return
        pattern = marked.pattern
        del self._marked[text]
        if pattern.tail is None:
            del self._exact[text]
        elif pattern.head:
            self._heads.remove(pattern.head, text)
        else:
            self._tails.remove(pattern.tail, text)

    def search(self, name: str) -> Search:
        """Begin to look for the bits of a name. A change of the patterns ends the use of a search."""
        candidates: list[_Marked] = []
        for length in self._heads.lengths:
            group = self._heads.groups.get(name[:length])
            if group:
                candidates += group.values()
        for length in self._tails.lengths:
            group = self._tails.groups.get(name[-length:] if length else "")
            if group:
                candidates += group.values()
        exact = self._exact.get(name)
        return Search(name, candidates, exact.bits if exact is not None else 0)


class Search:
    """The search for the bits of one name, in steps. `bits` are those found so far."""

    __slots__ = ("_at", "_candidates", "_name", "bits")

    def __init__(self, name: str, candidates: list[_Marked], bits: int) -> None:
        self._name = name
        self._candidates = candidates
        self._at = 0
        self.bits = bits

    def step(self, budget: int) -> int:
        """Try patterns worth `budget`, and return the rest of it: 0 or less, unless the search is over.

        A pattern costs 4, and 1 for each of its characters: at most 0.1 µs each.
        """
        name, candidates = self._name, self._candidates
        while budget > 0 and self._at < len(candidates):
            marked = candidates[self._at]
            self._at += 1
            budget -= 4
            if marked.bits & ~self.bits:
                budget -= len(marked.pattern.text)
                if marked.pattern.matches(name):
                    self.bits |= marked.bits
        return budget

    @property
    def over(self) -> bool:
        """Whether all patterns have been tried."""
        return self._at == len(self._candidates)
