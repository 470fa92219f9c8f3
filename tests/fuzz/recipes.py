"""Recipes for what a client sends after its handshake: bytes that stand for frames, mostly valid ones, and their cuts.

Any bytes are a recipe, so recipes can be changed at random and stay what they are. The first eight say how everything
is cut, and what is broken in it. Then each three stand for a frame: what kind it is, how long, and what is in it. A
recipe keeps track of fragments. Otherwise hardly any sequence of frames would be longer than two.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Final, NamedTuple

__all__ = ["RECIPES", "Sent", "random_recipe", "sent_by"]

_SETTINGS: Final = 8
"""Bytes before the first frame's."""

_FRAMES: Final = 32
_PIECES: Final = 100
_ROOM: Final = 140_000
"""Frames, pieces and bytes at most."""

_FIN: Final = 0x80
_TEXT: Final = 0x1
_CONTROL: Final = 0x8
_CLOSE: Final = 0x8

_FITTING: Final = (
    *[0x81] * 72, *[0x82] * 24, *[0x01] * 46, *[0x02] * 14, *[0x89] * 28, *[0x8A] * 40, *[0x88] * 4,
)  # fmt: skip
"""First bytes of frames. Of an unfinished message, text and binary ones become the next fragment."""

_BREAKING: Final = (
    0x00, 0x80, 0x01, 0x81,  # a fragment of nothing; a message in another
    0x83, 0x84, 0x85, 0x86, 0x07, 0x8B, 0x8C, 0x8D, 0x8E, 0x0F,  # opcodes 3 to 7, 11 to 15
    0x08, 0x09, 0x0A,  # fragments of control frames
    0xC1, 0xA1, 0x91, 0xF1, 0x41, 0xC0, 0xC2, 0x20, 0xD8, 0xC9, 0xAA,  # reserved bits
)  # fmt: skip
"""First bytes that break RFC 6455 for themselves, or where no such frame may be. They are left as they are."""

_SIZES: Final = (
    *[0] * 56, *[1] * 40, *[2] * 24, *[3] * 20, *[4] * 20, *[5] * 14, *[6] * 14, *[7] * 6, *[13] * 14, *[40] * 16,
    *[100] * 4, *[124] * 4, *[125] * 6, *[126] * 6, *[127] * 4, *[200] * 2, *[300] * 2, 1000, 4096, 65535, 65536,
)  # fmt: skip

_LIMITS: Final = (*[16384] * 8, *[100_000] * 4, 4096, 1000, 125, 1)
_CUTS: Final = (1, 1, 2, 3, 4, 5, 6, 7, 8, 10, 14, 20, 50, 131, 1000, 4096)
_BEGINNINGS: Final = (1, 2, 6, 6)
"""Where frames are cut in two: within their headers, or behind them."""

_DROPPED: Final = (*[0] * 24, 1, 2, 3, 4, 5, 6, 13, 50)

_CLOSES: Final = (
    b"", b"\x03\xe8", b"\x03\xe8bye", b"\x0f\xa0" + b"x" * 123, b"\x03\xe9" + "ä".encode(),
    b"\x03", b"\x03\xed", b"\x00\x00", b"\xff\xff", b"\x07\xd0", b"\x03\xe8\xff", b"\x03\xe8" + b"x" * 124,
)  # fmt: skip
"""Payloads of Closes, some of which no client may send (RFC 6455 sections 5.5.1 and 7.4)."""

_VALID_CLOSES: Final = _CLOSES[:5]
_BROKEN: Final = range(1, 10)
"""Contents that stand for something broken in a frame, see `_frame`."""

_MASKS: Final = (b"\0\0\0\0", b"\x37\xfa\x21\x3d", b"\xff\x80\x7f\x00", b"\x80\x81\x82\x83", b"\x81\x85\x8a\x80")
"""The last two look like beginnings of frames."""

_TEXTS: Final = (*[b"a" * 60] * 13, "ä".encode() * 30, "a€".encode() * 15, "\U0001f600".encode() * 15)
"""What texts are made of. A fragment goes on where the one before has ended, possibly within a character."""

_BINARIES: Final = (*[b"b" * 60] * 8, *[b"\x8a\x80\0\0\0\0" * 10] * 6, *[b"\x8a\x89\0\0\0\0" * 10] * 2)
"""What binary messages are made of. Some look like whole Pongs."""

_PERIOD: Final = 60
"""Bytes of each text and binary."""


class Sent(NamedTuple):
    """What a client sends, and how it is read.

    `pieces` is what arrives, read by read. `recut` is the most bytes that the parser gets at a time, 0 if it gets all.
    `limit` is that of a message, in bytes. Another client speaks at every `every`-th boundary. `compared` says whether
    a parser of its own reads the same.
    """

    pieces: list[bytes]
    limit: int
    recut: int
    every: int
    compared: bool


def random_recipe(source: random.Random) -> bytes:
    """Return a recipe made at random."""
    return source.randbytes(_SETTINGS + 3 * source.randint(1, _FRAMES))


def sent_by(recipe: bytes) -> Sent:
    """Return what a recipe stands for. Any bytes are one; what is missing of the first eight is 0."""
    cut, size, recut, limit, drop, breaks, where, value = recipe[:_SETTINGS].ljust(_SETTINGS, b"\0")
    frames = _frames(recipe, breaks=breaks % 2 == 1)
    data = bytearray().join(frames)
    if breaks >= 240 and data:
        data[where * len(data) // 256] ^= value
    if drop < len(_DROPPED) * 8:
        del data[max(len(data) - _DROPPED[drop // 8], 1) :]
    match cut % 8:
        case 0:
            sizes = [len(data)]
        case 1 | 2 | 3 | 4:
            sizes = [len(frame) for frame in frames]
        case 5:
            sizes = [1 + size % 16]
        case 6:
            first = _BEGINNINGS[size % 4]
            sizes = [part for frame in frames for part in (first, len(frame) - first) if part > 0]
        case _:
            sizes = [_CUTS[byte % 16] for byte in recipe[_SETTINGS:]]
    return Sent(
        pieces=_cut(bytes(data), sizes),
        limit=_LIMITS[limit % 16],
        recut=max(size, len(data) // _PIECES) if recut % 4 == 3 else 0,
        every=1 + recut // 4 % 4,
        compared=limit >= 208,
    )


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at, number = [], 0, 0
    least = len(data) // _PIECES
    while at < len(data):
        size = max(sizes[number % len(sizes)], least, 1)
        pieces.append(data[at : at + size])
        at += size
        number += 1
    return pieces


def _frames(recipe: bytes, *, breaks: bool) -> list[bytes]:
    """Return the frames of a recipe. Only if `breaks` do they break rules."""
    frames, room = [], _ROOM
    message: _Content | None = None  # the unfinished message
    for at in range(_SETTINGS, min(len(recipe), _SETTINGS + 3 * _FRAMES) - 2, 3):
        kind, size, content = recipe[at], _SIZES[recipe[at + 1]], recipe[at + 2]
        broken = content if breaks and content in _BROKEN else 0
        mask = _MASKS[content // 16 % 5]
        if kind >= len(_FITTING) and breaks:
            frame = _frame(_BREAKING[kind - len(_FITTING)], b"a" * size, mask, broken)
        else:
            first = _FITTING[kind % len(_FITTING)]
            if first == _FIN | _CLOSE:
                closes = _CLOSES if breaks else _VALID_CLOSES
                payload = closes[recipe[at + 1] % len(closes)]
            elif first & _CONTROL:
                payload = b"p" * min(size, 125)
            else:
                begins = message is None
                message = message or _Content((_TEXTS if first & _TEXT else _BINARIES)[content % 16])
                payload = message.fragment(size, whole=bool(first & _FIN and not breaks))
                first = first if begins else first & _FIN
                message = None if first & _FIN else message
            frame = _frame(first, payload, mask, broken)
        room -= len(frame)
        if room < 0:
            break
        frames.append(frame)
    return frames


class _Content:
    """A message in fragments, whose ends may lie within a character."""

    __slots__ = ("_at", "_run")

    def __init__(self, run: bytes) -> None:
        self._run = run
        self._at = 0

    def fragment(self, size: int, *, whole: bool) -> bytes:
        """Return the next fragment of that size, or slightly more if it ends the message and is to be `whole`."""
        at = self._at % _PERIOD
        if whole:
            size += -(at + size) % 4 * (self._run[0] >= 0x80)
        self._at += size
        return _filled(self._run, at, size)


@lru_cache(2**12)
def _filled(run: bytes, at: int, size: int) -> bytes:
    return (run * (size // _PERIOD + 2))[at : at + size]


@lru_cache(2**14)
def _frame(first: int, payload: bytes, mask: bytes, broken: int) -> bytes:
    """Return a frame, possibly with a header that breaks the rules of RFC 6455 section 5.2."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    match broken:
        case 1:
            return bytes([first, length[0] & 0x7F]) + length[1:] + payload  # not masked
        case 2:
            length = b"\xfe" + min(size, 65535).to_bytes(2, "big")  # more bytes than the length needs, mostly
        case 3:
            length = b"\xff" + size.to_bytes(8, "big")
        case 4:
            length = b"\xff" + (2**63 + size).to_bytes(8, "big")
        case 5:
            length = b"\xff" + (2**40).to_bytes(8, "big")
        case 6:
            length = bytes([0x80 | (size + 1) % 126])  # the next frame's first byte is taken for payload
        case 7:
            length = b"\xfe\x00\x7e"
            payload = b"p" * 126  # too long for a control frame
        case 8:
            payload = payload[:-1] + b"\xff" * bool(payload)  # no UTF-8
        case 9:
            return bytes([first, 0xFE]) + mask + b"p" * 126  # as if 126 were a length
    return bytes([first]) + length + mask + _masked(payload, mask)


def _masked(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


_BREAKS: Final = b"\x01\0\0\0\0\x01"
"""Settings of a recipe that may break rules."""


def _recipe(settings: bytes, *frames: tuple[int, int, int]) -> bytes:
    """Return a recipe with frames of a first byte, a size and a content."""
    records = (bytes([_kind(first), _SIZES.index(size), content]) for first, size, content in frames)
    return settings.ljust(_SETTINGS, b"\0") + b"".join(records)


def _kind(first: int) -> int:
    return _FITTING.index(first) if first in _FITTING else len(_FITTING) + _BREAKING.index(first)


RECIPES: Final = (
    _recipe(b"\x00", (0x81, 5, 0), (0x81, 0, 0), (0x82, 300, 32)),
    _recipe(b"\x01", (0x8A, 0, 0), (0x01, 0, 0), (0x8A, 0, 0), (0x89, 3, 0), (0x81, 0, 0), (0x81, 1, 0)),
    _recipe(b"\x05\x01\x03", (0x01, 3, 15), (0x01, 1, 31), (0x81, 4, 47), (0x89, 125, 0)),
    _recipe(b"\x06\x01\x03\xc9", (0x81, 126, 16), (0x82, 65536, 0), (0x81, 1, 0)),
    _recipe(b"\x00\x00\x00\xcf", (0x01, 0, 32), (0x81, 1, 32)),
    *(_recipe(b"\x00", (0x81, 7, 32), (0x88, size, 32), (0x81, 7, 32)) for size in (0, 1, 2, 3, 4)),
    *(_recipe(_BREAKS, (0x81, 1, 32), (0x88, size, 32), (0x81, 7, 32)) for size in (5, 7, 13)),
    *(_recipe(_BREAKS, (0x81, 1, 32), (first, 1, 32), (0x81, 1, 32)) for first in _BREAKING),
    *(_recipe(_BREAKS, (0x81, 1, 32), (0x81, 40, broken), (0x81, 1, 32)) for broken in _BROKEN),
    *(_recipe(_BREAKS, (0x81, 1, 32), (0x89, 40, broken), (0x81, 1, 32)) for broken in _BROKEN),
)
