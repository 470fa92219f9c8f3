"""Calls on their way through one connection. No I/O.

Answers find their calls by id, in whatever order they come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, TypeVar

import realtimed.client.results as results
from realtimed.client.calls import Call
from realtimed.errors import ProtocolError, RefusedError
from realtimed.rpc.wire import ID_LIMIT, Response

__all__ = ["IN_FLIGHT", "Batch", "request_ids"]

_T = TypeVar("_T")

IN_FLIGHT: Final = 512
"""Calls of a batch that may await their answers at a time. More would not be faster: these hide the round trip."""

_CHUNK: Final = 64 * 2**10
"""Bytes of requests that are collected before they are sent; the last request may exceed it."""


class Batch(Generic[_T]):
    """Calls that are sent one behind the other without waiting for answers, and the outcome of each.

    `outcomes` has a place for every call that was taken from `calls`, in their order: the result, or the refusal. A
    place is None until its answer has come. No more than `in_flight` calls await their answers at a time.
    """

    # Invariant: `_awaited` maps the id of each unanswered request to its place, and to what reads its answer.

    def __init__(self, calls: Iterable[Call[_T]], ids: Iterator[int], in_flight: int = IN_FLIGHT) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be 1 or more, not {in_flight}")
        self.outcomes: list[_T | RefusedError | None] = []
        self._calls = iter(calls)
        self._ids = ids
        self._in_flight = in_flight
        self._exhausted = False
        self._awaited: dict[int, tuple[int, Callable[[object], _T]]] = {}

    @property
    def done(self) -> bool:
        """Whether every call has its outcome."""
        return self._exhausted and not self._awaited

    @property
    def unanswered(self) -> int:
        """How many calls have no outcome yet."""
        return len(self._awaited)

    def requests(self) -> bytes:
        """Return the next requests to send: none while enough are in flight, or when there are no more calls."""
        if self._exhausted or len(self._awaited) > self._in_flight // 2:
            return b""  # half may be answered before more are sent: fewer and larger writes
        chunk = bytearray()
        while len(self._awaited) < self._in_flight and len(chunk) < _CHUNK:
            call = next(self._calls, None)
            if call is None:
                self._exhausted = True
                break
            id = next(self._ids)
            try:
                chunk += call.encode(id)
            except RefusedError as error:
                self.outcomes.append(error)
                continue
            self._awaited[id] = len(self.outcomes), call.read
            self.outcomes.append(None)
        return bytes(chunk)

    def answer(self, response: Response) -> None:
        """Take an answer. Raises `ProtocolError` if it belongs to no call of this batch, or makes no sense."""
        if response.id is None:
            raise results.goodbye(response.error)
        if response.id not in self._awaited:
            raise ProtocolError(f"the daemon answered request {response.id}, which awaits no answer")
        place, read = self._awaited.pop(response.id)
        self.outcomes[place] = read(response.result) if response.error is None else results.refusal(response.error)

    def results(self) -> list[_T | RefusedError]:
        """Return the outcomes of a batch that is done."""
        return [outcome for outcome in self.outcomes if outcome is not None]


def request_ids() -> Iterator[int]:
    """Return the ids for the requests of one client: 0, 1, 2, and so on, and after the largest one 0 again.

    Any thread, and a call in the middle of another, may take the next id at any moment: it is made by functions written
    in C, which cannot be interrupted.
    """
    return map(ID_LIMIT.__rmod__, itertools.count())
