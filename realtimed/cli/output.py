"""How `realtimectl` prints.

Text from clients and publishers reaches the terminal only through `visible` or as JSON in ASCII: neither lets a control
character through.
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
    """Return `value` as text that is safe to print: on one line, without control characters. None becomes "-"."""
    if value is None:
        return "-"
    return printable(ascii(value) if isinstance(value, bytes) else str(value))


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first `shown` names, and how many more there are."""
    return " ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def date(seconds: float) -> str:
    """Return a time, in seconds since 1970, as local time; if no calendar reaches it, as the number."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def moment(seconds: float) -> str:
    """Return a time as `date` does, with milliseconds."""
    milliseconds = round(seconds * 1000)
    return f"{date(milliseconds // 1000)}.{milliseconds % 1000:03}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns, numbers on the right."""
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
    """Print one name and value a line; a value that is a map gets a line for each of its keys."""
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
    """Return a message as `tail` and `history` show it, after its time of publication if the daemon sent one."""
    published = "" if message.time is None else f"{moment(message.time)} "
    return f"{published}{message.channel} {message.offset} {visible(message.message)}"


def as_json(message: ChannelMessage) -> dict[str, object]:
    """Return a message for `print_json`: bytes in base64."""
    content: dict[str, object] = {"message": message.message}
    if isinstance(message.message, bytes):
        content = {"base64": b64encode(message.message).decode()}
    return {"channel": message.channel, "offset": message.offset, "time": message.time, **content}


def stop_printing() -> None:
    """Print nothing more, not even output that Python has buffered and would write when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say_what_failed(program: str, what: str, error: OSError) -> None:
    """Print on standard error that `what` cannot be read or written, and stop printing."""
    stop_printing()
    with suppress(OSError):  # standard error cannot be written either
        typer.echo(f"{program}: {what}: {error.strerror or error}", err=True)


def print_json(value: object) -> None:
    """Print a value as JSON on one line, in ASCII."""
    from json import dumps  # noqa: PLC0415  (most commands do not need it)

    typer.echo(dumps(value))
