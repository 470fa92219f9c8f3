"""What is said on the control socket: a message is carried out as a command, and its result becomes an answer in bytes.

With `realtimed.rpc.wire` this is the only user of msgpack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn

import msgpack

from realtimed.control.commands import COMMANDS, Caller, Context, call
from realtimed.control.steps import Steps, Whole, Work
from realtimed.errors import RefusedError
from realtimed.rpc.wire import Message, Notification, Oversized, Request, Response, encode_response

__all__ = ["LongAnswer", "begin_work", "dispatch", "encode_refusal", "forbid"]

_PIECE_BYTES: Final = 64 * 2**10
"""Bytes at which a piece of an answer is closed: large enough to be sent with few calls."""

_PIECE_COST: Final = 60
"""Bytes that a piece takes beside its own."""

_RESPONSE: Final = 1


def dispatch(context: Context, caller: Caller, message: Message) -> object:
    """Carry out the command in a message and return its result, or the `Steps` to it. Raises `RefusedError`."""
    if isinstance(message, (Notification, Request)):
        return call(context, message.method, message.params, caller)
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
                f" {context.hub.max_message} bytes",
            )
        case Response():
            raise RefusedError("invalid_params", "the daemon has asked nothing: this is a response")


def forbid(reason: str, _: Message) -> NoReturn:
    """Refuse any command of a publisher that is not let in."""
    raise RefusedError("not_allowed", reason)


def encode_refusal(message: Message, error: RefusedError) -> bytes:
    """Return the answer to a command that was refused: none to a notification."""
    if isinstance(message, (Request, Oversized)) and message.id is not None:
        return encode_response(message.id, {"code": error.code, "message": error.message}, None)
    return b""


def begin_work(message: Request | Notification, steps: Steps, limit: int) -> tuple[Work, LongAnswer | None]:
    """Return a command whose steps are to be taken, and its answer of at most `limit` bytes: none to a notification."""
    answer = LongAnswer(message.id) if isinstance(message, Request) else None
    command = COMMANDS[message.method]
    return Work(steps, answer, limit, publishes=command.publishes, shorter=command.shorter), answer


class LongAnswer:
    """The answer to the request `id`, which is made of elements added one after the other, and what surrounds them.

    It is made in pieces, so that it can grow without being copied.
    """

    # Invariant: `pieces`, and behind them `_open`, have the encoded elements, `_count` of them. The head of the answer
    # says how many there are, so it is made last.

    def __init__(self, id: int) -> None:
        self.pieces: list[bytes] = []
        """The answer, in order, once it is finished."""
        self._id = id
        self._open = bytearray()
        self._closed_size = 0
        self._count = 0
        self._packer = msgpack.Packer()

    @property
    def size(self) -> int:
        """How many bytes of memory this takes."""
        return self._closed_size + len(self._open)

    def add(self, elements: Sequence[object]) -> None:
        """Add elements of a list or a map."""
        self._count += len(elements)
        for element in elements:
            self._open += self._packer.pack(element)
            self._close_piece(_PIECE_BYTES)

    def finish(self, whole: Whole) -> None:
        """Add what surrounds the elements."""
        self._close_piece(1)
        self.pieces.insert(0, self._head(whole))

    def _close_piece(self, least: int) -> None:
        if len(self._open) >= least:
            self.pieces.append(bytes(self._open))
            self._closed_size += len(self._open) + _PIECE_COST
            self._open.clear()

    def _head(self, whole: Whole) -> bytes:
        """Return all that comes before the elements: the array of the response, and the map around them."""
        pack = self._packer.pack
        head = bytearray(self._packer.pack_array_header(4))
        head += pack(_RESPONSE) + pack(self._id) + pack(None)
        if whole.name != "":
            head += self._packer.pack_map_header(len(whole.fields) + (whole.name is not None))
            for name, value in whole.fields.items():
                head += pack(name) + pack(value)
            if whole.name is None:
                return bytes(head)
            head += pack(whole.name)
        if whole.pairs:
            head += self._packer.pack_map_header(self._count // 2)
        else:
            head += self._packer.pack_array_header(self._count)
        return bytes(head)
