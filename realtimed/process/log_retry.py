"""The task that writes the lines which the reader of the log did not take at once."""

from __future__ import annotations

from typing import Final

import trio

from realtimed.process import logs

__all__ = ["retry_log"]

_INTERVAL: Final = 1.0
"""Seconds between two looks."""

_INTERVAL_BEHIND: Final = 0.05
"""Seconds between two looks while lines wait for a slow reader."""


async def retry_log() -> None:
    """Write those lines, forever."""
    while True:
        behind = logs.catch_up()
        await trio.sleep(_INTERVAL_BEHIND if behind else _INTERVAL)
