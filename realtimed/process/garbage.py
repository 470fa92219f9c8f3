"""When Python looks for garbage: often, at what is new, and never at everything.

An idle connection is about a hundred objects, and one that has ended frees them all at once, since it leaves no circles
of references behind (there is a test for every way to end). So there is next to nothing to find, and to walk over ten
thousand connections in search of it would take half a second.

By itself the garbage collector looks at new objects when there are so many more of them than before. A daemon that has
been running for a while makes as many as it frees: what a client's task waits in, for example, is made anew each time
that something arrives. Uncounted, they became hundreds of thousands, until a burst of commands set off a collection
that took a tenth of a second. So they are looked at as time goes by, sooner when it takes long.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Final

import trio

__all__ = ["calm", "look_often"]

_NEVER: Final = 2**31 - 1
"""How many looks at what is new make the collector look at older things by itself: the most it can be told. At four
looks a second that is seventeen years; a million would be three days."""

_YOUNG: Final = 2_000
"""How many more objects than before make the collector look by itself: a burst of handshakes does."""

_LONGEST: Final = 0.25
_SHORTEST: Final = 0.01
"""Seconds between two looks, at most and at least."""

_LOOK: Final = 0.001
"""Seconds that a look is to take."""


def calm() -> None:
    """Let the collector, by itself, only look at the youngest objects; what exists now is for good."""
    gc.freeze()
    gc.set_threshold(_YOUNG, _NEVER, _NEVER)


async def look_often(clock: Callable[[], float] = time.perf_counter) -> None:
    """Look at what is new, for ever. What is still in use is not looked at again.

    A second look at it, a little later, would find nothing more, and take a tenth of the time that a handshake takes.
    """
    pause = _LONGEST
    while True:
        await trio.sleep(pause)
        began = clock()
        gc.collect(0)
        took = clock() - began
        # What comes at the same rate as before takes `_LOOK` the next time. A single slow look may be the machine's.
        wanted = pause * _LOOK / took if took else _LONGEST
        pause = min(max(wanted, pause / 4, _SHORTEST), _LONGEST)
