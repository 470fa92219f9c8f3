"""Frames for clients that come back: made a piece at a time, and shared by clients that missed the same.

The frames of a long replay are made piece by piece, as the client reads.

When a network or a proxy fails, all clients come back at the same time and have missed much the same. A piece may wait
for its client to read: with frames of its own for each, five thousand clients would need five thousand times the
memory. For the same reason a replay has no list of what is to come. It reads from the channel's history, which
retains what a replay may need (see `realtimed.hub.ring.Ring`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple
from weakref import ref

from realtimed.hub.channel import Channel
from realtimed.hub.history import History
from realtimed.hub.position import Position
from realtimed.hub.publication import Frames, Publication, WireFormat
from realtimed.hub.ring import Kept, Ring

__all__ = ["Excerpt", "Pieces", "Remaining", "Replay", "Replays", "count_latest", "count_since", "tail"]

_PIECE_BYTES: Final = 32 * 2**10
_PIECE_FRAMES: Final = 256
"""Making this many frames of small messages takes a millisecond."""

_SHARED_FROM: Final = 2**10
"""Bytes of the smallest message whose frame is shared."""

_SHARED_COST: Final = 400
"""Bytes that a shared frame takes beside its own: a memoryview, a weak reference with its callback, a key."""

_Key = tuple[str, str, int, WireFormat]
_Bytes = bytes  # within `Replays` that is the name of a property


class Excerpt:
    """Consecutive publications in a channel's history: `count` of them, the first with the offset `first`.

    They are made lazily: never all of a long history at once. They are only valid until anything else happens, unless
    a `Replay` was begun.
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
        """Return all payloads, oldest first, as they are kept. They stay valid."""
        return self.ring.payloads[self._slots()] if self.ring is not None else []

    def times(self) -> Sequence[int]:
        """Return all times of publication, in milliseconds since 1970, in the order of `payloads`."""
        return self.ring.published[self._slots()] if self.ring is not None else ()

    def _slots(self) -> slice:
        """Return the slots of these publications in the columns of their ring."""
        assert self.ring is not None, "there are none without a ring"
        start = self.first - self.ring.first + self.ring.dropped
        return slice(start, start + self.count)


class Remaining(NamedTuple):
    """What is left of a replay: frames that are made, then publications of a channel from `first` up to `end`."""

    frames: list[Frames]
    channel: str = ""
    epoch: str = ""
    first: int = 0
    end: int = 0


class Pieces:
    """Frames to be taken in pieces. They end with the last one, or with `close`."""

    __slots__ = ("_frames", "_next", "_replay")

    # Invariant: `_next` is the next frame, which is made in advance, or None if there is none.

    def __init__(self, frames: Iterable[Frames]) -> None:
        self._replay = frames if isinstance(frames, Replay) else None
        self._frames = iter(frames)
        self._next = next(self._frames, None)

    def more(self) -> bool:
        """Return whether there are more frames."""
        return self._next is not None

    @property
    def retained(self) -> int:
        """Bytes of memory that may be kept for this alone."""
        return self._replay.retained if self._replay is not None else 0

    def __iter__(self) -> Iterator[Frames]:
        while (frame := self._next) is not None:
            self._next = next(self._frames, None)
            yield frame

    def take(self) -> list[Frames]:
        """Return the next piece: at least one frame, if there is one."""
        piece: list[Frames] = []
        size = 0
        for frame in self:
            piece.append(frame)
            size += len(frame)
            if size >= _PIECE_BYTES or len(piece) == _PIECE_FRAMES:
                break
        return piece

    def remaining(self) -> Remaining:
        """Return what has not been taken. Nothing changes."""
        made = [self._next] if self._next is not None else []
        if self._replay is not None:
            return self._replay.remaining(made)
        others = list(self._frames)
        self._frames = iter(others)
        return Remaining([*made, *others])

    def close(self) -> None:
        """Drop all frames that have not been taken."""
        self._next = None
        self._frames = iter(())
        if self._replay is not None:
            self._replay.close()


class Replay(Iterator[Frames]):
    """The frames of an answer, and then those of what the client has missed. It ends with the last, or with `close`.

    The history may drop publications meanwhile: the replay is still complete.
    """

    __slots__ = ("_answers", "_end", "_form", "_missed", "_next", "_replays")

    # Invariant: while `_next`, the offset of the next frame, is below `_end`, this is a reader of its ring.

    def __init__(self, replays: Replays, answers: Iterable[Frames], missed: Excerpt, form: WireFormat) -> None:
        self._replays = replays
        self._missed = missed
        self._form = form
        self._answers = iter(answers)
        self._next = missed.first
        self._end = missed.first + len(missed)

    def __next__(self) -> Frames:
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

    def remaining(self, made: list[Frames]) -> Remaining:
        """Return what is left. `made` is the frame that was made last, if it has not been taken."""
        missed = self._missed
        if self._next == missed.first:  # it is an answer, and others may follow
            answers = list(self._answers)
            self._answers = iter(answers)
            made = [*made, *answers]
        elif made and self._next < self._end:
            return Remaining([], missed.channel, missed.epoch, self._next - 1, self._end)
        return Remaining(made, missed.channel, missed.epoch, self._next, self._end)

    @property
    def retained(self) -> int:
        """Bytes that are retained for this and all others that read the same history."""
        return self._missed.ring.retained if self._missed.ring is not None and self._next < self._end else 0

    def close(self) -> None:
        """End the replay, and release what was retained for it."""
        self._end = self._next
        self._answers = iter(())
        if self._missed.ring is not None:
            self._replays.close(self, self._missed.ring)


class Replays:
    """All replays: the frames that they share, and what the history retains for them."""

    # Invariants: `_frames` has each shared frame that a client waits for, by channel, epoch, offset and format. Shared
    # frames are memoryviews, since there are no weak references to bytes. `shared` is the memory of all of them.

    def __init__(self, history: History) -> None:
        self.history = history
        self.freed: Callable[[], object] = lambda: None
        """Called when memory has been released. It returns at once."""
        self.shared = 0
        self._frames: dict[_Key, ref[memoryview]] = {}
        self._adopted = 0

    @property
    def bytes(self) -> int:
        """Bytes of memory that all replays together take, beside what waits for each client alone."""
        return self.shared + self.history.retained

    def close(self, replay: Replay, ring: Ring) -> None:
        """Release what was retained of a ring for a replay."""
        self.history.end_reading(ring, replay)
        self.freed()

    def replay(self, answers: Sequence[Frames], missed: Excerpt, form: WireFormat) -> Iterable[Frames]:
        """Return the answers, and behind them the frames of what was missed; the shared ones are memoryviews."""
        if not missed:
            return answers
        replay = Replay(self, answers, missed, form)
        if missed.ring is not None:
            self.history.begin_reading(missed.ring, replay)
        return replay

    def resume(self, remaining: Remaining, channel: Channel | None, form: WireFormat) -> Iterable[Frames] | None:
        """Return what remains of a replay of another process; None if the history of this one has not all of it."""
        if remaining.first >= remaining.end:
            return remaining.frames
        if channel is None or channel.ring is None or channel.epoch != remaining.epoch:
            return None
        count = remaining.end - remaining.first
        missed = Excerpt(channel.name, channel.epoch, channel.ring, remaining.first, count)
        replay = Replay(self, remaining.frames, missed, form)
        return replay if self.history.resume_reading(channel.ring, replay, remaining.first, remaining.end) else None

    def adopt(self, data: _Bytes, form: WireFormat) -> memoryview:
        """Return a frame that replays of another process have shared, and share it here."""
        frame = memoryview(data)
        self._adopted += 1
        self._remember(("", "", self._adopted, form), frame)  # no channel has this name
        return frame

    def frame(self, epoch: str, publication: Publication, form: WireFormat) -> Frames:
        """Return the frame of a publication of this epoch."""
        if len(publication.payload) < _SHARED_FROM:
            return publication.encoded(form)
        key = publication.channel, epoch, publication.offset, form
        known = self._frames.get(key)
        frame = known() if known is not None else None
        if frame is None:
            frame = memoryview(publication.encoded(form))
            self._remember(key, frame)
        return frame

    def _remember(self, key: _Key, frame: memoryview) -> None:
        size = len(frame) + _SHARED_COST
        self._frames[key] = ref(frame, partial(self._drop, key, size))
        self.shared += size

    def _drop(self, key: _Key, size: int, _: object) -> None:
        """Forget a shared frame that no client waits for any more."""
        self.shared -= size
        del self._frames[key]
        self.freed()


def tail(channel: Channel, count: int) -> Excerpt:
    """Return the last `count` publications of a channel."""
    return Excerpt(channel.name, channel.epoch, channel.ring, channel.offset - count + 1, count)


def count_since(history: History, channel: Channel, since: Position) -> int | None:
    """Return how many publications came after `since`, or None if not all of them are known any more."""
    if since.epoch != channel.epoch or since.offset > channel.offset:
        return None
    if since.offset == channel.offset:
        return 0
    return history.after(channel.ring, since.offset) if channel.ring is not None else None


def count_latest(history: History, channel: Channel, count: int) -> int:
    """Return how many of the last `count` publications are kept."""
    return history.latest(channel.ring, count) if count and channel.ring is not None else 0
