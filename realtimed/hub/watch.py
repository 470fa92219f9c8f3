"""Watching channels by pattern: connections that see publications pass, and are not subscribers.

A watcher changes nothing for others: no channel exists because of it, and it does not count as a recipient. Without
watchers, a round and a publication to nobody cost one look at an empty dict more, and other publications nothing.

`Watchers.show` queues the publications of a round, and `Watchers.step` works the queue off in slices that are short
whatever the patterns are. What is queued holds publishers back like what waits for a round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from realtimed.errors import RefusedError
from realtimed.hub.names import Marks, Pattern, Search, check_pattern
from realtimed.hub.publication import Publication, WireFormat

__all__ = ["Watcher", "Watchers"]

_LIMIT: Final = 16
"""Watchers at a time: each costs one write a slice."""

_SLICE: Final = 5000
"""The budget of one step, in units of about 0.1 µs."""

_SHOWN_COST: Final = 25
"""The cost of a publication in these units, whether it is watched or not."""

_WRITTEN_COST: Final = 3
_BYTES_A_UNIT: Final = 256
"""The cost of a publication for each watcher that sees it: `_WRITTEN_COST`, and a unit for each `_BYTES_A_UNIT`."""

_QUEUED_BYTES: Final = 256
"""Memory of a publication in the queue beside its message."""

_NAMES_KNOWN: Final = 4096
"""Names of channels whose watchers are remembered: about 1 MB if all names have the greatest length."""


class Watcher(Protocol):
    """What is known of a watcher here."""

    @property
    def form(self) -> WireFormat:
        """How publications look to this watcher."""

    def write(self, data: bytes) -> None:
        """Send or keep `data`. Never waits."""


class _Watching:
    """One watcher: its bit, its patterns, and the number of the first publication that it may see."""

    __slots__ = ("bit", "first", "patterns")

    def __init__(self, bit: int, first: int) -> None:
        self.bit = bit
        self.first = first
        self.patterns: set[str] = set()


class Watchers:
    """All watchers with their patterns, and the queue of what is still to be shown to them.

    `max_patterns` may change at any time: it is the limit for what is added from then on.
    """

    # Invariants:
    # - `members` has every watcher that has a pattern, each with a bit of its own.
    # - In `_marks` every pattern has the bits of its watchers, except for the changes in `_changes`, which wait for the
    #   end of `_search`. That is the search for the name of the first publication in `_queue`, as far as it has come.
    # - `_known` has the bits of some names, as they follow from `_marks`.
    # - The first in the queue is publication number `_begin`. `queued_bytes` is the memory of the queue, which is empty
    #   if there are no watchers.

    def __init__(self, *, max_patterns: int) -> None:
        self.max_patterns = max_patterns
        self.queued_bytes = 0
        self.members: dict[Watcher, _Watching] = {}
        self._marks = Marks()
        self._known: dict[str, int] = {}
        self._search: Search | None = None
        self._changes: list[tuple[Callable[[str, int], None], str, int]] = []
        self._queue: deque[Publication] = deque()
        self._begin = 0

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, watcher: Watcher) -> bool:
        return watcher in self.members

    @property
    def idle(self) -> bool:
        """Whether everything has been shown."""
        return not self._queue

    def patterns(self, watcher: Watcher) -> list[str]:
        """Return what a watcher watches."""
        watching = self.members.get(watcher)
        return list(watching.patterns) if watching is not None else []

    def resume(self, watcher: Watcher, patterns: Iterable[str]) -> None:
        """Go on with what a watcher has watched in another process, whatever the limits are."""
        for pattern in patterns:
            watching = self.members.setdefault(watcher, _Watching(self._free_bit(), 0))
            watching.patterns.add(pattern)
            self._change(self._marks.add, pattern, watching.bit)

    def add(self, watcher: Watcher, pattern: object) -> None:
        """Show `watcher` what is published on matching channels from now on.

        If it has other patterns already, it also sees what is queued.

        Raises `RefusedError` with the code ``invalid_channel``, ``too_many_channels`` or ``too_many_watchers``.
        """
        pattern = check_pattern(pattern)
        watching = self.members.get(watcher)
        if watching is None:
            if len(self.members) >= _LIMIT:
                raise RefusedError("too_many_watchers", f"there are {_LIMIT} connections that watch already, the limit")
            watching = _Watching(self._free_bit(), self._begin + len(self._queue))
        elif pattern in watching.patterns:
            return
        if len(watching.patterns) >= self.max_patterns:
            raise RefusedError(
                "too_many_channels", f"the limit, max-channels, is {self.max_patterns} patterns a connection"
            )
        self.members[watcher] = watching
        watching.patterns.add(pattern)
        self._change(self._marks.add, pattern, watching.bit)

    def remove(self, watcher: Watcher, pattern: object) -> bool:
        """Remove a pattern from a watcher. Returns whether the watcher had it.

        Raises `RefusedError` with the code ``invalid_channel`` if `pattern` cannot be one.
        """
        pattern = check_pattern(pattern)
        watching = self.members.get(watcher)
        if watching is None or pattern not in watching.patterns:
            return False
        if len(watching.patterns) == 1:
            self.leave(watcher)
            return True
        watching.patterns.remove(pattern)
        self._change(self._marks.remove, pattern, watching.bit)
        return True

    def leave(self, watcher: Watcher) -> None:
        """Remove a watcher, if it is one."""
        watching = self.members.pop(watcher, None)
        if watching is None:
            return
        for pattern in watching.patterns:
            self._change(self._marks.remove, pattern, watching.bit)
        if not self.members:
            self._clear()

    def show(self, publications: Iterable[Publication]) -> None:
        """Queue publications for watchers. Repeat `step` until all have been shown."""
        if not self.members:
            return
        for each in publications:
            # A copy: the formats that the original has for subscribers need not stay in memory as well.
            self._queue.append(Publication(each.channel, each.payload, each.text, each.offset, each.time))
            self.queued_bytes += len(each.payload) + _QUEUED_BYTES

    def step(self, budget: int = _SLICE) -> bool:
        """Show some of the queue, worth about `budget` units of 0.1 µs; return whether there is more.

        The order is kept for every watcher. The last publication of a step may be as large as a message can be.
        """
        seen: list[tuple[int, int, Publication]] = []
        while budget > 0 and self._queue:
            publication = self._queue[0]
            bits = self._known.get(publication.channel)
            if bits is None:
                bits, budget = self._look_for(publication.channel, budget)
                if bits is None:
                    break
            self._queue.popleft()
            self.queued_bytes -= len(publication.payload) + _QUEUED_BYTES
            budget -= _SHOWN_COST
            if bits:
                seen.append((self._begin, bits, publication))
                budget -= bits.bit_count() * (_WRITTEN_COST + len(publication.payload) // _BYTES_A_UNIT)
            self._begin += 1
        if seen:
            self._write(seen)
        return bool(self._queue)

    def abandon(self) -> list[Watcher]:
        """Give up the queue, after a fault; return all watchers, which may have missed some of it."""
        self._clear()
        return list(self.members)

    def _look_for(self, name: str, budget: int) -> tuple[int | None, int]:
        """Return the bits of those who watch `name`, None if they are not known yet, and the rest of the budget."""
        search = self._search
        if search is None:
            search = self._search = self._marks.search(name)
            budget -= self._marks.lookups
        budget = search.step(budget)
        if not search.over:
            return None, budget
        bits = search.bits
        if self._changes:
            bits &= ~self._no_longer_watching(name, bits)
            self._end_search()
        else:
            self._search = None
            if len(self._known) >= _NAMES_KNOWN:
                self._known.clear()
            self._known[name] = bits
        return bits, budget

    def _no_longer_watching(self, name: str, bits: int) -> int:
        """Return those of `bits` whose watchers have stopped watching `name` during the search for it."""
        changed = 0
        for _, _, bit in self._changes:
            changed |= bit
        return sum(
            each.bit
            for each in self.members.values()
            if each.bit & bits & changed and not any(Pattern(text).matches(name) for text in each.patterns)
        )

    def _write(self, seen: Sequence[tuple[int, int, Publication]]) -> None:
        """Write to each watcher what it watches of `seen`; watchers that see the same get the same bytes."""
        joined: dict[tuple[WireFormat, int], bytes] = {}
        for watcher, watching in list(self.members.items()):
            bit, first = watching.bit, watching.first
            # The publications it sees, as a number with a digit for each: a key that is quickly made.
            chosen = [bool(bits & bit) and number >= first for number, bits, _ in seen]
            if not any(chosen):
                continue
            key = watcher.form, int.from_bytes(bytes(chosen), "big")
            data = joined.get(key)
            if data is None:
                form = watcher.form
                parts = [each.encoded(form) for (_, _, each), sees in zip(seen, chosen, strict=True) if sees]
                data = joined[key] = b"".join(parts)
            watcher.write(data)

    def _free_bit(self) -> int:
        used = sum(each.bit for each in self.members.values())
        return ~used & (used + 1)

    def _change(self, change: Callable[[str, int], None], pattern: str, bit: int) -> None:
        """Add a pattern to `_marks` or remove it: now, or at the end of the search that is under way.

        Otherwise a watcher that changes its patterns all the time would keep every long search from ending.
        """
        self._changes.append((change, pattern, bit))
        if self._search is None:
            self._end_search()

    def _end_search(self) -> None:
        self._search = None
        for change, pattern, bit in self._changes:
            change(pattern, bit)
        self._changes.clear()
        self._known.clear()

    def _clear(self) -> None:
        self._begin += len(self._queue)
        self._queue.clear()
        self.queued_bytes = 0
        self._end_search()
