"""The walk over a client's frame headers.

trio-websocket reads the frames. `InboundMeter` only walks over their headers, because the library limits a message in
characters, not in bytes or fragments, and has no limit on the rate. The meter also says where messages end. There a
trio-websocket may pass from one client to the next, so the two have to agree. `tests.fuzz.desync` checks that they do.
"""

from __future__ import annotations

from typing import Final

from realtimed.websocket.frames import BINARY, CLOSE, CONTROL_PAYLOAD_LIMIT, FINAL, MASKED_HEADER, PONG
from realtimed.websocket.unfinished import Unfinished

__all__ = ["InboundMeter", "is_lone_pong"]

_OPCODE: Final = 0x0F
_MASKED: Final = 0x80


def is_lone_pong(data: bytes) -> bool:
    """Whether `data`, which begins a frame, is one whole Pong and nothing else."""
    return (
        len(data) > 1
        and data[0] == FINAL | PONG
        and data[1] >= _MASKED
        and len(data) == data[1] - _MASKED + MASKED_HEADER <= CONTROL_PAYLOAD_LIMIT + MASKED_HEADER
    )


class InboundMeter:
    """Counts a client's frames, its messages and their bytes, whatever pieces they arrive in.

    `frames` counts the frames whose header has been read, `messages` the messages whose last frame has ended.
    `boundary` says where the unfinished message or frame begins in what was walked over last: behind the last place
    that is between two messages, -1 if there is no such place behind a byte of it. `too_big` is set by the header of
    the frame that takes a message above `limit` bytes, before its payload is buffered anywhere. `closing` is set by the
    end of a Close. After either, pass nothing more on.
    """

    __slots__ = (
        "_first", "_fragments", "_header", "_payload", "boundary", "closing", "frames", "limit", "messages", "too_big",
        "unfinished",
    )  # fmt: skip

    # Invariants: `_header` has an incomplete header (at most 13 bytes) only while `_payload`, the bytes to come of the
    # current frame, is 0. `_first` is the first byte of the frame whose header was read last. `_fragments` is the bytes
    # of the unfinished message so far, -1 if there is none, since a first fragment may be empty.

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.frames = self.messages = self._first = self._payload = 0
        self.boundary = self._fragments = -1
        self.too_big = self.closing = False
        self.unfinished: Unfinished | None = None
        """What has come of the unfinished message or frame."""
        self._header = b""

    @property
    def between_frames(self) -> bool:
        """Whether the next byte begins a frame."""
        return not self._payload and not self._header

    @property
    def between_messages(self) -> bool:
        """Whether the next byte begins a message, or a control frame between two. Not so behind a Close."""
        return self._fragments < 0 and not self._payload and not self._header and not self.closing

    def is_pong(self, data: bytes) -> bool:
        """Whether `data`, which comes next, is one whole Pong and nothing else."""
        return is_lone_pong(data) and self.between_frames

    def keep(self, data: bytes) -> None:
        """Keep what belongs to the unfinished message or frame of `data`, which was walked over last."""
        if self.unfinished is None or self.boundary >= 0:
            self.unfinished = Unfinished()
        self.unfinished.add(data[max(self.boundary, 0) :])

    def walk(self, data: bytes) -> int:
        """Walk over `data`. Return how many bytes of it to pass on: all, or all up to the end of a Close."""
        size = len(data)
        if (
            MASKED_HEADER <= size <= CONTROL_PAYLOAD_LIMIT + MASKED_HEADER
            and data[1] == size - MASKED_HEADER + _MASKED
            and FINAL < data[0] <= FINAL | BINARY
            and self._fragments < 0
            and not self._payload
            and not self._header
            and not self.closing
        ):  # one whole message and nothing else, as most of what arrives is
            self.frames += 1
            self.messages += 1
            self.boundary = size
            if size - MASKED_HEADER > self.limit:
                self.too_big = True
            return size
        return self._walk(data, size)

    def _walk(self, data: bytes, size: int) -> int:
        at, self.boundary = 0, -1
        while at < size and not self.closing:
            if not self._payload:
                header = self._header + data[at : at + 14]
                taken = self._read(header)
                if not taken:
                    self._header = header
                    return size
                at += taken - len(self._header)
                self._header = b""
            if self._payload > size - at:
                self._payload -= size - at
                return size
            at += self._payload
            self._payload = 0
            opcode = self._first & _OPCODE
            if opcode == CLOSE:
                self.closing = True
            else:
                if opcode <= BINARY and self._first & FINAL:
                    self.messages += 1
                    self._fragments = -1
                if self._fragments < 0:
                    self.boundary = at
        return at

    def _read(self, header: bytes) -> int:
        """Read one header and return its length, or 0 if it is incomplete."""
        if len(header) < 2:
            return 0
        size = header[1] & 0x7F
        taken = MASKED_HEADER
        if size == 126:
            taken += 2
            size = int.from_bytes(header[2:4], "big")
        elif size == 127:
            taken += 8
            size = int.from_bytes(header[2:10], "big")
        if header[1] < _MASKED:
            taken -= 4  # an unmasked frame, which the library refuses
        if len(header) < taken:
            return 0
        self.frames += 1
        self._payload = size
        self._first = header[0]
        opcode = header[0] & _OPCODE
        if opcode <= BINARY:
            begins = opcode or self._fragments < 0
            self._fragments = size if begins else self._fragments + size
            self.too_big = self.too_big or self._fragments > self.limit
        return taken
