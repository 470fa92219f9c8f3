"""The daemon, on a machine whose time of day somebody sets: by as many seconds as the file CLOCK_OFFSET says.

`python -m tests.kit.wandering_clock_daemon OPTIONS…` takes the options of `realtimed`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from realtimed.cli.realtimed import main

_true_time = time.time
_true_time_ns = time.time_ns
_offset = Path(os.environ["CLOCK_OFFSET"])


def wandering_time() -> float:
    """Stand in for `time.time`."""
    return _true_time() + float(_offset.read_text())


def wandering_time_ns() -> int:
    """Stand in for `time.time_ns`."""
    return _true_time_ns() + int(float(_offset.read_text())) * 10**9


if __name__ == "__main__":
    time.time = wandering_time
    time.time_ns = wandering_time_ns
    main()
