"""A WebSocket handshake's request: what is wrong with it, in words, and what trio-websocket needs of it. No I/O.

The library refuses bad handshakes too, but without saying why, and takes some that RFC 6455 does not allow. It only
ever sees those that pass here.
"""

from __future__ import annotations

import base64
import binascii
import re
from http import HTTPStatus
from typing import Final, NamedTuple

__all__ = ["Refusal", "forwarded_for", "refusal", "without_unread"]

_REQUEST_LINE: Final = re.compile(rb"([A-Z]+) ([!-~]+) HTTP/1\.([01])\r\n")
_TARGET: Final = re.compile(rb"/|https?://", re.IGNORECASE)
_FIELD: Final = re.compile(rb"\n([^\s:]+):[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)")
_FORWARDED_FOR: Final = re.compile(rb"\nx-forwarded-for[ \t]*:([^\r\n]*)", re.IGNORECASE)
_HOST: Final = re.compile(rb"(\nhost:)[^\r\n]*", re.IGNORECASE)
_UNREAD: Final = re.compile(
    rb"\n(?!(?:host|connection|upgrade|content-length|transfer-encoding|sec-websocket-(?:key|version|protocol))[ \t]*:)"
    rb"[^\r\n:]+:[^\r\n]*\r(?=\n)",
    re.IGNORECASE,
)
_MISFORMED: Final = re.compile(rb"\n[ \t]|(?<!\r)\n|\r(?!\n)")
"""A folded line, or one that does not end with CR LF: others may take it for another line, or for two."""

_KEY_BYTES: Final = 16
"""RFC 6455 section 4.1, number 7."""


class Refusal(NamedTuple):
    """An HTTP answer that is not 101: its status, a sentence for whoever reads it, and headers that belong to it."""

    status: HTTPStatus
    sentence: str
    headers: str = "Connection: close\r\n"


_NO_WEBSOCKET: Final = Refusal(
    HTTPStatus.UPGRADE_REQUIRED,
    "This is realtimed. It speaks WebSocket, not HTTP: connect with new WebSocket(…) to /ws.",
    "Upgrade: websocket\r\nConnection: Upgrade, close\r\n",
)
_OTHER_VERSION: Final = Refusal(
    HTTPStatus.UPGRADE_REQUIRED,
    "Sec-WebSocket-Version: 13 is the version that is spoken here (RFC 6455).",
    "Upgrade: websocket\r\nConnection: Upgrade, close\r\nSec-WebSocket-Version: 13\r\n",
)


def refusal(head: bytes) -> Refusal | None:
    """Return why a request's head is no WebSocket handshake, or None if it is one.

    The rules are those of RFC 6455 section 4.2.1.
    """
    line = _REQUEST_LINE.match(head)
    if line is None:
        return _bad("This is no HTTP request. (If it is TLS: that belongs to the proxy in front of realtimed.)")
    if not head.isascii() or _MISFORMED.search(head) is not None:
        return _bad("A request's head is ASCII, in lines that end with CR LF and are not folded (RFC 9112).")
    fields: dict[bytes, list[bytes]] = {}
    for name, value in _FIELD.findall(head):
        fields.setdefault(name.lower(), []).append(value)
    if b"upgrade" not in fields:
        return _NO_WEBSOCKET
    if line[1] != b"GET" or line[3] != b"1":
        return _bad("A WebSocket handshake is a GET request of HTTP/1.1.")
    if _TARGET.match(line[2]) is None:
        return _bad("The target of a request begins with a slash, as /ws does.")
    if len(fields.get(b"host", ())) != 1:
        return _bad("A request has one Host header.")
    if b"websocket" not in _words(fields[b"upgrade"]) or b"upgrade" not in _words(fields.get(b"connection", [])):
        return _bad("A WebSocket handshake has the headers Connection: Upgrade and Upgrade: websocket.")
    versions = fields.get(b"sec-websocket-version", [])
    if len(versions) != 1:
        return _bad("A WebSocket handshake has one Sec-WebSocket-Version, which is 13.")
    if versions != [b"13"]:
        return _OTHER_VERSION
    if not _is_key(fields.get(b"sec-websocket-key", [])):
        return _bad(f"A WebSocket handshake has one Sec-WebSocket-Key, {_KEY_BYTES} bytes in base64.")
    return None


def forwarded_for(head: bytes) -> str:
    """Return whom the last proxy says it speaks for, "" if it says nothing."""
    hops = _FORWARDED_FOR.findall(head)
    return hops[-1].decode("ascii", "replace").rpartition(",")[2].strip() if hops else ""


def without_unread(head: bytes) -> bytes:
    """Return a head with those headers only that the library reads.

    It keeps all of them as long as the connection lives, and a browser sends a dozen that nobody reads. Nor does
    anybody read Host, but the library decodes it, and raises for what is no internationalized name.
    """
    return _HOST.sub(b"\\1 realtimed", _UNREAD.sub(b"", head))


def _bad(sentence: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, sentence)


def _words(values: list[bytes]) -> set[bytes]:
    """Return the words of a header whose value is a list, in lower case."""
    return {word.strip().lower() for value in values for word in value.split(b",")}


def _is_key(values: list[bytes]) -> bool:
    try:
        return len(values) == 1 and len(base64.b64decode(values[0], validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False
