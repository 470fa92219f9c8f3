"""The walk over a client's frame headers.

trio-websocket reads the frames. `InboundMeter` only walks over their headers, because the library limits a message in
characters, not in bytes or fragments, and has no limit on the rate.
"""

from __future__ import annotations

from realtimed.websocket.frames import BINARY, CLOSE, CONTROL_PAYLOAD_LIMIT, FINAL, PONG

__all__ = ["InboundMeter"]


class InboundMeter:
    """Counts a client's frames and the bytes of its messages, whatever pieces they arrive in.

    `frames` counts the frames whose header has been read. `too_big` is set by the header of the frame that takes a
    message above `limit` bytes, before its payload is buffered anywhere. `closing` is set by the end of a Close. After
    either, pass nothing more on.
    """

    __slots__ = ("_close", "_fragments", "_header", "_payload", "closing", "frames", "limit", "too_big")

    # Invariant: `_header` has an incomplete header (at most 13 bytes) only while `_payload`, the bytes still to come of
    # the current frame, is 0. `_fragments` is the bytes of the unfinished message so far. `_close` is set from the
    # header of a Close on; the walk ends behind that frame.

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.frames = 0
        self.too_big = False
        self.closing = False
        self._close = False
        self._fragments = 0
        self._header = b""
        self._payload = 0

    @property
    def between_frames(self) -> bool:
        """Whether the next byte begins a frame."""
        return not self._payload and not self._header

    def is_pong(self, data: bytes) -> bool:
        """Whether `data`, which comes next, is one whole Pong and nothing else."""
        return (
            len(data) > 1
            and data[0] == FINAL | PONG
            and data[1] >= 0x80
            and len(data) == data[1] - 0x80 + 6 <= CONTROL_PAYLOAD_LIMIT + 6
            and self.between_frames
        )

    def walk(self, data: bytes) -> int:
        """Walk over `data`. Return how many bytes of it to pass on: all, or all up to the end of a Close."""
        size = len(data)
        at = min(self._payload, size)
        self._payload -= at
        while at < size and not self._close:
            start = at - len(self._header)
            header = self._header + data[at : at + 14]
            taken = self._read(header)
            if not taken:
                self._header = header
                return size
            self._header = b""
            at = start + taken
            step = min(self._payload, size - at)
            self._payload -= step
            at += step
        self.closing = self._close and not self._payload
        return at if self._close else size

    def _read(self, header: bytes) -> int:
        """Read one header and return its length, or 0 if it is incomplete."""
        if len(header) < 2:
            return 0
        size = header[1] & 0x7F
        taken = 6  # two bytes and the mask
        if size == 126:
            taken = 8
            size = int.from_bytes(header[2:4], "big")
        elif size == 127:
            taken = 14
            size = int.from_bytes(header[2:10], "big")
        if header[1] < 0x80:
            taken -= 4  # an unmasked frame, which the library refuses
        if len(header) < taken:
            return 0
        self.frames += 1
        self._payload = size
        opcode = header[0] & 0x0F
        if opcode <= BINARY:
            self._fragments = size if opcode else self._fragments + size
            self.too_big = self.too_big or self._fragments > self.limit
            if header[0] & FINAL:
                self._fragments = 0
        elif opcode == CLOSE:
            self._close = True
        return taken
