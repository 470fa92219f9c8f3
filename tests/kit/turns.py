"""A count of the turns of the event loop."""

from __future__ import annotations

import trio

__all__ = ["Turns"]


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1
