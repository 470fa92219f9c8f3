"""What all commands of `realtimectl` share: three options, and the exit statuses.

The three options may stand before or after the command's name, so each help page lists them. A command gets them by
`context.ensure_object(Daemon)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from realtimed.cli.output import say_what_failed, stop_printing, visible
from realtimed.client.blocking import Client
from realtimed.client.connection import DEFAULT_TIMEOUT
from realtimed.config.units import as_seconds
from realtimed.errors import RealtimeError, RefusedError
from realtimed.rpc import address
from realtimed.text import quoted

__all__ = ["REFUSED", "STANDARD_STREAMS", "Command", "Daemon", "Group", "read_time"]

REFUSED: Final = 1
_UNREACHABLE: Final = 3
_INTERRUPTED: Final = 128 + 2  # as the shell reports SIGINT and SIGPIPE
_PIPE_CLOSED: Final = 128 + 13

STANDARD_STREAMS: Final = "standard input or output"


@dataclass(slots=True)
class Daemon:
    """Which daemon is meant, and how to print its answers."""

    socket: str | None = None
    timeout: float = DEFAULT_TIMEOUT
    json: bool = False

    def client(self) -> Client:
        """Return a client of this daemon."""
        try:
            return Client(self.socket, timeout=self.timeout)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--timeout") from None


def read_time(given: object) -> float:
    """Read a time, in seconds or with units, for typer."""
    try:
        return as_seconds(given)
    except ValueError:
        raise typer.BadParameter(
            f"expected a number of seconds, or a time such as 500ms, 90s or 5m, got {quoted(given)}"
        ) from None


def _keep(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> None:
    """Keep the value of a shared option. The one after the command's name is kept last, and so wins."""
    daemon = context.ensure_object(Daemon)
    if value is not None and value is not False:
        setattr(daemon, str(parameter.name), value)


def _declare(
    socket: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=f"The daemon's control socket: PATH or unix:PATH; if not given, REALTIME_SOCKET or {address.DEFAULT}.",
            show_default=False,
            expose_value=False,
            callback=_keep,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=read_time,
            help=f"How long the daemon may take to answer, such as 10 or 500ms; if not given, {DEFAULT_TIMEOUT:g}s.",
            show_default=False,
            expose_value=False,
            callback=_keep,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON for programs.", show_default=False, expose_value=False, callback=_keep),
    ] = False,
) -> None:
    """Declare the options that all commands have: typer makes options from a function's parameters."""


def _shared_options() -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(_declare)
    return typer.main.get_command(app).params


_SHARED: Final = _shared_options()


class Command(TyperCommand):
    """A command with the shared options, and with exit statuses for what may go wrong."""

    def __init__(self, *arguments: Any, params: list[Any], **more: Any) -> None:
        super().__init__(*arguments, params=[*params, *_SHARED], **more)
        self.short_help, _, _ = (self.help or "").partition("\n")  # of itself the list of commands would cut it

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raise `typer.Exit` with the status of what went wrong."""
        with _exit_status():
            return super().invoke(ctx)


class Group(TyperGroup):
    """The commands together, with the shared options."""

    def __init__(self, *arguments: Any, params: list[Any], **more: Any) -> None:
        super().__init__(*arguments, params=[*_SHARED, *params], **more)


@contextmanager
def _exit_status() -> Iterator[None]:
    try:
        yield
    except RealtimeError as error:
        typer.echo(f"realtimectl: {visible(str(error))}", err=True)
        raise typer.Exit(REFUSED if isinstance(error, RefusedError) else _UNREACHABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:  # `| head` has seen enough
        stop_printing()
        raise typer.Exit(_PIPE_CLOSED) from None
    except OSError as error:  # those of the control socket are RealtimeErrors
        say_what_failed("realtimectl", STANDARD_STREAMS, error)
        raise typer.Exit(REFUSED) from None
