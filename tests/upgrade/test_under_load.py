"""A small run of the load test: all kinds of clients, upgrades that succeed and upgrades that fail."""

from __future__ import annotations

from tests.load.upgrades import FAILURES, run


def test_nobody_notices_upgrades_that_succeed_or_fail() -> None:
    outcome = run(clients=60, behind_caddy=20, upgrades=3, failures=len(FAILURES), rate=100, interval=0.5)
    assert outcome.faults == []
    assert len(outcome.pauses) == 3
    for what in (
        "messages in fragments",
        "frames in two pieces",
        "messages to slow consumers",
        "replays",
        "came and went",
        "requests in two pieces",
        "calls with a connection each",
        "calls on kept connections",
        "messages that were followed",
        "messages to the crowd",
        "calls with receipts",
    ):
        assert outcome.counts[what], what
