"""The daemon, whose `stats` also tell how long turns of its event loop were, in seconds of processor time.

What else happens on the machine does not make them longer. `turn_p99` is what 99 % of all processor time was spent in
turns no longer than: somebody who comes at any moment waits for the turn that is under way and is served in the next.

`python -m tests.kit.timed_daemon OPTIONS…` takes the options of `realtimed`.
"""

from __future__ import annotations

import math
import time
from typing import Final

import trio

from realtimed import core
from realtimed.cli.realtimed import main
from realtimed.stats import Figures

_STEPS: Final = 10
"""Into how many steps each doubling of a length is divided."""


class _Turns(trio.abc.Instrument):
    """How much processor time was spent in turns of each length."""

    def __init__(self) -> None:
        self.spent: dict[int, float] = {}
        self._began = time.thread_time()

    def after_io_wait(self, timeout: float) -> None:
        self._began = time.thread_time()

    def before_io_wait(self, timeout: float) -> None:
        length = time.thread_time() - self._began
        if length > 0:
            step = math.ceil(math.log2(length) * _STEPS)
            self.spent[step] = self.spent.get(step, 0.0) + length

    @property
    def p99(self) -> float:
        rest = sum(self.spent.values()) * 0.01
        for step in sorted(self.spent, reverse=True):
            rest -= self.spent[step]
            if rest < 0:
                return float(2 ** (step / _STEPS))
        return 0.0


class TimedFigures(Figures):
    """See the module."""

    turns: _Turns | None = None

    def stats(self) -> dict[str, object]:
        if self.turns is None:  # from the first look on
            self.turns = _Turns()
            trio.lowlevel.add_instrument(self.turns)
        return super().stats() | {"turn_p99": self.turns.p99}


if __name__ == "__main__":
    vars(core)["Figures"] = TimedFigures
    main()
