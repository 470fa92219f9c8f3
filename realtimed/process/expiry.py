"""The task that drops what has become too old."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

__all__ = ["drop_expired"]

_INTERVAL: Final = 1.0
"""Seconds between two looks. Until then, readers check the age themselves."""


async def drop_expired(*stores: Callable[[], bool]) -> None:
    """Call each of `stores`, which drops a part of what is too old and returns whether there is more, forever."""
    while True:
        await trio.sleep(_INTERVAL)
        for drop in stores:
            while drop():
                await trio.lowlevel.checkpoint()
