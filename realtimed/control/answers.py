"""Commands that are carried out in steps, and answers that are made a piece at a time. Pure: no socket, no trio."""

from __future__ import annotations

from collections.abc import Sequence
from time import thread_time
from typing import Final

import msgpack

from realtimed.control.commands import COMMANDS
from realtimed.control.listing import Steps, Whole
from realtimed.control.service import ANSWER_LIMIT
from realtimed.errors import RefusedError
from realtimed.rpc.wire import Notification, Request

__all__ = ["Work"]

_PIECE_BYTES: Final = 64 * 2**10
"""Bytes from which on a piece is closed: large enough to be sent with few calls."""

_PIECE_COST: Final = 60
"""Bytes that a piece takes beside its own."""

_RESPONSE: Final = 1


class Work:
    """The `steps` of a command that are being taken, and the answer in the making, of at most `limit` bytes of memory.

    When the last step has been taken, `pieces` are the answer: none to a notification.
    """

    def __init__(self, message: Request | Notification, steps: Steps, limit: int) -> None:
        self.message = message
        self.pieces: list[bytes] = []
        self._command = COMMANDS[message.method]
        self._steps = steps
        self._limit = limit
        self._answer = _LongAnswer(message.id) if isinstance(message, Request) else None

    @property
    def publishes(self) -> bool:
        """Whether all steps have to be taken, whatever becomes of who wants the answer."""
        return self._command.publishes

    @property
    def size(self) -> int:
        """How many bytes of memory the answer takes so far."""
        return self._answer.size if self._answer is not None else 0

    def go_on(self, until: float) -> bool:
        """Take steps, one at least, until it is `until` by `thread_time`; return whether they are through.

        Raises `RefusedError` as the steps do, and with the code ``answer_too_large``.
        """
        while True:
            try:
                elements = next(self._steps)
            except StopIteration as end:
                if self._answer is not None:
                    self.pieces = self._answer.finish(end.value)
                return True
            if elements is None:
                return False
            if self._answer is not None:
                self._answer.add(elements)
                if self._answer.size > self._limit and self._command.shorter:
                    raise RefusedError(
                        "answer_too_large",
                        f"the answer has more than {self._limit} bytes, the limit (a quarter of max-answers-total, and"
                        f" {ANSWER_LIMIT} at most); {self._command.shorter}",
                    )
            if thread_time() > until:
                return False

    def close(self) -> None:
        """Take no more steps."""
        self._steps.close()


class _LongAnswer:
    """The answer to the request `id`, of which elements are added one after the other, and then what is around them.

    `size` is how many bytes of memory its pieces take.
    """

    # Invariant: `_pieces`, and behind them `_open`, have the encoded elements, `_count` of them. The head of the answer
    # says how many there are, so it is made last.

    def __init__(self, id: int) -> None:
        self._id = id
        self._pieces: list[bytes] = []
        self._open = bytearray()
        self._closed_size = 0
        self._count = 0
        self._packer = msgpack.Packer()

    @property
    def size(self) -> int:
        """How many bytes of memory this takes."""
        return self._closed_size + len(self._open)

    def add(self, elements: Sequence[object]) -> None:
        """Add elements of a list."""
        self._count += len(elements)
        for element in elements:
            self._open += self._packer.pack(element)
            self._close_piece(_PIECE_BYTES)

    def finish(self, whole: Whole) -> list[bytes]:
        """Return the pieces of the answer, in order."""
        self._close_piece(1)
        return [self._head(whole), *self._pieces]

    def _close_piece(self, least: int) -> None:
        if len(self._open) >= least:
            self._pieces.append(bytes(self._open))
            self._closed_size += len(self._open) + _PIECE_COST
            self._open.clear()

    def _head(self, whole: Whole) -> bytes:
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
