"""Commands that take long: their results are made in steps, with turns for others in between, and within a limit.

It knows no connection and no encoding. An `Answer` collects the elements of a result, in whatever form it is sent.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from time import thread_time
from typing import Final, NamedTuple, Protocol, TypeAlias

from realtimed.errors import RefusedError

__all__ = ["ANSWER_LIMIT", "WAIT", "Answer", "Steps", "Whole", "Work", "answer_limit"]

ANSWER_LIMIT: Final = 32 * 2**20
"""Bytes of memory that one answer may take, or a quarter of `max-answers-total` if that is less."""

_LEAST_LIMIT: Final = 2**20
"""Bytes of memory that any answer may take, however small that quarter is. The answers of commands that publish do not
take more."""


class Whole(NamedTuple):
    """What surrounds the elements of a result: a map that holds them as `name`, beside other `fields`.

    With `pairs` the elements are a map themselves, each key followed by its value; otherwise they are a list. If `name`
    is "", they are the whole result. If it is None, there are no elements.
    """

    fields: Mapping[str, object]
    name: str | None = ""
    pairs: bool = False


Steps: TypeAlias = Generator[Sequence[object] | None, None, Whole]
"""A result in the making. It yields some of its elements, or none, wherever others may have their turn, and `WAIT`
where it cannot go on before they have had it."""

WAIT: Final = None
"""What steps yield that cannot go on before others have had their turn."""


def answer_limit(total: int) -> int:
    """Return how many bytes of memory one answer may take, if all together may take `total`."""
    return max(min(ANSWER_LIMIT, total // 4), _LEAST_LIMIT)


class Answer(Protocol):
    """An answer in the making."""

    @property
    def size(self) -> int:
        """How many bytes of memory it takes."""

    def add(self, elements: Sequence[object]) -> None:
        """Add elements of the result."""

    def finish(self, whole: Whole) -> None:
        """Add what surrounds the elements. Nothing comes after it."""


class Work:
    """A command whose steps are being taken, and its `answer`: None if nobody wants one.

    `publishes` and `shorter` are those of its `Command`; `limit` is how many bytes of memory the answer may take.
    """

    def __init__(self, steps: Steps, answer: Answer | None, limit: int, *, publishes: bool, shorter: str) -> None:
        self.publishes = publishes
        self._steps = steps
        self._answer = answer
        self._limit = limit
        self._shorter = shorter

    @property
    def size(self) -> int:
        """How many bytes of memory the answer takes so far."""
        return self._answer.size if self._answer is not None else 0

    def go_on(self, until: float) -> bool:
        """Take steps, at least one, until `thread_time` is `until`; return whether that was all of them.

        Raises `RefusedError`: the command's own, or with the code ``answer_too_large``.
        """
        while True:
            try:
                elements = next(self._steps)
            except StopIteration as end:
                if self._answer is not None:
                    self._answer.finish(end.value)
                return True
            if elements is WAIT:
                return False
            if self._answer is not None:
                self._answer.add(elements)
                self._check_size()
            if thread_time() > until:
                return False

    def _check_size(self) -> None:
        if self.size > self._limit and self._shorter:
            raise RefusedError(
                "answer_too_large",
                f"the answer has more than {self._limit} bytes, the limit (a quarter of max-answers-total, and"
                f" {ANSWER_LIMIT} at most); {self._shorter}",
            )

    def close(self) -> None:
        """Take no more steps."""
        self._steps.close()
