"""Everything that broadcasts, behind one function: the Python clients, the PHP client, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import realtimed
from realtimed import Receipt
from tests.kit.blocking import FLAVOURS, opener
from tests.kit.php import literal, running_php
from tests.kit.stack import ROOT

WITH_RETRY = (*FLAVOURS, "function", "php", "php function")
"""Those that can make up a key."""

PUBLISHERS = (*WITH_RETRY, "realtimectl")


class Publish(Protocol):
    """Broadcasts and returns the receipt; raises what the publisher raises."""

    def __call__(self, channel: str, message: str, *, key: str | None = None, retry: bool = False) -> Receipt: ...


@contextmanager
def publishing(kind: str, path: Path, timeout: float = 10.0) -> Iterator[Publish]:
    """Give a `Publish` through the control socket at `path`; `kind` is one of `PUBLISHERS`."""
    if kind == "function":

        def function(channel: str, message: str, *, key: str | None = None, retry: bool = False) -> Receipt:
            return realtimed.broadcast(channel, message, key=key, retry=retry, socket=path)

        yield function
    elif kind == "realtimectl":
        yield _Realtimectl(path, timeout)
    elif kind.startswith("php"):
        call = "$client->broadcast" if kind == "php" else "Realtime\\broadcast"
        with running_php(path, timeout=timeout, environment={"REALTIME_SOCKET": str(path)}) as php:

            def from_php(channel: str, message: str, *, key: str | None = None, retry: bool = False) -> Receipt:
                named = (f", key: {literal(key)}" if key is not None else "") + (", retry: true" if retry else "")
                return Receipt(**php.run(f"return {call}({literal(channel)}, {literal(message)}{named});"))

            yield from_php
    else:
        with opener(kind) as connect:
            yield connect(path, timeout=timeout).broadcast


class _Realtimectl:
    def __init__(self, path: Path, timeout: float) -> None:
        self._command = [sys.executable, "-m", "realtimed.cli.realtimectl", "--json", "--socket", str(path)]
        self._timeout = ["--timeout", str(timeout)]

    def __call__(self, channel: str, message: str, *, key: str | None = None, retry: bool = False) -> Receipt:
        assert not retry, "realtimectl makes up no keys"
        keys = ["--key", key] if key is not None else []
        done = subprocess.run(
            [*self._command, *self._timeout, "broadcast", *keys, channel, message],
            capture_output=True,
            cwd=ROOT,
            env=dict(os.environ),
            check=True,
        )
        return Receipt(**json.loads(done.stdout))
