"""However a stream is cut, the decoder gives what MessagePack has in it, or a `ProtocolError`, and nothing else.

An input is a byte for the limits, a byte for how the stream is cut, and the stream. Where no command is too large, an
unpacker without limits has to agree on every command.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgpack

from realtimed.rpc.walker import DEPTH_LIMIT
from realtimed.rpc.wire import (
    BadBytesError,
    Decoder,
    Message,
    Oversized,
    encode_notification,
    encode_request,
    encode_response,
)
from tests.kit.budget import uncharged

__all__ = ["SEEDS", "check"]

_LIMITS: Final = (2**20, 32, 64, 256, 1000)
"""All have room for a request's kind and id, as any that is of use."""

_VALUES: Final = (None, 16, 8192)

SEEDS: Final = (
    b"\x00\x00" + encode_request(7, "broadcast", ["news", "hello"]) + encode_notification("ping", []),
    b"\x04\x03" + encode_request(2**32 - 1, "broadcast", ["news", b"x" * 300]) + encode_request(8, "ping", []),
    b"\x03\x05" + encode_notification("broadcast", ["news", {"a": [None, True, -1, 1.5, 2**40]}] * 9),
    b"\x02\x01\x94\x00\xce\xff\xff\xff\xff\xa9broadcast\xdd\xff\xff\xff\xff",
    b"\x00\x02" + encode_response(None, {"code": "x", "message": "y"}, None) + encode_response(5, None, True),
    b"\x00\x00\x94\x00\x07\xa9broadcast\x92\xa4news\xa3a\xffb\xc1",
    b"\x0a\x00" + encode_request(9, "m", [[[[[5]]], {"a": {"b": []}}]]) + b"\x94\x00\x07\xa1m" + b"\xdc\x1f\xff" * 9,
    b"\x05\x07" + encode_request(9, "m", [0] * 20) + encode_request(10, "m", [0] * 9),
    b"\x05\x3e" + encode_request(9, "m", [0] * 60)[:-1] + b"\x91" * 40 + b"\xc0" + encode_request(10, "m", []),
)


class _Outcome(NamedTuple):
    """What came out of a stream. Messages are compared as they are shown, since NaN is not equal to itself."""

    messages: list[str]
    unfinished: bool
    wrong: bool


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    first = data[0] if data else 0
    limit, max_values = _LIMITS[first % len(_LIMITS)], _VALUES[first // len(_LIMITS) % len(_VALUES)]
    stream = data[2:]
    size = max(data[1] + 1, len(stream) // 256) if len(data) > 1 else 1
    whole = _decoded(stream, limit, max_values, len(stream) or 1)
    in_pieces = _decoded(stream, limit, max_values, size)
    assert _agree(whole, in_pieces), f"in pieces of {size}: {in_pieces}; whole: {whole}"
    if len(stream) <= min(limit, max_values or limit) and not any(
        message.startswith("Oversized") for message in whole.messages
    ):
        with uncharged():
            expected = _unpacked(stream)
        assert whole.messages == expected, f"{whole.messages}, not {expected}"


def _agree(one: _Outcome, other: _Outcome) -> bool:
    """Return whether two outcomes are the same, but for what they say of a command that is too large and wrong."""
    if one == other:
        return True
    shorter, longer = sorted((one, other), key=lambda outcome: (len(outcome.messages), not outcome.wrong))
    same = len(shorter.messages)
    # The command is wrong before it is known to be too large, or was reported as too large before.
    either = [*shorter.messages[-1:], *longer.messages[same : same + 1]]
    return (
        shorter.wrong
        and longer.messages[:same] == shorter.messages
        and any(message.startswith("Oversized") for message in either)
    )


def _decoded(stream: bytes, limit: int, max_values: int | None, size: int) -> _Outcome:
    decoder = Decoder(limit, max_values)
    messages: list[Message] = []
    for at in range(0, len(stream), size):
        try:
            messages += decoder.feed(stream[at : at + size])
        except BadBytesError as error:
            return _Outcome(list(map(_shown, messages + error.messages)), unfinished=False, wrong=True)
    limits = {"bytes": limit, "values": max_values}
    assert all(each.limit == limits[each.unit] for each in messages if isinstance(each, Oversized))
    assert decoder.held <= limit
    return _Outcome(list(map(_shown, messages)), decoder.mid_message, wrong=False)


def _shown(message: Message) -> str:
    """Return a message as it is compared: a command beyond both limits may be reported for either."""
    return f"Oversized(id={message.id})" if isinstance(message, Oversized) else repr(message)


def _unpacked(stream: bytes) -> list[str]:
    """Return the commands at the beginning of a stream, in the form of ours, as msgpack alone finds them."""
    unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="surrogateescape")
    unpacker.feed(stream)
    commands: list[str] = []
    try:
        for value in unpacker:
            if _depth(value) > DEPTH_LIMIT:
                break
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


def _depth(value: object) -> int:
    """Return how deep arrays and maps are nested in a value; what is empty counts for nothing."""
    depth = 0
    level = [value]
    while level := [each for each in level if each and isinstance(each, (list, dict))]:
        depth += 1
        level = [each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32
