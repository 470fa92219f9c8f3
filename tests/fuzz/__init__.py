"""Fuzzers: each is a module with an invariant in its first line, a function `check`, and `SEEDS` to begin with.

A module may also have a function `generate`, which makes an input at random; `TALLY`, which counts what was checked;
and `COVERED`, names of packages whose lines an input may reach, beside those of realtimed.

Each input has a budget of processor time as well, see `tests.kit.budget`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.kit.budget import within_budget

__all__ = ["TARGETS", "checker", "corpus", "kept_in", "tally"]

TARGETS: Final = ("wire", "protocols", "inbound", "handshake", "control", "desync", "switching")


def kept_in(target: str) -> Path:
    """Return the directory of a target's corpus."""
    return Path(__file__).parent / f"corpus-{target}"


def corpus(target: str) -> list[bytes]:
    """Return a target's seeds, and the inputs kept in its corpus: each reaches something that no other does."""
    seeds: tuple[bytes, ...] = importlib.import_module(f"tests.fuzz.{target}").SEEDS
    return [*seeds, *(file.read_bytes() for file in sorted(kept_in(target).iterdir()))]


def checker(target: str, *, slower: float = 1) -> Callable[[bytes], None]:
    """Return what raises if a target's invariant does not hold for an input, or it exceeds its budget."""
    check: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{target}").check

    def check_in_time(data: bytes) -> None:
        within_budget(lambda: check(data), len(data), slower=slower)

    return check_in_time


def tally(target: str) -> Counter[str]:
    """Return what a target counts of what it has checked in this process."""
    module = importlib.import_module(f"tests.fuzz.{target}")
    counted: Counter[str] = module.TALLY if hasattr(module, "TALLY") else Counter()
    return counted
