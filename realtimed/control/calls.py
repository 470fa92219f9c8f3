"""What can be asked of the daemon, and what its answers mean. No I/O: both clients share it.

A `Call` is one question with the reader of its answer; a `Batch` is any number of them on their way through one
connection. Answers find their calls by id, in whatever order they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from realtimed.control.wire import ID_LIMIT, Notification, Response, encode_request
from realtimed.errors import ProtocolError, RefusedError, quoted

__all__ = [
    "IN_FLIGHT",
    "NOT_ALLOWED",
    "Batch",
    "Call",
    "ChannelInfo",
    "ChannelMessage",
    "ClientInfo",
    "Position",
    "Receipt",
    "broadcast",
    "broadcast_many",
    "channels",
    "clients",
    "disconnect",
    "goodbye",
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

_CHUNK: Final = 64 * 2**10
"""Bytes of requests that are put together before they are sent; the last request may exceed it."""

NOT_ALLOWED: Final = 4403
"""The close code for a client that is told to go: it should not come back by itself."""


class Receipt(NamedTuple):
    """What became of a broadcast.

    `recipients` is the number of clients it was queued for. `offset` numbers the messages of a channel one by one;
    `epoch` changes when they begin anew at 1.
    """

    recipients: int
    epoch: str
    offset: int


class Position(NamedTuple):
    """How far a channel has come: the `offset` of its newest message, within its `epoch`."""

    epoch: str
    offset: int


class ChannelInfo(NamedTuple):
    """A channel, its number of subscribers, and the offset of its newest message."""

    subscribers: int
    epoch: str
    offset: int


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
    """A message as subscribers of `channel` get it: text as str, binary as bytes."""

    channel: str
    message: str | bytes
    offset: int


class Call(NamedTuple, Generic[_T]):
    """A method with its parameters; `read` turns the result into what the caller gets, or raises `ProtocolError`."""

    method: str
    params: Sequence[object]
    read: Callable[[object], _T]

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


def broadcast(channel: str, message: str | bytes) -> Call[Receipt]:
    """Send `message` to all who watch `channel`."""
    return Call("broadcast", (_text("channel", channel), _message(message)), _receipt)


def broadcast_many(channels: Iterable[str], message: str | bytes) -> Call[list[Receipt]]:
    """Send `message` to all who watch any of `channels`."""
    if isinstance(channels, str):
        raise TypeError(f"channels must be several names; to send to one, use broadcast({quoted(channels)}, …)")
    names = [_text("channel", channel) for channel in channels]

    def read(result: object) -> list[Receipt]:
        receipts = [_receipt(each) for each in _list(result)]
        if len(receipts) != len(names):
            raise ProtocolError(f"the daemon sent {len(receipts)} receipts for {len(names)} channels")
        return receipts

    return Call("broadcast_many", (names, _message(message)), read)


def channels(prefix: str) -> Call[dict[str, ChannelInfo]]:
    """Ask for the channels whose names begin with `prefix`."""

    def read(result: object) -> dict[str, ChannelInfo]:
        return {
            name: ChannelInfo(_field(each, "subscribers", int), _field(each, "epoch", str), _field(each, "offset", int))
            for name, each in _map(result).items()
        }

    return Call("channels", (_text("prefix", prefix),), read)


def clients() -> Call[list[ClientInfo]]:
    """Ask who is connected."""
    return Call("clients", (), lambda result: [_client(each) for each in _list(result)])


def disconnect(client_id: str, code: int, reason: str | None) -> Call[bool]:
    """Close a client's connection."""
    params = (_text("client_id", client_id), code) if reason is None else (client_id, code, _text("reason", reason))
    return Call("disconnect", params, lambda result: _field(result, "disconnected", int) > 0)


def subscribe(channel: str) -> Call[Position]:
    """Have the messages of `channel` sent to this connection."""
    return Call(
        "subscribe",
        (_text("channel", channel),),
        lambda result: Position(_field(result, "epoch", str), _field(result, "offset", int)),
    )


def watch(pattern: str) -> Call[bool]:
    """Have the messages of all channels that match `pattern` sent to this connection."""
    return Call("watch", (_text("pattern", pattern),), lambda result: _field(result, "watched", bool))


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
        case Notification("message", [str(channel), str() | bytes() as message, int(offset)]):
            return ChannelMessage(channel, message, offset)
        case Notification("message", _):
            raise ProtocolError(f"the daemon sent a message that is none: {quoted(notification.params)}")
    return None


def goodbye(error: object) -> ProtocolError:
    """Return what to raise for an error that belongs to no request, the daemon's last words on a connection."""
    return ProtocolError(f"the daemon ended the connection: {_refusal(error)}")


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


def _message(value: object) -> str | bytes:
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"message must be a str or bytes, not {type(value).__name__}; json.dumps() makes one of data")
    return value


# How results are read. A newer daemon may say more than is known here; what is said less is a `ProtocolError`.


def _receipt(result: object) -> Receipt:
    return Receipt(_field(result, "recipients", int), _field(result, "epoch", str), _field(result, "offset", int))


def _client(result: object) -> ClientInfo:
    return ClientInfo(
        id=_field(result, "id", str),
        protocol=_field(result, "protocol", str),
        channels=[str(name) for name in _field(result, "channels", list)],
        address=_field(result, "address", str),
        connected_since=float(_field(result, "connected_since", (int, float))),
        pending=_field(result, "pending", int),
    )


def _refusal(error: object) -> RefusedError:
    return RefusedError(_field(error, "code", str), _field(error, "message", str))


def _field(value: object, name: str, kind: type[_T] | tuple[type[_T], ...]) -> _T:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ProtocolError(f"the daemon's answer has no usable {quoted(name)}: {quoted(value)}")
    return found


def _map(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
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
