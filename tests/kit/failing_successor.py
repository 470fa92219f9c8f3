"""The daemon, whose successors fail as a file says.

`python -m tests.kit.failing_successor OPTIONS…` takes the options of `realtimed`. The file is `fail` beside its control
socket.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from realtimed.cli.realtimed import main
from realtimed.process import successor
from realtimed.process.line import Kind
from realtimed.process.successor import Predecessor
from tests.kit.daemon import Daemon

__all__ = ["CRASH", "FEW", "HANG", "WRONG", "fail_at"]

CRASH: Final = "it crashes before it is ready"
HANG: Final = "it hangs before it is ready"
WRONG: Final = "it finds a wrong configuration"
FEW: Final = "it may open few files"

_FEW: Final = 60

_LONG: Final = 60.0
"""Seconds for which a successor hangs: it is ended before."""


@contextmanager
def fail_at(daemon: Daemon, failing: str) -> Iterator[None]:
    """Let a successor of `daemon` fail in one of these ways; with "" it does not."""
    directory = daemon.control_socket.parent
    fail, configuration = directory / "fail", directory / "realtimed.toml"
    if failing == WRONG:
        configuration.write_text("heartbeat = 'never'\n")
    elif failing:
        fail.write_text(failing)
    try:
        yield
    finally:
        fail.unlink(missing_ok=True)
        configuration.write_text("")


def _say(predecessor: Predecessor, kind: Kind, data: bytes = b"") -> None:
    """Fail before the last word, or become unable to take over at the first."""
    fail = Path(sys.argv[sys.argv.index("--socket") + 1]).with_name("fail")
    how = fail.read_text() if fail.exists() else ""
    if kind is Kind.HELLO and how == FEW:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FEW, _FEW))
    if kind is Kind.READY and how == CRASH:
        os._exit(3)
    if kind is Kind.READY and how == HANG:
        time.sleep(_LONG)
    _really_say(predecessor, kind, data)


if __name__ == "__main__":
    _really_say = Predecessor.say
    vars(successor)["Predecessor"].say = _say
    main()
