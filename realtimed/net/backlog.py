"""What waits, in order, for one client that does not read fast enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Final

import trio

from realtimed.hub.publication import Frames, WireFormat
from realtimed.hub.replays import Pieces, Remaining
from realtimed.net.backlogs import Backlogs, Data, Entry, Later
from realtimed.net.fifo import Fifo
from realtimed.net.waiting import Blobs, ReceivedBlobs, Replaying, Waiting, WaitingEntry

__all__ = ["FAR_OVER", "OVER_SECONDS", "Backlog"]

_BUFFERS_PER_SEND: Final = 64

_SMALL: Final = 256
"""Frames of at most this many bytes are copied behind the one before: that costs less than an entry for each."""

OVER_SECONDS: Final = 0.5
"""Seconds for which more than `max-backlog` may wait for a client. A larger burst is no reason to disconnect a client
that reads as fast as it can: that takes a few milliseconds."""

FAR_OVER: Final = 4
"""How many times `max-backlog` may wait even then, except for a single write to a client that has read all else."""

_CHUNK_BYTES: Final = 4096
"""Bytes of a chunk, which gathers small frames."""

_CHUNK_SECONDS: Final = 0.1
"""Seconds between the first and the last frame of a chunk. Deadlines are no more exact than that."""


class Backlog:
    """What one client has not read yet, in the order written."""

    __slots__ = (
        "_backlogs", "_later", "_replays", "asked", "cost", "entries", "over_since", "sent", "size", "time",
    )  # fmt: skip

    # Invariants: `entries` is in the order of time; the first `sent` bytes of its head are sent. `_later` has what
    # follows the entries, with `_replays` replays that have pieces still to be made; if it is not empty, a replay is
    # first. `size` is how many bytes wait, without pieces that are not made yet; `asked` counts those of them that the
    # client has asked for; `cost` is the memory that all of it takes for this client alone. `time` is that of the last
    # entry, or later. `over_since` is when more than the limit began to wait, infinite while no more does.

    def __init__(self, backlogs: Backlogs) -> None:
        self._backlogs = backlogs
        self.entries: Fifo[Entry] = Fifo()
        self.time = -math.inf
        self.sent = 0
        self.size = 0
        self.asked = 0
        self.cost = 0
        self.over_since = math.inf
        self._later: Fifo[Later] | None = None
        self._replays = 0

    @property
    def live(self) -> int:
        """Bytes that wait without the client having asked for them."""
        return self.size - self.asked

    @property
    def replaying(self) -> bool:
        """Whether something waits that the client has asked for."""
        return bool(self.asked or self._replays)

    @property
    def more(self) -> bool:
        """Whether something follows the `entries`."""
        return bool(self._later)

    @property
    def retained(self) -> int:
        """Bytes of history that may be retained for this client alone."""
        return sum(data.retained for _, data, _ in self._later or () if isinstance(data, Pieces))

    # For another process, in which the peer goes on reading.

    def waiting(self, blobs: Blobs) -> Waiting:
        """Return all of this. Nothing changes."""
        now, number = trio.current_time(), blobs.number
        later: list[WaitingEntry | Replaying] = []
        for time, data, asked in self._later or ():
            if isinstance(data, Pieces):
                left = data.remaining()
                frames = [number(each) for each in left.frames]
                later.append(Replaying(now - time, frames, left.channel, left.epoch, left.first, left.end))
            else:
                later.append(WaitingEntry(now - time, number(data), asked))
        entries = [WaitingEntry(now - time, number(data), asked) for time, data, asked in self.entries]
        return Waiting(self.sent, now - self.time, now - self.over_since, entries, later)

    def resume(self, waiting: Waiting, blobs: ReceivedBlobs, form: WireFormat) -> bool:
        """Fill this, which is empty, with what waited in another process; `form` is that of the stream.

        Return False, and leave this unfinished, if the history here has not all of a replay. Raises `HandOverError`.
        """
        now = trio.current_time()
        self.sent, self.time, self.over_since = waiting.sent, now - waiting.age, now - waiting.over_age
        for entry in waiting.entries:
            data = self._charged(blobs.frames(entry.frames, form), entry.asked)
            self.entries.append((now - entry.age, data, entry.asked))
        self.size -= self.sent
        self.asked -= self.sent if self.entries and self.entries.head[2] else 0
        self._later = later = Fifo[Later]() if waiting.later else None
        for each in waiting.later or ():
            assert later is not None, "something is later"
            if isinstance(each, WaitingEntry):
                data = self._charged(blobs.frames(each.frames, form), each.asked)
                later.append((now - each.age, data, each.asked))
                continue
            left = Remaining(blobs.made(each.frames, form), each.channel, each.epoch, each.first, each.end)
            rest = blobs.replays.resume(left, blobs.channels.get(each.channel), form)
            if rest is None:
                return False
            later.append((now - each.age, Pieces(rest), True))
            self._replays += 1
        return True

    def _charged(self, data: Data, asked: bool) -> Data:
        self.size += len(data)
        self.asked += len(data) if asked else 0
        self.cost += self._backlogs.charge(data, asked)
        return data

    def add(self, data: bytes, sent: int) -> None:
        """Append `data`, of which the first `sent` bytes have been sent. If anything else waits, `sent` must be 0."""
        time = trio.current_time()
        self.size += len(data) - sent
        queue = self._later or self.entries
        if len(data) <= _SMALL:
            if queue and not sent and self._gathered(queue.last, data, time):
                return
            stored: Data = bytearray(data)
        else:
            stored = data
        if queue is self.entries:
            if not queue:
                self.sent = sent
            # An entry behind a replay waits for that, not for the client, so the replay sets its time.
            time = self.time = max(self.time, time)
        self.cost += self._backlogs.charge(stored, False)
        queue.append((time, stored, False))

    def _gathered(self, last: Later, data: bytes, time: float) -> bool:
        """Copy `data` behind the last entry if that is a chunk with space for it. Return whether it was copied."""
        since, chunk, asked = last
        if type(chunk) is not bytearray or asked or len(chunk) + len(data) > _CHUNK_BYTES:
            return False
        if time - since > _CHUNK_SECONDS:
            return False
        chunk += data
        self.cost += len(data)
        self._backlogs.total += len(data)
        return True

    def add_replay(self, begun: bytes, sent: int, rest: Pieces, pace: float) -> None:
        """Append an answer that the client has asked for: `begun`, its first `sent` bytes sent, and then `rest`.

        If `begun` is not empty, nothing else may wait. The client gets `pace` seconds a byte for the answer, beside the
        time that it has for every message.
        """
        time = trio.current_time()
        if begun:
            self.time = max(self.time, time)
            self.sent = sent
            self._append_asked(begun, sent, pace)
        if rest.more():
            if self._later is None:
                self._later = Fifo()
            self._later.append((time, rest, True))
            self._replays += 1

    def next_piece(self, waited: float, pace: float) -> None:
        """Make the next piece of the first replay. `waited`: seconds spent on our turn, not the client's fault."""
        if not self._later:
            return
        time, pieces, _ = self._later.head
        assert isinstance(pieces, Pieces), "a replay is first of what is to come"
        self.time = max(self.time, time) + waited
        run: list[Frames] = []
        for frame in pieces.take():
            if isinstance(frame, memoryview):
                self._append_run(run, pace)
                self._append_asked(frame, 0, pace)
            else:
                run.append(frame)
        self._append_run(run, pace)
        if not pieces.more():
            self._later.popleft()
            self._replays -= 1
            self._advance()

    def _append_run(self, run: list[Frames], pace: float) -> None:
        if run:
            self._append_asked(b"".join(run), 0, pace)
            run.clear()

    def _append_asked(self, data: bytes | memoryview, sent: int, pace: float) -> None:
        self.time += len(data) * pace
        self.size += len(data) - sent
        self.asked += len(data) - sent
        self.cost += self._backlogs.charge(data, True)
        self.entries.append((self.time, data, True))

    def _advance(self) -> None:
        """Move entries from `_later` to `entries`, up to the next replay."""
        while self._later:
            time, data, asked = self._later.head
            if isinstance(data, Pieces):
                return
            self._later.popleft()
            self.time = max(self.time, time)
            self.entries.append((self.time, data, asked))

    def buffers(self) -> list[Data]:
        """Return the buffers to send next. While they exist, nothing may be added."""
        buffers = [data for _, data, _ in islice(self.entries, _BUFFERS_PER_SEND)]
        buffers[0] = memoryview(buffers[0])[self.sent :]
        return buffers

    def took(self, count: int) -> None:
        """Remove the first `count` bytes of `buffers`, which have been sent."""
        while self.entries:
            _, data, asked = self.entries.head
            part = min(count, len(data) - self.sent)
            count -= part
            self.sent += part
            self.size -= part
            if asked:
                self.asked -= part
            if self.sent < len(data):
                break
            self.entries.popleft()
            self.sent = 0
            self.cost -= self._backlogs.discharge(data, asked)
        if self.live <= self._backlogs.limit:
            self.over_since = math.inf

    @property
    def deadline(self) -> float:
        """The time at which the client is slow, unless it reads some of this before."""
        waiting = self.entries.head[0] + self._backlogs.timeout if self.entries else math.inf
        return min(waiting, self.over_since + OVER_SECONDS)

    def is_far_over(self) -> bool:
        """Return whether far more waits than the limit. Record when it begins to be more than the limit."""
        limit = self._backlogs.limit
        if self.live <= limit:
            return False
        if self.over_since == math.inf:
            self.over_since = trio.current_time()
        return self.live > FAR_OVER * limit

    def drop_unsent(self, boundary: Callable[[Data, int], int]) -> None:
        """Keep only the rest of a partly sent frame.

        `boundary` returns the offset of the first boundary between frames at or behind an offset.
        """
        sent = self.sent
        begun = self.entries.head if self.entries and sent else None
        self.clear()
        if begun is not None:
            time, data, _ = begun
            end = boundary(data, sent)
            if end > sent:
                rest = bytearray(data[sent:end])
                self.size = len(rest)
                self.cost += self._backlogs.charge(rest, False)
                self.entries.append((time, rest, False))

    def clear(self) -> None:
        """Drop everything."""
        self._backlogs.discard(self.entries)
        if self._later is not None:
            self._backlogs.discard(self._later)
        self.entries, self._later = Fifo(), None
        self._replays = 0
        self.size = self.asked = self.cost = self.sent = 0
        self.over_since = math.inf
