"""`realtimectl top`: what the daemon does each second, computed from two answers to `stats`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import typer

from realtimed.cli.output import print_json, visible
from realtimed.client.blocking import Client
from realtimed.errors import ProtocolError
from realtimed.text import quoted

__all__ = ["Sample", "difference", "show"]

_LARGEST: Final = 2.0**64
"""No counter is larger. The bound keeps rates from overflowing."""

_HEAD_EVERY = 20
"""Lines between two headings when the output is not a terminal."""


class Sample(NamedTuple):
    """What the daemon did within `seconds`.

    Rates are per second and `loop_lag` is in seconds; other fields are as of the end.
    """

    seconds: float
    connections: int
    connects: float
    disconnects: float
    handshakes_refused: float
    channels: int
    subscriptions: int
    publishers: int
    commands: float
    commands_refused: float
    publications: float
    deliveries: float
    sends: float
    deliveries_per_send: float
    sent_bytes: float
    backlogged: int
    backlog_bytes: int
    loop_lag: float
    closed: dict[str, int]


def difference(before: dict[str, Any], after: dict[str, Any]) -> Sample | None:
    """Return what happened between two answers to `stats`, or None if the daemon was restarted in between.

    Raises `ProtocolError` if a counter is missing, because the daemon has another version, or is not a number.
    """
    seconds = _number(after, "uptime") - _number(before, "uptime")
    if seconds <= 0:
        return None

    def change(name: str) -> float:
        return _number(after, name) - _number(before, name)

    def rate(name: str) -> float:
        return round(change(name) / seconds, 3)

    def now(name: str) -> int:
        return int(_number(after, name))

    codes, codes_before = _map(after, "closed"), _map(before, "closed")
    closed = {code: int(_number(codes, code)) - int(_number({code: 0, **codes_before}, code)) for code in codes}
    sends = change("sends")
    return Sample(
        seconds=round(seconds, 3),
        connections=now("clients"),
        connects=rate("connections"),
        disconnects=round(sum(closed.values()) / seconds, 3),
        handshakes_refused=rate("handshakes_refused"),
        channels=now("channels"),
        subscriptions=now("subscriptions"),
        publishers=now("publishers"),
        commands=rate("commands"),
        commands_refused=rate("commands_refused"),
        publications=rate("publications"),
        deliveries=rate("deliveries"),
        sends=rate("sends"),
        deliveries_per_send=round(change("deliveries") / sends, 3) if sends else 0.0,
        sent_bytes=rate("sent_bytes"),
        backlogged=now("backlogged"),
        backlog_bytes=now("backlog_bytes"),
        loop_lag=_number(after, "loop_lag"),
        closed={code: count for code, count in closed.items() if count},
    )


def _number(statistics: Mapping[str, Any], name: str) -> float:
    value = _counted(statistics, name)
    if not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise ProtocolError(f"the daemon counts {quoted(name)} as {quoted(value)}: that is not a number")
    return value


def _map(statistics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = _counted(statistics, name)
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value):
        raise ProtocolError(f"the daemon counts {quoted(name)} as {quoted(value)}: that is no map")
    return value


def _counted(statistics: Mapping[str, Any], name: str) -> object:
    if name not in statistics:
        raise ProtocolError(f"the daemon does not count {quoted(name)}: it is of another version than realtimectl")
    return statistics[name]


def show(client: Client, *, interval: float, count: int | None, json: bool) -> None:
    """Print a sample each `interval` seconds: `count` of them, or forever."""
    samples = _samples(client, interval, count)
    if json:
        for sample in samples:
            print_json(sample._asdict())
    elif sys.stdout.isatty():
        _show_live(client, samples)
    else:
        _print_lines(samples)


def _samples(client: Client, interval: float, count: int | None) -> Iterator[Sample]:
    before = client.stats()
    due = time.monotonic()
    while count is None or count > 0:
        due = max(due + interval, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))
        after = client.stats()
        sample = difference(before, after)
        before = after
        if sample is not None:
            yield sample
            count = None if count is None else count - 1


_COLUMNS = (
    ("TIME", 8), ("CONNECTIONS", 11), ("CLOSED/S", 8), ("PUBLISHED/S", 11), ("DELIVERED/S", 11), ("SENDS/S", 9),
    ("BYTES/S", 8), ("BACKLOG", 8), ("LAG", 8),
)  # fmt: skip
"""Headings and widths."""


def _print_lines(samples: Iterable[Sample]) -> None:
    for number, each in enumerate(samples):
        if number % _HEAD_EVERY == 0:
            typer.echo("  ".join(name.rjust(width) for name, width in _COLUMNS))
        cells = (
            time.strftime("%H:%M:%S"),
            str(each.connections),
            f"{each.disconnects:.1f}",
            f"{each.publications:.1f}",
            f"{each.deliveries:.1f}",
            f"{each.sends:.1f}",
            _bytes(each.sent_bytes),
            _bytes(each.backlog_bytes),
            f"{each.loop_lag * 1000:.1f} ms",
        )
        typer.echo("  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True)))
        sys.stdout.flush()


def _show_live(client: Client, samples: Iterable[Sample]) -> None:
    # Imported here, since no other command needs rich, which takes half as long to import as typer itself.
    from rich.console import Console, Group  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    version = visible(client.info().get("version"))
    # As Text, nothing that the daemon says is taken for markup.
    title = Text(f"realtimed {version} at {visible(client.socket)} – Ctrl-C ends", style="bold")
    with Live(Text("measuring …"), console=Console(highlight=False), auto_refresh=False) as live:
        for sample in samples:
            table = Table.grid(padding=(0, 2))
            for justify in ("left", "right", "left", "right"):
                table.add_column(justify=justify)
            for left, right in zip(*_figures(sample), strict=True):
                table.add_row(*(Text(cell) for cell in (*left, *right)))
            live.update(Group(title, table), refresh=True)


def _figures(sample: Sample) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return two columns of names and values."""
    closed = " ".join(f"{visible(code)}:{count}" for code, count in sample.closed.items())
    return [
        ("connections", f"{sample.connections:,}"),
        ("connected/s", f"{sample.connects:,.1f}"),
        ("closed/s", f"{sample.disconnects:,.1f}"),
        ("closed, by code", closed or "–"),
        ("refused handshakes/s", f"{sample.handshakes_refused:,.1f}"),
        ("channels", f"{sample.channels:,}"),
        ("subscriptions", f"{sample.subscriptions:,}"),
        ("publishers", f"{sample.publishers:,}"),
    ], [
        ("commands/s", f"{sample.commands:,.1f}"),
        ("refused commands/s", f"{sample.commands_refused:,.1f}"),
        ("publications/s", f"{sample.publications:,.1f}"),
        ("deliveries/s", f"{sample.deliveries:,.1f}"),
        ("sends/s", f"{sample.sends:,.1f}, {sample.deliveries_per_send:.1f} messages each"),
        ("bytes/s", _bytes(sample.sent_bytes)),
        ("backlog", f"{_bytes(sample.backlog_bytes)} for {sample.backlogged:,} clients"),
        ("event loop late by", f"{sample.loop_lag * 1000:.1f} ms"),
    ]


def _bytes(count: float) -> str:
    """Return a number of bytes with at most four digits."""
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}G"
