"""WebSocket frames (RFC 6455 section 5) as ready bytes.

A server sends unmasked frames, and this one never compresses them. So the bytes of a frame are right for every
subscriber, and a publication is encoded once for each wire format, however many subscribers receive it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Final, NamedTuple

from realtimed.rpc import defaults

__all__ = [
    "BINARY",
    "CLOSE",
    "CLOSE_BYTE",
    "CLOSE_REASONS",
    "CONTROL_PAYLOAD_LIMIT",
    "FINAL",
    "MASKED_HEADER",
    "PING",
    "PONG",
    "ClientClose",
    "CloseCode",
    "binary_frame",
    "check_close",
    "close_frame",
    "frame_boundary",
    "lone_close",
    "text_frame",
]

FINAL: Final = 0x80
_TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
CLOSE_BYTE: Final = FINAL | CLOSE
"""The first byte of a Close."""

_PING: Final = 0x9
PONG: Final = 0xA

CONTROL_PAYLOAD_LIMIT: Final = 125
"""Bytes a control frame may carry (RFC 6455 section 5.5)."""

_NO_STATUS: Final = 1005
"""Stands for the code of a Close without one (RFC 6455 section 7.4.1)."""

MASKED_HEADER: Final = 6
"""Bytes of the header of a client's frame with a payload of at most 125 bytes: two, and the mask."""

# The first byte and each form of the length together: one `pack` a frame.
_pack_short = struct.Struct("!BB").pack
_pack_medium = struct.Struct("!BBH").pack
_pack_long = struct.Struct("!BBQ").pack


class CloseCode(IntEnum):
    """Why a connection was closed. 4000 to 4999 are ours to define (RFC 6455 section 7.4.2)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    INVALID_DATA = 1007
    MESSAGE_TOO_BIG = 1009
    BAD_MESSAGE = 4400
    NOT_ALLOWED = defaults.NOT_ALLOWED
    NO_SUCH_PATH = 4404
    SILENT = 4408
    SLOW_CONSUMER = 4409
    TOO_MANY = 4429
    COME_BACK = 4503


CLOSE_REASONS: Final[Mapping[int, str]] = {
    **{int(code): code.name.lower() for code in CloseCode},
    _NO_STATUS: "no_status_received",
    1006: "abnormal_closure",  # no Close at all
}
"""Names of the close codes."""


def _frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return _pack_short(first, size) + payload
    if size < 65536:
        return _pack_medium(first, 126, size) + payload
    return _pack_long(first, 127, size) + payload


def text_frame(payload: bytes) -> bytes:
    """Return a whole text message; `payload` is UTF-8."""
    return _frame(FINAL | _TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """Return a whole binary message."""
    return _frame(FINAL | BINARY, payload)


def check_close(code: int | None, reason: str) -> None:
    """Raise `ValueError` unless an application may close with this code, if any, and the reason fits into a Close.

    Source: RFC 6455 sections 7.4.2 and 5.5.
    """
    if code is not None and code not in (1000, 1001) and not 3000 <= code <= 4999:
        raise ValueError("a close code is 1000, 1001 or 3000 to 4999 (RFC 6455 section 7.4)")
    size = len(reason.encode("utf-8", "replace"))
    if size > CONTROL_PAYLOAD_LIMIT - 2:
        raise ValueError(f"the reason has {size} bytes; a Close has room for {CONTROL_PAYLOAD_LIMIT - 2}")


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a Close. A `reason` of more than the 123 bytes that fit into one is cut between characters."""
    limit = CONTROL_PAYLOAD_LIMIT - 2
    text = reason.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
    return _frame(CLOSE_BYTE, struct.pack("!H", code) + text.encode())


class ClientClose(NamedTuple):
    """A client's Close: its code, 1005 if it has none, its reason, and the Close that answers it."""

    code: int
    reason: str
    answer: bytes


def lone_close(data: bytes) -> ClientClose | None:
    """Return the Close that `data` is, if it is one whole Close and nothing else, with nothing unusual about it.

    A Close is the end of a trio-websocket, and to make another costs more than the client's whole connection. So those
    of browsers and libraries are answered without one, with the bytes that it would answer: a Close without a code, or
    with 1000, 1001 or a code of an application, and a reason in UTF-8. `data` begins between two messages.
    """
    size = len(data) - MASKED_HEADER
    if size < 0 or data[0] != CLOSE_BYTE or data[1] != 0x80 | size or size > CONTROL_PAYLOAD_LIMIT:
        return None
    if not size:
        return ClientClose(_NO_STATUS, "", _frame(CLOSE_BYTE, b""))
    payload = bytes(byte ^ data[2 + at % 4] for at, byte in enumerate(data[MASKED_HEADER:]))
    code = int.from_bytes(payload[:2], "big")
    if size == 1 or not (code in (1000, 1001) or 3000 <= code <= 4999):
        return None
    try:
        reason = payload[2:].decode()
    except UnicodeDecodeError:
        return None
    return ClientClose(code, reason, _frame(CLOSE_BYTE, payload))


PING: Final = _frame(FINAL | _PING, b"")
"""A heartbeat. Pongs are not matched to pings: any byte a client sends is a sign of life."""


def frame_boundary(data: bytes | bytearray | memoryview, offset: int) -> int:
    """Return the offset of the first boundary between frames at or behind `offset`. `data` is whole server frames."""
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
