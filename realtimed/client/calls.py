"""The calls that clients make, one function for each command of the daemon. No I/O. `results` reads the answers.

A `Call` is one question with the reader of its answer. `Pages` are the calls that fetch a list.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

import realtimed.client.results as results
from realtimed.client.results import ChannelInfo, ChannelMessage, ClientInfo, History, Position, Receipt, Subscribed
from realtimed.errors import ProtocolError, RefusedError
from realtimed.rpc.defaults import HISTORY_SHOWN, NOT_ALLOWED
from realtimed.rpc.wire import encode_request
from realtimed.text import quoted

__all__ = [
    "HISTORY_SHOWN",
    "NOT_ALLOWED",
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
    "history",
    "info",
    "ping",
    "stats",
    "subscribe",
    "upgrade",
    "watch",
]

_T = TypeVar("_T")

_PAGE: Final = 1000
"""Clients or channels that a call asks for in one page. The daemon may send fewer."""

_COUNT_LIMIT: Final = 2**32
"""No history is this long. Larger numbers are a mistake, and those of more than 64 bits cannot be sent."""

LIST_BYTES: Final = 256 * 2**20
"""Bytes of memory that a list of clients or channels may take, with all its pages."""

_PAGE_BYTES: Final = 64 * 2**10
"""Bytes of that limit which a page takes even if it is empty, so that the pages have an end."""

_KEY_BYTES: Final = 16
"""Random bytes of a generated key: as many as a UUID has."""


class Call(NamedTuple, Generic[_T]):
    """A method with its parameters. `read` turns the daemon's result into the caller's, or raises `ProtocolError`.

    A call is `repeatable` if the daemon answers a repeat without carrying it out again. The `older` call asks for less,
    with parameters that an older daemon understands when it refuses those of this call.
    """

    method: str
    params: Sequence[object]
    read: Callable[[object], _T]
    repeatable: bool = False
    older: Call[_T] | None = None

    def in_place_of(self, outcome: _T | RefusedError) -> Call[_T] | None:
        """Return the older call, if there is one and `outcome` shows that the daemon is older than this client."""
        return self.older if isinstance(outcome, RefusedError) and outcome.code == "invalid_params" else None

    def encode(self, id: int) -> bytes:
        """Return the request. Raises `RefusedError`, as the daemon would, for a str or a number that cannot be sent."""
        try:
            return encode_request(id, self.method, self.params)
        except UnicodeEncodeError as error:
            raise RefusedError(
                "invalid_utf8",
                f"{quoted(error.object)} is not valid Unicode: there is a lone surrogate at index {error.start};"
                " what is not text can be sent as bytes",
            ) from None
        except OverflowError:
            raise RefusedError("invalid_params", f"a number in this {self.method} is larger than can be sent") from None


# The methods of the daemon.


def broadcast(channel: str, message: str | bytes, key: str | None = None, *, retry: bool = False) -> Call[Receipt]:
    """Send `message` to all subscribers of `channel`. With `key`, or `retry`, which generates one, it is repeatable."""
    keys = _keys(key, retry=retry)
    return Call("broadcast", (_text("channel", channel), _message(message), *keys), results.receipt, bool(keys))


def broadcast_many(
    channels: Iterable[str], message: str | bytes, key: str | None = None, *, retry: bool = False
) -> Call[list[Receipt]]:
    """Send `message` to all subscribers of any of `channels`; `key` and `retry` are as for `broadcast`."""
    if isinstance(channels, str):
        raise TypeError(f"channels must be several names; to send to one, use broadcast({quoted(channels)}, …)")
    names = [_text("channel", channel) for channel in channels]

    def read(result: object) -> list[Receipt]:
        receipts = [results.receipt(each) for each in results.array(result)]
        if len(receipts) != len(names):
            raise ProtocolError(f"the daemon sent {len(receipts)} receipts for {len(names)} channels")
        return receipts

    keys = _keys(key, retry=retry)
    return Call("broadcast_many", (names, _message(message), *keys), read, bool(keys))


def channels(prefix: str, limit: int | None = None) -> Pages[tuple[str, ChannelInfo]]:
    """Ask for the channels whose names begin with `prefix`, and for no more than `limit` of them."""

    def read(result: object) -> list[tuple[str, ChannelInfo]]:
        listed = results.mapping(result).get("channels")
        return [(name, results.channel_info(each)) for name, each in results.mapping(listed).items()]

    return Pages("channels", {"prefix": _text("prefix", prefix)}, limit, read, ["prefix"])


def count_channels(prefix: str) -> Call[int]:
    """Ask how many channels there are whose names begin with `prefix`."""
    return Call("channels", ({"prefix": _text("prefix", prefix), "count": True},), _number)


def history(channel: str, count: int) -> Call[History]:
    """Ask for the last `count` messages of `channel` that are kept."""
    _check_count("count", count)

    def read(result: object) -> History:
        messages = [results.kept(channel, each) for each in results.array(results.mapping(result).get("messages"))]
        if len(messages) > count:
            raise ProtocolError(f"the daemon sent {len(messages)} messages where {count} were asked for")
        return History(results.position(result), messages)

    older = Call("history", (_text("channel", channel), count), read)
    return Call("history", (*older.params, {"time": True}), read, older=older)


def clients(channel: str | None, address: str | None, limit: int | None = None) -> Pages[ClientInfo]:
    """Ask for the connected clients: all, or those on a channel or from an address, but no more than `limit`."""

    def read(result: object) -> list[ClientInfo]:
        return [results.client_info(each) for each in results.array(results.mapping(result).get("clients"))]

    return Pages("clients", _client_filters(channel, address), limit, read, ["channel", "address"])


def count_clients(channel: str | None, address: str | None) -> Call[int]:
    """Ask how many clients are connected: of all, or of those on a channel or from an address."""
    return Call("clients", ({**_client_filters(channel, address), "count": True},), _number)


def _client_filters(channel: str | None, address: str | None) -> dict[str, object]:
    given = {"channel": channel, "address": address}
    return {name: _text(name, value) for name, value in given.items() if value is not None}


def disconnect(client_id: str, code: int, reason: str | None) -> Call[bool]:
    """Close a client's connection."""
    params = (_text("client_id", client_id), code) if reason is None else (client_id, code, _text("reason", reason))
    return Call("disconnect", params, lambda result: results.count(result, "disconnected") > 0)


def subscribe(channel: str, since: Position | None = None, last: int | None = None) -> Call[Subscribed]:
    """Subscribe this connection to `channel`. Messages after `since` come first, if the daemon keeps all of them.

    Without `since`, the newest `last` messages that the daemon keeps come first.
    """
    place: tuple[object, ...] = () if since is None else ({"epoch": _text("epoch", since[0]), "offset": since[1]},)
    if last is not None:
        _check_count("last", last)
    asked = last if since is None else None

    def read(result: object) -> Subscribed:
        recovered = results.flag(result, "recovered") if since is not None else None
        following = results.count(result, "last") if asked is not None else 0
        if asked is not None and following > asked:
            raise ProtocolError(f"the daemon announced {following} messages where {asked} were asked for")
        return Subscribed(results.position(result), recovered, following)

    older = Call("subscribe", (_text("channel", channel), *place), read)
    options = {"time": True} if asked is None else {"time": True, "last": asked}
    params = (channel, *(place or (None,)), options)
    return Call("subscribe", params, read, older=older if asked is None else None)


def watch(pattern: str) -> Call[bool]:
    """Watch all channels that match `pattern` on this connection."""

    def read(result: object) -> bool:
        return results.flag(result, "watched")

    older = Call("watch", (_text("pattern", pattern),), read)
    return Call("watch", (pattern, {"time": True}), read, older=older)


def stats() -> Call[dict[str, Any]]:
    """Ask for the counters."""
    return Call("stats", (), results.mapping)


def upgrade() -> Call[dict[str, Any]]:
    """Return the call of ``upgrade``."""
    return Call("upgrade", (), results.mapping)


def info() -> Call[dict[str, Any]]:
    """Ask for the version, the limits and the like."""
    return Call("info", (), results.mapping)


def ping() -> Call[str]:
    """Ask whether the daemon answers."""
    return Call("ping", (), _pong)


class Pages(Generic[_T]):
    """The calls that ask for a list page by page, and the members that they have `found`.

        while (call := pages.next()) is not None:
            pages.take(…the result of the call…)

    A member that exists all the time is found once; one that comes or goes between two pages may be missing. `found`
    takes `LIST_BYTES` of memory at most.
    """

    # Invariants: `_wanted` is how many more members the caller wants, None for all. `_after` is the place behind which
    # the next page begins, None for the first; `_asked` is how many members the last call asked for. `_size` is how
    # many bytes of `LIST_BYTES` are taken.

    def __init__(
        self,
        method: str,
        filters: dict[str, object],
        limit: int | None,
        read: Callable[[object], list[_T]],
        narrower: Sequence[str],
    ) -> None:
        if limit is not None and not 0 < limit < _COUNT_LIMIT:
            raise ValueError(f"limit must be from 1 to {_COUNT_LIMIT - 1}, not {limit}")
        self.found: list[_T] = []
        self._method = method
        self._filters = filters
        self._wanted = limit
        self._read = read
        self._narrower = narrower
        self._after: int | None = None
        self._asked = 0
        self._size = 0
        self._over = False

    def next(self) -> Call[tuple[list[_T], int | None]] | None:
        """Return the call for the next page, or None if there are no more pages."""
        if self._over or self._wanted == 0:
            return None
        self._asked = _PAGE if self._wanted is None else min(_PAGE, self._wanted)
        place = {} if self._after is None else {"after": self._after}
        return Call(self._method, ({**self._filters, "limit": self._asked, **place},), self._page)

    def take(self, page: tuple[list[_T], int | None]) -> None:
        """Take a page: the result of the last call."""
        found, self._after = page
        self.found += found
        self._over = self._after is None
        if self._wanted is not None:
            self._wanted = max(self._wanted - len(found), 0)

    def _page(self, result: object) -> tuple[list[_T], int | None]:
        """Read the members of a page, and the place where the next page begins: None after the last."""
        after = results.mapping(result).get("next")
        if after is not None and not results.is_count(after):
            raise ProtocolError(f"the daemon's answer has no usable 'next': {quoted(after)}")
        if after is not None and self._after is not None and after <= self._after:
            raise ProtocolError(f"the daemon's pages do not go on: behind {self._after} comes {after}")
        page = self._read(result)
        if len(page) > self._asked:
            raise ProtocolError(f"the daemon sent a page of {len(page)} where {self._asked} were asked for")
        self._size += _PAGE_BYTES + sum(map(_size, page))
        if self._size > LIST_BYTES:
            raise ProtocolError(
                f"the list takes more than {LIST_BYTES} bytes of memory, the limit; ask for a part of it, with"
                f" {', '.join(['limit', *self._narrower])}"
            )
        return page, after


# Checks before a call is made, as the error would be less clear later.


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
    """Return the parameters for the key: one or none."""
    if key is not None:
        return (_text("key", key),)
    return (os.urandom(_KEY_BYTES).hex(),) if retry else ()


# Readers of results that are only used here.


def _size(value: object) -> int:
    """Return how many bytes of memory a member of a list takes, with all its fields."""
    inner = sum(map(_size, value)) if isinstance(value, (tuple, list)) else 0
    return sys.getsizeof(value) + inner


def _number(result: object) -> int:
    return results.count(result, "count")


def _pong(result: object) -> str:
    if result != "pong":
        raise ProtocolError(f"the daemon's answer to ping is not pong: {quoted(result)}")
    return "pong"
