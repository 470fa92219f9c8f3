"""Attacks for some seconds each: no other client notices, and memory stays within its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.attacks import ATTACKS, Attack, attack, attacked_daemon

SECONDS = 3
TRIES = 3
"""How often an attack may be made: what else happens on the machine makes pings late, too."""


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.name)
async def test_an_attack_disturbs_nobody_and_memory_is_bounded(kind: Attack, runtime_dir: Path) -> None:
    for _ in range(TRIES):
        async with attacked_daemon(runtime_dir, kind) as daemon:
            outcome = await trio.to_thread.run_sync(attack, daemon, kind, SECONDS)
        if not outcome.complaints:
            break
    assert outcome.complaints == []
