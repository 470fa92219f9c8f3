"""A hundred thousand channels with history take the memory that was configured, and no more."""

from __future__ import annotations

from pathlib import Path

import trio

from benchmarks.machine import resident_bytes
from realtimed.rpc.wire import encode_notification
from tests.kit.clients import publisher
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import running_daemon

CHANNELS = 100_000
LIMIT = 32 * 2**20
MESSAGE = "x" * 128
AT_ONCE = 1000


async def test_a_hundred_thousand_channels_stay_within_the_limit(runtime_dir: Path) -> None:
    options = ("--history-total", str(LIMIT))
    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as sender:
            for number in range(AT_ONCE):  # what every daemon takes once, whatever comes then
                await sender.call("broadcast", f"first:{number}", MESSAGE)
            before, grown = resident_bytes(daemon.process.pid), 0
            for first in range(0, CHANNELS, AT_ONCE):
                numbers = range(first, first + AT_ONCE)
                commands = [encode_notification("broadcast", [f"channel:{number}", MESSAGE]) for number in numbers]
                await sender.stream.send_all(b"".join(commands))
                stats = await sender.call("stats")
                assert stats["history_bytes"] <= LIMIT
                grown = max(grown, resident_bytes(daemon.process.pid) - before)
    print(f"{stats['history_channels']} channels are kept; memory grew by {grown / 2**20:.1f} MiB")
    assert stats["publications"] == CHANNELS + AT_ONCE
    assert stats["history_bytes"] > 0.99 * LIMIT
    assert grown < LIMIT
