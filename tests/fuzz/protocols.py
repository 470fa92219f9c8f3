"""Whatever a client says is answered by events, or by silence or a Close in the plain protocol, as a model says.

An input is up to 200 lines of a conversation; one that begins with a zero byte is a binary message. The model reads
JSON with Python's own parser. Where the two parsers differ by intention (numbers out of range, lone surrogates, NaN),
only the form of the answer is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending, Frames
from realtimed.websocket.frames import close_frame
from realtimed.websocket.protocols import Conversation, ViolationError
from realtimed.websocket.protocols.plain import Plain
from realtimed.websocket.protocols.v1 import RealtimeV1
from tests.fuzz.frames import messages_of
from tests.kit.subscribers import Listener

__all__ = ["SEEDS", "check"]

SEEDS: Final = (
    b'{"action":"subscribe","channel":"news"}\n{"action":"unsubscribe","channel":"news"}',
    b'{"action":"subscribe","channel":"news","id":7,"since":{"epoch":"x","offset":0}}\n{"action":"ping","id":"a"}',
    b'{"action":"subscribe","channel":"news","last":2}\n{"action":"subscribe","channel":"news","last":1,"since":null}',
    b'{"action":"subscribe","channel":"news","last":0,"since":{"epoch":"","offset":0}}',
    b"\n".join(
        b'{"action":"subscribe","channel":"%s","id":"x"}' % name for name in (b"a", b"b", b"c", b"d", b"a", b"e f")
    ),
    b'{"action":"subscribe","channel":"\\u00e4\\ud83d\\ude00","id":-1.5e3}\n[1]\nnull\n"x"\n{}\n\x00\xff\n{"action":1}',
    b'{"action":"unsubscribe","action":"subscribe","channel":"news","since":null,"more":[1,{"a":[]}]}',
)

_CHANNEL: Final = re.compile(r"[A-Za-z0-9_\-=@,.;:/]{1,200}")
_MAX_CHANNELS: Final = 3
_LINES: Final = 200
"""Twice as many as a client may send at once."""

_EVENTS: Final = {"subscribed", "unsubscribed", "pong", "error", "message"}
_CODES: Final = {"invalid_message", "invalid_channel", "too_many_channels"}


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    lines: list[str | bytes] = [
        line[1:] if line[:1] == b"\0" else line.decode("utf-8", "ignore") for line in data.split(b"\n", _LINES)[:_LINES]
    ]
    for protocol, judge in ((Plain, _judge_plain), (RealtimeV1, _judge_v1)):
        hub, listener = _hub(), Listener(form=protocol.form)
        conversation: Conversation = protocol(hub, listener)
        model: set[str] = set()
        for line in lines:
            if not judge(conversation, line, model):
                break
            assert {channel.name for channel in listener.channels} == model
            assert hub.subscriptions == len(model)
        hub.leave(listener)
        assert hub.subscriptions == 0


def _hub() -> Hub:
    hub = Hub(
        max_message=100,
        max_channels=_MAX_CHANNELS,
        history=History(limit=1000, clock=lambda: 0.0, default=Retention(2, 60)),
    )
    for number in range(3):
        hub.publish("news", f"{number}")
    return hub


def _judge_plain(conversation: Conversation, line: str | bytes, model: set[str]) -> bool:
    """Check one message; return whether the connection goes on."""
    command, certain = _read(line)
    accepted = command is not None and command.get("action") != "ping" and _join(command, model)
    try:
        answer = conversation.receive(line)
    except ViolationError as raised:
        violation = raised
    else:
        assert not list(answer)
        assert accepted or not certain, f"{line!r} was accepted"
        if not certain:
            model.clear()
            model.update(channel.name for channel in conversation.subscriber.channels)
        return True
    assert violation.ending in (Ending.BAD_MESSAGE, Ending.TOO_MANY), violation
    assert violation.reason
    assert 2 < len(close_frame(conversation.close_code(violation.ending), violation.reason)) <= 127
    assert not (accepted and certain), f"{line!r} was refused: {violation}"
    return False


def _judge_v1(conversation: Conversation, line: str | bytes, model: set[str]) -> bool:
    """Check one message and its answer."""
    command, certain = _read(line)
    accepted = command is not None and _join(command, model)
    events = _events(conversation.receive(line))
    assert events, line
    first = events[0]
    assert {event["event"] for event in events} <= _EVENTS
    assert all(event["event"] == "message" for event in events[1:])
    if first["event"] == "error":
        assert first["code"] in _CODES
        assert first["message"]
    if not certain:
        model.clear()
        model.update(channel.name for channel in conversation.subscriber.channels)
    elif accepted and command is not None:
        answered = {"subscribe": "subscribed", "unsubscribe": "unsubscribed", "ping": "pong"}[command["action"]]
        assert (first["event"], first.get("id")) == (answered, command.get("id")), (line, first)
    else:
        assert first["event"] == "error", (line, first)
    return True


def _join(command: dict[str, Any], model: set[str]) -> bool:
    """Carry a command out in the model; return whether it may be."""
    match command:
        case {"action": "subscribe", "channel": str(channel)}:
            if not _CHANNEL.fullmatch(channel) or (len(model) >= _MAX_CHANNELS and channel not in model):
                return False
            model.add(channel)
        case {"action": "unsubscribe", "channel": str(channel)}:
            if not _CHANNEL.fullmatch(channel):
                return False
            model.discard(channel)
        case {"action": "ping"}:
            pass
        case _:
            return False
    return True


def _read(line: str | bytes) -> tuple[dict[str, Any] | None, bool]:
    """Return a command as Python's parser reads it, None if it is none; and whether that is beyond doubt."""
    if isinstance(line, bytes):
        return None, True
    try:
        found = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        return None, not re.search(r"\d{300}|[\[{]{100}", line)
    certain = not re.search(r"\\u[dD]|\d{15}|[eE.]|\x7f", line.replace('"since"', "").replace("subscribe", ""))
    return (found, certain) if isinstance(found, dict) else (None, certain)


class _Object(dict[str, Any]):
    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _events(answer: Iterable[Frames]) -> list[dict[str, Any]]:
    events = []
    for opcode, payload in messages_of(b"".join(answer)):
        assert opcode == 1
        event = json.loads(payload)
        assert isinstance(event, dict)
        events.append(event)
    return events
