"""However a stream is cut, the decoder gives what MessagePack has in it, or a `ProtocolError`, and nothing else.

An input is a byte for the limit, a byte for how the stream is cut, and the stream. Where no command is too large, an
unpacker without limits has to agree on every command.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgpack

from realtimed.control.wire import (
    BadBytesError,
    Decoder,
    Message,
    Oversized,
    encode_notification,
    encode_request,
    encode_response,
)
from tests.budget import uncharged

__all__ = ["SEEDS", "check"]

_LIMITS: Final = (2**20, 32, 64, 256, 1000)
"""All have room for a request's kind and id, as any that is of use."""

SEEDS: Final = (
    b"\x00\x00" + encode_request(7, "broadcast", ["news", "hello"]) + encode_notification("ping", []),
    b"\x04\x03" + encode_request(2**32 - 1, "broadcast", ["news", b"x" * 300]) + encode_request(8, "ping", []),
    b"\x03\x05" + encode_notification("broadcast", ["news", {"a": [None, True, -1, 1.5, 2**40]}] * 9),
    b"\x02\x01\x94\x00\xce\xff\xff\xff\xff\xa9broadcast\xdd\xff\xff\xff\xff",
    b"\x00\x02" + encode_response(None, {"code": "x", "message": "y"}, None) + encode_response(5, None, True),
    b"\x00\x00\x94\x00\x07\xa9broadcast\x92\xa4news\xa3a\xffb\xc1",
)


class _Outcome(NamedTuple):
    """What came out of a stream. Messages are compared as they are shown, since NaN is not equal to itself."""

    messages: list[str]
    unfinished: bool
    wrong: bool


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    limit = _LIMITS[data[0] % len(_LIMITS)] if data else 1
    stream = data[2:]
    size = max(data[1] + 1, len(stream) // 256) if len(data) > 1 else 1
    whole = _decoded(stream, limit, len(stream) or 1)
    in_pieces = _decoded(stream, limit, size)
    assert _agree(whole, in_pieces), f"in pieces of {size}: {in_pieces}; whole: {whole}"
    if len(stream) <= limit and not any(message.startswith("Oversized") for message in whole.messages):
        with uncharged():
            expected = _unpacked(stream)
        assert whole.messages == expected, f"{whole.messages}, not {expected}"


def _agree(one: _Outcome, other: _Outcome) -> bool:
    """Return whether two outcomes are the same, but for what they say of a command that is too large and wrong."""
    if one == other:
        return True
    shorter, longer = sorted((one, other), key=lambda outcome: len(outcome.messages))
    same = len(shorter.messages)
    rest = longer.messages[same:]
    return shorter.wrong and longer.messages[:same] == shorter.messages and bool(rest) and "Oversized" in rest[0]


def _decoded(stream: bytes, limit: int, size: int) -> _Outcome:
    decoder = Decoder(limit)
    messages: list[Message] = []
    for at in range(0, len(stream), size):
        try:
            messages += decoder.feed(stream[at : at + size])
        except BadBytesError as error:
            return _Outcome([repr(each) for each in messages + error.messages], unfinished=False, wrong=True)
    assert all(each.limit == limit for each in messages if isinstance(each, Oversized))
    return _Outcome([repr(each) for each in messages], decoder.mid_message, wrong=False)


def _unpacked(stream: bytes) -> list[str]:
    """Return the commands at the beginning of a stream, in the form of ours, as msgpack alone finds them."""
    unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="surrogateescape")
    unpacker.feed(stream)
    commands: list[str] = []
    try:
        for value in unpacker:
            match value if type(value) is list and value and type(value[0]) is int else None:  # True equals 1
                case [0, id, str(method), list(params)] if _is_id(id):
                    commands.append(f"Request(id={id}, method={method!r}, params={params!r})")
                case [1, id, error, result] if id is None or _is_id(id):
                    commands.append(f"Response(id={id}, error={error!r}, result={result!r})")
                case [2, str(method), list(params)]:
                    commands.append(f"Notification(method={method!r}, params={params!r})")
                case _:
                    break
    except (ValueError, TypeError):
        pass  # no MessagePack, or an unhashable key: what came before counts
    return commands


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32
