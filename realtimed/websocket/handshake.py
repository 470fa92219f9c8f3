"""A WebSocket handshake's request: what is wrong with it, in words, and the answer to a good one. No I/O.

trio-websocket refuses bad handshakes without saying why, accepts some that RFC 6455 does not allow, and takes a hundred
times as long to answer. So it never sees a peer's request. The fuzzer `tests.fuzz.switching` compares the answers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import string
from collections.abc import Callable, Iterator
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final, NamedTuple
from urllib.parse import unquote

from realtimed.net.head import Head

__all__ = [
    "Refusal",
    "client_address",
    "forwarded_for",
    "http_answer",
    "path",
    "refusal",
    "subprotocols",
    "switching_protocols",
]

_READ: Final = (
    b"host", b"connection", b"upgrade", b"content-length", b"transfer-encoding", b"x-forwarded-for",
    b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-protocol",
)  # fmt: skip
"""The headers that are read here. They must be ASCII. All others may have bytes above 0x7f in their values."""

_IN_HOSTS: Final = (string.ascii_letters + string.digits + "-._~!$&'()*+,;=%[]:").encode()
"""The bytes of RFC 3986 section 3.2.2, and the colon before a port."""

_ADDRESS_LENGTH: Final = 64
"""Characters of an IPv6 address with the name of an interface. Python accepts a name of any length."""

_SCHEMES: Final = (b"http://", b"https://")

_PATH_LENGTH: Final = 1024
"""Bytes of a path. Decoding 16 KiB of percent signs would take 10 ms."""

_KEY_BYTES: Final = 16
_KEY_LENGTH: Final = 24
"""RFC 6455 section 4.1, number 7; and their length in base64."""

_KEY_SUFFIX: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""What proves that the server speaks WebSocket: hashed together with the key (RFC 6455 section 1.3)."""


class Refusal(NamedTuple):
    """An HTTP answer other than 101: its status, a sentence that says why, and its headers.

    `header` is the name of the wrong header of the request, for the log; "" if no header is wrong.
    """

    status: HTTPStatus
    sentence: str
    headers: str = "Connection: close\r\n"
    header: str = ""


_NO_WEBSOCKET: Final = Refusal(
    HTTPStatus.UPGRADE_REQUIRED,
    "This is realtimed. It speaks WebSocket, not HTTP: connect with new WebSocket(…) to /ws.",
    "Upgrade: websocket\r\nConnection: Upgrade, close\r\n",
    "Upgrade",
)
_OTHER_VERSION: Final = Refusal(
    HTTPStatus.UPGRADE_REQUIRED,
    "Sec-WebSocket-Version: 13 is the version that is spoken here (RFC 6455).",
    "Upgrade: websocket\r\nConnection: Upgrade, close\r\nSec-WebSocket-Version: 13\r\n",
    "Sec-WebSocket-Version",
)


def refusal(head: Head) -> Refusal | None:
    """Return why a request is not a WebSocket handshake, or None if it is one.

    The rules are those of RFC 6455 section 4.2.1, and of RFC 9112 for what is not HTTP. The first check that finds
    something decides.
    """
    for check in _CHECKS:
        found = check(head)
        if found is not None:
            return found
    return None


def forwarded_for(head: Head) -> str:
    """Return the address for which the last proxy says it speaks; "" if what it says is too long for an address."""
    hop = head.text(b"x-forwarded-for").rpartition(",")[2].strip()
    return hop if len(hop) <= _ADDRESS_LENGTH else ""


def client_address(peer: str, head: Head) -> str:
    """Return the address of the client, if known. `peer` is the address of its connection, or "".

    Only what a proxy on this machine adds to X-Forwarded-For is trusted.
    """
    if peer and not ip_address(peer.partition("%")[0]).is_loopback:
        return peer
    named = forwarded_for(head).partition("%")[0]  # an address's zone may have any length
    if not named:
        return peer
    try:
        return str(ip_address(named))
    except ValueError:
        return peer


def http_answer(status: HTTPStatus, sentence: str, headers: str) -> bytes:
    """Return an HTTP answer with a sentence as its body. `headers` are further headers, as lines."""
    body = sentence.encode() + b"\n"
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(body)}\r\n{headers}"
    return f"{head}Content-Type: text/plain; charset=utf-8\r\n\r\n".encode() + body


def path(head: Head) -> str:
    """Return the path of a request's target as Caddy's path matcher sees it: decoded, in lower case, slashes merged.

    Of a longer path only the first `_PATH_LENGTH` bytes are decoded, and the result ends with "…".
    """
    target = head.target
    if target.lower().startswith(_SCHEMES):  # a request to a proxy also names the host
        target = b"/" + target.partition(b"://")[2].partition(b"?")[0].partition(b"/")[2]
    encoded = target.partition(b"?")[0].partition(b"#")[0].decode("ascii")
    decoded = unquote(encoded[:_PATH_LENGTH]) + "…" * (len(encoded) > _PATH_LENGTH)
    begin, end = "/" * decoded.startswith("/"), "/" * decoded.endswith("/")
    merged = "/".join(filter(None, decoded.split("/"))).lower()
    return f"{begin}{merged}{end}" if merged else begin


def subprotocols(head: Head) -> Iterator[str]:
    """Yield the subprotocols that the client offers, in its order."""
    return filter(None, map(str.strip, head.text(b"sec-websocket-protocol").split(",")))


def switching_protocols(head: Head, subprotocol: str) -> bytes:
    """Return the answer to a handshake that `refusal` has accepted (RFC 6455 section 4.2.2).

    `subprotocol` is one that the client offers; "" stands for none. trio-websocket would write the same bytes.
    """
    [key] = head.fields[b"sec-websocket-key"]
    proof = base64.b64encode(hashlib.sha1(key + _KEY_SUFFIX).digest()).decode()
    chosen = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {proof}\r\n{chosen}\r\n"
    ).encode()


def _bad(sentence: str, name: bytes = b"") -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, sentence, header=_spelled(name))


def _spelled(name: bytes) -> str:
    return name.decode("ascii").title().replace("Websocket", "WebSocket")


def _not_http(head: Head) -> Refusal | None:
    return Refusal(head.fault.status, head.fault.sentence, header=head.fault.header) if head.fault is not None else None


def _not_ascii(head: Head) -> Refusal | None:
    for name in _READ:
        if not b"".join(head.fields.get(name, ())).isascii():
            return _bad(f"The header {_spelled(name)} has a byte above 0x7f in its value (RFC 9110 section 5.5).", name)
    return None


def _unclear_end(head: Head) -> Refusal | None:
    """Refuse a request about whose end two readers might not agree."""
    lengths = head.fields.get(b"content-length", [])
    if len(lengths) > 1:
        return _bad(f"A request has one Content-Length, not {len(lengths)} (RFC 9112 section 6.3).", b"content-length")
    if lengths and not lengths[0].isdigit():
        return _bad("The value of Content-Length is one number (RFC 9110 section 8.6).", b"content-length")
    if lengths and b"transfer-encoding" in head.fields:
        return _bad(
            "A request has Content-Length or Transfer-Encoding, not both (RFC 9112 section 6.3).", b"transfer-encoding"
        )
    return None


def _no_upgrade(head: Head) -> Refusal | None:
    return _NO_WEBSOCKET if b"upgrade" not in head.fields else None


def _wrong_request_line(head: Head) -> Refusal | None:
    if head.method != b"GET" or head.version != b"HTTP/1.1":
        return _bad("A WebSocket handshake is a GET request of HTTP/1.1.")
    if not head.target.lower().startswith((b"/", *_SCHEMES)):
        return _bad("The target of a request begins with a slash, as /ws does.")
    return None


def _has_body(head: Head) -> Refusal | None:
    if b"transfer-encoding" in head.fields:
        return _bad("A WebSocket handshake has no body, and no Transfer-Encoding.", b"transfer-encoding")
    if head.fields.get(b"content-length", [b"0"])[0].strip(b"0"):
        return _bad("A WebSocket handshake has no body, and no Content-Length but 0.", b"content-length")
    return None


def _wrong_host(head: Head) -> Refusal | None:
    hosts = head.fields.get(b"host", [])
    if len(hosts) != 1:
        return _bad("A request has one Host header.", b"host")
    if hosts[0].translate(None, _IN_HOSTS):
        return _bad("The value of Host is a name or an address, and possibly a port (RFC 9110 section 7.2).", b"host")
    return None


def _wrong_upgrade(head: Head) -> Refusal | None:
    for name, word in ((b"upgrade", "websocket"), (b"connection", "upgrade")):
        if not head.has_word(name, word):
            return _bad("A WebSocket handshake has the headers Connection: Upgrade and Upgrade: websocket.", name)
    return None


def _wrong_version(head: Head) -> Refusal | None:
    versions = head.fields.get(b"sec-websocket-version", [])
    if len(versions) != 1:
        return _bad("A WebSocket handshake has one Sec-WebSocket-Version, which is 13.", b"sec-websocket-version")
    return _OTHER_VERSION if versions != [b"13"] else None


def _wrong_key(head: Head) -> Refusal | None:
    if _is_key(head.fields.get(b"sec-websocket-key", [])):
        return None
    sentence = f"A WebSocket handshake has one Sec-WebSocket-Key, {_KEY_BYTES} bytes in base64."
    return _bad(sentence, b"sec-websocket-key")


def _is_key(values: list[bytes]) -> bool:
    if [len(value) for value in values] != [_KEY_LENGTH]:
        return False
    try:
        return len(base64.b64decode(values[0], validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False


_CHECKS: Final[tuple[Callable[[Head], Refusal | None], ...]] = (
    _not_http,
    _not_ascii,
    _unclear_end,
    _no_upgrade,
    _wrong_request_line,
    _has_body,
    _wrong_host,
    _wrong_upgrade,
    _wrong_version,
    _wrong_key,
)
"""What `refusal` checks, in this order. Each returns a refusal, or None if it finds nothing wrong."""
