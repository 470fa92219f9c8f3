"""A message of a client that has not come in full, in a form in which another trio-websocket can go on with it.

The bytes that came are kept while a client is in the middle of a message. What they cost is bounded by the message, not
by its frames: fragments that are whole are put together, and control frames between them, which have been answered, are
dropped. Each byte is moved a few times at most, however small the pieces are.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from realtimed.websocket.frames import FINAL

__all__ = ["Unfinished", "put_together"]

_ALLOWED: Final = 2048
"""Bytes beyond twice those of the last time that may come until the fragments are put together again."""

_CONTROL: Final = 0x8
"""The bit that all control frames have in their opcode (RFC 6455 section 5.5)."""


_MASKED: Final = 0x80
_MASK_BYTES: Final = 4


class _Frame(NamedTuple):
    """Where a frame's mask, its payload and the frame itself have their places."""

    mask: int
    payload: int
    end: int


class Unfinished:
    """What has come of a message."""

    __slots__ = ("_allowed", "_data")

    # Invariant: `_data` is at most as long as `_allowed` when `add` returns.

    def __init__(self) -> None:
        self._data = bytearray()
        self._allowed = _ALLOWED

    def add(self, data: bytes) -> None:
        """Add what comes next."""
        self._data += data
        if len(self._data) > self._allowed:
            self._data = bytearray(put_together(self._data))
            self._allowed = 2 * len(self._data) + _ALLOWED

    @property
    def held(self) -> int:
        """How many bytes are kept."""
        return len(self._data)

    def data(self) -> bytes:
        """Return the beginning of a message that is the same to every reader."""
        return put_together(self._data)


def put_together(data: bytes | bytearray) -> bytes:
    """Return the beginning of a message with its whole fragments as one, and without whole control frames."""
    opcode, payload, at = 0, bytearray(), 0
    begun = False
    while True:
        frame = _frame_at(data, at)
        if frame is None:
            break
        first = data[at] & ~FINAL
        if not first & _CONTROL:
            payload += _unmasked(data[frame.payload : frame.end], data[frame.mask : frame.payload])
            opcode = opcode if begun else first
            begun = True
        at = frame.end
    return (_fragment(opcode, payload) if begun else b"") + bytes(data[at:])


def _fragment(opcode: int, payload: bytearray) -> bytes:
    """Return a fragment that others follow, masked with zeros."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 2**16:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([opcode]) + length + bytes(4) + payload


def _frame_at(data: bytes | bytearray, at: int) -> _Frame | None:
    """Return the frame that begins at a place; None if it is not whole, or not masked."""
    if len(data) < at + 2 or data[at + 1] < _MASKED:
        return None
    size, mask = data[at + 1] - _MASKED, at + 2
    if size >= 126:
        mask += 2 if size == 126 else 8
        size = int.from_bytes(data[at + 2 : mask], "big")
    payload = mask + _MASK_BYTES
    return _Frame(mask, payload, payload + size) if payload + size <= len(data) else None


def _unmasked(data: bytes | bytearray, mask: bytes | bytearray) -> bytes:
    """Return a payload without its mask (RFC 6455 section 5.3)."""
    size = len(data)
    masks = (bytes(mask) * (size // _MASK_BYTES + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(masks, "big")).to_bytes(size, "big")
