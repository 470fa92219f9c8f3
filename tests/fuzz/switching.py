"""For each head that is let pass, our 101 is what the library would write: for our request, and for the client's own.

An input is a recipe for a head: any bytes, read from their beginning, that choose a target, the order of the headers,
their names' letters, blanks, lists and further headers. Most such heads are let pass.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import Final, TypeVar

from realtimed.net.head import Head
from realtimed.websocket.handshake import refusal, subprotocols, switching_protocols
from realtimed.websocket.protocols import PROTOCOLS
from tests.kit.heads import HEADS, answer_of_the_library, key_of, own_request

__all__ = ["SEEDS", "TALLY", "check", "generate", "head_of"]

TALLY: Final = Counter[str]()
"""Heads that were let pass or refused, and the answers that were compared."""

_LITERAL: Final = b"\0"
"""The first byte of an input that is a head itself, and no recipe."""

_TARGETS: Final = (
    b"/ws", b"/ws", b"/", b"/WS/", b"//%77s?a=b", b"/ws#x", b"http://localhost/ws", b"HTTPS://x:443", b"/" * 300,
    b"*",
)  # fmt: skip
_HOSTS: Final = (b"localhost", b"x", b"", b"[::1]:8080", b"xn--zzzzzz", b"a" * 70, b"EXAMPLE.org:443", b"..")
_CONNECTIONS: Final = (b"Upgrade", b"upgrade", b"keep-alive, Upgrade", b",UPGRADE,\t", b"close , upgrade", b"close")
_UPGRADES: Final = (b"websocket", b"WebSocket", b"h2c, websocket", b"websocket,,", b"WEBSOCKET\t", b"h2c")
_OFFERS: Final = (
    b"realtime.v1", b"graphql-ws, realtime.v1", b"realtime.v1,realtime.v1", b", ,realtime.v1,", b"REALTIME.V1", b"",
    b"a b", b'"realtime.v1"',
)  # fmt: skip
_NAMES: Final = (
    b"Cookie", b"User-Agent", b"Origin", b"X", b"Sec-WebSocket-Extensions", b"X-Forwarded-For", b"Expect", b"Accept",
    b"Sec-WebSocket-Accept", b"Sec-WebSocket-Version-", b"!#$%&'*+-.^_`|~", b"TE",
)  # fmt: skip
_VALUES: Final = (
    b"", b"0", b"a=b; c=d", b"100-continue", b"permessage-deflate; client_max_window_bits", b"\xff\xfe",
    b"::1, 1.2.3.4", b"\xc3\xa4", b"x" * 500, b",", b'"', b"a:b", b"101",
)  # fmt: skip
_BLANKS: Final = (b" ", b" ", b" ", b"", b"\t", b"  \t ", b" " * 40)

T = TypeVar("T")


class _Choices:
    """Takes choices from the bytes of a recipe. When they are used up, it takes the first of each."""

    def __init__(self, recipe: bytes) -> None:
        self._bytes = iter(recipe)

    def number(self, limit: int) -> int:
        """Return a number below `limit`, which is at most 256."""
        return next(self._bytes, 0) % limit

    def of(self, choices: Sequence[T]) -> T:
        """Return one of the choices."""
        return choices[self.number(len(choices))]

    def rarely(self, often: T, rare: Sequence[T]) -> T:
        """Return `often`, mostly."""
        return self.of(rare) if self.number(8) == 7 else often

    def spelled(self, name: bytes) -> bytes:
        """Return a name in some mixture of small and large letters."""
        how = self.number(256)
        if how < 128:
            return name
        return bytes(byte ^ 0x20 if chr(byte).isalpha() and how >> at % 7 & 1 else byte for at, byte in enumerate(name))


def head_of(recipe: bytes) -> bytes:
    """Return the head that a recipe stands for."""
    choices = _Choices(recipe)
    target = choices.rarely(b"/ws", _TARGETS)
    key = base64.b64encode(hashlib.sha1(recipe).digest()[:16])
    fields = [
        (b"Host", choices.rarely(b"localhost", _HOSTS)),
        (b"Upgrade", choices.rarely(b"websocket", _UPGRADES)),
        (b"Connection", choices.rarely(b"Upgrade", _CONNECTIONS)),
        (b"Sec-WebSocket-Key", choices.rarely(key, (b"A" * 22 + b"==", b"/+" * 10 + b"/w=="))),
        (b"Sec-WebSocket-Version", b"13"),
    ]
    for _ in range(choices.number(4)):
        fields.insert(choices.number(len(fields) + 1), (b"Sec-WebSocket-Protocol", choices.of(_OFFERS)))
    for _ in range(choices.number(6)):
        value = choices.of(_VALUES) if choices.number(2) else bytes(choices.number(128) + 128 for _ in range(4))
        fields.insert(choices.number(len(fields) + 1), (choices.of(_NAMES), value))
    if choices.number(16) == 15:
        fields.insert(choices.number(len(fields)), (b"Connection", choices.of(_CONNECTIONS)))
    if choices.number(16) == 15:
        fields.insert(choices.number(len(fields)), (b"Content-Length", choices.of((b"0", b"000", b"1"))))
    if choices.number(16) == 15:
        fields.insert(choices.number(len(fields)), (b"Upgrade", choices.of(_UPGRADES)))
    for at in range(choices.number(len(fields))):
        other = choices.number(len(fields))
        fields[at], fields[other] = fields[other], fields[at]
    lines = [choices.spelled(name) + b":" + choices.of(_BLANKS) + value + choices.of(_BLANKS) for name, value in fields]
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", *lines, b"", b""])


SEEDS: Final = (*(_LITERAL + head for head in HEADS), b"", *(bytes([byte]) * 100 for byte in (1, 7, 8, 15, 128, 255)))


def generate(source: random.Random) -> bytes:
    """Return a recipe made at random."""
    return bytes([source.randint(1, 255)]) + source.randbytes(source.randint(20, 100))


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    sent, end, _ = (data[1:] if data[:1] == _LITERAL else head_of(data)).partition(b"\r\n\r\n")
    if not end:
        return
    sent += end
    head = Head(sent)
    if refusal(head) is not None:
        TALLY["refused"] += 1
        return
    TALLY["heads"] += 1
    key, offered = key_of(head), set(subprotocols(head))
    for subprotocol in ("", *(name for name in PROTOCOLS if name in offered)):
        answer = switching_protocols(head, subprotocol)
        assert answer == answer_of_the_library(own_request(key, subprotocol), subprotocol)
        theirs = answer_of_the_library(sent, subprotocol)  # None if the library does not let the head pass
        assert theirs in (answer, None)
        TALLY["answers"] += 1
        TALLY["answers to the client's own request"] += theirs is not None
