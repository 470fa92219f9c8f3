"""Whatever comes in place of a handshake is answered with 101 or a refusal in words, or ends before the head's end.

An input is a byte for how the rest is cut, and the request. What is answered with 101 is a handshake by the letter of
RFC 6455 section 4.2.1, and bears the right answer to its key.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Final

from tests.fuzz.harness import cut, websocket_hears
from tests.kit.clients import REQUEST

__all__ = ["SEEDS", "check"]

_REFUSALS: Final = {400, 408, 426, 431, 503}
_MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_ROOM: Final = 15_700
"""Bytes that a header's value may have beside the rest of a handshake."""


def _with(line: bytes) -> bytes:
    return b"\x00" + REQUEST.removesuffix(b"\r\n") + line + b"\r\n\r\n"


SEEDS: Final = (
    b"\x00" + REQUEST,
    b"\x01"
    + REQUEST.removesuffix(b"\r\n")
    + b"Sec-WebSocket-Protocol: a, realtime.v1\r\nX-Forwarded-For: ::1, 1\r\n\r\n",
    b"\x02" + REQUEST.replace(b"/ws", b"//%77S?a=b#c") + b"\x81\x80\0\0\0\0",
    b"\x00" + REQUEST.replace(b"13", b"8, 13").replace(b"Upgrade: websocket", b"Upgrade: h2c, WebSocket"),
    b"\x00" + REQUEST.removesuffix(b"\r\n") + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
    b"\x03\x16\x03\x01\x02\x00\r\n\r\n",
    b"\x00GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\n\r\n",
    # Patterns with two repeats side by side take quadratic time for these.
    _with(b"X: a" + b" " * _ROOM + b"b"),
    _with(b"X:" + b" " * _ROOM + b"\0"),
    b"\x00" + REQUEST.replace(b"websocket\r", b"websocket, " + b" " * _ROOM + b", x\r"),
    b"\x00GET / HTTP/1.1\r\nHost: x\r\nCookie: a" + b" " * _ROOM + b"b\r\n\r\n",
    _with(b"X-Forwarded-For: " + b" ," * (_ROOM // 2)),
    _with(b"a:\r\n" * (_ROOM // 4)),
    b"\x00" + REQUEST.replace(b"/ws", b"/%ff" * (_ROOM // 4)),
)


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    how, sent = data[0] if data else 0, data[1:]
    heard = websocket_hears(cut(sent, how))
    end = sent.find(b"\r\n\r\n")
    if not heard:
        assert end < 0, "a whole head has an answer"
        return
    head, _, body = heard.partition(b"\r\n\r\n")
    line = re.match(rb"HTTP/1\.1 (\d{3}) [ -~]*(?:\r\n|$)", head)
    assert line, heard
    status = int(line[1])
    if status != 101:
        assert status in _REFUSALS, status
        assert not body or re.fullmatch(rb"[ -~\xe2\x80\xa6]+\n", body), body
        return
    request = sent[: end + 2]
    fields = [field.partition(b":") for field in request.split(b"\r\n")[1:-1]]
    named = {name.lower(): value.strip() for name, _, value in fields}
    assert request.startswith(b"GET "), request
    assert named[b"sec-websocket-version"] == b"13"
    assert b"websocket" in named[b"upgrade"].lower() or len(fields) > len(named)
    accept = base64.b64encode(hashlib.sha1(named[b"sec-websocket-key"] + _MAGIC).digest())
    assert b"\nsec-websocket-accept: " + accept in b"\n" + re.sub(
        rb"(?i)\nsec-websocket-accept: *", b"\nsec-websocket-accept: ", head
    ), head
