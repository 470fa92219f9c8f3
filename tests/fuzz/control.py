"""Whatever a publisher sends, each request is answered once, in order, with a result or an error that is documented.

An input is a byte for how the rest is cut, and the stream. Bytes that are no MessagePack-RPC end the connection, after
an error that belongs to no request.
"""

from __future__ import annotations

from typing import Final

import msgpack

from realtimed.rpc.wire import (
    VALUES_LIMIT,
    BadBytesError,
    Decoder,
    Message,
    Oversized,
    Request,
    encode_notification,
    encode_request,
)
from tests.fuzz.harness import cut, publisher_hears
from tests.kit.budget import uncharged

__all__ = ["SEEDS", "check"]

_CODES: Final = {
    "answer_too_large", "invalid_channel", "invalid_params", "invalid_pattern", "invalid_utf8", "message_too_large",
    "protocol_error", "too_many_channels", "too_many_watchers", "unknown_method",
}  # fmt: skip

SEEDS: Final = (
    b"\x00" + encode_request(1, "broadcast", ["news", "hello", "key"]) + encode_request(2, "broadcast", ["a b", "x"]),
    b"\x01" + encode_request(3, "broadcast_many", [["a", "b"], b"\xff"]) + encode_notification("broadcast", ["a", 5]),
    b"\x02" + encode_request(4, "subscribe", ["news", {"epoch": "x", "offset": 0}]) + encode_request(5, "channels", []),
    b"\x00"
    + encode_request(6, "watch", ["n*"])
    + encode_request(7, "unwatch", ["n*"])
    + encode_request(8, "stats", []),
    b"\x01" + encode_request(20, "channels", [{"limit": 1}]) + encode_request(21, "clients", [{"count": True}]),
    b"\x01"
    + encode_request(22, "broadcast_many", [["a", "b", "a"], "x", "k"])
    + encode_request(23, "channels", [{1: 2}]),
    b"\x00" + encode_request(9, "disconnect", ["c-1", 4000, "x"]) + encode_request(10, "clients", []),
    b"\x03" + encode_request(11, "history", ["news", 5]) + encode_request(12, "info", []) + b"\xc1",
    b"\x02"
    + encode_request(30, "subscribe", ["news", None, {"time": True, "last": 2}])
    + encode_request(31, "watch", ["n*", {"time": False}])
    + encode_request(32, "history", ["news", 5, {"time": True}]),
    b"\x00" + encode_request(13, "unsubscribe", ["news"]) + encode_request(14, "dance", [None]) + b"\x94\x00",
)


def check(data: bytes) -> None:
    """Raise if the invariant does not hold."""
    how, sent = data[0] if data else 0, data[1:]
    pieces = cut(sent, how)
    heard = publisher_hears(pieces)
    with uncharged():
        _judge(pieces, heard)


def _judge(pieces: list[bytes], heard: bytes) -> None:
    # In the same pieces, since a command that is both too large and wrong is the one or the other by how it arrives.
    decoder, messages, broken = Decoder(200 + 2**20, VALUES_LIMIT), list[Message](), False
    try:
        for piece in pieces:
            messages += decoder.feed(piece)
    except BadBytesError as error:
        messages, broken = [*messages, *error.messages], True
    owed: list[int | None] = [
        message.id for message in messages if isinstance(message, (Request, Oversized)) and message.id is not None
    ]
    if broken:
        owed.append(None)
    answered = []
    unpacker = msgpack.Unpacker(strict_map_key=False, unicode_errors="surrogateescape")
    unpacker.feed(heard)
    for value in unpacker:
        match value:
            case [1, id, None, result]:
                assert result is not None
                answered.append(id)
            case [1, id, {"code": str(code), "message": str(text)}, None]:
                assert code in _CODES, code
                assert text
                answered.append(id)
            case _:
                assert value[:2] == [2, "message"], value
    assert unpacker.tell() == len(heard)
    assert answered == owed, f"answered {answered}, not {owed}"
