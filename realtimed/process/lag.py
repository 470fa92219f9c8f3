"""How late the event loop is: how long a task that is due waits for those before it."""

from __future__ import annotations

from typing import Final

import trio

from realtimed.process.histogram import Histogram

__all__ = ["LoopLag"]

_PERIOD: Final = 1.0
"""Seconds between two measurements."""


class LoopLag:
    """Measures the lag once a second: `latest` is the last measurement, `times` has all of them, in seconds."""

    def __init__(self) -> None:
        self.latest = 0.0
        self.times = Histogram()

    async def run(self) -> None:
        """Measure, forever."""
        while True:
            due = trio.current_time() + _PERIOD
            await trio.sleep_until(due)
            self.latest = trio.current_time() - due
            self.times.observe(self.latest)
