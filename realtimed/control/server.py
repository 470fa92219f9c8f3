"""The daemon's end of the control socket: commands in, answers out.

All commands that have arrived are carried out together and answered in one write; meanwhile nothing else runs, so
the publications of one read share a round of the fan-out. A connection is read no further while its answers wait to be
read, while the fan-out is behind, or while too much waits for slow clients: that is how publishers feel back-pressure.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final, Protocol

import trio

from realtimed.channel import check_channel_name, encode_message
from realtimed.config import Config
from realtimed.control.idempotency import Answered
from realtimed.control.wire import (
    VALUES_LIMIT,
    BadBytesError,
    Decoder,
    Message,
    Notification,
    Oversized,
    Request,
    Response,
    encode_notification,
    encode_response,
)
from realtimed.errors import RefusedError, quoted
from realtimed.frames import CloseCode, Publication, WireFormat, check_close
from realtimed.hub import Hub, Joined, Position, Receipt
from realtimed.logs import Event
from realtimed.stream import QueuedStream

__all__ = ["Client", "Connection", "Service"]

_READ_BYTES: Final = 64 * 2**10
_HISTORY_SHOWN: Final = 100
_PARAMS_ROOM: Final = 2**20
"""Bytes a command may have beside its message: names of channels, above all."""

_FIRST_COMMAND: Final = 1.0
"""Seconds that a daemon which is about to end waits for the first command of a connection."""

log = logging.getLogger(__name__)


class Client(Protocol):
    """A connected WebSocket, for those who ask who is there or want to end it."""

    def describe(self) -> dict[str, object]:
        """Return what the ``clients`` command shows."""

    def close(self, code: int, reason: str) -> bool:
        """Say goodbye and end the connection. Returns at once, whether it was not ending already."""


class _AsNotification:
    def encode(self, publication: Publication) -> bytes:
        return encode_notification("message", (publication.channel, publication.message, publication.offset))


@dataclass
class Service:
    """What commands work on; one for all connections."""

    hub: Hub
    clients: Mapping[str, Client]
    config: Config
    stats: Callable[[], dict[str, object]]
    info: Callable[[], dict[str, object]]
    room: Callable[[], Awaitable[None]]
    at_once: Callable[[Callable[[], None]], None]
    answered: Answered
    connections: set[Connection] = field(default_factory=set)
    commands: int = 0
    stopping: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    """Refused commands, by the code of the error."""
    settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    """Waits until everything published so far has been handed to the sockets or to their backlogs."""
    listening: set[Connection] = field(default_factory=set)
    """Those of the connections that have no commands left and stay to hear what the others publish."""
    left: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    """Where to wait for a connection to be gone, or to be done with its commands."""

    async def hear_out(self, connection: Connection) -> None:
        """Wait, when the daemon stops, until no connection has commands left and all they published is handed on."""
        self.listening.add(connection)
        self.left.unpark_all()
        while len(self.connections) > len(self.listening):
            await self.left.park()
        await self.settle()

    def note_refusal(self, code: str) -> None:
        """Count a command that is refused."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def stop(self) -> None:
        """Let every connection end once it has answered what has been sent to it.

        One that has just been made is given the time to send its first command, or whoever opens a connection for each
        command would meet with errors whenever the daemon restarts.
        """
        self.stopping = True
        for connection in self.connections:
            connection.stop()


class Connection:
    """One publisher's connection, and its stream's owner."""

    form: ClassVar[WireFormat] = _AsNotification()

    def __init__(self, stream: QueuedStream, service: Service) -> None:
        self.stream = stream
        self._service = service
        self._hub = service.hub
        self._decoder = Decoder(service.config.max_message + _PARAMS_ROOM, VALUES_LIMIT)
        self._nursery: trio.Nursery
        self._is_new = True
        self._credentials = stream.peer()[1] or (0, -1, -1)
        self._forbidden: str | None = None
        self._complained = False
        stream.form = self.form

    async def run(self) -> None:
        """Carry out commands until the publisher hangs up or breaks the protocol; then shut the stream."""
        self._service.connections.add(self)
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    self.stream.attach(self._nursery, self)
                    log.debug(Event("publisher connected", **self._peer()))
                    self._check_access()
                    await self._serve()
                    if self._service.stopping and (self.stream.channels or self.stream in self._hub.watchers):
                        await self._service.hear_out(self)
                    with trio.move_on_after(self._service.config.close_timeout):
                        await self.stream.flush()
                finally:
                    # A nursery that is closing takes no new tasks, and others run before it has closed: from here on
                    # neither a publication (`seal`) nor the daemon's stop (`_is_new`) may need one.
                    self.stream.seal()
                    self._is_new = False
                self._nursery.cancel_scope.cancel()
        finally:
            self._hub.leave(self.stream)
            self._hub.watchers.leave(self.stream)
            self._service.connections.remove(self)
            self._service.listening.discard(self)
            self._service.left.unpark_all()
            self.stream.shut()
            self.stream.detach()
            del self._nursery  # it leads back here

    def stop(self) -> None:
        """Take no more commands, but for one that has begun to arrive, or the first of all. Returns at once."""
        if self._is_new:
            self._nursery.start_soon(self._stop_later)
        elif not self._decoder.mid_message:
            self.stream.stop_receiving()

    async def _stop_later(self) -> None:
        await trio.sleep(_FIRST_COMMAND)
        self.stream.stop_receiving()

    # What the stream tells its owner.

    def slow(self, reason: str) -> None:
        """See `realtimed.stream.Owner`."""
        if self._nursery.cancel_scope.cancel_called:
            return  # it has been said
        reason = f"it does not read its answers: {reason}"
        log.warning(Event("publisher disconnected", code="slow", reason=reason, **self._peer()))
        self._nursery.cancel_scope.cancel()

    def broken(self) -> None:
        """See `realtimed.stream.Owner`."""
        self._nursery.cancel_scope.cancel()

    def misbehaved(self, code: CloseCode, reason: str) -> None:
        """See `realtimed.stream.Owner`."""

    def library_done(self) -> None:
        """See `realtimed.stream.Owner`."""

    async def _serve(self) -> None:
        begun = math.inf  # when the command that is arriving in pieces began to
        while True:
            if self._service.stopping:
                self.stop()
            try:
                data = await self._receive(begun + self._service.config.command_timeout)
            except trio.BrokenResourceError:
                return
            if data is None:
                limit = f"{self._service.config.command_timeout:g} s"
                self._end("timeout", f"a command has begun and not ended; the limit, command-timeout, is {limit}")
                return
            if not data:
                return
            self._is_new = False
            self._decoder.limit = self._service.config.max_message + _PARAMS_ROOM  # a reload may have changed it
            try:
                messages = self._decoder.feed(data)
            except BadBytesError as error:
                self._carry_out(error.messages)
                self._end("protocol_error", str(error))
                return
            if len(self._service.connections) == 1:  # nobody else can publish in this turn
                self._service.at_once(partial(self._carry_out, messages))
            else:
                self._carry_out(messages)
            if not self._decoder.mid_message:
                begun = math.inf
            elif messages or begun == math.inf:
                begun = trio.current_time()
            await self.stream.flush()
            await self._service.room()

    async def _receive(self, deadline: float) -> bytes | None:
        """Return what has arrived, or None if nothing has by the deadline."""
        if deadline == math.inf:
            return await self.stream.receive_some(_READ_BYTES)
        # Not `trio.fail_at`: from Python 3.12 on its exception leads back to itself, and stays.
        with trio.CancelScope(deadline=deadline):
            return await self.stream.receive_some(_READ_BYTES)
        return None

    def _end(self, code: str, message: str) -> None:
        """Say what ends the connection: a response to no request in particular."""
        self._service.note_refusal(code)
        log.info(Event("publisher disconnected", code=code, reason=message, **self._peer()))
        self.stream.write(encode_response(None, {"code": code, "message": message}, None))

    def _carry_out(self, messages: list[Message]) -> None:
        answers: list[bytes] = []
        work = self._result if self._forbidden is None else self._forbid
        self._service.commands += len(messages)
        for message in messages:
            if answers and self.stream.channels:
                # What this connection watches may be handed to it while a command is carried out. That comes later.
                self._write(answers)
                answers = []
            try:
                result = work(message)
            except RefusedError as error:
                self._service.note_refusal(error.code)
                if isinstance(message, (Request, Oversized)) and message.id is not None:
                    refusal = {"code": error.code, "message": error.message}
                    answers.append(encode_response(message.id, refusal, None))
                else:
                    self._complain(error)
            else:
                if isinstance(message, Request):
                    answers.append(encode_response(message.id, None, _shown(result)))
                if isinstance(result, Joined):
                    # Before anything newer on that channel.
                    self.stream.write_frames(self._hub.replays.replay(answers, result.missed, self.form))
                    answers = []
        self._write(answers)

    def _write(self, answers: Sequence[bytes]) -> None:
        if answers:
            self.stream.write(b"".join(answers))

    def _peer(self) -> dict[str, int]:
        """Return the fields of the log that say who the publisher is."""
        pid, uid, gid = self._credentials
        return {"pid": pid, "uid": uid, "gid": gid}

    def _complain(self, error: RefusedError) -> None:
        """Log that a notification was refused, which its sender is not told: the first time on a connection."""
        if not self._complained:
            self._complained = True
            log.info(Event("notification refused", code=error.code, reason=error.message, **self._peer()))

    def _check_access(self) -> None:
        """Forbid everything to a publisher that is not of the users or groups that are let in."""
        config = self._service.config
        if not config.allow_user and not config.allow_group:
            return
        _, uid, gid = self._credentials
        if uid in config.allow_user or not self.stream.peer_groups().isdisjoint(config.allow_group):
            return
        self._forbidden = (
            "this daemon serves only the users of allow-user and the groups of allow-group;"
            f" you are user {uid} of group {gid}"
        )
        log.warning(Event("publisher not allowed", **self._peer()))

    def _forbid(self, message: Message) -> object:
        raise RefusedError("not_allowed", self._forbidden or "")

    def _result(self, message: Message) -> object:
        if isinstance(message, (Notification, Request)):
            if message.method == "broadcast" and len(message.params) == 2:  # first, and without matching of patterns
                return self._hub.publish(*message.params)
            return self._other(message.method, message.params)
        match message:
            case Oversized(_, limit, "values"):
                raise RefusedError(
                    "message_too_large",
                    f"the command has more than {limit} MessagePack values; that is the limit. Send several commands,"
                    " each with fewer channels",
                )
            case Oversized(_, limit):
                raise RefusedError(
                    "message_too_large",
                    f"the command has more than {limit} bytes; the limit of a message, max-message, is"
                    f" {self._hub.max_message} bytes",
                )
            case Response():
                raise RefusedError("invalid_params", "the daemon has asked nothing: this is a response")

    def _other(self, method: str, params: list[object]) -> object:
        match method, params:
            case "broadcast", [channel, content, key]:
                check_channel_name(channel)
                return self._once(str(channel), key, lambda: [self._hub.publish(channel, content)])[0]
            case "broadcast_many", [[*channels], content]:
                return list(map(_shown, self._publish_on_all(channels, content)))
            case "broadcast_many", [[*channels], content, key]:
                for channel in channels:
                    check_channel_name(channel)
                names = tuple(map(str, channels))
                return self._once(names, key, lambda: self._publish_on_all(channels, content))
            case "channels", []:
                return self._hub.describe_channels()
            case "channels", [str(prefix)]:
                return self._hub.describe_channels(prefix)
            case "history", [channel]:
                return self._history(channel, _HISTORY_SHOWN)
            case "history", [channel, int(count)] if _is_count(count):
                return self._history(channel, count)
            case "clients", []:
                return [client.describe() for client in self._service.clients.values()]
            case "disconnect", [str(client)]:
                return self._disconnect(client)
            case "disconnect", [str(client), int(code)]:
                return self._disconnect(client, code)
            case "disconnect", [str(client), int(code), str(reason)]:
                return self._disconnect(client, code, reason)
            case "subscribe", [channel]:
                return self._hub.subscribe(self.stream, channel)
            case "subscribe", [channel, {"epoch": str(epoch), "offset": int(offset)}] if _is_count(offset):
                return self._hub.subscribe(self.stream, channel, Position(epoch, offset))
            case "unsubscribe", [channel]:
                return {"unsubscribed": self._hub.unsubscribe(self.stream, channel)}
            case "watch", [pattern]:
                self._hub.watchers.add(self.stream, pattern)
                return {"watched": True}
            case "unwatch", [pattern]:
                return {"unwatched": self._hub.watchers.remove(self.stream, pattern)}
            case "stats", []:
                return self._service.stats()
            case "ping", []:
                return "pong"
            case "info", []:
                return self._service.info()
        if method in _PARAMS:
            raise RefusedError("invalid_params", f"{method} takes {_PARAMS[method]}, not {quoted(params)}")
        raise RefusedError("unknown_method", f"there is no method {quoted(method)}; there are {', '.join(_PARAMS)}")

    def _publish_on_all(self, channels: Sequence[object], content: object) -> list[Receipt]:
        """Publish on all channels, or on none if one of them is wrong."""
        encode_message(content, self._hub.max_message)
        for channel in channels:
            check_channel_name(channel)
        return [self._hub.publish(channel, content) for channel in channels]

    def _once(
        self, channels: str | tuple[str, ...], key: object, publish: Callable[[], list[Receipt]]
    ) -> list[dict[str, object]]:
        """Publish unless that was done with the same key before."""
        receipts, repeated = self._service.answered.once(channels, key, publish)
        return [_shown(receipt) | ({"repeated": True} if repeated else {}) for receipt in receipts]

    def _history(self, channel: object, count: int) -> dict[str, object]:
        position, publications = self._hub.recent(channel, count)
        return {
            "epoch": position.epoch,
            "offset": position.offset,
            "messages": [(publication.offset, publication.message) for publication in publications],
        }

    def _disconnect(
        self, id: str, code: int = CloseCode.NOT_ALLOWED, reason: str = "disconnected by an administrator"
    ) -> dict[str, object]:
        try:
            check_close(code, reason)
        except ValueError as error:
            raise RefusedError("invalid_params", str(error)) from None
        client = self._service.clients.get(id)
        return {"disconnected": int(client is not None and client.close(code, reason))}


_PARAMS: Final = {
    "broadcast": "[channel, message, key?]",
    "broadcast_many": "[[channel, …], message, key?]",
    "channels": "[prefix?]",
    "history": "[channel, count?]",
    "clients": "[]",
    "disconnect": "[client id, code?, reason?]",
    "subscribe": "[channel, {epoch, offset}?]",
    "unsubscribe": "[channel]",
    "watch": "[pattern]",
    "unwatch": "[pattern]",
    "stats": "[]",
    "ping": "[]",
    "info": "[]",
}


def _is_count(value: int) -> bool:
    """Return whether this is a whole number from 0, and no truth value, which is an int as well."""
    return type(value) is int and value >= 0


def _shown(result: object) -> Any:
    """Return a result as it is said over the socket."""
    if isinstance(result, Receipt):
        return {"recipients": result.recipients, "epoch": result.epoch, "offset": result.offset}
    if isinstance(result, Joined):
        recovered = {} if result.recovered is None else {"recovered": result.recovered}
        return {"epoch": result.epoch, "offset": result.offset, **recovered}
    return result
