"""WebSocket frames (RFC 6455 section 5) as ready bytes, and the walk over a client's frame headers.

What a server sends is unmasked and, here, never compressed: one frame's bytes are right for every subscriber, so a
publication is encoded once per wire format, however many receive it.

Reading frames is trio-websocket's work. `InboundMeter` only walks over the headers, because the library bounds a
message by its characters and not by its bytes or fragments, and has no limit on the rate.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, Protocol, TypeAlias

import msgspec

__all__ = [
    "PING",
    "CloseCode",
    "Frame",
    "InboundMeter",
    "Publication",
    "WireFormat",
    "binary_frame",
    "close_frame",
    "frame_boundary",
    "text_frame",
]

_FINAL: Final = 0x80
_CONTINUATION: Final = 0x0
_TEXT: Final = 0x1
_BINARY: Final = 0x2
_CLOSE: Final = 0x8
_PING: Final = 0x9
_PONG: Final = 0xA

_CONTROL_PAYLOAD_LIMIT: Final = 125
"""Bytes a control frame may carry (RFC 6455 section 5.5)."""

# The first byte, then every form of length, at once: one pack per frame.
_pack_short = struct.Struct("!BB").pack
_pack_medium = struct.Struct("!BBH").pack
_pack_long = struct.Struct("!BBQ").pack


Frame: TypeAlias = bytes | memoryview
"""One or more whole frames. A memoryview is shared by several clients, and counted once."""


class CloseCode(IntEnum):
    """Why a connection was closed. 4000 to 4999 are ours to define (RFC 6455 section 7.4.2)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    INVALID_DATA = 1007
    MESSAGE_TOO_BIG = 1009
    BAD_MESSAGE = 4400
    NOT_ALLOWED = 4403
    NO_SUCH_PATH = 4404
    SILENT = 4408
    SLOW_CONSUMER = 4409
    TOO_MANY = 4429
    COME_BACK = 4503


def _frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return _pack_short(first, size) + payload
    if size < 65536:
        return _pack_medium(first, 126, size) + payload
    return _pack_long(first, 127, size) + payload


def text_frame(payload: bytes) -> bytes:
    """Return a whole text message; `payload` is UTF-8."""
    return _frame(_FINAL | _TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """Return a whole binary message."""
    return _frame(_FINAL | _BINARY, payload)


def check_close(code: int, reason: str) -> None:
    """Raise `ValueError` unless an application may close with this code, and a Close has room for the reason.

    Source: RFC 6455 sections 7.4.2 and 5.5.
    """
    if code not in (1000, 1001) and not 3000 <= code <= 4999:
        raise ValueError("a close code is 1000, 1001 or 3000 to 4999 (RFC 6455 section 7.4)")
    size = len(reason.encode("utf-8", "replace"))
    if size > _CONTROL_PAYLOAD_LIMIT - 2:
        raise ValueError(f"the reason has {size} bytes; a Close has room for {_CONTROL_PAYLOAD_LIMIT - 2}")


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a Close. A `reason` beyond the 123 bytes a Close has room for is cut between characters."""
    room = _CONTROL_PAYLOAD_LIMIT - 2
    text = reason.encode("utf-8", "replace")[:room].decode("utf-8", "ignore")
    return _frame(_FINAL | _CLOSE, struct.pack("!H", code) + text.encode())


PING: Final = _frame(_FINAL | _PING, b"")
"""A heartbeat. Pongs are not matched to pings: any byte a client sends is a sign of life."""


def frame_boundary(data: bytes | bytearray | memoryview, offset: int) -> int:
    """Return the first boundary between frames at or behind `offset`; `data` is whole frames of a server."""
    at = 0
    while at < offset:
        size = data[at + 1]
        if size < 126:
            at += 2 + size
        elif size == 126:
            at += 4 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            at += 10 + int.from_bytes(data[at + 2 : at + 10], "big")
    return at


class WireFormat(Protocol):
    """How a publication looks to one kind of subscriber."""

    def encode(self, publication: Publication) -> bytes:
        """Return the bytes that go out on the subscriber's socket."""
        ...


class Publication(msgspec.Struct, eq=False, gc=False):  # one for each publication: made in a fraction of the time
    """One message on its way: what was said, where, and its place in the channel.

    `payload` is the message in bytes, UTF-8 if `text`. `offset` counts the channel's publications from 1. `time` is the
    wall clock at publication, in milliseconds since 1970: it may run backwards from one publication to the next.
    """

    # Invariant: `_bytes` is this in the format `_form`, the first anyone needed; `_others` has the other formats. Most
    # publications need one only, and a dictionary for each would cost as much as to encode it.

    channel: str
    payload: bytes
    text: bool
    offset: int
    time: int = 0
    _form: WireFormat | None = None
    _bytes: bytes = b""
    _others: dict[WireFormat, bytes] | None = None

    @property
    def message(self) -> str | bytes:
        """The message as it was published."""
        return self.payload.decode() if self.text else self.payload

    def encoded(self, form: WireFormat) -> bytes:
        """Return this publication in `form`, encoding it when the first subscriber needs it."""
        if self._form is form:
            return self._bytes
        if self._form is None:
            self._form = form
            self._bytes = form.encode(self)
            return self._bytes
        if self._others is None:
            self._others = {}
        encoded = self._others.get(form)
        if encoded is None:
            encoded = self._others[form] = form.encode(self)
        return encoded


class InboundMeter:
    """Counts a client's frames and the bytes of its messages, whatever pieces they arrive in.

    `frames` counts all frames whose header has been seen. `too_big` is set by the header of the frame that takes a
    message above `limit` bytes, before its payload is buffered anywhere; `closing` by the end of a Close. After
    either, nothing more is to be passed on.
    """

    __slots__ = ("_close", "_fragments", "_header", "_payload", "closing", "frames", "limit", "too_big")

    # Invariant: `_header` holds an incomplete header (at most 13 bytes) only while `_payload`, the bytes still to come
    # of the frame at hand, is 0. `_fragments` is the bytes of the unfinished message so far. `_close` is set from a
    # Close's header on; behind that frame nothing is walked over.

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
            and data[0] == _FINAL | _PONG
            and data[1] >= 0x80
            and len(data) == data[1] - 0x80 + 6 <= _CONTROL_PAYLOAD_LIMIT + 6
            and self.between_frames
        )

    def walk(self, data: bytes) -> int:
        """Walk over `data` and return how much of it is to be passed on: all, or all up to a Close's end."""
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
        """Take in one header and return its length, or 0 if it is not complete."""
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
            taken -= 4  # an unmasked frame: the library refuses it
        if len(header) < taken:
            return 0
        self.frames += 1
        self._payload = size
        opcode = header[0] & 0x0F
        if opcode <= _BINARY:
            self._fragments = size if opcode else self._fragments + size
            self.too_big = self.too_big or self._fragments > self.limit
            if header[0] & _FINAL:
                self._fragments = 0
        elif opcode == _CLOSE:
            self._close = True
        return taken
