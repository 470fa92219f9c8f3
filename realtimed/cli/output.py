"""How `realtimectl` prints.

What comes from clients and publishers reaches the terminal only through `visible` or as JSON in ASCII, where no control
character survives.
"""

from __future__ import annotations

import os
import time
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer

from realtimed.client.calls import ChannelMessage
from realtimed.text import printable

__all__ = [
    "as_json",
    "date",
    "line",
    "moment",
    "print_json",
    "print_map",
    "print_table",
    "say_what_failed",
    "some",
    "stop_printing",
    "visible",
]


def visible(value: object) -> str:
    """Return `value` as text that is safe to print: on one line, and with no power over the terminal. None is "-"."""
    if value is None:
        return "-"
    return printable(ascii(value) if isinstance(value, bytes) else str(value))


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    return " ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def date(seconds: float) -> str:
    """Return a moment, in seconds since 1970, as local time; if it is beyond all calendars, as that number."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def moment(seconds: float) -> str:
    """Return a moment as `date` does, with the milliseconds behind it."""
    milliseconds = round(seconds * 1000)
    return f"{date(milliseconds // 1000)}.{milliseconds % 1000:03}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns, numbers to the right."""
    right = [bool(rows) and all(isinstance(row[at], int) for row in rows) for at in range(len(head))]
    cells = [head, *([visible(value) for value in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )
    typer.echo("\n".join(lines))


def print_map(values: dict[str, Any], *, json: bool) -> None:
    """Print names and values below each other; what is itself a map gets a line for each of its keys."""
    if json:
        print_json(values)
        return
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [(f"{name} {key}", visible(inner)) for key, inner in value.items()]
        elif isinstance(value, list):
            lines.append((name, visible(" ".join(map(str, value)) or None)))
        else:
            is_date = name == "started" and isinstance(value, (int, float))
            lines.append((name, date(value) if is_date else visible(value)))
    lines = [(visible(name), value) for name, value in lines]
    width = max((len(name) for name, _ in lines), default=0)
    typer.echo("\n".join(f"{name:{width}}  {value}" for name, value in lines))


def line(message: ChannelMessage) -> str:
    """Return a message as `tail` and `history` show it, behind its time of publication if the daemon tells that."""
    published = "" if message.time is None else f"{moment(message.time)} "
    return f"{published}{message.channel} {message.offset} {visible(message.message)}"


def as_json(message: ChannelMessage) -> dict[str, object]:
    """Return a message as `print_json` takes it: bytes in base64."""
    content: dict[str, object] = {"message": message.message}
    if isinstance(message.message, bytes):
        content = {"base64": b64encode(message.message).decode()}
    return {"channel": message.channel, "offset": message.offset, "time": message.time, **content}


def stop_printing() -> None:
    """Let nothing more be printed: not even what Python has kept and would try to write when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say_what_failed(program: str, what: str, error: OSError) -> None:
    """Say that `what` cannot be read or written, and print nothing more."""
    stop_printing()
    with suppress(OSError):  # of what cannot be written either
        typer.echo(f"{program}: {what}: {error.strerror or error}", err=True)


def print_json(value: object) -> None:
    """Print a value as JSON on one line, in ASCII."""
    from json import dumps  # noqa: PLC0415  (most calls need none)

    typer.echo(dumps(value))
