"""Frames on their way to clients that come back: a piece at a time, and many who missed the same share the bytes.

A long replay is neither made nor sent in one go: its frames are made piece by piece, as their client reads.

Everyone comes back at the same time when a network or a proxy fails, and has missed much the same. A piece may wait for
its client to read; if each had frames of its own, five thousand clients would need five thousand times the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Final
from weakref import ref

from realtimed.frames import Frame, Publication, WireFormat

__all__ = ["Pieces", "Replays"]

_PIECE_BYTES: Final = 32 * 2**10
_PIECE_FRAMES: Final = 256
"""With small messages, making so many frames takes a millisecond."""

_SHARED_FROM: Final = 2**10
"""Bytes of a message from which on its frame is shared. What keeps account of a shared one takes some 400 bytes."""

_Key = tuple[str, int, WireFormat]


class Pieces:
    """Frames, taken in pieces."""

    __slots__ = ("_frames", "_next")

    # Invariant: `_next` is the next frame, made already, or None if there is none.

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames = iter(frames)
        self._next = next(self._frames, None)

    def more(self) -> bool:
        """Return whether there are any left."""
        return self._next is not None

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self._next) is not None:
            self._next = next(self._frames, None)
            yield frame

    def take(self) -> list[Frame]:
        """Return the next piece: at least one frame, if there is one."""
        piece: list[Frame] = []
        size = 0
        for frame in self:
            piece.append(frame)
            size += len(frame)
            if size >= _PIECE_BYTES or len(piece) == _PIECE_FRAMES:
                break
        return piece

    def extend(self, frames: Iterable[Frame]) -> None:
        """Let more follow, while there are any left."""
        self._frames = chain(self._frames, frames)


class Replays:
    """All frames that replays share; `bytes` is what they take together."""

    # Invariant: `_frames` finds each shared frame that somebody waits for, by the epoch and offset of its publication
    # and by its format. A shared frame is a memoryview, since there are no weak references to bytes.

    def __init__(self) -> None:
        self.bytes = 0
        self._frames: dict[_Key, ref[memoryview]] = {}

    def frames(self, epoch: str, missed: Iterable[Publication], form: WireFormat) -> Iterator[Frame]:
        """Yield the frames of publications on a channel in this epoch; those that are shared are memoryviews."""
        for publication in missed:
            if len(publication.payload) < _SHARED_FROM:
                yield publication.encoded(form)
            else:
                yield self._shared((epoch, publication.offset, form), publication)

    def _shared(self, key: _Key, publication: Publication) -> memoryview:
        known = self._frames.get(key)
        frame = known() if known is not None else None
        if frame is None:
            frame = memoryview(publication.encoded(key[2]))
            self._frames[key] = ref(frame, partial(self._drop, key, len(frame)))
            self.bytes += len(frame)
        return frame

    def _drop(self, key: _Key, size: int, _: object) -> None:
        """Take note that nobody waits for a frame any more."""
        self.bytes -= size
        del self._frames[key]
