"""What one process hands over to the next, in portions, and who makes them and takes them.

An upgrade has two phases. At first everything goes on: each `Part` hands over what it has, a portion at a time, with
turns for others in between. Then nothing is read or sent by anyone, and each part hands over the rest: what has changed
since. So the pause is short, however much there is.

The next process takes the portions in the same order. It touches no socket before `begin`: until then the process
before it may change its mind, and go on as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec

from realtimed.errors import RealtimeError

__all__ = ["TAKE_OVER", "HandOverError", "Part", "Portion", "SmallPart", "TakenPortion", "decoded"]

TAKE_OVER: Final = "REALTIMED_TAKE_OVER"
"""The variable in which a successor finds the descriptor of its end of the line."""

_T = TypeVar("_T")


class HandOverError(RealtimeError):
    """The hand-over to the next process has failed: why, in words."""


def decoded(data: bytes, kind: type[_T]) -> _T:
    """Return a record that another process has encoded. Raises `HandOverError` if that is not what `data` is."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise HandOverError(f"that is no {kind.__name__.strip('_')} of this version: {error}") from error


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


class SmallPart(Part):
    """A part that is handed over as a whole, at the end."""

    def first(self) -> Iterator[Portion]:
        """See `Part`."""
        return iter(())

    @property
    def unrest(self) -> str:
        """See `Part`."""
        return ""

    def stay(self) -> None:
        """See `Part`."""

    def gone(self) -> None:
        """See `Part`."""

    def take(self, portion: TakenPortion) -> None:
        """See `Part`."""
        raise HandOverError(f"{type(self).__name__} has no portion of this kind")

    def begin(self) -> None:
        """See `Part`."""
