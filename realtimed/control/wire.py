"""MessagePack-RPC without I/O: bytes in, messages out.

The form is the published one for streams:

    request       [0, id, method, params]
    response      [1, id, error, result]
    notification  [2, method, params]       (no answer)

`Decoder` never keeps more than one command of `limit` bytes. A request that is larger is not buffered: the
decoder skips it as it arrives and reports it as `Oversized`, so that its sender can be told and the commands behind
it are not lost. Only bytes that are not MessagePack, or not RPC, are a `ProtocolError`; after one, the decoder is of
no further use and the connection has to end.

A str that is not UTF-8 arrives with its bad bytes as lone surrogates (PEP 383), to be refused by whoever wants text:
a publisher in a language whose strings have no encoding gets an error for that command and keeps its connection.

Source: https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import msgpack

from realtimed.errors import ProtocolError, quoted

__all__ = [
    "ID_LIMIT",
    "Decoder",
    "Message",
    "Notification",
    "Oversized",
    "Request",
    "Response",
    "encode_notification",
    "encode_request",
    "encode_response",
]

_REQUEST: Final = 0
_RESPONSE: Final = 1
_NOTIFICATION: Final = 2
_HTTP_BEGINS: Final = frozenset(b"CDGHOPT")
"""First letters of HTTP's methods, each of which is a number in MessagePack."""

ID_LIMIT: Final = 2**32
"""Ids are 32-bit unsigned numbers; a client starts again at 0 when it reaches this one."""


class Request(NamedTuple):
    """A command that wants an answer bearing its `id`."""

    id: int
    method: str
    params: list[object]


class Response(NamedTuple):
    """The answer to the request `id`: either `error` is None or `result` is.

    `id` is None for an error that ends the connection and belongs to no request in particular.
    """

    id: int | None
    error: object
    result: object


class Notification(NamedTuple):
    """A command or an event that gets no answer."""

    method: str
    params: list[object]


class Oversized(NamedTuple):
    """A command of more than `limit` bytes, which is being skipped. `id` is None for a notification."""

    id: int | None
    limit: int


Message: TypeAlias = Request | Response | Notification | Oversized

_packer = msgpack.Packer()


def encode_request(id: int, method: str, params: Sequence[object]) -> bytes:
    """Return a request ready to send. A str with lone surrogates raises `UnicodeEncodeError`."""
    return bytes(_packer.pack((_REQUEST, id, method, params)))


def encode_response(id: int | None, error: object, result: object) -> bytes:
    """Return a response ready to send."""
    return bytes(_packer.pack((_RESPONSE, id, error, result)))


def encode_notification(method: str, params: Sequence[object]) -> bytes:
    """Return a notification ready to send."""
    return bytes(_packer.pack((_NOTIFICATION, method, params)))


class Decoder:
    """Turns what a stream delivers, in pieces of any size, into messages.

    `limit` is the largest command in bytes that is decoded; it has room for at least a kind and an id. However the
    stream is cut into pieces, the same messages come out of it, and the work is in proportion to its bytes. Only a
    command that is both too large and wrong is called the one or the other, as it happens.
    """

    # Invariants: `_unpacker` has been fed `_fed` bytes, and `_partial` is the part of them that belongs to the command
    # it is in the middle of: at most `limit` bytes, and none while `_skipping` is set, which stands inside an
    # oversized command. `_walker` has walked over `_partial`, to know by the lengths announced there what it becomes.

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._unpacker = self._new_unpacker()
        self._fed = 0
        self._partial = bytearray()
        self._walker = _Skipper(limit)
        self._skipping: _Skipper | None = None

    @property
    def mid_message(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._partial) or self._skipping is not None

    @property
    def held(self) -> int:
        """How many bytes of memory what has come of an unfinished message takes."""
        return 2 * len(self._partial)  # here, and in the unpacker

    def feed(self, data: bytes) -> list[Message]:
        """Take `data` from the stream and return all messages that are now complete, in order.

        Raises `ProtocolError` when the bytes are not MessagePack-RPC; messages that came before the bad bytes are
        then in the exception's `messages` attribute (see `BadBytesError`), for they are not to be lost.
        """
        messages: list[Message] = []
        try:
            while data:
                data = self._decode(data, messages) if self._skipping is None else self._skip(self._skipping, data)
        except ProtocolError as error:
            raise BadBytesError(str(error), messages) from error.__cause__
        return messages

    def _new_unpacker(self) -> msgpack.Unpacker:
        return msgpack.Unpacker(
            max_buffer_size=0,  # none of msgpack's own: what it holds is bounded here, by the size of a command
            max_str_len=self.limit,
            max_bin_len=self.limit,
            max_ext_len=self.limit,
            max_array_len=self.limit,
            max_map_len=self.limit,
            strict_map_key=False,  # a map with numbers as keys is MessagePack, if not what any method wants
            unicode_errors="surrogateescape",
        )

    def _decode(self, data: bytes, messages: list[Message]) -> bytes:
        """Decode what is complete and keep what is not; return what lies behind an oversized command."""
        began = -len(self._partial)  # where the command at hand begins, counted from the start of `data`
        cause: Exception | None = None
        self._unpacker.feed(data)
        try:
            for value in self._unpacker:
                end = self._unpacker.tell() - self._fed
                if end - began > self.limit:
                    head = bytes(self._partial[:_HEAD]) + data[: max(end, 0)] if began < 0 else data[began:end]
                    messages.append(_report(head[:_HEAD], self.limit))
                else:
                    messages.append(_classify(value))
                began = end
        except (ValueError, TypeError) as error:  # no MessagePack, an unhashable key in a map, or a length over `limit`
            cause = error
        self._fed += len(data)
        if began >= 0:
            self._partial.clear()
            self._walker = _Skipper(self.limit)
        unfinished = data[max(began, 0) :]
        if not unfinished:
            return b""
        self._partial += unfinished
        rest = self._walker.feed(unfinished)
        try:
            return self._let_go(rest, messages, cause) if cause is not None or self._walker.oversized else b""
        finally:
            del cause  # it leads back to this frame, and from there to all that is waiting for the result

    def _let_go(self, rest: bytes, messages: list[Message], cause: Exception | None) -> bytes:
        """Report the command at hand as oversized, and skip what is to come of it; return what lies behind it."""
        partial, skipper = bytes(self._partial), self._walker
        self._partial.clear()
        self._unpacker = self._new_unpacker()
        self._fed = 0
        if not skipper.oversized:
            raise ProtocolError(f"not MessagePack, or nested too deeply: {quoted(partial[:16])}") from cause
        messages.append(_report(partial[:_HEAD], self.limit))
        return self._end_or_go_on(skipper, rest)

    def _skip(self, skipper: _Skipper, data: bytes) -> bytes:
        return self._end_or_go_on(skipper, skipper.feed(data))

    def _end_or_go_on(self, skipper: _Skipper, rest: bytes) -> bytes:
        if skipper.malformed:
            raise ProtocolError("not MessagePack: there is the byte 0xc1, which has no meaning")
        self._skipping = None if skipper.done else skipper
        return rest


class BadBytesError(ProtocolError):
    """Bytes that are not MessagePack-RPC, after the complete `messages` that came before them."""

    def __init__(self, text: str, messages: list[Message]) -> None:
        super().__init__(text)
        self.messages = messages


def _classify(value: object) -> Message:
    """Check that a decoded value is RPC, or raise `ProtocolError`."""
    # By hand, as every command passes here and matching patterns takes five times as long. `type(…) is int` leaves out
    # bool, and the decoder makes no other subclasses.
    if type(value) is list and value and type(value[0]) is int:
        if len(value) == 3:
            kind, method, params = value
            if kind == _NOTIFICATION and type(method) is str and type(params) is list:
                return Notification(method, params)
        elif len(value) == 4:
            kind, id, method, params = value
            if kind == _REQUEST and _valid_id(id) and type(method) is str and type(params) is list:
                return Request(id, method, params)
            if kind == _RESPONSE and (id is None or _valid_id(id)):
                return Response(id, method, params)
    is_http = type(value) is int and value in _HTTP_BEGINS
    http = "; if it was an HTTP request: this socket is not for browsers" if is_http else ""
    raise ProtocolError(
        f"this is MessagePack but not MessagePack-RPC: {quoted(value)}; expected [0, id, method, params]"
        f" or [2, method, params]{http}"
    )


def _valid_id(id: object) -> bool:
    return type(id) is int and 0 <= id < ID_LIMIT


# The first byte of a value → how many bytes of length follow it, or how long its payload is. What a first byte says
# by itself (fixint, fixstr, fixarray, fixmap) is read in `_Skipper`.
_SIZED: Final = {
    0xC4: 1, 0xC5: 2, 0xC6: 4,  # bin
    0xC7: 1, 0xC8: 2, 0xC9: 4,  # ext, with one more byte for its type
    0xD9: 1, 0xDA: 2, 0xDB: 4,  # str
    0xDC: 2, 0xDD: 4,  # array
    0xDE: 2, 0xDF: 4,  # map
}  # fmt: skip
_FIXED: Final = {
    0xC0: 0, 0xC2: 0, 0xC3: 0,  # nil, false, true
    0xCA: 4, 0xCB: 8,  # float
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,  # uint
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,  # int
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,  # fixext
}  # fmt: skip


class _Skipper:
    """Walks over one MessagePack value without keeping it, only to find where it ends.

    `owed` is the number of values still to come and `payload` the bytes still to come of the one at hand. The value
    ends when both are 0.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.owed = 1
        self.payload = 0
        self.walked = 0
        self.malformed = False
        self._cut = b""  # a value's first byte whose length has not arrived yet

    @property
    def done(self) -> bool:
        return self.owed == 0 and self.payload == 0

    @property
    def oversized(self) -> bool:
        return self.walked + self.payload + self.owed > self.limit  # an owed value is a byte at least

    def feed(self, data: bytes) -> bytes:
        """Walk over `data`; return what lies behind the value's end."""
        data = self._cut + data
        self._cut = b""
        at = 0
        while not self.done and not self.malformed:
            if self.payload:
                step = min(self.payload, len(data) - at)
                self.payload -= step
                at += step
                if self.payload:
                    break
                continue
            step = self._header(data, at)
            if step == 0:
                self._cut = data[at:]
                break
            at += step
        self.walked += at
        return data[at:] if self.done else b""

    def _header(self, data: bytes, at: int) -> int:
        """Read the value that begins at `at`; return the bytes its header took, or 0 if more are needed."""
        if at >= len(data):
            return 0
        first = data[at]
        took, inside = 1, 0
        if first <= 0x7F or first >= 0xE0:  # fixint
            pass
        elif first <= 0x8F:  # fixmap
            inside = 2 * (first & 0x0F)
        elif first <= 0x9F:  # fixarray
            inside = first & 0x0F
        elif first <= 0xBF:  # fixstr
            self.payload = first & 0x1F
        elif first in _FIXED:
            self.payload = _FIXED[first]
        elif first in _SIZED:
            width = _SIZED[first]
            if at + 1 + width > len(data):
                return 0
            took += width
            length = int.from_bytes(data[at + 1 : at + took], "big")
            if first >= 0xDC:
                inside = length * (2 if first >= 0xDE else 1)
            else:
                self.payload = length + (1 if first <= 0xC9 and first >= 0xC7 else 0)
        else:  # 0xC1 is never used
            self.malformed = True
            return 0
        self.owed += inside - 1
        return took


_HEAD: Final = 16
"""As many bytes of an oversized command are looked at, for its kind and its id."""


def _report(head: bytes, limit: int) -> Oversized:
    """Say which command, beginning with `head`, is oversized, or raise `ProtocolError` if it is no RPC."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(head)
    try:
        parts, kind = unpacker.read_array_header(), unpacker.unpack()
        if (parts, kind) == (3, _NOTIFICATION):
            return Oversized(None, limit)
        id = unpacker.unpack() if (parts, kind) == (4, _REQUEST) else None
        if isinstance(id, int) and _valid_id(id):
            return Oversized(id, limit)
    except (ValueError, msgpack.OutOfData):
        pass  # the error below says it
    raise ProtocolError(f"more than {limit} bytes that are no MessagePack-RPC request: {quoted(head)}")
