"""The command `realtimectl`: talks to a running daemon through its control socket.

It starts in the time that typer takes to import: it imports neither the daemon nor trio.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Final

import typer

from realtimed import __version__
from realtimed.cli.administering import disconnect, doctor, upgrade
from realtimed.cli.asking import channels, clients, history, info, ping, stats
from realtimed.cli.command import REFUSED, STANDARD_STREAMS, Command, Group
from realtimed.cli.output import say_what_failed
from realtimed.cli.publishing import broadcast
from realtimed.cli.watching import tail, top

__all__ = ["app", "main"]

# \b keeps the lines of a paragraph as they are. It has to be the character itself, so no raw strings.
_HELP: Final = """Broadcast, and see who listens: the shell's way to a running realtimed.

\b
  realtimectl broadcast news hello
  realtimectl broadcast news - < message.json
  realtimectl tail news sport
  realtimectl clients
  realtimectl --json channels | jq 'keys'

Options that all commands have may stand before or after the command's name.

\b
Exit status:
  0    done
  1    refused, or nothing could be read or written: the reason is on standard error
  2    wrong usage
  3    no daemon there, or no answer in time
  130  ended by Ctrl-C
  141  the reader of the output has closed it
"""

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, and no rich to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (broadcast, channels, history, clients, disconnect, tail, top, stats, ping, info, doctor, upgrade):
    app.command(cls=Command)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"realtimectl {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command's name, beside those that all commands have."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    try:
        app(prog_name="realtimectl")
    except OSError as error:  # before a command begins: --version and --help
        say_what_failed("realtimectl", STANDARD_STREAMS, error)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
