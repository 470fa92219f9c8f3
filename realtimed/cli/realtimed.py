"""The command `realtimed`: starts the daemon. Each setting of `realtimed.config.settings` is one option."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from realtimed import __version__
from realtimed.cli.output import say_what_failed, visible
from realtimed.config.loading import load
from realtimed.config.settings import SETTINGS, Setting
from realtimed.errors import ConfigurationError
from realtimed.process import logs
from realtimed.process.log_output import open_standard_descriptors
from realtimed.process.portions import TAKE_OVER

if TYPE_CHECKING:
    from realtimed.process.successor import Predecessor

__all__ = ["main"]

# Each paragraph is one line: typer wraps it to the terminal.
_HELP = """Serve WebSockets, and broadcast the messages of publishers to them.

Browsers connect through Caddy to a WebSocket address; PHP, Python and the shell send commands to the control socket. \
Ctrl-C or SIGTERM stops it; it tells clients when to come back.

Try it without being root, in two terminals:

\b
  realtimed --socket /tmp/rt.sock --websocket 127.0.0.1:9000
  realtimectl --socket /tmp/rt.sock broadcast news hello

Each setting has an option, an environment variable and a key in a TOML file: the variable's name in lower case, \
without REALTIME_. The command line wins, then the environment, then the file.

A TIME is in seconds or has units: 500ms, 90s, 5m, 12h, 7d, 1h30m. A SIZE is in bytes or has a unit, a power of \
1,024: 64K, 64KB, 64KiB, 1.5M, 2G. A RATE is per second or has a unit: 50/s, 30/m.
"""

_EXIT_FAILED = 1
_EXIT_USAGE = 2


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"realtimed {__version__}")
        raise typer.Exit


def _start(**given: Any) -> None:
    """Load the configuration, then check it or run the daemon."""
    open_standard_descriptors()
    predecessor = _predecessor()
    file, check = given.pop("config"), given.pop("check")
    options = {name: value for name, value in given.items() if name in SETTINGS and value not in (None, [], ())}
    try:
        reread = partial(load, options, os.environ, file)
        config = reread()
        if check:
            typer.echo("The configuration is valid.")
            return
        logs.configure(config.log_level, config.log_format)
        # Imported here, since `--help` and `--check` need no trio.
        from realtimed.daemon import run  # noqa: PLC0415

        _run(partial(run, config, reread, os.environ, predecessor))
    except ConfigurationError as error:
        if predecessor is not None:
            predecessor.refuse(str(error))
        for line in str(error).split("\n"):
            typer.echo(f"realtimed: {visible(line)}", err=True)
        raise typer.Exit(_EXIT_USAGE) from None


def _predecessor() -> Predecessor | None:
    """Return the daemon that has started this one to take over from it, if there is one."""
    if TAKE_OVER not in os.environ:
        return None
    from realtimed.process.successor import Predecessor  # noqa: PLC0415

    return Predecessor.of(os.environ)


def _run(daemon: Callable[[], None]) -> None:
    try:
        daemon()
    except OSError as error:  # only before it serves: later ones are handled or come in exception groups
        typer.echo(f"realtimed: cannot start: {error.strerror or error}", err=True)
        raise typer.Exit(_EXIT_FAILED) from None


class _Command(TyperCommand):
    """Shows its options in groups. typer does so only with rich, which takes half as long to import as typer itself."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _parameter(setting: Setting) -> inspect.Parameter:
    default = setting.shown_default
    shown = f"default {default}; {setting.variable}" if default else setting.variable
    # `load` reads the variable, and names it if its value is wrong; typer would name the option.
    option = typer.Option(
        setting.option,
        help=f"{setting.help} ({shown})",
        metavar=setting.metavar,
        show_default=False,
        rich_help_panel=setting.panel,
    )
    kind = list[str] | None if isinstance(setting.default, tuple) else str | None
    return _keyword(setting.name, kind, option)


def _keyword(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_PARAMETERS = [
    *map(_parameter, SETTINGS.values()),
    _keyword("config", Path | None, typer.Option("--config", metavar="FILE", help="A TOML file with settings.")),
    _keyword(
        "check",
        bool,
        typer.Option("--check", help="Say what is wrong with the configuration, and do not start."),
        default=False,
    ),
    _keyword(
        "version",
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
        default=False,
    ),
]


def main() -> None:
    """Run the command line."""
    # typer reads a command's options from its signature.
    _start.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
    _start.__annotations__ = {each.name: each.annotation for each in _PARAMETERS}
    app = typer.Typer(
        rich_markup_mode=None,  # plain text, and no rich to import
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(help=_HELP, cls=_Command)(_start)
    try:
        app(prog_name="realtimed")
    except OSError as error:
        say_what_failed("realtimed", "standard output", error)
        sys.exit(_EXIT_FAILED)


if __name__ == "__main__":
    main()
