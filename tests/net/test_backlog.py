"""What a backlog counts, and how it is let go of."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from realtimed.net.backlog import Backlog
from realtimed.net.backlogs import ENTRY_BYTES, SHARED_BYTES, Backlogs

LIMIT = 2**20


def make_backlogs() -> Backlogs:
    return Backlogs(limit=LIMIT, timeout=10, total_limit=2**30)


async def test_small_frames_are_gathered_and_cost_little_more_than_their_bytes() -> None:
    backlogs = make_backlogs()
    backlog = Backlog(backlogs)
    for _ in range(10_000):
        backlog.add(b"\x81\x01x", 0)
    assert backlog.size == backlog.live == 30_000
    assert 30_000 < backlogs.held < 33_000


@pytest.mark.parametrize("clients", [1, 2, 50])
async def test_bytes_that_many_wait_for_count_once(clients: int) -> None:
    backlogs = make_backlogs()
    data = b"x" * 50_000
    waiting = [Backlog(backlogs) for _ in range(clients)]
    for backlog in waiting:
        backlog.add(data, 0)
    assert backlogs.held == 50_000 + SHARED_BYTES + clients * ENTRY_BYTES
    for backlog in waiting[1:]:
        backlog.took(50_000)
    assert backlogs.held == 50_000 + SHARED_BYTES + ENTRY_BYTES
    waiting[0].clear()
    assert backlogs.held == 0


async def test_a_long_backlog_is_let_go_of_a_part_at_a_time() -> None:
    backlogs = make_backlogs()
    short, long = Backlog(backlogs), Backlog(backlogs)
    for number in range(10_000):
        data = b"%300d" % number
        long.add(data, 0)
        if number < 50:
            short.add(data, 0)
    before = backlogs.held
    short.clear()
    assert backlogs.held == before - 50 * ENTRY_BYTES
    long.clear()
    assert long.size == 0
    long.add(b"new", 0)  # it may be used again
    parts = [backlogs.held]
    while backlogs.let_go():
        parts.append(backlogs.held)
    assert len(parts) > 10
    assert sorted(set(parts), reverse=True) == parts
    assert backlogs.held == long.cost == cost_of(b"new")
    long.clear()
    assert backlogs.held == 0


@pytest.mark.usefixtures("autojump_clock")
async def test_what_is_let_go_of_in_parts_is_free_in_the_end() -> None:
    backlogs = make_backlogs()
    backlog = Backlog(backlogs)
    for number in range(10_000):
        backlog.add(b"%300d" % number, 0)
    with trio.move_on_after(1) as soon:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backlogs.exceeded)
            await trio.testing.wait_all_tasks_blocked()
            backlog.clear()
    assert soon.cancelled_caught, "nothing is exceeded"
    assert backlogs.held == 0


def cost_of(data: bytes) -> int:
    backlogs = make_backlogs()
    Backlog(backlogs).add(data, 0)
    return backlogs.held
