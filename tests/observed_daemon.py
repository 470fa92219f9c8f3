"""The daemon, whose `stats` also tell how many tasks and descriptors it has, and how much memory of its own.

`python -m tests.observed_daemon OPTIONS…` takes the options of `realtimed`.
"""

from __future__ import annotations

import re
from pathlib import Path

import trio

from realtimed import daemon
from realtimed.cli.realtimed import main


class ObservedDaemon(daemon.Daemon):
    """See the module."""

    def stats(self) -> dict[str, object]:
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert anonymous is not None
        return super().stats() | {
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,  # one is that of the directory
            "memory": int(anonymous[1]) * 1024,
        }


if __name__ == "__main__":
    vars(daemon)["Daemon"] = ObservedDaemon
    main()
