"""The pace at which a daemon that stops sends its clients away, without a clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from realtimed.websocket.drain import Pace

SECONDS = 10.0
CLIENTS = 1000


def shares(
    step: Callable[[float], float], clients: int = CLIENTS, seconds: float = SECONDS
) -> Iterator[tuple[float, int]]:
    """Yield when how many were sent away; `step` returns after how many seconds to ask again."""
    now, pace = 100.0, Pace(100.0, seconds)
    pace.plan(now, clients)
    while clients and pace.seconds_left(now) > 0:
        now += step(now - 100)
        count = pace.share(now, clients)
        clients -= count
        yield now - 100, count


def in_any_second(told: list[tuple[float, int]]) -> int:
    return max(sum(count for at, count in told if began < at <= began + 1) for began, _ in told)


def test_all_have_gone_before_the_time_is_over_and_each_second_has_its_share() -> None:
    told = list(shares(lambda _: 0.05))
    assert sum(count for _, count in told) == CLIENTS
    assert told[-1][0] <= SECONDS
    assert in_any_second(told) <= CLIENTS / SECONDS * 1.3 + 1


def test_a_delay_is_caught_up_with_and_not_in_one_go() -> None:
    told = list(shares(lambda at: 1.0 if 4 <= at < 4.05 else 0.05))
    assert sum(count for _, count in told) == CLIENTS
    assert in_any_second(told) <= CLIENTS / SECONDS * 1.3 + 1


@pytest.mark.parametrize("clients", [0, 1, 2, 7])
def test_few_clients_are_sent_away_one_by_one(clients: int) -> None:
    told = list(shares(lambda _: 0.05, clients))
    assert sum(count for _, count in told) == clients
    assert max((count for _, count in told), default=0) <= 1


def test_who_joins_meanwhile_goes_as_well() -> None:
    now, pace, clients = 0.0, Pace(0.0, SECONDS), 10
    pace.plan(now, clients)
    joined = False
    while clients and pace.seconds_left(now) > 0:
        now += 0.05
        if now > 5 and not joined:
            joined, clients = True, clients + 500
            pace.plan(now, clients)
        clients -= pace.share(now, clients)
    assert clients == 0
    assert now <= SECONDS


def test_no_share_is_negative_or_more_than_there_are_whatever_the_clock_does() -> None:
    chance = random.Random(1)
    for _ in range(200):
        clients = left = chance.randrange(500)
        for _, count in shares(
            lambda _: chance.choice([1e-9, 0.01, 0.05, 0.5, 3.0]), clients, chance.choice([0.1, 10])
        ):
            assert 0 <= count <= left
            left -= count
