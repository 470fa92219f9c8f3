"""The commands of the control socket: one table of their names, their parameters in words, and their functions.

A new command is a function here and a row in `COMMANDS`; the result is `shown` as it is, unless it is a `Receipt` or a
`Joined`. Commands know no connection and no bytes: any code that has a `Context` may `call` them. Only a command that
sends messages to its caller needs a `Caller`. A command that may take long returns `Steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from realtimed.control.forms import WITH_TIME
from realtimed.control.idempotency import KeyedReceipts, checked_key
from realtimed.control.listing import Client, list_channels, list_clients
from realtimed.control.steps import WAIT, Steps, Whole
from realtimed.errors import RefusedError
from realtimed.hub.channel import Subscriber
from realtimed.hub.hub import Hub
from realtimed.hub.names import check_channel_name
from realtimed.hub.position import Position, Receipt
from realtimed.hub.publication import encode_message
from realtimed.hub.results import Joined
from realtimed.rpc.defaults import HISTORY_SHOWN
from realtimed.text import quoted

__all__ = ["CHANNELS_LIMIT", "COMMANDS", "UNDER_WAY", "Caller", "Command", "Context", "call", "shown"]

CHANNELS_LIMIT: Final = 5000
"""Channels that one ``broadcast_many`` may name."""

_STEP: Final = 64
"""Channels that one step publishes on: a fraction of a millisecond."""

_PAGES: Final = (
    'ask for a page of it with {"limit": …, "after": …}, for how many there are with {"count": true}, or for'
)

UNDER_WAY: Final = object()
"""The result of a command whose outcome is not known yet. Its caller gives no other command until it is."""

_T = TypeVar("_T")

Caller: TypeAlias = Subscriber
"""The subscriber that gave a command, and gets the messages it asks for."""


@dataclass
class Context:
    """What commands work on."""

    hub: Hub
    publish: Callable[[object, object, bytes | None], Receipt]
    """Publishes one message; see `realtimed.broker.base.Broker.publish_one`."""
    clients: Mapping[str, Client]
    disconnect: Callable[[str, int | None, str], bool]
    stats: Callable[[], dict[str, object]]
    info: Callable[[], dict[str, object]]
    keyed_receipts: KeyedReceipts
    upgrade: Callable[[Subscriber | None], None]
    """Begins an upgrade for a caller, or raises `RefusedError`."""


_Run: TypeAlias = Callable[[Context, Caller | None, list[object]], object]


class Command(NamedTuple):
    """A command: its parameters in words, and a function that returns its result, or the `Steps` to it.

    - The function returns `NotImplemented` for parameters that the command does not take.
    - It raises `RefusedError` if it cannot do what was asked; steps raise it before anything is done.
    - Steps that publish (`publishes`) are all taken, even if the caller has gone. Of other steps, those of one command
      are taken at a time, since they may take memory in proportion to the number of clients or channels.

    `shorter` says how to ask for less, if the result may be large.
    """

    params: str
    run: _Run
    publishes: bool = False
    shorter: str = ""


def call(context: Context, method: str, params: list[object], caller: Caller | None = None) -> object:
    """Carry out a command and return its result, or the `Steps` to it.

    Raises `RefusedError`; then nothing was done.
    """
    if method == "broadcast" and len(params) == 2:  # the most frequent command, so without the table
        return context.publish(params[0], params[1], None)
    command = COMMANDS.get(method)
    if command is None:
        raise RefusedError("unknown_method", f"unknown method {quoted(method)}; the methods are {', '.join(COMMANDS)}")
    result = command.run(context, caller, params)
    if result is NotImplemented:
        raise RefusedError("invalid_params", f"{method} takes {command.params}, not {quoted(params)}")
    return result


def shown(result: object) -> Any:
    """Return a result in the form in which it is sent."""
    if isinstance(result, Receipt):
        return {"recipients": result.recipients, "epoch": result.epoch, "offset": result.offset}
    if isinstance(result, Joined):
        recovered = {} if result.recovered is None else {"recovered": result.recovered}
        last = {} if result.last is None else {"last": result.last}
        return {"epoch": result.epoch, "offset": result.offset, **recovered, **last}
    return result


@dataclass
class _Options:
    """What the last parameter of a command may ask for: times of publication, and the `last` messages of a channel."""

    time: bool = False
    last: int | None = None


def _options(given: Mapping[object, object], *known: str) -> _Options:
    """Read the options that a command has. Raises `RefusedError` for other options and for wrong values."""
    options = _Options()
    for name, value in given.items():
        if name not in known:
            raise RefusedError("invalid_params", f"there is no option {quoted(name)} here, only {' and '.join(known)}")
        if name == "time" and type(value) is bool:
            options.time = value
        elif name == "last" and isinstance(value, int) and _is_count(value):
            options.last = value
        else:
            raise RefusedError(
                "invalid_params", f"{name} cannot be {quoted(value)}: time is true or false, last a number from 0"
            )
    return options


def _broadcast(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case [channel, content]:
            return context.publish(channel, content, None)
        case [channel, content, key]:
            check_channel_name(channel)
            name, key = str(channel), checked_key(key)
            known = context.keyed_receipts.known(name, key)
            if known is not None:
                return _again(known)[0]
            receipt = context.publish(name, content, None)
            context.keyed_receipts.remember(name, key, [receipt])
            return receipt
    return NotImplemented


def _upgrade(context: Context, caller: Caller | None, params: list[object]) -> object:
    if params:
        return NotImplemented
    context.upgrade(caller)
    return UNDER_WAY


def _broadcast_many(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case [list() as channels, content]:
            pass
        case [list() as channels, content, key]:
            checked_key(key)
        case _:
            return NotImplemented
    if len(channels) > CHANNELS_LIMIT:
        raise RefusedError(
            "too_many_channels",
            f"broadcast_many names {len(channels)} channels; the limit is {CHANNELS_LIMIT} a command",
        )
    payload = encode_message(content, context.hub.max_message)
    return _publish_on_all(context, channels, content, payload, *params[2:])


def _publish_on_all(
    context: Context, channels: list[object], content: object, payload: bytes, key: object = None
) -> Steps:
    """Publish on all channels, or on none if one name is wrong. With a known `key`, only repeat the receipts."""
    for some in _in_parts(channels):
        for channel in some:
            check_channel_name(channel)
        yield ()
    if key is None:
        for some in _in_parts(channels):
            yield [shown(context.publish(each, content, payload)) for each in some]
        return Whole({})
    names, key, keyed = tuple(map(str, channels)), checked_key(key), context.keyed_receipts
    while keyed.is_under_way(names, key):  # on another connection, for a few turns of the event loop
        yield WAIT
    known = keyed.known(names, key)
    if known is not None:
        for receipts in _in_parts(known):
            yield _again(receipts)
        return Whole({})
    published: list[Receipt] = []
    keyed.begin(names, key)
    try:
        for some in _in_parts(names):
            receipts = [context.publish(each, content, payload) for each in some]
            published += receipts
            yield [shown(receipt) for receipt in receipts]
        keyed.remember(names, key, published)
    finally:
        keyed.end(names, key)
    return Whole({})


def _in_parts(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Cut a list into parts, one for each step."""
    for start in range(0, len(items), _STEP):
        yield items[start : start + _STEP]


def _again(receipts: Sequence[Receipt]) -> list[dict[str, object]]:
    return [shown(receipt) | {"repeated": True} for receipt in receipts]


def _channels(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case []:
            return list_channels(context.hub)
        case [str(prefix)]:
            return list_channels(context.hub, prefix)
        case [{**options}]:
            return list_channels(context.hub, options=options)
    return NotImplemented


def _clients(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case []:
            return list_clients(context.hub, context.clients)
        case [{**options}]:
            return list_clients(context.hub, context.clients, options)
    return NotImplemented


def _history(context: Context, _: Caller | None, params: list[object]) -> object:
    match params:
        case [channel]:
            count = HISTORY_SHOWN
        case [channel, int(count)] if _is_count(count):
            pass
        case [channel, int(count), {**given}] if _is_count(count):
            return _recent(context, channel, count, _options(given, "time"))
        case _:
            return NotImplemented
    return _recent(context, channel, count, _Options())


def _recent(context: Context, channel: object, count: int, options: _Options) -> Steps:
    position, publications = context.hub.recent(channel, count)
    kept = zip(publications.payloads(), publications.times(), strict=True)
    for offset, (payload, time) in enumerate(kept, publications.first):
        message = payload.decode() if isinstance(payload, bytes) else bytes(payload)
        yield [(offset, message, {"time": time}) if options.time else (offset, message)]
    return Whole({"epoch": position.epoch, "offset": position.offset}, "messages")


def _disconnect(context: Context, _: Caller | None, params: list[object]) -> object:
    code: int | None = None
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
    return {"disconnected": int(context.disconnect(id, code, reason))}


def _subscribe(context: Context, caller: Caller | None, params: list[object]) -> object:
    options = _Options()
    since = None
    match params:
        case [channel]:
            pass
        case [channel, {"epoch": str(epoch), "offset": int(offset)}] if _is_count(offset):
            since = Position(epoch, offset)
        case [channel, None, {**given}]:
            options = _options(given, "time", "last")
        case [channel, {"epoch": str(epoch), "offset": int(offset)}, {**given}] if _is_count(offset):
            options = _options(given, "time")  # not "last": what was missed since the position comes instead
            since = Position(epoch, offset)
        case _:
            return NotImplemented
    caller = _required(caller)
    joined = context.hub.subscribe(caller, channel, since, last=options.last)
    _tell_time(context, caller, options)
    return joined


def _unsubscribe(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [channel]:
            return {"unsubscribed": context.hub.unsubscribe(_required(caller), channel)}
    return NotImplemented


def _watch(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [pattern]:
            options = _Options()
        case [pattern, {**given}]:
            options = _options(given, "time")
        case _:
            return NotImplemented
    caller = _required(caller)
    context.hub.watchers.add(caller, pattern)
    _tell_time(context, caller, options)
    return {"watched": True}


def _unwatch(context: Context, caller: Caller | None, params: list[object]) -> object:
    match params:
        case [pattern]:
            return {"unwatched": context.hub.watchers.remove(_required(caller), pattern)}
    return NotImplemented


def _tell_time(context: Context, caller: Caller, options: _Options) -> None:
    """From now on send `caller` the times of publications, if it has asked for them."""
    if options.time:
        context.hub.change_form(caller, WITH_TIME)


def _required(caller: Caller | None) -> Caller:
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
    """Return whether this is a whole number from 0; True and False are not."""
    return type(value) is int and value >= 0


COMMANDS: Final[Mapping[str, Command]] = {
    "broadcast": Command("[channel, message, key?]", _broadcast),
    "broadcast_many": Command("[[channel, …], message, key?]", _broadcast_many, publishes=True),
    "channels": Command(
        "[prefix?] or [{limit?, after?, prefix?, count?}]",
        _channels,
        shorter=f'{_PAGES} less of it with {{"prefix": …}}',
    ),
    "history": Command(
        "[channel, count?] or [channel, count, {time?}]",
        _history,
        shorter="ask for fewer messages: history [channel, count]",
    ),
    "clients": Command(
        "[] or [{limit?, after?, channel?, address?, count?}]",
        _clients,
        shorter=f'{_PAGES} less of it with {{"channel": …}} or {{"address": …}}',
    ),
    "disconnect": Command("[client id, code?, reason?]", _disconnect),
    "subscribe": Command(
        "[channel, {epoch, offset}?] or [channel, {epoch, offset} or nil, {time?, last?}]", _subscribe
    ),
    "unsubscribe": Command("[channel]", _unsubscribe),
    "watch": Command("[pattern, {time?}?]", _watch),
    "unwatch": Command("[pattern]", _unwatch),
    "stats": Command("[]", _stats),
    "ping": Command("[]", _ping),
    "info": Command("[]", _info),
    "upgrade": Command("[]", _upgrade),
}
