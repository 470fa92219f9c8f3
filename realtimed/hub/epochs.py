"""Epochs: which run of a channel's offsets a position belongs to. Pure."""

from __future__ import annotations

import secrets
import zlib
from array import array
from typing import Final, NamedTuple

__all__ = ["EpochState", "Epochs"]

_GROUPS: Final = 2**18
"""Groups of channel names, by their hash. Each group takes 4 bytes."""


class EpochState(NamedTuple):
    """What another process needs in order to go on: see `Epochs`."""

    run: str
    unique: int
    forgotten: bytes


class Epochs:
    """The epochs of channels whose offsets are counted here."""

    # Invariant: `_forgotten` says for each group of names how many of its channels have been forgotten that had a
    # publication.

    def __init__(self) -> None:
        self._run = secrets.token_hex(4)
        self._forgotten = array("I", bytes(4 * _GROUPS))
        self._unique = 0

    def of(self, name: str) -> str:
        """Return the epoch of a channel that begins at offset 0 now.

        No publication of another run of the daemon has it, and none of this channel before it was forgotten. As long as
        nothing is published on a channel its epoch stays the same, so it can be forgotten without harm. Otherwise
        clients that come and go could fill the memory with channels that nobody publishes on, or push those of other
        clients out of it.
        """
        return f"{self._run}{self._forgotten[_group(name)]:x}"

    def unique(self) -> str:
        """Return an epoch that no other publication has: for a channel that is forgotten with its only one."""
        self._unique += 1
        return f"{self._run}x{self._unique:x}"

    def end(self, name: str) -> None:
        """Record that a channel with publications is forgotten: if it comes back it gets another epoch."""
        self._forgotten[_group(name)] += 1

    def state(self) -> EpochState:
        """Return what another process needs in order to go on."""
        return EpochState(self._run, self._unique, self._forgotten.tobytes())

    def go_on_from(self, state: EpochState) -> None:
        """Go on where another process has ended. Raises `ValueError` for what it cannot have been."""
        forgotten = array("I", state.forgotten)
        if len(forgotten) != _GROUPS:
            raise ValueError(f"{len(forgotten)} groups of names in place of {_GROUPS}")
        self._run, self._unique, self._forgotten = state.run, state.unique, forgotten


def _group(name: str) -> int:
    """Return the group of a name: the same one in every process, as Python's `hash` is not."""
    return zlib.crc32(name.encode()) % _GROUPS
