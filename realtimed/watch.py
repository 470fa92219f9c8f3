"""Watching channels by pattern: who sees publications pass without being a subscriber.

A watcher changes nothing for anybody else: it makes no channel exist and counts as nobody's recipient. While nobody
watches, a round and a publication to nobody cost one look at an empty dict more, and no other publication anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate
from typing import Final, Protocol

from realtimed.config import CHANNEL_CHARACTERS
from realtimed.errors import RefusedError, quoted
from realtimed.frames import Publication, WireFormat

__all__ = ["Watcher", "Watchers"]

_LIMIT: Final = 16
"""Watchers at a time: each looks at every publication, on the time of all."""

_PATTERN: Final = re.compile(rf"[{CHANNEL_CHARACTERS}*]{{1,200}}")


class Watcher(Protocol):
    """What is known of a watcher here."""

    @property
    def form(self) -> WireFormat:
        """How publications look to this watcher. Never changes."""

    def write(self, data: bytes) -> None:
        """Send or keep `data`. Never waits."""


class Watchers:
    """Who watches which patterns. In a pattern ``*`` stands for any characters, or none; all else for itself."""

    # Invariant: `_matchers` has those who watch something, each with an expression that matches all of its patterns
    # in `_patterns`. fnmatch's expressions match in linear time, since a channel's name has none of its other signs.

    def __init__(self, *, max_patterns: int) -> None:
        self._max_patterns = max_patterns
        self._patterns: dict[Watcher, set[str]] = {}
        self._matchers: dict[Watcher, re.Pattern[str]] = {}

    def __len__(self) -> int:
        return len(self._patterns)

    def add(self, watcher: Watcher, pattern: object) -> None:
        """Let `watcher` see what is published on matching channels from the next round on.

        Raises `RefusedError` with the code ``invalid_channel``, ``too_many_channels`` or ``too_many_watchers``.
        """
        pattern = _checked(pattern)
        patterns = self._patterns.get(watcher, set())
        if pattern in patterns:
            return
        if len(patterns) >= self._max_patterns:
            raise RefusedError(
                "too_many_channels", f"the limit, max-channels, is {self._max_patterns} patterns a connection"
            )
        if watcher not in self._patterns and len(self._patterns) >= _LIMIT:
            raise RefusedError("too_many_watchers", f"there are {_LIMIT} connections that watch already, the limit")
        self._set(watcher, patterns | {pattern})

    def remove(self, watcher: Watcher, pattern: object) -> bool:
        """Let `watcher` no longer see what only `pattern` matches. Returns whether it did watch it.

        Raises `RefusedError` with the code ``invalid_channel`` if it cannot be a pattern.
        """
        pattern = _checked(pattern)
        patterns = self._patterns.get(watcher, set())
        if pattern not in patterns:
            return False
        self._set(watcher, patterns - {pattern})
        return True

    def leave(self, watcher: Watcher) -> None:
        """Forget a watcher, if it is one."""
        self._patterns.pop(watcher, None)
        self._matchers.pop(watcher, None)

    def show(self, publications: Iterable[Publication]) -> None:
        """Hand each watcher those of the publications that it watches."""
        publications = list(publications)
        for watcher, matcher in list(self._matchers.items()):
            data = b"".join([each.encoded(watcher.form) for each in publications if matcher.match(each.channel)])
            if data:
                watcher.write(data)

    def _set(self, watcher: Watcher, patterns: set[str]) -> None:
        if not patterns:
            self.leave(watcher)
            return
        self._patterns[watcher] = patterns
        self._matchers[watcher] = re.compile("|".join(map(translate, sorted(patterns))))


def _checked(pattern: object) -> str:
    """Return what is a pattern, or raise `RefusedError`."""
    if isinstance(pattern, str) and _PATTERN.fullmatch(pattern) is not None:
        return pattern
    raise RefusedError(
        "invalid_channel",
        f"{quoted(pattern)} is not a pattern: 1 to 200 characters of A-Z a-z 0-9 _ - = @ , . ; : / and *",
    )
