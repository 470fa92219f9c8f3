"""Text from outside as it may be shown: escaped, cut, on one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["printable", "quoted"]


def printable(text: str) -> str:
    """Return `text` on one line and with no power over a terminal: what is not printable comes out escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def quoted(value: object, limit: int = 60) -> str:
    """Return `value` as it may stand in an error or a log line.

    Control characters, terminal escapes, characters that turn the direction of writing, lone surrogates and anything
    else that `str.isprintable` rejects are escaped. A string or bytes are cut to about `limit` characters.
    """
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return repr(value[:limit]) + "…"
    shown = ""
    for piece in _representation(value, limit):
        shown += piece
        if len(shown) > limit + 2:
            return shown[:limit] + "…"
    return shown


_DECIMAL_BITS: Final = 1024
"""Bits of a number that is shown in decimal digits, however few of them."""


def _representation(value: object, limit: int) -> Iterator[str]:
    """Yield `repr` of a value in pieces. Who stops after `limit` characters spends no time on the rest.

    Each level of a nested value yields at least one character first, so it is not entered any deeper than that.
    """
    match value:
        case str() | bytes():
            yield repr(value[: limit + 3])
        case bool():
            yield repr(value)
        case int() if value.bit_length() > max(4 * (limit + 3), _DECIMAL_BITS):
            yield hex(value >> value.bit_length() - 4 * (limit + 3))  # decimal digits would take quadratic time
        case list():
            yield "["
            for number, each in enumerate(value):
                if number:
                    yield ", "
                yield from _representation(each, limit)
            yield "]"
        case dict():
            yield "{"
            for number, (key, each) in enumerate(value.items()):
                yield ", " if number else ""
                yield from _representation(key, limit)
                yield ": "
                yield from _representation(each, limit)
            yield "}"
        case _:
            yield repr(value)
