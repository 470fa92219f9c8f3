"""The task that drops what has become too old."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

__all__ = ["drop_expired"]

_INTERVAL: Final = 1.0
"""Seconds between two looks. What is found meanwhile is checked for its age where that matters."""


async def drop_expired(*stores: Callable[[], bool]) -> None:
    """Call each of `stores`, which drops a part of what is too old and returns whether there is more, without end."""
    while True:
        await trio.sleep(_INTERVAL)
        for drop in stores:
            while drop():
                await trio.lowlevel.checkpoint()
