"""Whatever frames a client sends, however cut, it hears what RFC 6455 says, at most one Close, and nothing after it.

An input is a byte for the protocol, a byte for how the rest is cut, and what follows the handshake. With the echo
protocol every answer is known, from a reader of frames that was written from the RFC; a limit may end it sooner.
"""

from __future__ import annotations

import json
from typing import Final
from unittest import mock

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage

from realtimed.websocket.frames import CloseCode
from realtimed.websocket.protocols import PROTOCOLS
from tests.fuzz.frames import CLOSE, TEXT, Expected, expected, measured, messages_of
from tests.fuzz.harness import BURST, MAX_INBOUND, cut, websocket_hears
from tests.kit.budget import uncharged
from tests.kit.clients import REQUEST, subscribe
from tests.system.echo_daemon import Echo

__all__ = ["SEEDS", "check"]

_OURS: Final = (CloseCode.BAD_MESSAGE, CloseCode.TOO_MANY, CloseCode.MESSAGE_TOO_BIG)


class _Echo(Echo):
    __slots__ = ()

    name = "echo"


def _sent(*events: Event) -> bytes:
    client = Connection(ConnectionType.CLIENT)
    return b"".join(client.send(event) for event in events)


SEEDS: Final = (
    b"\x00\x00" + _sent(TextMessage(data="häll"), TextMessage(data="o"), CloseConnection(code=1000, reason="x")),
    b"\x00\x03" + _sent(TextMessage(data="ä", message_finished=False), Ping(payload=b"x"), TextMessage(data="b")),
    b"\x00\x05" + _sent(BytesMessage(data=b"\xff" * 200), BytesMessage(data=b"y" * 1100)),
    b"\x00\x00" + _sent(*[Ping()] * 70),
    b"\x00\x01\xc1\x80\0\0\0\0",
    b"\x01\x00" + _sent(TextMessage(data=subscribe("news")), TextMessage(data="not JSON")),
    b"\x02\x02" + _sent(TextMessage(data=subscribe("news", id=1)), TextMessage(data='{"action":"ping"}')),
)


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    name = ("echo", "", "realtime.v1")[data[0] % 3] if data else "echo"
    how = data[1] if len(data) > 1 else 0
    sent = data[2:]
    offer = f"Sec-WebSocket-Protocol: {name}\r\n\r\n".encode() if name else b"\r\n"
    with mock.patch.dict(PROTOCOLS, {"echo": _Echo}):
        heard = websocket_hears([REQUEST.removesuffix(b"\r\n") + offer, *cut(sent, how)])
    with uncharged():
        _judge(name, sent, heard)


def _judge(name: str, sent: bytes, heard: bytes) -> None:
    head, end, frames = heard.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    assert end
    events = list(messages_of(frames))
    code = None
    if events and events[-1][0] == CLOSE:
        _, payload = events.pop()
        code = int.from_bytes(payload[:2], "big") if payload else 1005
        payload[2:].decode()
    assert CLOSE not in [opcode for opcode, _ in events]
    model = expected(sent)
    if name == "echo":
        _compare(events, code, model, *measured(sent))
    else:
        assert code in model.codes or code in _OURS, (code, model.codes)
        for opcode, payload in events:
            if opcode == TEXT:
                json.loads(payload)


def _compare(events: list[tuple[int, bytes]], code: int | None, model: Expected, frames: int, largest: int) -> None:
    cut_short = (frames > BURST and code == CloseCode.TOO_MANY) or (
        largest > MAX_INBOUND and code == CloseCode.MESSAGE_TOO_BIG
    )
    if cut_short:
        assert events == model.events[: len(events)]
    else:
        assert code in model.codes, f"closed with {code}, not {model.codes}"
        assert events == model.events, f"heard {events}, not {model.events}"
