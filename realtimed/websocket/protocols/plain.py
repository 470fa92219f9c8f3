"""The plain protocol, which works from a browser's console without a library.

    → {"action":"subscribe","channel":"news"}
    ← each message of the channel as published: text as a text frame, binary as a binary frame
    → {"action":"unsubscribe","channel":"news"}

Nothing is answered. A mistake closes the connection with a code and a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final, Literal

import msgspec

from realtimed.errors import RefusedError
from realtimed.hub.publication import Ending, Frames, Publication, WireFormat
from realtimed.websocket.frames import binary_frame, text_frame
from realtimed.websocket.protocols.base import Conversation, ViolationError, not_json, not_valid

__all__ = ["Plain"]


class _Command(msgspec.Struct):
    action: Literal["subscribe", "unsubscribe"]
    channel: str


_ACTIONS: Final = '"subscribe" or "unsubscribe"'
_EXAMPLE: Final = '{"action":"subscribe","channel":"…"}'

_decode = msgspec.json.Decoder(_Command).decode


class _AsPublished:
    def encode(self, publication: Publication) -> bytes:
        return text_frame(publication.payload) if publication.text else binary_frame(publication.payload)


class Plain(Conversation):
    """One client that speaks the plain protocol."""

    __slots__ = ()

    name = ""
    form: ClassVar[WireFormat] = _AsPublished()

    def receive(self, message: str | bytes) -> Iterable[Frames]:
        """See `Conversation.receive`."""
        if isinstance(message, bytes):
            raise ViolationError(Ending.BAD_MESSAGE, "expected a text frame with a JSON object, got a binary frame")
        try:
            command = _decode(message)
        except msgspec.ValidationError as error:
            raise ViolationError(Ending.BAD_MESSAGE, not_valid(error, _ACTIONS)) from None
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise ViolationError(Ending.BAD_MESSAGE, f"{not_json(message, error)}; expected {_EXAMPLE}") from None
        try:
            if command.action == "subscribe":
                self.hub.subscribe(self.subscriber, command.channel)
            else:
                self.hub.unsubscribe(self.subscriber, command.channel)
        except RefusedError as error:
            ending = Ending.TOO_MANY if error.code.startswith("too_many_") else Ending.BAD_MESSAGE
            raise ViolationError(ending, error.message) from None
        return ()
