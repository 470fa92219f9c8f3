"""Where `realtimectl tail` begins: now, or with messages that the daemon still has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias

import typer

from realtimed.client.blocking import Client
from realtimed.client.calls import ChannelMessage, Position
from realtimed.text import quoted

__all__ = ["Since", "following", "parse_since"]

Since: TypeAlias = Position | int
"""A place in one channel, or a number of messages that came last."""

_ALL: Final = 10**9
"""More messages than any history holds."""


def parse_since(text: str, channels: Sequence[str]) -> Since:
    """Return what ``--since`` says. Raises `typer.BadParameter`."""
    if text == "all":
        return _ALL
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    place = re.fullmatch(r"([0-9A-Za-z]+):([0-9]{1,18})", text)
    if place is None:
        raise typer.BadParameter(f"expected EPOCH:OFFSET, a number, or all; not {quoted(text)}", param_hint="--since")
    if len(set(channels)) > 1:
        raise typer.BadParameter("EPOCH:OFFSET is a place in one channel; several are given", param_hint="--since")
    return Position(place[1], int(place[2]))


@contextmanager
def following(client: Client, channels: Sequence[str], since: Since | None) -> Iterator[Iterator[ChannelMessage]]:
    """Subscribe; give what `since` asks for of each channel, and after it all messages as they come.

    What is no longer kept is said on standard error.
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
