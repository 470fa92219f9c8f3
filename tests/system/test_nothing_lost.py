"""Nothing is lost across a reconnect: short runs of `make jitter` and `make avalanche`."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import trio

from tests.kit.patience import LONG_PATIENCE
from tests.load import avalanche, jitter


async def test_cut_connections_lose_nothing(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE):
        plan = jitter.Plan(clients=200, seconds=10, every=2, away=0.5)
        outcome = await jitter.run(plan, runtime_dir, random.Random(), print)
    print(outcome)
    assert not outcome.faults
    assert outcome.received == outcome.expected
    assert not outcome.ended_by_server
    assert set(outcome.cuts) >= {"closed", "reset", "vanished"}
    assert sum(client.replayed for client in outcome.clients) > plan.clients, "the cuts were felt"


async def test_without_history_the_loss_is_told_and_noticed(runtime_dir: Path) -> None:
    """What proves the others: where something must be lost, the clients count it, and are told each time."""
    with trio.fail_after(LONG_PATIENCE):
        plan = jitter.Plan(clients=20, seconds=3, every=0.5, away=0.5, history_seconds=0)
        outcome = await jitter.run(plan, runtime_dir, random.Random(), print)
    assert outcome.received < outcome.expected
    assert not [what for client in outcome.clients for what in client.told], "nobody was told that it had everything"
    losers = [client for client in outcome.clients if client.received < plan.messages + jitter.MARKS]
    assert all(client.refusals for client in losers)
    assert len([what for what in outcome.faults if "is not recovered" in what]) >= len(losers)


@pytest.mark.parametrize("through_caddy", [False, True], ids=["direct", "Caddy"])
@pytest.mark.parametrize("keep_history", [False, True], ids=["history lost", "history kept"])
async def test_a_restart_brings_everyone_back_as_advised(
    runtime_dir: Path, keep_history: bool, through_caddy: bool
) -> None:
    with trio.fail_after(LONG_PATIENCE):
        plan = avalanche.Plan(400, signal.SIGTERM, through_caddy, keep_history)
        outcome = await avalanche.run(plan, runtime_dir, random.Random(), print)
    print(outcome)
    assert not outcome.faults
    assert outcome.advised == outcome.back == plan.clients
    assert outcome.goodbyes == {"closed with 4503 restarting": plan.clients}
    recovered = plan.clients if keep_history else 0
    assert sum(client.recoveries for client in outcome.clients) == recovered
    assert sum(client.refusals for client in outcome.clients) == plan.clients - recovered
    # They were told different moments of 1.8 s, the first of them after 1 s. If there is no daemon by then, since the
    # machine is slow, they wait for it together.
    assert outcome.down > 1 or outcome.most_in_a_second < plan.clients


async def test_after_a_crash_everyone_comes_back_and_is_told(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE):
        plan = avalanche.Plan(400, signal.SIGKILL, keep_history=True)
        outcome = await avalanche.run(plan, runtime_dir, random.Random(), print)
    print(outcome)
    assert not outcome.faults
    assert outcome.back == plan.clients
    assert not outcome.advised
    assert sum(client.refusals for client in outcome.clients) == plan.clients
