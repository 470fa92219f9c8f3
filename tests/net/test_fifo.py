"""The short queue, against a deque."""

from __future__ import annotations

import random
import tracemalloc
from collections import deque

import pytest

from realtimed.net.fifo import Fifo


def test_it_does_what_a_deque_does() -> None:
    source = random.Random(1)
    fifo, model = Fifo[int](), deque[int]()
    for number in range(100_000):
        if source.random() < (0.6 if number // 10_000 % 2 else 0.4):
            fifo.append(number)
            model.append(number)
        elif model:
            assert fifo.popleft() == model.popleft()
        assert len(fifo) == len(model)
        assert bool(fifo) == bool(model)
        if model:
            assert (fifo.head, fifo.last) == (model[0], model[-1])
        if number % 1000 == 0:
            assert list(fifo) == list(model)


def test_what_has_gone_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        fifo = Fifo[int]()
        for _ in range(10):
            fifo.append(0)
        for _ in range(100_000):
            fifo.append(0)
            fifo.popleft()
        assert tracemalloc.get_traced_memory()[0] < 5000
    finally:
        tracemalloc.stop()


def test_an_empty_one_has_no_items() -> None:
    fifo = Fifo[str]()
    fifo.append("a")
    assert fifo.popleft() == "a"
    with pytest.raises(IndexError):
        _ = fifo.head
    with pytest.raises(IndexError):
        _ = fifo.last
    with pytest.raises(IndexError):
        fifo.popleft()
