"""Fuzzers: each is a module with an invariant in its first line, a function `check`, and `SEEDS` to begin with."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

__all__ = ["TARGETS", "corpus", "kept_in"]

TARGETS: Final = ("wire", "protocols", "inbound", "handshake", "control")


def kept_in(target: str) -> Path:
    """Return the directory of a target's corpus."""
    return Path(__file__).parent / f"corpus-{target}"


def corpus(target: str) -> list[bytes]:
    """Return a target's seeds, and the inputs kept in its corpus: each reaches something that no other does."""
    seeds: tuple[bytes, ...] = importlib.import_module(f"tests.fuzz.{target}").SEEDS
    return [*seeds, *(file.read_bytes() for file in sorted(kept_in(target).iterdir()))]
