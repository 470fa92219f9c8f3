"""The results of calls, and how they are read from the daemon's answers. No I/O.

Nothing in an answer is trusted: the type of every field is checked, counts are not negative, and text is Unicode. A
newer daemon may add fields, which are ignored; a field that is missing or wrong is a `ProtocolError`. Errors show the
daemon's words on one line, escaped and cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeGuard

from realtimed.errors import ProtocolError, RefusedError
from realtimed.hub.position import Position, Receipt
from realtimed.rpc.wire import Notification
from realtimed.text import printable, quoted

__all__ = [
    "ChannelInfo",
    "ChannelMessage",
    "ClientInfo",
    "History",
    "Position",
    "Receipt",
    "Subscribed",
    "array",
    "channel_info",
    "client_info",
    "count",
    "field",
    "flag",
    "goodbye",
    "is_count",
    "kept",
    "mapping",
    "position",
    "published",
    "receipt",
    "refusal",
    "text",
]

_SAID: Final = 1000
"""Characters of the daemon's words that an error shows."""

_CODE: Final = 64
"""Characters of a refusal's code."""


class Subscribed(NamedTuple):
    """The result of a subscription: the position of the channel, and which earlier messages follow.

    `recovered` says whether all messages after the given position follow; None if no position was given. `last` is how
    many of the last messages follow; 0 if none were asked for.
    """

    position: Position
    recovered: bool | None
    last: int


class ChannelInfo(NamedTuple):
    """A channel: its number of subscribers, the position of its newest message, and how many messages are kept."""

    subscribers: int
    epoch: str
    offset: int
    history: int


class ClientInfo(NamedTuple):
    """A connected client.

    `address` is its address according to the proxy, `connected_since` is in seconds since 1970, and `pending` is how
    many bytes wait until it reads them.
    """

    id: str
    protocol: str
    channels: list[str]
    address: str
    connected_since: float
    pending: int


class ChannelMessage(NamedTuple):
    """A message as subscribers of `channel` get it: text as str, binary as bytes.

    `time` is when it was published, in seconds since 1970 by the clock of the daemon's machine; None if the daemon is
    older than this client and does not say.
    """

    channel: str
    message: str | bytes
    offset: int
    time: float | None = None


class History(NamedTuple):
    """What the daemon keeps of a channel: the newest `messages`, oldest first, and the `position` of the channel.

    The last message is the one that `position` names. If there is no such channel, its epoch is "" and its offset 0.
    """

    position: Position
    messages: list[ChannelMessage]


# How results are read.


def receipt(result: object) -> Receipt:
    """Read the result of a broadcast on one channel."""
    repeated = isinstance(result, dict) and "repeated" in result and flag(result, "repeated")
    return Receipt(count(result, "recipients"), *position(result), repeated)


def position(result: object) -> Position:
    """Read the position of a channel."""
    return Position(text(result, "epoch"), count(result, "offset"))


def channel_info(result: object) -> ChannelInfo:
    """Read the description of a channel."""
    return ChannelInfo(count(result, "subscribers"), *position(result), count(result, "history"))


def client_info(result: object) -> ClientInfo:
    """Read the description of a client."""
    channels = array(field(result, "channels", _is_array))
    if not all(map(_is_text, channels)):
        raise _unusable(result, "channels")
    return ClientInfo(
        id=text(result, "id"),
        protocol=text(result, "protocol"),
        channels=[str(name) for name in channels],
        address=text(result, "address"),
        connected_since=float(field(result, "connected_since", _is_time)),
        pending=count(result, "pending"),
    )


def kept(channel: str, entry: object) -> ChannelMessage:
    """Read a message of a channel's history."""
    match entry:
        case [offset, message, *more] if is_count(offset) and _is_message(message):
            return ChannelMessage(channel, message, offset, _time(more))
    raise ProtocolError(f"the daemon's history has an entry that is not a message: {quoted(entry)}")


def published(notification: Notification) -> ChannelMessage | None:
    """Return the message in a notification; None for an unknown kind of notification."""
    if notification.method != "message":
        return None
    match notification.params:
        case [channel, message, offset, *more] if _is_text(channel) and _is_message(message) and is_count(offset):
            return ChannelMessage(channel, message, offset, _time(more))
    raise ProtocolError(f"the daemon sent an entry that is not a message: {quoted(notification.params)}")


def _time(more: list[Any]) -> float | None:
    """Read the time of publication, in seconds since 1970, from the fields behind a message."""
    if not more:
        return None
    milliseconds: int = field(more[0], "time", lambda found: type(found) is int)
    return milliseconds / 1000


def refusal(error: object) -> RefusedError:
    """Read the error of an answer."""
    code = text(error, "code")
    if not 0 < len(code) <= _CODE or not code.isascii() or not code.isprintable() or " " in code:
        raise _unusable(error, "code")
    said = text(error, "message")
    return RefusedError(code, printable(said if len(said) <= _SAID else said[:_SAID] + "…"))


def goodbye(error: object) -> ProtocolError:
    """Return the exception for an error that belongs to no request: the daemon's last words on a connection."""
    return ProtocolError(f"the daemon ended the connection: {refusal(error)}")


def mapping(value: object) -> dict[str, Any]:
    """Return `value` if it is a map with names as keys."""
    if not isinstance(value, dict) or not all(map(_is_text, value)):
        raise ProtocolError(f"the daemon's answer is not a map: {quoted(value)}")
    return value


def array(value: object) -> list[object]:
    """Return `value` if it is an array."""
    if not isinstance(value, list):
        raise ProtocolError(f"the daemon's answer is not an array: {quoted(value)}")
    return value


def text(value: object, name: str) -> str:
    """Return the text that the map `value` has under `name`."""
    found: str = field(value, name, _is_text)
    return found


def count(value: object, name: str) -> int:
    """Return the number from 0 that the map `value` has under `name`."""
    found: int = field(value, name, is_count)
    return found


def flag(value: object, name: str) -> bool:
    """Return the truth value that the map `value` has under `name`."""
    found: bool = field(value, name, lambda found: isinstance(found, bool))
    return found


def field(value: object, name: str, fits: Callable[[object], bool]) -> Any:
    """Return what the map `value` has under `name`, if it `fits`. Raises `ProtocolError` otherwise."""
    found = value.get(name) if isinstance(value, dict) else None
    if not fits(found):
        raise _unusable(value, name)
    return found


def is_count(value: object) -> TypeGuard[int]:
    """Return whether this is a whole number from 0; True and False are not."""
    return type(value) is int and value >= 0


def _is_array(value: object) -> bool:
    return isinstance(value, list)


def _is_time(value: object) -> bool:
    return is_count(value) or (isinstance(value, float) and math.isfinite(value))


def _is_message(value: object) -> TypeGuard[str | bytes]:
    return isinstance(value, bytes) or _is_text(value)


def _is_text(value: object) -> TypeGuard[str]:
    """Return whether this is a str of Unicode. One that was not UTF-8 has lone surrogates, which cannot be encoded."""
    if not isinstance(value, str):
        return False
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    return True


def _unusable(value: object, name: str) -> ProtocolError:
    return ProtocolError(f"the daemon's answer has no usable {quoted(name)}: {quoted(value)}")
