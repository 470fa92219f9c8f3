"""The gate that everything from outside passes: while it is closed, nothing is read or accepted.

What peers send meanwhile waits in the kernel. So the state of the daemon holds still, and can be handed over.
"""

from __future__ import annotations

import trio

__all__ = ["Gate"]


class Gate:
    """A gate, which is open at first."""

    def __init__(self) -> None:
        self.closed = False
        self._waiting = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """Let nobody pass."""
        self.closed = True

    def open(self) -> None:
        """Let everybody pass."""
        self.closed = False
        self._waiting.unpark_all()

    async def passed(self) -> None:
        """Wait while the gate is closed."""
        while self.closed:
            await self._waiting.park()
