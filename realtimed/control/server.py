"""The daemon's end of the control socket: commands in, answers out.

All commands that have arrived are carried out together and answered in one write; meanwhile nothing else runs, so
the publications of one read share a round of the fan-out. A connection is read no further while its answers wait to be
read, while the fan-out is behind, or while too much waits for slow clients: that is how publishers feel back-pressure.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

import trio

from realtimed.config import Config
from realtimed.control.wire import (
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
from realtimed.frames import CloseCode, Publication, WireFormat
from realtimed.hub import Hub, Receipt, check_channel_name, encode_message
from realtimed.stream import QueuedStream

__all__ = ["Client", "Connection", "Service"]

_READ_BYTES: Final = 64 * 2**10
_PARAMS_ROOM: Final = 2**20
"""Bytes a command may have beside its message: names of channels, above all."""

_FIRST_COMMAND: Final = 1.0
"""Seconds that a daemon which is about to end waits for the first command of a connection."""

log = logging.getLogger(__name__)


class Client(Protocol):
    """A connected WebSocket, for those who ask who is there or want to end it."""

    def describe(self) -> dict[str, object]:
        """Return what the ``clients`` command shows."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye and end the connection. Returns at once."""


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
    connections: set[Connection] = field(default_factory=set)
    commands: int = 0
    refused: int = 0
    stopping: bool = False

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
        self._decoder = Decoder(service.config.max_message + _PARAMS_ROOM)
        self._nursery: trio.Nursery
        self._patience = trio.CancelScope()
        self._is_new = True
        stream.form = self.form

    async def run(self) -> None:
        """Carry out commands until the publisher hangs up or breaks the protocol; then shut the stream."""
        self._service.connections.add(self)
        try:
            async with trio.open_nursery() as self._nursery:
                self.stream.attach(self._nursery, self)
                log.debug("publisher connected pid=%d uid=%d gid=%d", *(self.stream.peer()[1] or (0, -1, -1)))
                await self._serve()
                with trio.move_on_after(self._service.config.close_timeout):
                    await self.stream.flush()
                self._nursery.cancel_scope.cancel()
        finally:
            self._hub.leave(self.stream)
            self._service.connections.remove(self)
            self.stream.shut()
            self.stream.detach()
            del self._nursery  # it leads back here

    def stop(self) -> None:
        """Take no more commands, but for one that has begun to arrive, or the first of all. Returns at once."""
        if self._is_new:
            self._patience.deadline = min(self._patience.deadline, trio.current_time() + _FIRST_COMMAND)
        elif not self._decoder.mid_message:
            self.stream.stop_receiving()

    # What the stream tells its owner.

    def slow(self, reason: str) -> None:
        """See `realtimed.stream.Owner`."""
        log.warning("publisher disconnected: it does not read its answers, %s", reason)
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
            self._patience = trio.CancelScope(deadline=begun + self._service.config.command_timeout)
            if self._service.stopping:
                self.stop()
            with self._patience:
                try:
                    data = await self.stream.receive_some(_READ_BYTES)
                except trio.BrokenResourceError:
                    return
            if self._patience.cancelled_caught:
                if begun == math.inf:
                    return
                limit = f"{self._service.config.command_timeout:g} s"
                self._end("timeout", f"a command has begun and not ended; the limit, command-timeout, is {limit}")
                return
            if not data:
                return
            self._is_new = False
            try:
                messages = self._decoder.feed(data)
            except BadBytesError as error:
                self._carry_out(error.messages)
                self._end("protocol_error", str(error))
                return
            self._carry_out(messages)
            if not self._decoder.mid_message:
                begun = math.inf
            elif messages or begun == math.inf:
                begun = trio.current_time()
            await self.stream.flush()
            await self._service.room()

    def _end(self, code: str, message: str) -> None:
        """Say what ends the connection: a response to no request in particular."""
        self._service.refused += 1
        log.info("publisher disconnected code=%s reason=%s", code, quoted(message, 200))
        self.stream.write(encode_response(None, {"code": code, "message": message}, None))

    def _carry_out(self, messages: list[Message]) -> None:
        answers = []
        self._service.commands += len(messages)
        for message in messages:
            try:
                result = self._result(message)
            except RefusedError as error:
                self._service.refused += 1
                if isinstance(message, (Request, Oversized)) and message.id is not None:
                    refusal = {"code": error.code, "message": error.message}
                    answers.append(encode_response(message.id, refusal, None))
                else:
                    log.info("notification refused code=%s reason=%s", error.code, quoted(error.message, 200))
            else:
                if isinstance(message, Request):
                    answers.append(encode_response(message.id, None, result))
        if answers:
            self.stream.write(b"".join(answers))

    def _result(self, message: Message) -> object:
        match message:
            case Request(_, "broadcast", [channel, content]) | Notification("broadcast", [channel, content]):
                return _receipt(self._hub.publish(channel, content))
            case Request(_, method, params) | Notification(method, params):
                return self._other(method, params)
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
            case "broadcast_many", [[*channels], content]:
                return self._broadcast_many(channels, content)
            case "channels", []:
                return self._hub.describe_channels()
            case "channels", [str(prefix)]:
                return self._hub.describe_channels(prefix)
            case "clients", []:
                return [client.describe() for client in self._service.clients.values()]
            case "disconnect", [str(client)]:
                return self._disconnect(client)
            case "disconnect", [str(client), int(code)]:
                return self._disconnect(client, code)
            case "disconnect", [str(client), int(code), str(reason)]:
                return self._disconnect(client, code, reason)
            case "subscribe", [channel]:
                joined = self._hub.subscribe(self.stream, channel)
                return {"epoch": joined.epoch, "offset": joined.offset}
            case "unsubscribe", [channel]:
                return {"unsubscribed": self._hub.unsubscribe(self.stream, channel)}
            case "stats", []:
                return self._service.stats()
            case "ping", []:
                return "pong"
            case "info", []:
                return self._service.info()
        if method in _PARAMS:
            raise RefusedError("invalid_params", f"{method} takes {_PARAMS[method]}, not {quoted(params)}")
        raise RefusedError("unknown_method", f"there is no method {quoted(method)}; there are {', '.join(_PARAMS)}")

    def _broadcast_many(self, channels: list[object], content: object) -> list[dict[str, object]]:
        """Publish on all channels, or on none if one of them is wrong."""
        encode_message(content, self._hub.max_message)
        for channel in channels:
            check_channel_name(channel)
        return [_receipt(self._hub.publish(channel, content)) for channel in channels]

    def _disconnect(
        self, id: str, code: int = CloseCode.NOT_ALLOWED, reason: str = "disconnected by an administrator"
    ) -> dict[str, object]:
        if code not in (1000, 1001) and not 3000 <= code <= 4999:
            raise RefusedError("invalid_params", "a close code is 1000, 1001 or 3000 to 4999 (RFC 6455 section 7.4)")
        client = self._service.clients.get(id)
        if client is not None:
            client.close(code, reason)
        return {"disconnected": 0 if client is None else 1}


_PARAMS: Final = {
    "broadcast": "[channel, message]",
    "broadcast_many": "[[channel, …], message]",
    "channels": "[prefix?]",
    "clients": "[]",
    "disconnect": "[client id, code?, reason?]",
    "subscribe": "[channel]",
    "unsubscribe": "[channel]",
    "stats": "[]",
    "ping": "[]",
    "info": "[]",
}


def _receipt(receipt: Receipt) -> dict[str, object]:
    return {"recipients": receipt.recipients, "epoch": receipt.epoch, "offset": receipt.offset}
