"""Tables: Markdown that can be read as it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

__all__ = ["Table", "count", "span"]


@dataclass
class Table:
    """What one case of a scenario has shown: cells for people, and all there is for programs."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.columns))]
        text = [f"### {self.title}", ""]
        for number, line in enumerate(lines):
            cells = [
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            text.append(f"| {' | '.join(cells)} |")
            if number == 0:
                rules = ["-" * width if at == 0 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
                text.append(f"| {' | '.join(rules)} |")
        text += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(text).rstrip() + "\n"


def count(value: float) -> str:
    """Return a number with three digits that matter."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} M" if value < 1e9 else f"{value / 1e9:.3g} G"
    if value >= 1e4:
        return f"{value / 1e3:.3g} k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def span(values: Iterable[float]) -> str:
    """Return the median, and the least and the greatest in brackets."""
    known = sorted(values)
    return f"{count(median(known))} ({count(known[0])}–{count(known[-1])})" if known else "–"
