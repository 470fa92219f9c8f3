"""The garbage collector looks often at little, and never at much."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from realtimed.process import garbage


@pytest.fixture(autouse=True)
def calmed() -> Iterator[None]:
    before = gc.get_threshold()
    garbage.calm()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


async def test_objects_that_take_the_place_of_others_do_not_pile_up(
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    kept: deque[list[Any]] = deque(([] for _ in range(20_000)), maxlen=20_000)
    nursery.start_soon(garbage.look_often)
    for _ in range(100):
        for _ in range(200):
            kept.append([])
        await trio.sleep(0.05)
    assert len(kept) == 20_000
    assert len(gc.get_objects(generation=0)) < 5_000
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("cost", "pause"), [(0.0001, 0.25), (0.002, 0.01), (1.0, 0.01)])
async def test_the_longer_a_look_takes_the_sooner_comes_the_next(
    cost: float,
    pause: float,
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    looks: list[float] = []

    def clock() -> float:
        looks.append(trio.current_time())
        return len(looks) // 2 * cost  # half of the calls are before a look, half behind it

    nursery.start_soon(garbage.look_often, clock)
    await trio.sleep(5)
    assert looks[-1] - looks[-3] == pytest.approx(pause)
    nursery.cancel_scope.cancel()


async def test_a_single_slow_look_changes_little(
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    looks: list[float] = []

    def clock() -> float:
        looks.append(trio.current_time())
        return 10.0 if len(looks) >= 10 else 0.0  # the fifth takes ten seconds

    nursery.start_soon(garbage.look_often, clock)
    await trio.sleep(5)
    pauses = [later - earlier for earlier, later in zip(looks[::2], looks[2::2], strict=False)]
    assert pauses[:4] == pytest.approx([0.25] * 4)
    assert min(pauses) >= 0.25 / 4
    assert pauses[-1] == pytest.approx(0.25)
    nursery.cancel_scope.cancel()


def test_the_collector_never_walks_over_what_has_been_there_for_long() -> None:
    generations = set()

    def note(_: str, info: dict[str, int]) -> None:
        generations.add(info["generation"])

    kept: list[list[Any]] = []
    gc.callbacks.append(note)
    try:
        for _ in range(200_000):
            kept.append([])  # noqa: PERF401  (one after the other)
    finally:
        gc.callbacks.remove(note)
    assert generations == {0}


def test_nor_does_it_after_millions_of_looks() -> None:
    generations = set()

    def note(_: str, info: dict[str, int]) -> None:
        generations.add(info["generation"])

    for _ in range(2_000_000):
        gc.collect(0)
    gc.callbacks.append(note)
    try:
        kept: list[list[Any]] = [[] for _ in range(20_000)]
    finally:
        gc.callbacks.remove(note)
    assert len(kept) == 20_000
    assert generations == {0}
