"""When Python collects garbage: often, among new objects, and never among all.

When a connection ends, its objects are freed at once, since it leaves no reference cycles behind (there is a test for
every way to end). So there is next to nothing to find, and everything would stand still during a walk over all objects.

By itself the garbage collector examines new objects when their number has grown by a threshold. A daemon that has been
running for a while creates as many as it frees: the objects in which a task waits, for example, are replaced each time
that it wakes. Uncounted, they became hundreds of thousands, until a burst of commands started a collection that took a
tenth of a second. So they are examined by time, and sooner if that takes long.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Final

import trio

__all__ = ["calm", "look_often"]

_NEVER: Final = 2**31 - 1
"""Collections of new objects before the collector examines older ones by itself: the highest threshold there is. At
four collections a second that is seventeen years; a million would be three days."""

_YOUNG: Final = 2_000
"""Growth in objects at which the collector examines new ones by itself, as in a burst of handshakes."""

_LONGEST: Final = 0.25
_SHORTEST: Final = 0.01
"""Seconds between two collections, at most and at least."""

_LOOK: Final = 0.001
"""Seconds that a collection should take."""


def calm() -> None:
    """Make the collector, by itself, examine only the youngest objects, and exempt those that exist now."""
    gc.freeze()
    gc.set_threshold(_YOUNG, _NEVER, _NEVER)


async def look_often(clock: Callable[[], float] = time.perf_counter) -> None:
    """Collect among new objects, forever. Objects that survive are not examined again.

    A second examination a little later would find nothing more, and take a tenth of the time of a handshake.
    """
    pause = _LONGEST
    while True:
        await trio.sleep(pause)
        began = clock()
        gc.collect(0)
        took = clock() - began
        # At the same rate of new objects the next one takes `_LOOK`. A single slow one may be the machine's fault.
        wanted = pause * _LOOK / took if took else _LONGEST
        pause = min(max(wanted, pause / 4, _SHORTEST), _LONGEST)
