"""The soak, for some seconds: descriptors and tasks end where they began. Its judge sees what has grown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.load.soak import Outcome, Plan, Reading, run

FIRST = Reading(memory=50_000_000, descriptors=14, tasks=12, connections=1000, deliveries=5000)


async def test_a_short_soak_ends_where_it_began() -> None:
    outcome = await run(Plan(minutes=0.1, rounds=2, warm_up=1, duty=1.0))
    first, last = outcome.readings
    assert (last.descriptors, last.tasks) == (first.descriptors, first.tasks)
    assert last.connections > first.connections
    assert outcome.witnessed > 10
    assert outcome.complaints == []


@pytest.mark.parametrize(
    ("last", "wrong"),
    [
        (FIRST, []),
        (replace(FIRST, memory=50_900_000, connections=9000), []),
        (replace(FIRST, memory=51_100_000), ["memory has grown by 2.2%"]),
        (replace(FIRST, descriptors=15), ["there were 14 descriptors, and there are 15"]),
        (replace(FIRST, tasks=13), ["there were 12 tasks, and there are 13"]),
    ],
)
def test_the_judge_sees_what_has_grown(last: Reading, wrong: list[str]) -> None:
    warming_up = replace(FIRST, memory=1)
    assert Outcome(Plan(minutes=1, rounds=3, warm_up=2), [warming_up, FIRST, last]).judge() == wrong
