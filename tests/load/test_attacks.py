"""Attacks for some seconds each: no other client notices, and memory stays within its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.load.attacks import ATTACKS, Attack, attack, attacked_daemon

SECONDS = 2
TOLERANCE = 2
TRIES = 3
"""How often an attack may be made: what else happens on the machine makes pings late, too. `make attack` is strict."""


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.name)
async def test_an_attack_disturbs_nobody_and_memory_is_bounded(kind: Attack, runtime_dir: Path) -> None:
    for _ in range(TRIES):
        async with attacked_daemon(runtime_dir, kind) as daemon:
            complaints = (await trio.to_thread.run_sync(attack, daemon, kind, SECONDS)).complaints(TOLERANCE)
        if not complaints:
            break
    assert complaints == []
