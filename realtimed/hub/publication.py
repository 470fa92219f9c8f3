"""What is published, how it looks to subscribers, and why a connection that gets it may end."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, TypeAlias

import msgspec

from realtimed.errors import RefusedError

__all__ = ["Ending", "Frame", "Publication", "WireFormat", "encode_message", "join_frames"]

Frame: TypeAlias = bytes | memoryview
"""One or more whole frames. A memoryview is shared by several clients, and counted once."""


class Ending(Enum):
    """Why a connection ends. Each protocol has its close code and its words for it; metrics and log have this name."""

    BY_CLIENT = "by_client"
    """The client has closed it, with a code of its own."""
    GONE = "gone"
    """The client hung up without a Close, or takes nothing any more."""
    FAULT = "fault"
    """An internal error: the client may have missed something, and comes back to ask for it."""
    KICKED = "kicked"
    """An administrator has disconnected the client."""
    RESTART = "restart"
    """The daemon stops."""
    MAX_AGE = "max_age"
    """The connection has reached its age."""
    SLOW = "slow"
    """Too much waits for the client, or for too long."""
    SILENT = "silent"
    """Nothing has been heard from the client for too long."""
    BAD_MESSAGE = "bad_message"
    """The client has said something that its protocol does not know, and which has no answer there."""
    TOO_MANY = "too_many"
    """The client has more channels, or sends more frames, than it may."""
    TOO_BIG = "too_big"
    """A message of the client is larger than it may be."""
    NO_SUCH_PATH = "no_such_path"
    """WebSockets are not served at the path that the client asked for."""
    PROTOCOL_ERROR = "protocol_error"
    """The client breaks RFC 6455."""
    INVALID_DATA = "invalid_data"
    """A text message of the client is not UTF-8."""


class WireFormat(Protocol):
    """The format of one kind of subscriber."""

    def encode(self, publication: Publication) -> bytes:
        """Return the bytes that go out on the subscriber's socket."""
        ...


class Publication(msgspec.Struct, eq=False, gc=False):  # one for each publication: made in a fraction of the time
    """One message on its way, and its position in the channel.

    `payload` is the message in bytes, UTF-8 if `text`. `offset` counts the channel's publications from 1. `time` is the
    wall clock at publication, in milliseconds since 1970: it may run backwards from one publication to the next.
    """

    # Invariant: `_bytes` is the publication in the format `_form`, the first that a subscriber needed; `_others` has
    # the other formats. Most publications need only one, and a dictionary for each would cost as much as encoding it.

    channel: str
    payload: bytes
    text: bool
    offset: int
    time: int = 0
    _form: WireFormat | None = None
    _bytes: bytes = b""
    _others: dict[WireFormat, bytes] | None = None

    @property
    def message(self) -> str | bytes:
        """The message as it was published."""
        return self.payload.decode() if self.text else self.payload

    def encoded(self, form: WireFormat) -> bytes:
        """Return the publication in `form`; the first call for a format encodes it."""
        if self._form is form:
            return self._bytes
        if self._form is None:
            self._form = form
            self._bytes = form.encode(self)
            return self._bytes
        if self._others is None:
            self._others = {}
        encoded = self._others.get(form)
        if encoded is None:
            encoded = self._others[form] = form.encode(self)
        return encoded


def join_frames(publications: Sequence[Publication], form: WireFormat) -> bytes:
    """Return the frames of publications in `form`, in this order."""
    if len(publications) == 1:
        return publications[0].encoded(form)
    return b"".join([each.encoded(form) for each in publications])


def encode_message(message: object, limit: int) -> bytes:
    """Return a message's bytes. Raises `RefusedError` unless it is valid text, or bytes, of at most `limit` bytes."""
    if isinstance(message, str):
        try:
            payload = message.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                "invalid_utf8",
                f"the message is not valid UTF-8 at character {error.start}: what is not text can be sent as binary",
            ) from None
    elif isinstance(message, bytes):
        payload = message
    else:
        raise RefusedError("invalid_params", f"a message is str or bin, not {type(message).__name__}")
    if len(payload) > limit:
        raise RefusedError(
            "message_too_large", f"the message has {len(payload)} bytes; the limit, max-message, is {limit}"
        )
    return payload
