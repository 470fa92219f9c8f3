"""How long tests wait for what should have happened long ago."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

__all__ = ["LONG_PATIENCE", "PATIENCE", "SHORT", "until"]

PATIENCE: Final = 30
"""Seconds after which a test that waits for something has failed.

What a test waits for takes milliseconds, or seconds on a machine that is busy with other tests. Caddy alone waits 5 s
for a daemon that is not there. A higher figure costs nothing but the time of a test that fails.
"""

LONG_PATIENCE: Final = 120
"""The same for a test that keeps the machine busy for many seconds itself: thousands of clients, a whole site."""

SHORT: Final = 0.2
"""Seconds of a timeout that is expected to pass."""


def until(true: Callable[[], bool]) -> None:
    """Ask again and again, until the answer is yes."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
