"""The daemon, whose `stats` also tell how many tasks and descriptors it has, and how much memory of its own.

The tasks of engines are left out: how many there are depends on how many clients spoke at the same moment.

Memory that has been freed, but that the C library keeps for what comes next, is given back before it is measured: it is
tens of megabytes, and says only what the busiest moment was.

`python -m tests.kit.observed_daemon OPTIONS…` takes the options of `realtimed`.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Final

import trio

from realtimed import core
from realtimed.cli.realtimed import main
from realtimed.stats import Figures

_TASKS_OF_AN_ENGINE: Final = 2
"""Its own, and the reader of its trio-websocket."""

_LIBRARY: Final = ctypes.CDLL(None)


class ObservedFigures(Figures):
    """See the module."""

    def stats(self) -> dict[str, object]:
        if hasattr(_LIBRARY, "malloc_trim"):  # glibc
            _LIBRARY.malloc_trim(0)
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert anonymous is not None
        return super().stats() | {
            "tasks": trio.lowlevel.current_statistics().tasks_living
            - _TASKS_OF_AN_ENGINE * self.sessions.engines.count,
            "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,  # one is that of the directory
            "memory": int(anonymous[1]) * 1024,
        }


if __name__ == "__main__":
    vars(core)["Figures"] = ObservedFigures
    main()
