"""The head of an HTTP request, read in one linear pass. No I/O.

Strategy: split at line ends, at the first colon and at commas; strip; compare sets of bytes. There is no regular
expression, since one with two adjacent repeats takes quadratic time. The grammar is that of RFC 9112 (messages) and
RFC 9110 (fields). A server may tolerate folded lines, line ends other than CR LF, and control characters; this one does
not. What passes here means the same to every other reader.
"""

from __future__ import annotations

import string
from http import HTTPStatus
from typing import Final, NamedTuple

from realtimed.text import quoted

__all__ = ["FIELD_LIMIT", "Fault", "Head", "HeadBuffer"]

FIELD_LIMIT: Final = 256
"""Headers of a request. Browsers send about 20, and proxies add a few."""

_TOKEN: Final = b"!#$%&'*+-.^_`|~" + (string.digits + string.ascii_letters).encode()
"""The bytes of names and methods (RFC 9110 section 5.6.2)."""

_VISIBLE: Final = bytes(range(0x21, 0x7F))
_IN_VALUES: Final = b"\t " + _VISIBLE + bytes(range(0x80, 0x100))
_BLANK: Final = b" \t"

_NAME_SHOWN: Final = 40
"""Bytes of a name that are quoted in a sentence."""


class Fault(NamedTuple):
    """What is wrong with a head: a sentence, the name of the wrong header ("" if none), the status of the answer.

    The name is as sent, but cut, with escapes for bytes that are not ASCII.
    """

    sentence: str
    header: str = ""
    status: HTTPStatus = HTTPStatus.BAD_REQUEST


_NO_HTTP: Final = Fault("This is no HTTP request. (If it is TLS: that belongs to the proxy in front of realtimed.)")
_LINE_ENDS: Final = "CR and LF stand only together, at the end of a line (RFC 9112 section 2.2)."


class HeadBuffer:
    """Collects bytes until they hold a whole head, in linear time, whatever pieces they come in.

    Once `feed` has returned True, `head` is the head with the empty line at its end, and `rest` is what came behind it.
    """

    __slots__ = ("_data", "_limit", "head", "rest")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self.head = b""
        self.rest = b""

    @property
    def collected(self) -> bytes:
        """What has come so far."""
        return bytes(self._data)

    def feed(self, data: bytes | bytearray) -> bool:
        """Take more bytes. Return whether the head is whole. Raises `OverflowError` if it is longer than the limit.

        An empty line that ends with LF alone also ends a head, which is refused later. So the peer learns of its
        mistake before its deadline.
        """
        if not self._data and len(data) <= self._limit and _is_one_head(data):
            self.head = bytes(data)
            return True
        begin = max(len(self._data) - 2, 0)
        self._data += data
        if b"\n" not in data and len(self._data) <= self._limit:
            return False
        ends = [at + len(mark) for mark in (b"\n\r\n", b"\n\n") if (at := self._data.find(mark, begin)) >= 0]
        if min(ends, default=len(self._data)) > self._limit:
            raise OverflowError
        if not ends:
            return False
        self.head, self.rest = bytes(self._data[: min(ends)]), bytes(self._data[min(ends) :])
        self._data.clear()
        return True


def _is_one_head(data: bytes | bytearray) -> bool:
    """Return whether `data` is a whole head with nothing behind it: so it comes in general, and is quickly told."""
    return data.find(b"\n\r\n") == len(data) - 3 >= 0 and b"\n\n" not in data


class Head:
    """The parts of a request's head. `fault` is the first thing that is wrong with it, or None.

    `fields` maps each name, in lower case, to its values in order, without the blanks around them. Values may have
    bytes above 0x7f, which have no defined meaning (RFC 9110 section 5.5). After a fault, `fields` has the well-formed
    fields; it is empty if there are too many, since the last ones are unknown then. `method`, `target` and `version`
    are b"" if the fault is in the request line.
    """

    __slots__ = ("fault", "fields", "method", "target", "version")

    def __init__(self, data: bytes) -> None:
        """Read `data`: everything up to the empty line, with or without that line."""
        first, *lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n", FIELD_LIMIT + 1)
        self.method = self.target = self.version = b""
        self.fields: dict[bytes, list[bytes]] = {}
        self.fault = self._read_request_line(first)
        if len(lines) > FIELD_LIMIT:
            self.fault = self.fault or Fault(
                f"A request's head may have {FIELD_LIMIT} headers.", status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            )
        else:
            self._read_fields(lines)

    def text(self, name: bytes) -> str:
        """Return all values of a header, joined by commas (RFC 9110 section 5.3); "" if there is no such header.

        Bytes above 0x7f become U+FFFD.
        """
        return b",".join(self.fields.get(name, ())).decode("ascii", "replace")

    def has_word(self, name: bytes, word: str) -> bool:
        """Return whether `word`, in lower case, is in a header's list of values, where case does not matter."""
        return word in map(str.strip, self.text(name).lower().split(","))

    def _read_request_line(self, line: bytes) -> Fault | None:
        method, _, rest = line.partition(b" ")
        target, _, version = rest.partition(b" ")
        if (b"\r" in line or b"\n" in line) and b" HTTP/" in line:
            return Fault(f"The request line has a CR or LF in it: {_LINE_ENDS}")
        if not method or method.translate(None, _TOKEN) or not target or not version.startswith(b"HTTP/"):
            return _NO_HTTP
        if target.translate(None, _VISIBLE):
            return Fault("The target of a request is visible ASCII, and all else percent-encoded (RFC 9112 section 3).")
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            return Fault("HTTP/1.1 is the version of HTTP that is spoken here.")
        self.method, self.target, self.version = method, target, version
        return None

    def _read_fields(self, lines: list[bytes]) -> None:
        previous = b""
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not name or name.translate(None, _TOKEN) or value.translate(None, _IN_VALUES):
                self.fault = self.fault or _explained(line, previous)
            else:
                self.fields.setdefault(name.lower(), []).append(value.strip(_BLANK))
            previous = name


def _explained(line: bytes, previous: bytes) -> Fault:
    """Return what is wrong with a line that is not a header. `previous` is the name in the line before."""
    name, colon, value = line.partition(b":")
    if line[:1] in (b" ", b"\t"):
        if not previous:
            return Fault("The line after the request line begins with a space (RFC 9112 section 2.2).")
        return _fault(previous, "is folded: the line after it begins with a space (RFC 9112 section 5.2).")
    if b"\r" in line or b"\n" in line:
        return _fault(name, f"has a CR or LF in it: {_LINE_ENDS}")
    if not colon:
        return _fault(name, "has no colon after its name (RFC 9112 section 5).")
    if not name:
        return Fault("A header has no name before its colon (RFC 9112 section 5).")
    if name[-1:] in (b" ", b"\t"):
        return _fault(name, "has a space before its colon (RFC 9112 section 5.1).")
    if wrong := name.translate(None, _TOKEN):
        return _fault(name, f"has a byte in its name that no name may have, {wrong[0]:#04x} (RFC 9110 section 5.1).")
    wrong = value.translate(None, _IN_VALUES)
    return _fault(name, f"has a control character in its value, {wrong[0]:#04x} (RFC 9110 section 5.5).")


def _fault(name: bytes, what: str) -> Fault:
    name = name.rstrip(_BLANK)
    shown = quoted(name, _NAME_SHOWN).removeprefix("b")
    return Fault(f"The header {shown} {what}", name[:_NAME_SHOWN].decode("ascii", "backslashreplace"))
