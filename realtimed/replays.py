"""Frames on their way to clients that come back: many who missed the same share the bytes.

Everyone comes back at the same time when a network or a proxy fails, and has missed much the same. A long replay waits
for its client to read; if each had frames of its own, fifty clients of a channel with 6 MiB of history would need 300.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final
from weakref import ref

from realtimed.frames import Frame, Publication, WireFormat

__all__ = ["Replays"]

_SHARED_FROM: Final = 64 * 2**10
"""Bytes of messages from which on a replay is shared. A shorter one is in the kernel's hands before the next begins."""

_Key = tuple[str, int, WireFormat]


class Replays:
    """All frames that replays share; `bytes` is what they take together."""

    # Invariant: `_frames` finds each shared frame that somebody waits for, by the epoch and offset of its publication
    # and by its format. A shared frame is a memoryview, since there are no weak references to bytes.

    def __init__(self) -> None:
        self.bytes = 0
        self._frames: dict[_Key, ref[memoryview]] = {}

    def frames(self, epoch: str, missed: Sequence[Publication], form: WireFormat) -> list[Frame]:
        """Return the frames of publications on a channel in this epoch; those that are shared are memoryviews."""
        if sum([len(publication.payload) for publication in missed]) < _SHARED_FROM:
            return [publication.encoded(form) for publication in missed]
        return [self._shared((epoch, publication.offset, form), publication) for publication in missed]

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
