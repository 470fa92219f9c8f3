"""The protocol `realtime.v1`: JSON envelopes, for applications.

    ← {"event":"welcome","client":"c-9c31-1f","heartbeat":25}
    → {"action":"subscribe","channel":"news","id":7,"since":{"epoch":"k3f","offset":41}}
    ← {"event":"subscribed","channel":"news","id":7,"epoch":"k3f","offset":44,"recovered":true}
    ← {"event":"message","channel":"news","offset":45,"time":1767225600000,"data":"…"}     (bytes: "base64", not "data")
    → {"action":"unsubscribe","channel":"news","id":8}
    ← {"event":"unsubscribed","channel":"news","id":8}
    → {"action":"ping"}    ← {"event":"pong"}
    ← {"event":"error","id":7,"code":"invalid_channel","message":"…"}
    ← {"event":"goodbye","reason":"restart","retry_after_ms":1740}

A mistake is answered with an error and ends nothing. `since` asks for what was published after a position. With
``"recovered":true`` all of it follows, in order, before anything newer; with ``false`` nothing of it does. ``"last":n``
asks for the newest n messages that are kept. `time` is the time of publication, in milliseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Final

import msgspec

from realtimed.errors import RefusedError
from realtimed.hub.position import Position
from realtimed.hub.publication import Ending, Frames, Publication, WireFormat
from realtimed.websocket.frames import text_frame
from realtimed.websocket.protocols.base import Conversation, not_json, not_valid

__all__ = ["RealtimeV1"]

_ACTIONS: Final = '"subscribe", "unsubscribe" or "ping"'
_GOODBYES: Final = {Ending.RESTART: "restart", Ending.MAX_AGE: "max-age"}
_Id = int | str | None


class _Since(msgspec.Struct):
    epoch: str
    offset: Annotated[int, msgspec.Meta(ge=0)]


class _Subscribe(msgspec.Struct, tag_field="action", tag="subscribe"):
    channel: str
    id: _Id = None
    since: _Since | None = None
    last: Annotated[int, msgspec.Meta(ge=0)] | None = None


class _Unsubscribe(msgspec.Struct, tag_field="action", tag="unsubscribe"):
    channel: str
    id: _Id = None


class _Ping(msgspec.Struct, tag_field="action", tag="ping"):
    id: _Id = None


class _Identified(msgspec.Struct):
    """The id of a message that is not a valid command. The error carries it."""

    id: _Id = None


_decode = msgspec.json.Decoder(_Subscribe | _Unsubscribe | _Ping).decode
_decode_id = msgspec.json.Decoder(_Identified).decode
_encode = msgspec.json.Encoder().encode


def _event(event: str, **fields: object) -> bytes:
    return text_frame(_encode({"event": event, **fields}))


# Each publication makes one of these. msgspec encodes them in half the time of a dict.


class _Text(msgspec.Struct, tag_field="event", tag="message", gc=False):
    channel: str
    offset: int
    time: int
    data: str


class _Bytes(msgspec.Struct, tag_field="event", tag="message", gc=False):
    channel: str
    offset: int
    time: int
    base64: bytes


class _Enveloped:
    def encode(self, publication: Publication) -> bytes:
        channel, offset, time, payload = publication.channel, publication.offset, publication.time, publication.payload
        if publication.text:
            return text_frame(_encode(_Text(channel, offset, time, payload.decode())))
        return text_frame(_encode(_Bytes(channel, offset, time, payload)))


class RealtimeV1(Conversation):
    """One client that speaks `realtime.v1`."""

    __slots__ = ()

    name = "realtime.v1"
    form: ClassVar[WireFormat] = _Enveloped()

    def greeting(self, client: str, heartbeat: float) -> bytes:
        """See `Conversation.greeting`."""
        # A whole number is written without a point: not every reader of JSON takes 25.0 for an integer.
        return _event("welcome", client=client, heartbeat=int(heartbeat) if heartbeat.is_integer() else heartbeat)

    def receive(self, message: str | bytes) -> Iterable[Frames]:
        """See `Conversation.receive`."""
        if isinstance(message, bytes):
            return [_error(None, "invalid_message", "expected a text frame with a JSON object, got a binary frame")]
        try:
            command = _decode(message)
        except msgspec.ValidationError as error:
            return [_error(_id_of(message), "invalid_message", not_valid(error, _ACTIONS))]
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            return [_error(None, "invalid_message", not_json(message, error))]
        try:
            return self._answer(command)
        except RefusedError as error:
            return [_error(command.id, error.code, error.message)]

    def farewell(self, ending: Ending, retry_after: float) -> bytes:
        """See `Conversation.farewell`."""
        return _event("goodbye", reason=_GOODBYES[ending], retry_after_ms=round(retry_after * 1000))

    def _answer(self, command: _Subscribe | _Unsubscribe | _Ping) -> Iterable[Frames]:
        match command:
            case _Subscribe(channel=name, since=since, last=last):
                if since is not None and last is not None:
                    raise RefusedError("invalid_message", "`since` and `last` exclude each other: give one of them")
                position = Position(since.epoch, since.offset) if since is not None else None
                joined = self.hub.subscribe(self.subscriber, name, position, last=last)
                recovered = {} if joined.recovered is None else {"recovered": joined.recovered}
                where = {"epoch": joined.epoch, "offset": joined.offset}
                answer = _event("subscribed", channel=name, **_id(command), **where, **recovered)
                return self.hub.replays.replay([answer], joined.missed, self.form)
            case _Unsubscribe(channel=name):
                self.hub.unsubscribe(self.subscriber, name)
                return [_event("unsubscribed", channel=name, **_id(command))]
            case _Ping():
                return [_event("pong", **_id(command))]


def _id(command: _Subscribe | _Unsubscribe | _Ping) -> dict[str, int | str]:
    """Return the field for the command's id in its answer: none if the command had no id."""
    return {} if command.id is None else {"id": command.id}


def _id_of(message: str) -> _Id:
    try:
        return _decode_id(message).id
    except (msgspec.DecodeError, RecursionError):  # ValidationError is a DecodeError too
        return None


def _error(id: _Id, code: str, message: str) -> bytes:
    return _event("error", id=id, code=code, message=message)
