"""The budgets are kept by what is linear, and exceeded by what is not."""

from __future__ import annotations

import os
import re
import time

import pytest

from tests.kit.budget import LARGEST, OverBudgetError, allowed, processor_time, uncharged, within_budget


def busy(seconds: float) -> None:
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass


def test_an_input_has_50_ms_and_large_ones_more_in_proportion() -> None:
    assert [allowed(size) for size in (0, 1, LARGEST, 4 * LARGEST)] == [0.05, 0.05, 0.05, 0.2]


def test_a_pattern_that_is_quadratic_is_over_budget() -> None:
    text = "a" + " " * 10_000 + "b"
    assert within_budget(text.strip, len(text)) == text
    with pytest.raises(OverBudgetError, match=r"^10002 bytes took \d+, \d+, \d+ ms of processor time; .* is 50 ms$"):
        within_budget(lambda: re.search(r" *$", text), len(text))


def test_one_try_within_the_budget_is_enough() -> None:
    tries = iter([0.2, 0.2, 0.0])
    within_budget(lambda: busy(next(tries)), 1)
    assert next(tries, None) is None


def test_waiting_costs_nothing_and_neither_does_what_is_left_out() -> None:
    def work() -> int:
        time.sleep(0.1)
        with uncharged():
            busy(0.1)
        return 7

    assert within_budget(work, 1) == 7


def test_instrumented_code_has_more() -> None:
    within_budget(lambda: busy(0.1), 1, slower=4)


def test_the_time_of_a_process_is_that_of_its_own_clock() -> None:
    before = processor_time(os.getpid())
    busy(0.05)
    assert 0.05 <= processor_time(os.getpid()) - before <= time.process_time()
