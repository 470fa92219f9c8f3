"""The commands of `realtimectl` that go on until they are interrupted: `tail` and `top`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Final, TypeAlias

import typer

from realtimed.cli.command import Daemon, read_time
from realtimed.cli.output import as_json, line, print_json, some, visible
from realtimed.client.blocking import Client
from realtimed.client.calls import ChannelMessage, Position
from realtimed.text import quoted

__all__ = ["tail", "top"]

_SHORTEST_INTERVAL: Final = 0.1
_LONGEST_INTERVAL: Final = 3600.0
"""Seconds between two samples of `top`."""

_ALL: Final = 10**9
"""More messages than any history holds."""

_Since: TypeAlias = Position | int
"""A position in one channel, or a number of the last messages of each."""


def tail(
    context: typer.Context,
    channels: Annotated[list[str], typer.Argument(metavar="CHANNEL", show_default=False)],
    since: Annotated[
        str | None,
        typer.Option(
            metavar="EPOCH:OFFSET|COUNT|all", help="Begin with messages that the daemon keeps.", show_default=False
        ),
    ] = None,
) -> None:
    """Print the messages of channels as they come, until Ctrl-C.

    \b
      realtimectl tail news sport
      realtimectl tail 'chat:*'
      realtimectl tail news --since 5
      realtimectl tail --json news | jq -r .message

    A channel may be a pattern, in which * stands for any characters. Then the channels are watched from outside:
    messages without any recipient are shown too, and publishers do not count this command as a recipient.

    It says on standard error when it has begun. A line has the time of publication, the channel, the offset and the
    message. The time is local; for an old message too it is the time of publication. Characters that could control a
    terminal are escaped, and a binary message is shown as b'...'. With --json each line is an object with "channel",
    "offset", "time" in seconds since 1970, and "message", or "base64" in place of "message" if it is binary.

    With --since 5 each channel begins with the last 5 messages that are kept, with --since all with all of them. With
    --since EPOCH:OFFSET, for one channel, everything after that position is shown; if not all of it is kept, none of it
    is, and standard error says so. `channels`, `broadcast` and `history --json` show positions.
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
    begin = None if since is None else _parse_since(since, channels)
    watching = any("*" in channel for channel in channels)
    if watching and begin is not None:
        raise typer.BadParameter("it is for channels, not for patterns", param_hint="--since")
    with (
        daemon.client() as client,
        client.watch(*channels) if watching else _following(client, channels, begin) as messages,
    ):
        typer.echo(f"realtimectl: watching {visible(some(channels))}; Ctrl-C ends it", err=True)
        for message in messages:
            if daemon.json:
                print_json(as_json(message))
            else:
                typer.echo(line(message))


def _parse_since(text: str, channels: Sequence[str]) -> _Since:
    """Return what ``--since`` says. Raises `typer.BadParameter`."""
    if text == "all":
        return _ALL
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    position = re.fullmatch(r"([0-9A-Za-z]+):([0-9]{1,18})", text)
    if position is None:
        raise typer.BadParameter(f"expected EPOCH:OFFSET, a number, or all; not {quoted(text)}", param_hint="--since")
    if len(set(channels)) > 1:
        raise typer.BadParameter("EPOCH:OFFSET is a place in one channel; several are given", param_hint="--since")
    return Position(position[1], int(position[2]))


@contextmanager
def _following(client: Client, channels: Sequence[str], since: _Since | None) -> Iterator[Iterator[ChannelMessage]]:
    """Subscribe; give the kept messages of each channel that `since` asks for, and then all messages as they come.

    Says on standard error if messages are no longer kept.
    """
    positions = dict.fromkeys(channels, since) if isinstance(since, Position) else {}
    last = since if isinstance(since, int) else None
    with client.subscribe(*channels, since=positions, last=last) as subscription:
        for channel, recovered in subscription.recovered.items():
            if not recovered:
                asked, begins = positions[channel], subscription.positions[channel]
                typer.echo(
                    f"realtimectl: not recovered: not everything after {asked.epoch}:{asked.offset} of {channel} is"
                    f" kept, or the epoch is another. What follows begins after {begins.epoch}:{begins.offset}",
                    err=True,
                )
        yield subscription


def _read_interval(given: object) -> float:
    seconds = read_time(given)
    if not _SHORTEST_INTERVAL <= seconds <= _LONGEST_INTERVAL:
        raise typer.BadParameter(f"expected a time from 100ms to 1h, got {quoted(given)}")
    return seconds


def top(
    context: typer.Context,
    interval: Annotated[
        float,
        typer.Option(metavar="TIME", parser=_read_interval, help="Time between two samples, such as 5 or 500ms."),
    ] = 1.0,
    count: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=1, help="End after this many samples.", show_default=False)
    ] = None,
) -> None:
    """Show what the daemon does in each second, until Ctrl-C.

    On a terminal the figures stay in place; in a pipe each sample is a line, and with --json an object.

    \b
      realtimectl top --json --count 1 | jq .deliveries
    """  # noqa: D301
    from realtimed.cli.top import show  # noqa: PLC0415  (it takes time to import)

    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        show(client, interval=interval, count=count, json=daemon.json)
