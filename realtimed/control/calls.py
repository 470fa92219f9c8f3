"""What can be asked of the daemon, and what its answers mean. No I/O: both clients share it.

A `Call` is one question with the reader of its answer; a `Batch` is any number of them on their way through one
connection. Answers find their calls by id, in whatever order they come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from realtimed.control.wire import ID_LIMIT, Notification, Response, encode_request
from realtimed.errors import ProtocolError, RefusedError, quoted

__all__ = [
    "HISTORY_SHOWN",
    "IN_FLIGHT",
    "NOT_ALLOWED",
    "Batch",
    "Call",
    "ChannelInfo",
    "ChannelMessage",
    "ClientInfo",
    "History",
    "Pages",
    "Position",
    "Receipt",
    "Subscribed",
    "broadcast",
    "broadcast_many",
    "channels",
    "clients",
    "count_channels",
    "count_clients",
    "disconnect",
    "goodbye",
    "history",
    "info",
    "ping",
    "published",
    "request_ids",
    "stats",
    "subscribe",
    "watch",
]

_T = TypeVar("_T")

IN_FLIGHT: Final = 512
"""Calls of a batch that may await their answers at a time. More would not be faster: it hides the round trip."""

HISTORY_SHOWN: Final = 100
"""How many messages of a channel's history are asked for unless the caller says."""

_PAGE: Final = 1000
"""Members of a page of clients or channels that are asked for. The daemon may send fewer."""

_COUNT_LIMIT: Final = 2**32
"""No history is that long; larger numbers are a mistake, and those of 64 bits and more cannot be sent."""

_KEY_BYTES: Final = 16
"""Random bytes of a key that is made up: as many as a UUID has."""

_CHUNK: Final = 64 * 2**10
"""Bytes of requests that are put together before they are sent; the last request may exceed it."""

NOT_ALLOWED: Final = 4403
"""The close code for a client that is told to go: it should not come back by itself."""


class Receipt(NamedTuple):
    """What became of a broadcast.

    `recipients` is the number of clients it was queued for. `offset` numbers the messages of a channel one by one;
    `epoch` changes when they begin anew at 1. `repeated` says that a broadcast with the same key was carried out
    before: this is its receipt, and nothing was sent again.
    """

    recipients: int
    epoch: str
    offset: int
    repeated: bool = False


class Position(NamedTuple):
    """A place in a channel: behind the message with this `offset`, within its `epoch`."""

    epoch: str
    offset: int


class Subscribed(NamedTuple):
    """What `subscribe` comes to: where the channel is, and what follows.

    `recovered` says whether all after a position follows, and is None if none was given. `last` is how many of the last
    messages follow that were asked for.
    """

    position: Position
    recovered: bool | None
    last: int


class ChannelInfo(NamedTuple):
    """A channel, its number of subscribers, the offset of its newest message, and how many messages are kept."""

    subscribers: int
    epoch: str
    offset: int
    history: int


class ClientInfo(NamedTuple):
    """A connected client.

    `address` is what the proxy says of it, `connected_since` is in seconds since 1970, and `pending` is how many bytes
    wait for it because it reads slowly.
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


class Call(NamedTuple, Generic[_T]):
    """A method with its parameters; `read` turns the result into what the caller gets, or raises `ProtocolError`.

    A call is `repeatable` if the daemon does no more for a second one like it than to answer again. An `older` call
    asks for less, in a way that a daemon understands which refuses the parameters of this one.
    """

    method: str
    params: Sequence[object]
    read: Callable[[object], _T]
    repeatable: bool = False
    older: Call[_T] | None = None

    def in_place_of(self, outcome: _T | RefusedError) -> Call[_T] | None:
        """Return the call to make after this one came to `outcome`, if there is one: the daemon may be an older one."""
        return self.older if isinstance(outcome, RefusedError) and outcome.code == "invalid_params" else None

    def encode(self, id: int) -> bytes:
        """Return the request. Raises `RefusedError` for a str that cannot be sent, as the daemon would."""
        try:
            return encode_request(id, self.method, self.params)
        except UnicodeEncodeError as error:
            raise RefusedError(
                "invalid_utf8",
                f"{quoted(error.object)} is not valid Unicode: there is a lone surrogate at index {error.start};"
                " what is not text can be sent as bytes",
            ) from None


# The methods of the daemon.


def broadcast(channel: str, message: str | bytes, key: str | None = None, *, retry: bool = False) -> Call[Receipt]:
    """Send `message` to all who watch `channel`; with a key, or one made up if `retry`, it is repeatable."""
    keys = _keys(key, retry=retry)
    return Call("broadcast", (_text("channel", channel), _message(message), *keys), _receipt, bool(keys))


def broadcast_many(
    channels: Iterable[str], message: str | bytes, key: str | None = None, *, retry: bool = False
) -> Call[list[Receipt]]:
    """Send `message` to all who watch any of `channels`; `key` and `retry` are as for `broadcast`."""
    if isinstance(channels, str):
        raise TypeError(f"channels must be several names; to send to one, use broadcast({quoted(channels)}, …)")
    names = [_text("channel", channel) for channel in channels]

    def read(result: object) -> list[Receipt]:
        receipts = [_receipt(each) for each in _list(result)]
        if len(receipts) != len(names):
            raise ProtocolError(f"the daemon sent {len(receipts)} receipts for {len(names)} channels")
        return receipts

    keys = _keys(key, retry=retry)
    return Call("broadcast_many", (names, _message(message), *keys), read, bool(keys))


def channels(prefix: str, limit: int | None = None) -> Pages[tuple[str, ChannelInfo]]:
    """Ask for the channels whose names begin with `prefix`, and for no more than `limit` of them."""

    def read(result: object) -> list[tuple[str, ChannelInfo]]:
        return [
            (name, ChannelInfo(_field(each, "subscribers", int), *_position(each), _field(each, "history", int)))
            for name, each in _field(result, "channels", dict).items()
        ]

    return Pages("channels", {"prefix": _text("prefix", prefix)}, limit, read)


def count_channels(prefix: str) -> Call[int]:
    """Ask how many channels there are whose names begin with `prefix`."""
    return Call("channels", ({"prefix": _text("prefix", prefix), "count": True},), _count)


def history(channel: str, count: int) -> Call[History]:
    """Ask for the last `count` messages of `channel` that are kept."""
    _check_count("count", count)

    def read(result: object) -> History:
        messages = [_kept(channel, each) for each in _field(result, "messages", list)]
        return History(_position(result), messages)

    older = Call("history", (_text("channel", channel), count), read)
    return Call("history", (*older.params, {"time": True}), read, older=older)


def clients(channel: str | None, address: str | None, limit: int | None = None) -> Pages[ClientInfo]:
    """Ask who is connected: of all, or of those on a channel or from an address, no more than `limit`."""

    def read(result: object) -> list[ClientInfo]:
        return [_client(each) for each in _field(result, "clients", list)]

    return Pages("clients", _client_filters(channel, address), limit, read)


def count_clients(channel: str | None, address: str | None) -> Call[int]:
    """Ask how many clients there are, of all or of those on a channel or from an address."""
    return Call("clients", ({**_client_filters(channel, address), "count": True},), _count)


def _client_filters(channel: str | None, address: str | None) -> dict[str, object]:
    given = {"channel": channel, "address": address}
    return {name: _text(name, value) for name, value in given.items() if value is not None}


def disconnect(client_id: str, code: int, reason: str | None) -> Call[bool]:
    """Close a client's connection."""
    params = (_text("client_id", client_id), code) if reason is None else (client_id, code, _text("reason", reason))
    return Call("disconnect", params, lambda result: _field(result, "disconnected", int) > 0)


def subscribe(channel: str, since: Position | None = None, last: int | None = None) -> Call[Subscribed]:
    """Have the messages of `channel` sent to this connection, those after `since` included if they are kept.

    Without `since`, the `last` ones that are kept are sent first.
    """
    place: tuple[object, ...] = () if since is None else ({"epoch": _text("epoch", since[0]), "offset": since[1]},)
    if last is not None:
        _check_count("last", last)
    asked = last if since is None else None

    def read(result: object) -> Subscribed:
        recovered = _field(result, "recovered", bool) if since is not None else None
        return Subscribed(_position(result), recovered, _field(result, "last", int) if asked is not None else 0)

    older = Call("subscribe", (_text("channel", channel), *place), read)
    options = {"time": True} if asked is None else {"time": True, "last": asked}
    params = (channel, *(place or (None,)), options)
    return Call("subscribe", params, read, older=older if asked is None else None)


def watch(pattern: str) -> Call[bool]:
    """Have the messages of all channels that match `pattern` sent to this connection."""

    def read(result: object) -> bool:
        return _field(result, "watched", bool)

    older = Call("watch", (_text("pattern", pattern),), read)
    return Call("watch", (pattern, {"time": True}), read, older=older)


def stats() -> Call[dict[str, Any]]:
    """Ask for the counters."""
    return Call("stats", (), _map)


def info() -> Call[dict[str, Any]]:
    """Ask for the version, the limits and the like."""
    return Call("info", (), _map)


def ping() -> Call[str]:
    """Ask for a sign of life."""
    return Call("ping", (), _str)


def published(notification: Notification) -> ChannelMessage | None:
    """Return the message that a notification brings; None for a kind of notification that is not known here."""
    match notification:
        case Notification("message", [str(channel), str() | bytes() as message, int(offset), *more]):
            return ChannelMessage(channel, message, offset, _time(more))
        case Notification("message", _):
            raise ProtocolError(f"the daemon sent a message that is none: {quoted(notification.params)}")
    return None


def goodbye(error: object) -> ProtocolError:
    """Return what to raise for an error that belongs to no request, the daemon's last words on a connection."""
    return ProtocolError(f"the daemon ended the connection: {_refusal(error)}")


class Pages(Generic[_T]):
    """The calls that ask for a list page by page, and what they have `found`.

        while (call := pages.next()) is not None:
            pages.take(…the result of the call…)

    What is there all the time is found once; what comes or goes between two pages may be missing.
    """

    def __init__(
        self, method: str, filters: dict[str, object], limit: int | None, read: Callable[[object], list[_T]]
    ) -> None:
        if limit is not None and not 0 < limit < _COUNT_LIMIT:
            raise ValueError(f"limit must be from 1 to {_COUNT_LIMIT - 1}, not {limit}")
        self.found: list[_T] = []
        self._method = method
        self._filters = filters
        self._left = limit
        self._read = read
        self._after: int | None = None
        self._over = False

    def next(self) -> Call[tuple[list[_T], int | None]] | None:
        """Return the call for the next page, or None if there is no more to ask for."""
        if self._over or self._left == 0:
            return None
        limit = _PAGE if self._left is None else min(_PAGE, self._left)
        place = {} if self._after is None else {"after": self._after}
        return Call(self._method, ({**self._filters, "limit": limit, **place},), self._page)

    def take(self, page: tuple[list[_T], int | None]) -> None:
        """Take a page, which is the result of the call that was returned last."""
        found, self._after = page
        self.found += found
        self._over = self._after is None
        if self._left is not None:
            self._left = max(self._left - len(found), 0)

    def _page(self, result: object) -> tuple[list[_T], int | None]:
        after = _map(result).get("next")
        if after is not None and not isinstance(after, int):
            raise ProtocolError(f"the daemon's answer has no usable 'next': {quoted(after)}")
        if after is not None and self._after is not None and after <= self._after:
            raise ProtocolError(f"the daemon's pages do not go on: behind {self._after} comes {after}")
        return self._read(result), after


class Batch(Generic[_T]):
    """Calls that go out one behind the other, and what became of each.

    `outcomes` has a place for every call that was taken from `calls`, in their order: the result, or the refusal.
    A place is None until its answer has come, and no more than `in_flight` places are at a time.
    """

    # Invariant: `_awaited` maps the id of each unanswered request to its place, and to what reads its answer.

    def __init__(self, calls: Iterable[Call[_T]], ids: Iterator[int], in_flight: int = IN_FLIGHT) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be 1 or more, not {in_flight}")
        self.outcomes: list[_T | RefusedError | None] = []
        self._calls = iter(calls)
        self._ids = ids
        self._in_flight = in_flight
        self._exhausted = False
        self._awaited: dict[int, tuple[int, Callable[[object], _T]]] = {}

    @property
    def done(self) -> bool:
        """Whether every call has its outcome."""
        return self._exhausted and not self._awaited

    @property
    def unanswered(self) -> int:
        """How many calls have no outcome yet."""
        return len(self._awaited)

    def requests(self) -> bytes:
        """Return the next requests to send; nothing while enough are in flight, or when there are no more calls."""
        if self._exhausted or len(self._awaited) > self._in_flight // 2:
            return b""  # half may come back before more go out: fewer and larger writes
        chunk = bytearray()
        while len(self._awaited) < self._in_flight and len(chunk) < _CHUNK:
            call = next(self._calls, None)
            if call is None:
                self._exhausted = True
                break
            id = next(self._ids)
            try:
                chunk += call.encode(id)
            except RefusedError as error:
                self.outcomes.append(error)
                continue
            self._awaited[id] = len(self.outcomes), call.read
            self.outcomes.append(None)
        return bytes(chunk)

    def answer(self, response: Response) -> None:
        """Take an answer. Raises `ProtocolError` if it is to no call of this batch, or makes no sense."""
        if response.id is None:
            raise goodbye(response.error)
        if response.id not in self._awaited:
            raise ProtocolError(f"the daemon answered request {response.id}, which awaits no answer")
        place, read = self._awaited.pop(response.id)
        self.outcomes[place] = read(response.result) if response.error is None else _refusal(response.error)

    def results(self) -> list[_T | RefusedError]:
        """Return the outcomes of a batch that is done."""
        return [outcome for outcome in self.outcomes if outcome is not None]


def request_ids() -> Iterator[int]:
    """Yield the ids for the requests of one client: 0, 1, 2, and so on, and after the largest one 0 again."""
    while True:
        yield from range(ID_LIMIT)


# What is checked before it is sent, since the error would be less clear later.


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    return value


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value < _COUNT_LIMIT:
        raise ValueError(f"{name} must be from 0 to {_COUNT_LIMIT - 1}, not {value}")


def _message(value: object) -> str | bytes:
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"message must be a str or bytes, not {type(value).__name__}; json.dumps() makes one of data")
    return value


def _keys(key: object, *, retry: bool) -> tuple[str, ...]:
    """Return the key as the parameter that it is, or none."""
    if key is not None:
        return (_text("key", key),)
    return (os.urandom(_KEY_BYTES).hex(),) if retry else ()


# How results are read. A newer daemon may say more than is known here; what is said less is a `ProtocolError`.


def _receipt(result: object) -> Receipt:
    repeated = isinstance(result, dict) and "repeated" in result and _field(result, "repeated", bool)
    return Receipt(_field(result, "recipients", int), *_position(result), repeated)


def _position(result: object) -> Position:
    return Position(_field(result, "epoch", str), _field(result, "offset", int))


def _kept(channel: str, entry: object) -> ChannelMessage:
    match entry:
        case [int(offset), str() | bytes() as message, *more]:
            return ChannelMessage(channel, message, offset, _time(more))
    raise ProtocolError(f"the daemon's history has a message that is none: {quoted(entry)}")


def _time(more: Sequence[object]) -> float | None:
    """Return the time of publication out of what the daemon says behind a message, in seconds since 1970."""
    if not more:
        return None
    time = _field(more[0], "time", int)
    if isinstance(time, bool):
        raise ProtocolError(f"the daemon's answer has no usable 'time': {quoted(more[0])}")
    return time / 1000


def _client(result: object) -> ClientInfo:
    return ClientInfo(
        id=_field(result, "id", str),
        protocol=_field(result, "protocol", str),
        channels=[str(name) for name in _field(result, "channels", list)],
        address=_field(result, "address", str),
        connected_since=float(_field(result, "connected_since", (int, float))),
        pending=_field(result, "pending", int),
    )


def _count(result: object) -> int:
    return _field(result, "count", int)


def _refusal(error: object) -> RefusedError:
    return RefusedError(_field(error, "code", str), _field(error, "message", str))


def _field(value: object, name: str, kind: type[_T] | tuple[type[_T], ...]) -> _T:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ProtocolError(f"the daemon's answer has no usable {quoted(name)}: {quoted(value)}")
    return found


def _map(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ProtocolError(f"the daemon's answer is not a map: {quoted(value)}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ProtocolError(f"the daemon's answer is not an array: {quoted(value)}")
    return value


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"the daemon's answer is not a str: {quoted(value)}")
    return value
