"""Fuzzes one target, or each in turn: `python -m tests.fuzz TARGET… --seconds 60`, or `--megabytes 10`.

Some targets count what they check: `desync --blind --seconds 3600 --until frames=20000000` goes on until it is enough.

Guided by coverage: with atheris where it is installed, otherwise by a loop of our own that keeps an input which reaches
a line of realtimed by a way that none took before. With `--blind` nothing guides it, and it makes several times as many
inputs. All begin with the corpus and the seeds. An input that breaks the invariant, or takes more processor time than
`tests.kit.budget` allows, is written to a file, and ends the run with status 1.

What was found is kept in two steps: `python -m tests.fuzz TARGET --keep DIR`, then `--minimise DIR`, which leaves in
the target's corpus those inputs, out of the corpus and of DIR, that reach something which no other reaches.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tests.fuzz import TARGETS, checker, corpus, kept_in, tally
from tests.fuzz.mutations import mutated, repeated
from tests.kit.budget import LARGEST
from tests.kit.stack import ROOT

_SHOWN_EVERY: Final = 10.0
"""Seconds between two lines of progress."""

_REPEATED: Final = 16
"""One input in so many that atheris makes has a run of bytes repeated; it does not come upon that by itself."""

_MUTATED: Final = 4
"""One input in so many is made from the corpus if a target can make others from nothing, and nothing guides it."""

_SLOWER: Final = 5
"""How much slower code may be that is instrumented by atheris."""

_HANG: Final = 20
"""Seconds that one input may take."""

_MEMORY_LIMIT: Final = 1024
"""MiB that a fuzzer may take: beyond that something leaks."""


class _Budget:
    """Counts what has been fed, shows it, and ends the process when it is enough."""

    def __init__(self, target: str, seconds: float, size: float, until: tuple[str, int] | None) -> None:
        self._check: Callable[[bytes], None]
        self._tally = Counter[str]()
        self._until = until
        self._target = target
        self._began = self._shown = time.monotonic()
        self._ends = self._began + seconds
        self._size = size
        self.inputs = self.bytes = 0

    def load(self, *, slower: float = 1) -> None:
        """Import the target, whose code is so many times slower than it would be by itself."""
        self._check = checker(self._target, slower=slower)
        self._tally = tally(self._target)

    def feed(self, data: bytes) -> None:
        """Check the invariant for one input; one that breaks it is written to a file."""
        try:
            self._check(data)
        except BaseException:
            file = Path(f"fuzz-{self._target}-{hashlib.sha1(data).hexdigest()[:12]}")
            file.write_bytes(data)
            print(f"{self._target}: broken by {data[:200]!r}, all of it is in {file}", flush=True)
            raise
        self.inputs += 1
        self.bytes += len(data)
        now = time.monotonic()
        if now - self._shown > _SHOWN_EVERY:
            self._show()
            self._shown = now
        enough = self._until is not None and self._tally[self._until[0]] >= self._until[1]
        if enough or now > self._ends or self.bytes >= self._size:
            self._show()
            sys.stdout.flush()
            # Neither libFuzzer nor the loop has another way out.
            os._exit(0 if enough or self._until is None else 1)

    def _show(self) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.monotonic() - self._began
        shown = f"{self.inputs} inputs, {self.bytes} bytes, {self.inputs / seconds:.0f} inputs/s, {memory:.0f} MiB"
        checked = "".join(f", {count} {name}" for name, count in self._tally.items())
        print(f"{self._target}: {seconds:.0f} s, {shown}{checked}", flush=True)


def _fuzz_with_atheris(budget: _Budget, target: str, found: Path) -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["realtimed", "wsproto", "trio_websocket", "h11"]):
        budget.load(slower=_SLOWER)
    arguments = [
        f"-max_len={LARGEST}", f"-timeout={_HANG}", f"-rss_limit_mb={_MEMORY_LIMIT}", "-len_control=0", "-verbosity=0",
        str(found),
    ]  # fmt: skip
    for number, data in enumerate(corpus(target)):
        (found / f"seed-{number}").write_bytes(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.randrange(_REPEATED):
            return bytes(atheris.Mutate(data, max_size))
        return repeated(data, source)[:max_size]

    atheris.Setup([sys.argv[0], *arguments], budget.feed, custom_mutator=mutate)
    atheris.Fuzz()


def _steps(target: str, data: bytes) -> set[tuple[str, int, int]]:
    """Return the steps from line to line that realtimed makes for one input, and what else the target says."""
    module, steps = importlib.import_module(f"tests.fuzz.{target}"), set[tuple[str, int, int]]()
    packages = [importlib.import_module(name).__path__[0] for name in getattr(module, "COVERED", ())]
    ours = (str(ROOT / "realtimed"), *packages)
    counted, before = tally(target), tally(target).copy()

    def enter(frame: FrameType, _event: str, _value: object) -> Any:
        file, previous = frame.f_code.co_filename, 0
        if not file.startswith(ours):
            return None

        def step(frame: FrameType, event: str, _value: object) -> Any:
            nonlocal previous
            if event == "line":
                steps.add((file, previous, frame.f_lineno))
                previous = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        module.check(data)
    finally:
        sys.settrace(None)
        counted.clear()
        counted.update(before)
    return steps


def _fuzz_without(budget: _Budget, target: str) -> None:
    budget.load()
    inputs, source, reached = corpus(target), random.Random(), set[tuple[str, int, int]]()
    pending = list(inputs)
    while True:
        data = pending.pop() if pending else mutated(source.choice(inputs), inputs, source)[:LARGEST]
        budget.feed(data)
        steps = _steps(target, data)  # once more: what is traced takes many times as long
        if not steps <= reached:
            reached |= steps
            inputs.append(data)


def _fuzz_blindly(budget: _Budget, target: str) -> None:
    budget.load()
    inputs, source = corpus(target), random.Random()
    generate = getattr(importlib.import_module(f"tests.fuzz.{target}"), "generate", None)
    for data in inputs:
        budget.feed(data)
    while True:
        if generate is not None and source.randrange(_MUTATED):
            budget.feed(generate(source))
        else:
            budget.feed(mutated(source.choice(inputs), inputs, source)[:LARGEST])


def _minimise(target: str, found: Path) -> None:
    """Leave in the corpus what reaches something by itself, the shortest first; seeds need not be kept again."""
    reached = set[tuple[str, int, int]]()
    for data in importlib.import_module(f"tests.fuzz.{target}").SEEDS:
        reached |= _steps(target, data)
    kept: list[bytes] = []
    for data in sorted({*corpus(target), *(file.read_bytes() for file in found.iterdir())}, key=len):
        steps = _steps(target, data)
        if not steps <= reached:
            reached |= steps
            kept.append(data)
    for file in kept_in(target).iterdir():
        file.unlink()
    for data in kept:
        (kept_in(target) / hashlib.sha1(data).hexdigest()[:12]).write_bytes(data)
    print(f"{target}: {len(kept)} inputs are kept, {sum(map(len, kept))} bytes; they make {len(reached)} steps")


def _fuzz(target: str, budget: _Budget, keep: Path | None, *, blind: bool) -> None:
    if blind:
        _fuzz_blindly(budget, target)
    elif importlib.util.find_spec("atheris") is None:
        _fuzz_without(budget, target)
    elif keep is not None:
        _fuzz_with_atheris(budget, target, keep)
    else:
        with tempfile.TemporaryDirectory() as found:
            _fuzz_with_atheris(budget, target, Path(found))


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each target at most (default: 60)")
    parser.add_argument("--megabytes", type=float, default=1000, help="for each target at most (default: 1000)")
    parser.add_argument(
        "--until", default="", metavar="NAME=NUMBER", help="end when so many of what it counts are checked"
    )
    parser.add_argument("--blind", action="store_true", help="do not look for what reaches something new")
    parser.add_argument("--keep", type=Path, help="a directory for the inputs that reach something new")
    parser.add_argument("--minimise", type=Path, metavar="DIR", help="reduce the corpus and what --keep found in DIR")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.minimise is not None:
        if len(given.targets) != 1:
            parser.error("--minimise is for one TARGET, as a directory has the inputs of one")
        _minimise(given.targets[0], given.minimise)
        return 0
    if given.alone:
        [target] = given.targets
        name, _, number = given.until.partition("=")
        until = (name, int(number)) if name else None
        budget = _Budget(target, given.seconds, given.megabytes * 1e6, until)
        _fuzz(target, budget, given.keep, blind=given.blind)
    limits = [f"--seconds={given.seconds}", f"--megabytes={given.megabytes}", f"--until={given.until}"]
    status = 0
    for target in given.targets:
        more = ["--blind"] * given.blind + [f"--keep={given.keep}"] * (given.keep is not None)
        command = [sys.executable, "-m", "tests.fuzz", target, "--alone", *limits, *more]
        status |= subprocess.run(command, check=False).returncode
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(_main())
