"""MessagePack-RPC without I/O: bytes in, messages out.

The form is the published one for streams:

    request       [0, id, method, params]
    response      [1, id, error, result]
    notification  [2, method, params]       (no answer)

No object is built before a command has come in full and is known to be within its limits: bytes, values, depth. To
find the end of a command, the decoder walks over the headers of its values, which allocates nothing, whatever they
announce. msgpack's `skip` walks over commands that are whole. `Walker` walks over a command that comes in pieces.

A command beyond a limit is not buffered. The decoder skips it as it arrives and reports it as `Oversized`, so that its
sender gets an error and the commands behind it are not lost. Bytes that are not MessagePack, or not RPC, or nested too
deeply, are a `ProtocolError`. After one the decoder is of no further use, and the connection has to end.

A str that is not UTF-8 arrives with its bad bytes as lone surrogates (PEP 383), and the command that needs text refuses
it. So a publisher in a language whose strings have no encoding gets an error for one command and keeps its connection.

Source: https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from realtimed.errors import ProtocolError
from realtimed.rpc.walker import DEPTH_LIMIT, TOO_DEEP, Walker, WalkerState
from realtimed.text import quoted

__all__ = [
    "ID_LIMIT",
    "VALUES_LIMIT",
    "BadBytesError",
    "Decoder",
    "DecoderState",
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
_RESPONSE_HEAD: Final = b"\x94\x01"
"""How a response begins."""

_HTTP_BEGINS: Final = frozenset(b"CDGHOPT")
"""First letters of the methods of HTTP. In MessagePack each is a number."""

ID_LIMIT: Final = 2**32
"""Ids are unsigned 32-bit numbers, below this one; the largest is followed by 0."""

VALUES_LIMIT: Final = 8192
"""MessagePack values in a command, counting the command itself: more than a command with 5,000 channels needs. An empty
array takes one byte to send and 56 in memory."""

_REQUEST_BYTES: Final = 256
"""Bytes that a packer for one request begins with. It grows when it needs more."""

_HEAD: Final = 24
"""Bytes at the beginning of a command that hold its kind and its id, however these are encoded."""

_SHORTEST: Final = 4
"""Bytes of the shortest command: a notification without a name."""

_SMALL_FEED: Final = 4096
"""Bytes that the scout's buffer holds at first. One that had to grow is not kept."""

_WALKED_AT_ONCE: Final = 1024
"""Values that a walk passes before other tasks get their turn: a third of a millisecond."""


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
    """A command of more than `limit` of its `unit`: bytes or values. It is skipped. `id` is None for a notification."""

    id: int | None
    limit: int
    unit: str = "bytes"


Message: TypeAlias = Request | Response | Notification | Oversized

_packer = msgpack.Packer()
_unpack: Final = partial(
    msgpack.unpackb,
    strict_map_key=False,  # numbers as keys are MessagePack, though no method takes them
    unicode_errors="surrogateescape",
)


def encode_request(id: int, method: str, params: Sequence[object]) -> bytes:
    """Return a request ready to send. A str with lone surrogates raises `UnicodeEncodeError`.

    A finalizer may call this in the middle of another call, so each call has a packer for itself.
    """
    return bytes(msgpack.Packer(buf_size=_REQUEST_BYTES).pack((_REQUEST, id, method, params)))


def encode_response(id: int | None, error: object, result: object) -> bytes:
    """Return a response ready to send."""
    return bytes(_packer.pack((_RESPONSE, id, error, result)))


def encode_notification(method: str, params: Sequence[object]) -> bytes:
    """Return a notification ready to send."""
    return bytes(_packer.pack((_NOTIFICATION, method, params)))


class DecoderState(NamedTuple):
    """What a decoder holds: bytes, and where the walk stands over an oversized command that it skips."""

    data: bytes
    skipped: WalkerState | None = None


class Decoder:
    """Turns the bytes of a stream, in pieces of any size, into messages.

    `limit` is the largest command in bytes, at least as many as a kind and an id take. `max_values` is how many values
    a command may have, None for any number. Both may change at any time and apply to the command that is arriving.
    However the stream is cut into pieces, the same messages come out, and the work is in proportion to the bytes. Only
    for a command that is wrong in several ways does the error depend on the pieces.
    """

    # Invariants: `_data` is what was received last; all before `_at` has been decoded or walked over. `_scout` is the
    # unpacker that finds the end of whole commands. If `_ahead` is not None, the scout has been fed `_data` from `_at`
    # on, and `_ahead` is what to add to its count of bytes to get an index of `_data`. If `_ahead` is None, a scout
    # holds no bytes. In the middle of a command that is not whole, `_walker` is set and stands at `_at`. What it has
    # walked over is in `_partial`, no more than `limit` bytes as `limit` was when they came. While `_skipping`, the
    # command has been reported as oversized, and `_partial` is empty.

    def __init__(self, limit: int, max_values: int | None = None) -> None:
        self.limit = limit
        self.max_values = max_values
        self._data = b""
        self._at = 0
        self._scout: Any = None
        self._ahead: int | None = None
        self._partial = bytearray()
        self._walker: Walker | None = None
        self._skipping = False

    @property
    def mid_message(self) -> bool:
        """Whether the walk has begun a message and not reached its end."""
        return self._walker is not None

    @property
    def held(self) -> int:
        """How many bytes are held: those of a command that is not whole, and those that are `pending`."""
        return len(self._partial) + self.pending

    @property
    def pending(self) -> int:
        """How many bytes have been received and not been decoded or walked over."""
        return len(self._data) - self._at

    def state(self) -> DecoderState:
        """Return what has not become messages, for another process."""
        skipped = self._walker.state() if self._skipping and self._walker is not None else None
        return DecoderState(bytes(self._partial) + self._data[self._at :], skipped)

    def resume(self, state: DecoderState) -> None:
        """Go on where another process has stood. Nothing has been received yet."""
        if state.skipped is not None:
            self._skipping, self._walker = True, Walker.resumed(state.skipped)
        self.receive(state.data)

    def feed(self, data: bytes) -> list[Message]:
        """Take `data` from the stream and return all messages that are now complete, in order.

        Raises `BadBytesError`, with the messages before the bad bytes, when the bytes are not MessagePack-RPC.
        """
        messages: list[Message] = []
        self.receive(data)
        try:
            while self._at < len(self._data):
                message = self.next_message()
                if message is not None:
                    messages.append(message)
        except ProtocolError as error:
            raise BadBytesError(str(error), messages) from error.__cause__
        return messages

    def receive(self, data: bytes) -> None:
        """Take `data` from the stream. The caller takes its messages with `next_message` before it gives more."""
        if self._at < len(self._data):
            data = self._data[self._at :] + data
            self._scout = None
        self._data = data
        self._at = 0
        self._ahead = None

    def next_message(self) -> Message | None:
        """Return the next message that was received. It is built by this call, not before.

        None means that there is none yet. If something is `pending`, ask again when other tasks have had their turn.

        Raises `ProtocolError` when the bytes are not MessagePack-RPC.
        """
        walker, size = self._walker, len(self._data)
        message = None
        if walker is None and size - self._at >= _SHORTEST:
            message = self._take_whole()
        if message is None and self._at < size:
            if walker is None:
                walker = self._walker = Walker()
                self._scout = self._ahead = None  # the walker passes bytes that the scout still has
            message = self._go_on(walker)
        if self._at == size:
            self._data = b""
            self._at = 0
        return message

    def _take_whole(self) -> Message | None:
        """Return the command that begins at `_at`; None if it is not whole, or not MessagePack."""
        began = self._at
        scout = self._scout
        if self._ahead is None:
            if scout is None:
                # Its buffer needs no limit: it holds what was received last.
                scout = self._scout = msgpack.Unpacker(max_buffer_size=0, read_size=_SMALL_FEED)
            scout.feed(self._data[began:])
            self._ahead = began - scout.tell()
        try:
            scout.skip()
        except (msgpack.OutOfData, ValueError):
            return None
        end = self._at = scout.tell() + self._ahead
        if end == len(self._data) > _SMALL_FEED:
            self._scout = self._ahead = None
        if end - began > self.limit:
            return _report(self._data[began : began + _HEAD], self.limit, "bytes")
        command = self._data[began:end]
        # A value takes at least one byte, so only few commands have to be walked over.
        if self.max_values is not None and len(command) > self.max_values:
            walker = Walker()
            walker.feed(command, 0, self.max_values + 1)
            if walker.wrong:
                raise ProtocolError(walker.wrong)
            if walker.values > self.max_values:
                return _report(command[:_HEAD], self.max_values, "values")
        return _build(command)

    def _go_on(self, walker: Walker) -> Message | None:
        """Walk on over a command that comes in pieces; return it after the last one, or a report if it is too large."""
        data, began = self._data, self._at
        end = self._at = walker.feed(data, began, _WALKED_AT_ONCE)
        done = walker.done
        if done:
            self._walker = None
        if self._skipping:
            self._skipping = not done
        else:
            report = self._excess(walker, began)
            if report is not None:
                self._partial.clear()
                self._skipping = not done
                return report
            self._partial += data[began:end]
        if walker.wrong:
            raise ProtocolError(walker.wrong)
        if not done or not self._partial:
            return None
        command = bytes(self._partial)
        self._partial.clear()
        return _build(command)

    def _excess(self, walker: Walker, began: int) -> Oversized | None:
        """Return a report if the arriving command is too large. Its newest piece begins at index `began` of `_data`."""
        if walker.size > self.limit:
            limit, unit = self.limit, "bytes"
        elif self.max_values is not None and walker.values + walker.owed > self.max_values:
            limit, unit = self.max_values, "values"
        else:
            return None
        head = bytes(self._partial[:_HEAD]) + self._data[began : began + _HEAD]
        return _report(head[:_HEAD], limit, unit)


class BadBytesError(ProtocolError):
    """Bytes that are not MessagePack-RPC, after the complete `messages` that came before them."""

    def __init__(self, text: str, messages: list[Message]) -> None:
        super().__init__(text)
        self.messages = messages


def _build(command: bytes) -> Message:
    """Return the message of a whole command, or raise `ProtocolError`."""
    try:
        value = _unpack(command)
    except (ValueError, TypeError) as error:  # not MessagePack, an unhashable key in a map, or nested very deeply
        raise ProtocolError(f"not MessagePack, or nested too deeply: {quoted(command[:16])}") from error
    return _classify(value)


def _classify(value: object) -> Message:
    """Check that a decoded value is RPC, or raise `ProtocolError`."""
    # Not with `match`, which takes five times as long, as every command passes here. `type(…) is int` excludes bool,
    # and the decoder makes no other subclasses.
    if type(value) is list and value and type(value[0]) is int:
        if len(value) == 3:
            kind, method, params = value
            if kind == _NOTIFICATION and type(method) is str and type(params) is list:
                _check_depth(params, 2)
                return Notification(method, params)
        elif len(value) == 4:
            kind, id, method, params = value
            if kind == _REQUEST and _valid_id(id) and type(method) is str and type(params) is list:
                _check_depth(params, 2)
                return Request(id, method, params)
            if kind == _RESPONSE and (id is None or _valid_id(id)):
                _check_depth((method, params), 1)
                return Response(id, method, params)
    is_http = type(value) is int and value in _HTTP_BEGINS
    http = "; if it was an HTTP request: this socket is not for browsers" if is_http else ""
    raise ProtocolError(
        f"this is MessagePack but not MessagePack-RPC: {quoted(value)}; expected [0, id, method, params]"
        f" or [2, method, params]{http}"
    )


def _valid_id(id: object) -> bool:
    return type(id) is int and 0 <= id < ID_LIMIT


def _check_depth(values: Iterable[object], depth: int) -> None:
    """Raise `ProtocolError` if `values`, the contents of an array at this depth, are nested too deeply."""
    while True:
        inner: list[object] = []
        for each in values:
            if type(each) is list:
                inner += each
            elif type(each) is dict:
                inner += each.values()
        if not inner:
            return
        depth += 1
        if depth > DEPTH_LIMIT:
            raise ProtocolError(TOO_DEEP)
        values = inner


def _report(head: bytes, limit: int, unit: str) -> Oversized:
    """Return a report of the command that begins with `head`, or raise `ProtocolError` if it is not RPC."""
    unpacker = msgpack.Unpacker(read_size=_HEAD)
    unpacker.feed(head)
    try:
        parts, kind = unpacker.read_array_header(), unpacker.unpack()
        if (parts, kind) == (3, _NOTIFICATION):
            return Oversized(None, limit, unit)
        id = unpacker.unpack() if (parts, kind) == (4, _REQUEST) else None
        if isinstance(id, int) and _valid_id(id):
            return Oversized(id, limit, unit)
    except (ValueError, TypeError, msgpack.OutOfData):
        pass  # the error below says it
    if head[:2] == _RESPONSE_HEAD:
        raise ProtocolError(f"a response of more than {limit} {unit}, the limit")
    raise ProtocolError(f"more than {limit} {unit} that are no MessagePack-RPC request: {quoted(head)}")
