"""Sizes, times and rates as people write them: 64K, 1.5 MiB, 250ms, 1h30m, 100/s.

The functions raise `ValueError` without words: their callers know the sentence that it belongs to.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["as_rate", "as_seconds", "as_size", "shown_seconds", "shown_size"]

_LONGEST: Final = 40
"""Characters of a size, time or rate; a longer text is none."""

_TIMES: Final = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_SIZES: Final = {"g": 2**30, "m": 2**20, "k": 2**10, "": 1}

_TIME: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(ms|[smhd]) *")
_SIZE: Final = re.compile(r"([0-9]+)(\.[0-9]+)? *(?:([kmg])i?)?b?", re.IGNORECASE)
_RATE: Final = re.compile(r"(.+?) */ *([smhd])")


def as_seconds(value: object) -> float:
    """Return a time in seconds: a number of them, or a text such as 90, 90s, 500ms, 12h or 1h30m.

    The number may be negative, infinite or not a number. Raises `ValueError` if `value` is not a time.
    """
    number = _number(value)
    if number is not None:
        return number
    total, rest = 0.0, _text(value)
    if not rest:
        raise ValueError
    while rest:
        match = _TIME.match(rest)
        if match is None:
            raise ValueError
        total += float(match[1]) * _TIMES[match[2]]
        rest = rest[match.end() :]
    return total


def as_size(value: object) -> int:
    """Return a number of bytes: a whole number, or a text such as 65536, 64K, 64 KB or 1.5GiB.

    K, M and G are powers of 1,024, in upper or lower case, with or without B or iB after them. Raises `ValueError` if
    `value` is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(_text(value))
    if match is None or (match[2] and not match[3]):
        raise ValueError
    unit = _SIZES[(match[3] or "").lower()]
    return int(match[1]) * unit + int(float(match[2] or 0) * unit)


def as_rate(value: object) -> float:
    """Return a number per second: a number, or a text such as 50, 50/s or 300/m.

    Raises `ValueError` if `value` is not a rate.
    """
    number = _number(value)
    if number is not None:
        return number
    match = _RATE.fullmatch(_text(value))
    number = _number(match[1]) if match is not None else None
    if match is None or number is None:
        raise ValueError
    return number / _TIMES[match[2]]


def shown_seconds(seconds: float) -> str:
    """Return a time as `as_seconds` reads it, in the largest unit that gives a whole number."""
    for name, length in _TIMES.items():
        if seconds and not seconds % length:
            return f"{seconds / length:g}{name}"
    return f"{seconds:g}"


def shown_size(size: int) -> str:
    """Return a size as `as_size` reads it, in the largest unit that gives a whole number."""
    for name, length in _SIZES.items():
        if size and not size % length:
            return f"{size // length}{name.upper()}"
    return str(size)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > _LONGEST:
        raise ValueError
    return value.strip()


def _number(value: object) -> float | None:
    """Return a number without a unit, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > _LONGEST:
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
