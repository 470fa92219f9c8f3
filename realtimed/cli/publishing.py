"""The command of `realtimectl` that publishes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from realtimed.cli.command import Daemon
from realtimed.cli.output import print_json, visible
from realtimed.errors import RefusedError

__all__ = ["broadcast"]


def broadcast(
    context: typer.Context,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", show_default=False)],
    message: Annotated[
        str, typer.Argument(metavar="MSG", help="The message, or - to read it from standard input.", show_default=False)
    ],
    binary: Annotated[
        bool, typer.Option("--binary", help="Send the bytes as they are, as a binary message.", show_default=False)
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="Send it only if no message with this key was sent to this channel before (1 to 200 characters).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Send a message to all clients that are subscribed to a channel.

    \b
      realtimectl broadcast news hello
      realtimectl broadcast news -- -5          a message that begins with a dash
      jq -c . news.json | realtimectl broadcast news -
      realtimectl broadcast --binary thumbnails - < cat.png
      realtimectl broadcast --key match-17-goal-3 scores 2:1

    With --key the command repeats itself if the connection breaks before the answer, and may itself be repeated after
    exit status 3: the message is sent once, and the other answers are marked as repeated. The daemon remembers a key
    for its retry-window (300 s), but not beyond a restart.

    Standard input is sent as it is, with the newline at its end if there is one.
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
    with daemon.client() as client:
        receipt = client.broadcast(channel, _message(message, binary=binary), key=key)
    if daemon.json:
        print_json(receipt._asdict())
    else:
        clients = "1 client" if receipt.recipients == 1 else f"{receipt.recipients} clients"
        repeated = " (repeated: it was sent before)" if receipt.repeated else ""
        typer.echo(f"queued for {clients}, offset {receipt.offset}, epoch {visible(receipt.epoch)}{repeated}")


def _message(given: str, *, binary: bool) -> str | bytes:
    """Return the message that an argument stands for. Raises `RefusedError` for text that is not UTF-8."""
    if given != "-":
        data = os.fsencode(given)
    elif sys.stdin is not None:
        data = sys.stdin.buffer.read()
    else:
        raise RefusedError("invalid_params", "the message was to be read from standard input, which is closed")
    if binary:
        return data
    try:
        return data.decode() if given == "-" else given.encode().decode()
    except UnicodeError:
        raise RefusedError("invalid_utf8", "the message is not UTF-8 text; --binary sends it as it is") from None
