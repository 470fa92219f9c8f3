"""The commands of `realtimectl` that ask the daemon once and print its answer."""

from __future__ import annotations

import time
from typing import Annotated, Final

import typer

from realtimed.cli.command import Daemon
from realtimed.cli.output import as_json, date, line, print_json, print_map, print_table, some, visible
from realtimed.client.calls import HISTORY_SHOWN

__all__ = ["channels", "clients", "history", "info", "ping", "stats"]

_MOST: Final = 10**9

_Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", "-n", metavar="NUMBER", min=1, max=_MOST, help="Show this many at most.", show_default=False
    ),
]
_Count = Annotated[bool, typer.Option("--count", help="Print only how many there are.", show_default=False)]


def channels(
    context: typer.Context,
    prefix: Annotated[
        str, typer.Argument(metavar="PREFIX", help="Only names that begin with it.", show_default=False)
    ] = "",
    limit: _Limit = None,
    count: _Count = False,
) -> None:
    """List the channels that have subscribers.

    \b
      realtimectl channels chat:
      realtimectl channels chat: --count

    OFFSET is that of the newest message; it begins at 1 in every epoch. HISTORY is how many messages are kept. --limit
    selects the channels that have been there for longest.
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        if count:
            _print_count(daemon, client.count_channels(prefix), limit)
            return
        found = client.channels(prefix, limit=limit)
    if daemon.json:
        print_json({name: each._asdict() for name, each in found.items()})
    else:
        rows = [(name, each.subscribers, each.history, each.offset, each.epoch) for name, each in sorted(found.items())]
        print_table(("CHANNEL", "SUBSCRIBERS", "HISTORY", "OFFSET", "EPOCH"), rows)


def history(
    context: typer.Context,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", show_default=False)],
    count: Annotated[
        int, typer.Option("--count", "-n", metavar="COUNT", min=1, max=_MOST, help="Show this many at most.")
    ] = HISTORY_SHOWN,
) -> None:
    """Print the last messages of a channel that the daemon keeps, oldest first.

    \b
      realtimectl history news -n 5
      realtimectl history news --json | jq '.messages[].message'

    The lines are those of `tail`, each with the time when its message was published. With --json it is one object, with
    the channel's "epoch" and "offset" and a list of "messages".
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        position, messages = client.history(channel, count)
    if daemon.json:
        print_json({"channel": channel, **position._asdict(), "messages": list(map(as_json, messages))})
        return
    for message in messages:
        typer.echo(line(message))
    if not messages:
        typer.echo(f"realtimectl: nothing is kept of {channel}", err=True)


def clients(
    context: typer.Context,
    channel: Annotated[
        str | None,
        typer.Option(metavar="CHANNEL", help="Only clients that are subscribed to it.", show_default=False),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Only clients with this address.", show_default=False)
    ] = None,
    limit: _Limit = None,
    count: _Count = False,
) -> None:
    """List the connected clients, the longest connected first.

    \b
      realtimectl clients --channel news
      realtimectl clients --address 203.0.113.7 --count
      realtimectl clients --address 203.0.113.7 --json | jq -r '.[].id' | xargs -n 1 realtimectl disconnect

    PENDING is how many bytes wait for a client that reads slowly.
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        if count:
            _print_count(daemon, client.count_clients(channel=channel, address=address), limit)
            return
        found = sorted(
            client.clients(channel=channel, address=address, limit=limit), key=lambda each: each.connected_since
        )
    if daemon.json:
        print_json([each._asdict() for each in found])
    else:
        rows = [
            (each.id, each.protocol, each.address, date(each.connected_since), each.pending, some(each.channels))
            for each in found
        ]
        print_table(("CLIENT", "PROTOCOL", "ADDRESS", "CONNECTED", "PENDING", "CHANNELS"), rows)


def _print_count(daemon: Daemon, count: int, limit: int | None) -> None:
    count = count if limit is None else min(count, limit)
    if daemon.json:
        print_json({"count": count})
    else:
        typer.echo(count)


def stats(context: typer.Context) -> None:
    """Show the daemon's counters."""
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        print_map(client.stats(), json=daemon.json)


def ping(context: typer.Context) -> None:
    """Say whether the daemon answers, and how fast."""
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        began = time.perf_counter()
        client.ping()
        milliseconds = round((time.perf_counter() - began) * 1000, 3)
    if daemon.json:
        print_json({"milliseconds": milliseconds})
    else:
        typer.echo(f"the daemon at {visible(client.socket)} answered after {milliseconds:g} ms")


def info(context: typer.Context) -> None:
    """Show the daemon's version, limits and start time."""
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        print_map(client.info(), json=daemon.json)
