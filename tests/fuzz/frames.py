"""A server's frames taken apart, and what a client's mean: written from RFC 6455, and with nothing of the daemon."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

__all__ = ["CLOSE", "PONG", "TEXT", "Expected", "expected", "measured", "messages_of"]

TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

_VALID_CODES: Final = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
"""Section 7.4 and the IANA registry."""


def messages_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield opcode and payload of each of a server's frames, all of which are whole, final, unmasked and minimal."""
    at = 0
    while at < len(data):
        assert data[at] & 0xF0 == 0x80, f"not final, or with reserved bits: {data[at]:#x}"
        size, begin = data[at + 1], at + 2
        assert size < 0x80, "masked"
        if size == 126:
            size, begin = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            assert size > 125
        elif size == 127:
            size, begin = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
            assert size > 0xFFFF
        assert begin + size <= len(data), "cut short"
        yield data[at] & 0x0F, data[begin : begin + size]
        at = begin + size


@dataclass
class Expected:
    """What an echo server has to say: `events` are opcodes and payloads. `codes` are those its Close may have then.

    None among the codes means that there may be no Close: the client is gone.
    """

    events: list[tuple[int, bytes]] = field(default_factory=list)
    codes: set[int | None] = field(default_factory=lambda: {None})


def measured(data: bytes) -> tuple[int, int]:
    """Return how many frames begin up to a Close, whatever they are, and the size of the largest message."""
    frames = largest = message = at = 0
    while len(data) - at >= 2:
        first, second = data[at], data[at + 1]
        width = {126: 2, 127: 8}.get(second & 0x7F, 0)
        size = int.from_bytes(data[at + 2 : at + 2 + width], "big") if width else second & 0x7F
        at += 2 + width + (4 if second & 0x80 else 0)
        if at > len(data):
            break
        frames += 1
        if first & 0x0F <= BINARY:
            message = size + (0 if first & 0x0F else message)
            largest = max(largest, message)
            message = 0 if first & 0x80 else message
        elif first & 0x0F == CLOSE:
            break
        at += size
    return frames, largest


def expected(data: bytes) -> Expected:
    """Return what RFC 6455 expects of an echo server that hears `data` and then the end of the connection."""
    result = Expected()
    kind, message, decoder, at = 0, b"", codecs.getincrementaldecoder("utf-8")(), 0
    while at < len(data):
        if len(data) - at < 2:
            return result
        first, second = data[at], data[at + 1]
        opcode, final, size, begin = first & 0x0F, bool(first & 0x80), second & 0x7F, at + 2
        width = {126: 2, 127: 8}.get(size, 0)
        wrong: bool = (
            bool(first & 0x70)
            or opcode not in (0, TEXT, BINARY, CLOSE, PING, PONG)
            or (opcode >= CLOSE and (not final or size > 125))
            or second < 0x80
        )
        if width:
            size = int.from_bytes(data[begin : begin + width], "big")
            begin += width
            wrong = wrong or (begin <= len(data) and (size < 126 or (width == 8 and (size <= 0xFFFF or size >= 2**63))))
        begin += 4 if second & 0x80 else 0
        if wrong:
            # Who sees the mistake before the header is whole may say so.
            result.codes = {1002} if begin <= len(data) else {1002, None}
            return result
        if begin > len(data):
            return result
        mask = data[begin - 4 : begin]
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data[begin : begin + size]))
        whole = len(payload) == size
        if opcode < CLOSE:
            if bool(kind) == bool(opcode):  # a continuation of nothing, or another beginning
                result.codes = {1002} if payload or whole else {1002, None}
                return result
            kind = kind or opcode
            if kind == TEXT:
                try:
                    decoder.decode(payload, final and whole)
                except UnicodeDecodeError:
                    result.codes = {1007}
                    return result
            message += payload
            if whole and final:
                result.events.append((kind, message))
                kind, message, decoder = 0, b"", codecs.getincrementaldecoder("utf-8")()
        elif whole and opcode == PING:
            result.events.append((PONG, payload))
        elif whole and opcode == CLOSE:
            result.codes = {_close_code(payload)}
            return result
        at = begin + size
    return result


def _close_code(payload: bytes) -> int:
    """Return the code with which a Close is answered; 1005 for an answer without a code."""
    if not payload:
        return 1005
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or code not in _VALID_CODES:
        return 1002
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        return 1007
    return code
