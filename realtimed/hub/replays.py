"""Frames on their way to clients that come back: a piece at a time, and many who missed the same share the bytes.

A long replay is neither made nor sent in one go: its frames are made piece by piece, as their client reads.

Everyone comes back at the same time when a network or a proxy fails, and has missed much the same. A piece may wait for
its client to read; if each had frames of its own, five thousand clients would need five thousand times the memory. For
the same reason a replay keeps no list of what it has still to send: it reads it from the channel's history, which
retains what a replay may need (see `realtimed.hub.ring.Ring`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final
from weakref import ref

from realtimed.hub.history import History
from realtimed.hub.publication import Frame, Publication, WireFormat
from realtimed.hub.ring import Kept, Ring

__all__ = ["Missed", "Pieces", "Replay", "Replays"]

_PIECE_BYTES: Final = 32 * 2**10
_PIECE_FRAMES: Final = 256
"""With small messages, making so many frames takes a millisecond."""

_SHARED_FROM: Final = 2**10
"""Bytes of a message from which on its frame is shared."""

_SHARED_COST: Final = 400
"""Bytes that a shared frame takes beside its own: a memoryview, a weak reference with its callback, a key."""

_Key = tuple[str, str, int, WireFormat]


class Missed:
    """Consecutive publications of a channel out of its history, `count` of them, the first with the offset `first`.

    They are made when they are asked for: a long history of many is not made at once. As soon as anything else happens,
    they are only there for a `Replay`.
    """

    __slots__ = ("channel", "count", "epoch", "first", "ring")

    def __init__(self, channel: str, epoch: str, ring: Ring | None, first: int, count: int) -> None:
        self.channel = channel
        self.epoch = epoch
        self.ring = ring
        self.first = first
        self.count = count if ring is not None else 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Publication]:
        return map(self.publication, range(self.first, self.first + self.count))

    def publication(self, offset: int) -> Publication:
        """Return the publication with this offset."""
        assert self.ring is not None, "there are none without a ring"
        payload, time = self.ring.at(offset)
        return Publication(self.channel, bytes(payload), isinstance(payload, bytes), offset, time)

    def payloads(self) -> list[Kept]:
        """Return all payloads, oldest first, as they are kept: they stay however long that takes."""
        return self.ring.payloads[self._places()] if self.ring is not None else []

    def times(self) -> Sequence[int]:
        """Return all times of publication, in milliseconds since 1970, in the order of `payloads`."""
        return self.ring.published[self._places()] if self.ring is not None else ()

    def _places(self) -> slice:
        """Return where these publications are in the columns of their ring."""
        assert self.ring is not None, "there are none without a ring"
        start = self.first - self.ring.first + self.ring.dropped
        return slice(start, start + self.count)


class Pieces:
    """Frames, taken in pieces. They end when the last has been taken, or with `close`."""

    __slots__ = ("_frames", "_next", "_replay")

    # Invariant: `_next` is the next frame, made already, or None if there is none.

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._replay = frames if isinstance(frames, Replay) else None
        self._frames = iter(frames)
        self._next = next(self._frames, None)

    def more(self) -> bool:
        """Return whether there are any left."""
        return self._next is not None

    @property
    def retained(self) -> int:
        """How many bytes of memory may be kept for this alone."""
        return self._replay.retained if self._replay is not None else 0

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

    def close(self) -> None:
        """Take no more."""
        self._next = None
        self._frames = iter(())
        if self._replay is not None:
            self._replay.close()


class Replay(Iterator[Frame]):
    """Frames that answer a client, and then what it has missed. It ends with the last of them, or with `close`.

    What is to come stays as it is, whatever the history drops meanwhile.
    """

    __slots__ = ("_answers", "_end", "_form", "_missed", "_next", "_replays")

    # Invariant: while `_next` is below `_end`, this is a reader of its ring.

    def __init__(self, replays: Replays, answers: Iterable[Frame], missed: Missed, form: WireFormat) -> None:
        self._replays = replays
        self._missed = missed
        self._form = form
        self._answers = iter(answers)
        self._next = missed.first
        self._end = missed.first + len(missed)
        if missed.ring is not None and len(missed):
            replays.history.begin_reading(missed.ring, self)

    def __next__(self) -> Frame:
        answer = next(self._answers, None)
        if answer is not None:
            return answer
        if self._next >= self._end:
            raise StopIteration
        frame = self._replays.frame(self._missed.epoch, self._missed.publication(self._next), self._form)
        self._next += 1
        if self._next == self._end:
            self.close()
        return frame

    @property
    def retained(self) -> int:
        """How many bytes are retained by this and others that read the same history."""
        return self._missed.ring.retained if self._missed.ring is not None and self._next < self._end else 0

    def close(self) -> None:
        """Let go of what is still to come."""
        self._end = self._next
        self._answers = iter(())
        if self._missed.ring is not None:
            self._replays.close(self, self._missed.ring)


class Replays:
    """All replays: the frames that they share, and what the history retains for them."""

    # Invariants: `_frames` finds each shared frame that somebody waits for, by the epoch and offset of its publication
    # and by its format. A shared frame is a memoryview, since there are no weak references to bytes. `shared` is what
    # they take together.

    def __init__(self, history: History) -> None:
        self.history = history
        self.freed: Callable[[], object] = lambda: None
        """Called when fewer bytes are taken than before. It returns at once."""
        self.shared = 0
        self._frames: dict[_Key, ref[memoryview]] = {}

    @property
    def bytes(self) -> int:
        """How many bytes of memory all replays together take, beside what waits for each client alone."""
        return self.shared + self.history.retained

    def close(self, replay: Replay, ring: Ring) -> None:
        """Retain nothing of a ring for a replay any more."""
        self.history.end_reading(ring, replay)
        self.freed()

    def replay(self, answers: Sequence[Frame], missed: Missed, form: WireFormat) -> Iterable[Frame]:
        """Return the answers, and behind them the frames of what was missed; those that are shared are memoryviews."""
        return Replay(self, answers, missed, form) if missed else answers

    def frame(self, epoch: str, publication: Publication, form: WireFormat) -> Frame:
        """Return the frame of a publication in this epoch."""
        if len(publication.payload) < _SHARED_FROM:
            return publication.encoded(form)
        key = publication.channel, epoch, publication.offset, form
        known = self._frames.get(key)
        frame = known() if known is not None else None
        if frame is None:
            frame = memoryview(publication.encoded(form))
            size = len(frame) + _SHARED_COST
            self._frames[key] = ref(frame, partial(self._drop, key, size))
            self.shared += size
        return frame

    def _drop(self, key: _Key, size: int, _: object) -> None:
        """Account for a frame that nobody waits for any more."""
        self.shared -= size
        del self._frames[key]
        self.freed()
