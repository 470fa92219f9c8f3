"""The commands of the control socket: one table of their names, their parameters in words, and what carries them out.

They know no connection and no bytes, and may be called by whoever has a `Context`. A command that sends messages to the
one who gave it needs a `Caller` to send them to; all others do without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from realtimed.channel import Subscriber, check_channel_name, encode_message
from realtimed.control.idempotency import Answered
from realtimed.errors import RefusedError, quoted
from realtimed.frames import CloseCode, check_close
from realtimed.hub import Hub, Joined, Position, Receipt

__all__ = ["COMMANDS", "Caller", "Client", "Command", "Context", "carry_out", "shown"]

_HISTORY_SHOWN: Final = 100

Caller: TypeAlias = Subscriber
"""Whoever gave a command, and may be sent messages for it."""


class Client(Protocol):
    """A connected WebSocket, for those who ask who is there or want to end it."""

    def describe(self) -> dict[str, object]:
        """Return what the ``clients`` command shows."""

    def close(self, code: int, reason: str) -> bool:
        """Say goodbye and end the connection. Returns at once, whether it was not ending already."""


@dataclass
class Context:
    """What commands work on."""

    hub: Hub
    clients: Mapping[str, Client]
    stats: Callable[[], dict[str, object]]
    info: Callable[[], dict[str, object]]
    answered: Answered


_Run: TypeAlias = Callable[[Context, Caller | None, list[object]], object]


class Command(NamedTuple):
    """A command: its parameters in words, and a function that returns its result.

    The function returns `NotImplemented` for parameters that the command does not take, and raises `RefusedError` for
    what it cannot do.
    """

    params: str
    run: _Run


def carry_out(context: Context, method: str, params: list[object], caller: Caller | None = None) -> object:
    """Carry out a command and return its result. Raises `RefusedError`; then nothing was done."""
    if method == "broadcast" and len(params) == 2:  # first, and without matching of patterns
        return context.hub.publish(*params)
    command = COMMANDS.get(method)
    if command is None:
        raise RefusedError("unknown_method", f"there is no method {quoted(method)}; there are {', '.join(COMMANDS)}")
    result = command.run(context, caller, params)
    if result is NotImplemented:
        raise RefusedError("invalid_params", f"{method} takes {command.params}, not {quoted(params)}")
    return result


def shown(result: object) -> Any:
    """Return a result as it is said over the socket."""
    if isinstance(result, Receipt):
        return {"recipients": result.recipients, "epoch": result.epoch, "offset": result.offset}
    if isinstance(result, Joined):
        recovered = {} if result.recovered is None else {"recovered": result.recovered}
        return {"epoch": result.epoch, "offset": result.offset, **recovered}
    return result


def _broadcast(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case [channel, content]:
            return context.hub.publish(channel, content)
        case [channel, content, key]:
            check_channel_name(channel)
            return _once(context, str(channel), key, lambda: [context.hub.publish(channel, content)])[0]
    return NotImplemented


def _broadcast_many(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case [[*channels], content]:
            return list(map(shown, _publish_on_all(context, channels, content)))
        case [[*channels], content, key]:
            for channel in channels:
                check_channel_name(channel)
            names = tuple(map(str, channels))
            return _once(context, names, key, lambda: _publish_on_all(context, channels, content))
    return NotImplemented


def _publish_on_all(context: Context, channels: Sequence[object], content: object) -> list[Receipt]:
    """Publish on all channels, or on none if one of them is wrong."""
    encode_message(content, context.hub.max_message)
    for channel in channels:
        check_channel_name(channel)
    return [context.hub.publish(channel, content) for channel in channels]


def _once(
    context: Context, channels: str | tuple[str, ...], key: object, publish: Callable[[], list[Receipt]]
) -> list[dict[str, object]]:
    """Publish unless that was done with the same key before."""
    receipts, repeated = context.answered.once(channels, key, publish)
    return [shown(receipt) | ({"repeated": True} if repeated else {}) for receipt in receipts]


def _channels(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case []:
            return context.hub.describe_channels()
        case [str(prefix)]:
            return context.hub.describe_channels(prefix)
    return NotImplemented


def _history(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case [channel]:
            count = _HISTORY_SHOWN
        case [channel, int(count)] if _is_count(count):
            pass
        case _:
            return NotImplemented
    position, publications = context.hub.recent(channel, count)
    return {
        "epoch": position.epoch,
        "offset": position.offset,
        "messages": [(publication.offset, publication.message) for publication in publications],
    }


def _clients(context: Context, _: Caller | None, params: list[object]) -> object:
    if params:
        return NotImplemented
    return [client.describe() for client in context.clients.values()]


def _disconnect(context: Context, _: Caller | None, params: list[object]) -> object:
    code: int = CloseCode.NOT_ALLOWED
    reason = "disconnected by an administrator"
    match params:
        case [str(id)]:
            pass
        case [str(id), int(code)]:
            pass
        case [str(id), int(code), str(reason)]:
            pass
        case _:
            return NotImplemented
    try:
        check_close(code, reason)
    except ValueError as error:
        raise RefusedError("invalid_params", str(error)) from None
    client = context.clients.get(id)
    return {"disconnected": int(client is not None and client.close(code, reason))}


def _subscribe(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [channel]:
            return context.hub.subscribe(_listening(caller), channel)
        case [channel, {"epoch": str(epoch), "offset": int(offset)}] if _is_count(offset):
            return context.hub.subscribe(_listening(caller), channel, Position(epoch, offset))
    return NotImplemented


def _unsubscribe(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [channel]:
            return {"unsubscribed": context.hub.unsubscribe(_listening(caller), channel)}
    return NotImplemented


def _watch(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [pattern]:
            context.hub.watchers.add(_listening(caller), pattern)
            return {"watched": True}
    return NotImplemented


def _unwatch(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [pattern]:
            return {"unwatched": context.hub.watchers.remove(_listening(caller), pattern)}
    return NotImplemented


def _listening(caller: Caller | None) -> Caller:
    if caller is None:
        raise RefusedError("invalid_params", "this command needs a connection on which messages can be sent")
    return caller


def _stats(context: Context, _: Caller | None, params: list[object]) -> object:
    return NotImplemented if params else context.stats()


def _ping(_: Context, __: Caller | None, params: list[object]) -> object:
    return NotImplemented if params else "pong"


def _info(context: Context, _: Caller | None, params: list[object]) -> object:
    return NotImplemented if params else context.info()


def _is_count(value: int) -> bool:
    """Return whether this is a whole number from 0, and no truth value, which is an int as well."""
    return type(value) is int and value >= 0


COMMANDS: Final[Mapping[str, Command]] = {
    "broadcast": Command("[channel, message, key?]", _broadcast),
    "broadcast_many": Command("[[channel, …], message, key?]", _broadcast_many),
    "channels": Command("[prefix?]", _channels),
    "history": Command("[channel, count?]", _history),
    "clients": Command("[]", _clients),
    "disconnect": Command("[client id, code?, reason?]", _disconnect),
    "subscribe": Command("[channel, {epoch, offset}?]", _subscribe),
    "unsubscribe": Command("[channel]", _unsubscribe),
    "watch": Command("[pattern]", _watch),
    "unwatch": Command("[pattern]", _unwatch),
    "stats": Command("[]", _stats),
    "ping": Command("[]", _ping),
    "info": Command("[]", _info),
}
