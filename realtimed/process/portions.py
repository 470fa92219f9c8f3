"""What one process hands over to the next, in portions, and who makes them and takes them.

An upgrade has two phases. At first everything goes on: each `Part` hands over what it has, a portion at a time, with
turns for others in between. Then nothing is read or sent by anyone, and each part hands over the rest: what has changed
since. So the pause is short, however much there is.

The next process takes the portions in the same order. It touches no socket before `begin`: until then the process
before it may change its mind, and go on as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from realtimed.errors import RealtimeError

__all__ = ["HandOverError", "Part", "Portion", "TakenPortion"]


class HandOverError(RealtimeError):
    """The hand-over to the next process has failed: why, in words."""


class Portion(NamedTuple):
    """Bytes, and open files that go with them. The files stay open here as well."""

    data: bytes
    descriptors: Sequence[int] = ()


class TakenPortion(NamedTuple):
    """A portion that has arrived. Whoever takes it owns the open files."""

    data: bytes
    descriptors: Sequence[int]


class Part(Protocol):
    """A part of the daemon that is handed over."""

    # In the process that hands over:

    def first(self) -> Iterator[Portion]:
        """Yield portions of what there is now. Between two of them anything may change; each takes milliseconds."""

    @property
    def unrest(self) -> str:
        """A clause that says what has to end before the rest can be handed over; "" if nothing has to."""

    def rest(self) -> Portion:
        """Return what has changed since `first` began, and all that changes often. Nothing happens meanwhile."""

    def stay(self) -> None:
        """Go on here: nothing was handed over. Called after `first` has begun, whatever it has yielded."""

    def gone(self) -> None:
        """Forget, and touch no more, what belongs to the next process now. What was not handed over goes on."""

    # In the next process, whose part is new:

    def take(self, portion: TakenPortion) -> None:
        """Take a portion of `first`. Raises `HandOverError` for one that no part can have made."""

    def take_rest(self, portion: TakenPortion) -> None:
        """Take the rest. Raises `HandOverError`, as `take` does."""

    def begin(self) -> None:
        """Everything is ours from now on: serve."""
