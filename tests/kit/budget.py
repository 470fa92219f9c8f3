"""Budgets of processor time for what comes from outside: 50 ms for 16 KiB, so that nothing worse than linear stays.

Processor time does not depend on what else runs on the machine, but somewhat on what the processor's caches hold, and
on when garbage is collected. So a budget is several times what the worst input takes that is read in linear time, and
an input exceeds it only if it does so each of three times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

__all__ = ["LARGEST", "OverBudgetError", "allowed", "processor_time", "uncharged", "within_budget"]

LARGEST: Final = 16 * 1024
"""Bytes of the largest input that peers may send without being known: a request's head, a client's message."""

_SECONDS: Final = 0.05
"""What that may take; more in proportion for larger inputs, and no less for smaller ones."""

_TRIES: Final = 3

T = TypeVar("T")


class OverBudgetError(AssertionError):
    """An input took too much processor time."""


class _Meter:
    free = 0.0
    """Seconds that were not charged since the start of the process."""


def allowed(size: int) -> float:
    """Return the seconds of processor time that an input of `size` bytes may take."""
    return _SECONDS * max(size / LARGEST, 1)


@contextmanager
def uncharged() -> Iterator[None]:
    """Leave out of the account what a test does by itself, such as asking its model what is right."""
    began = time.process_time()
    try:
        yield
    finally:
        _Meter.free += time.process_time() - began


def within_budget(work: Callable[[], T], size: int, *, slower: float = 1) -> T:
    """Do the work that `size` bytes make, and return its result; up to three times if it exceeds its budget.

    With code that is instrumented, the budget is `slower` times as large. Raises `OverBudgetError` if all three tries
    exceed it.
    """
    budget, tries = allowed(size) * slower, []
    for _ in range(_TRIES):
        free, began = _Meter.free, time.process_time()
        result = work()
        tries.append(time.process_time() - began - (_Meter.free - free))
        if tries[-1] <= budget:
            return result
    took = ", ".join(f"{each * 1000:.0f}" for each in tries)
    raise OverBudgetError(f"{size} bytes took {took} ms of processor time; their budget is {budget * 1000:.0f} ms")


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that all threads of a process have taken."""
    return time.clock_gettime(~pid << 3 | 2)  # its clock's number, see CPUCLOCK_SCHED in Linux' posix-timers.h
