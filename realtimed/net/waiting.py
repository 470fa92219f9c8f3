"""What waits for a peer, as it passes to another process.

Many clients may wait for the same frames. They go over once, and what waits for a client refers to them by number. Of a
replay only those frames go over that are made already; the others go over as positions in a channel's history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from realtimed.hub.channel import Channel
from realtimed.hub.publication import Frames, WireFormat
from realtimed.hub.replays import Replays
from realtimed.net.backlogs import Data
from realtimed.process.portions import HandOverError

__all__ = ["Blobs", "ReceivedBlobs", "Replaying", "Waiting", "WaitingEntry"]

_SHARED, _OWN, _REPLAYED = range(3)
"""Bytes that several clients may wait for; a `bytearray` for one alone; a `memoryview` that replays share."""

Blob: TypeAlias = tuple[int, bytes]
"""One of the kinds above, and the bytes."""


class WaitingEntry(msgspec.Struct, array_like=True, tag=0):
    """Frames that wait, by number, and for how many seconds they do: less than 0 for those that have longer to wait."""

    age: float
    frames: int
    asked: bool


class Replaying(msgspec.Struct, array_like=True, tag=1):
    """A replay: frames that are made, by number; then the publications of a channel from `first` up to `end`."""

    age: float
    frames: list[int]
    channel: str
    epoch: str
    first: int
    end: int


class Waiting(msgspec.Struct, array_like=True):
    """All that waits for one peer; see `realtimed.net.backlog.Backlog`. Ages are in seconds, infinite for never."""

    sent: int
    age: float
    over_age: float
    entries: list[WaitingEntry]
    later: list[WaitingEntry | Replaying] | None = None


class Blobs:
    """Collects the frames that wait, each once. They have to stay as they are meanwhile."""

    def __init__(self) -> None:
        self.all: list[Blob] = []
        self._known: dict[int, int] = {}

    def number(self, data: Data) -> int:
        """Return the number of some frames."""
        number = self._known.get(id(data))
        if number is None:
            number = self._known[id(data)] = len(self.all)
            kind = _SHARED if isinstance(data, bytes) else _OWN if isinstance(data, bytearray) else _REPLAYED
            self.all.append((kind, bytes(data)))
        return number


class ReceivedBlobs:
    """The frames that have come from another process, and the channels that replays go on with."""

    def __init__(self, blobs: Sequence[Blob], replays: Replays, channels: Mapping[str, Channel]) -> None:
        self.replays = replays
        self.channels = channels
        self._blobs = blobs
        self._replayed: dict[int, memoryview] = {}

    def frames(self, number: int, form: WireFormat) -> Data:
        """Return the frames with a number. Raises `HandOverError` if there are none."""
        if not 0 <= number < len(self._blobs):
            raise HandOverError(f"something waits for frames {number}, of {len(self._blobs)}")
        kind, data = self._blobs[number]
        if kind == _OWN:
            return bytearray(data)
        if kind == _SHARED:
            return data
        if number not in self._replayed:
            self._replayed[number] = self.replays.adopt(data, form)
        return self._replayed[number]

    def made(self, numbers: Sequence[int], form: WireFormat) -> list[Frames]:
        """Return the frames of a replay that are made. Raises `HandOverError` if there are none of this kind."""
        found = [self.frames(number, form) for number in numbers]
        if any(isinstance(each, bytearray) for each in found):
            raise HandOverError("a replay has frames that belong to one client alone")
        return [each for each in found if not isinstance(each, bytearray)]
