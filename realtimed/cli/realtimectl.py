"""The command `realtimectl`: talks to a running daemon through its control socket.

It starts in the time that typer needs to be imported; the daemon and trio are left alone.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Concatenate, Final, NamedTuple, ParamSpec

import typer

from realtimed import __version__
from realtimed.control.calls import NOT_ALLOWED, ChannelMessage
from realtimed.control.client import Client
from realtimed.control.connection import DEFAULT_TIMEOUT
from realtimed.errors import RealtimeError, RefusedError, printable, quoted

__all__ = ["app", "main"]

_REFUSED: Final = 1
_UNREACHABLE: Final = 3
_INTERRUPTED: Final = 128 + 2  # as the shell reports SIGINT and SIGPIPE
_PIPE_CLOSED: Final = 128 + 13

_HELP = """Broadcast, and see who listens: the shell's way to a running realtimed.

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
  1    refused: the reason is on standard error
  2    wrong usage
  3    no daemon there, or no answer in time
  130  ended by Ctrl-C
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, and no rich to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SOCKET: Final = typer.Option(
    "--socket",
    metavar="PATH",
    help="The daemon's control socket; else REALTIME_SOCKET says, else it is /run/realtime.sock.",
    show_default=False,
)
_TIMEOUT: Final = typer.Option(
    "--timeout",
    metavar="SECONDS",
    help=f"How long the daemon may take to answer; else {DEFAULT_TIMEOUT:g}.",
    show_default=False,
)
_JSON: Final = typer.Option("--json", help="Print JSON for programs.", show_default=False)

_Arguments = ParamSpec("_Arguments")


class _Daemon(NamedTuple):
    """Which daemon is meant, and how to print what it says."""

    socket: str | None
    timeout: float | None
    json: bool

    def or_else(self, given: _Daemon) -> _Daemon:
        """Return what stands behind the command's name, and for the rest what stands before it: `given`."""
        return _Daemon(
            given.socket if self.socket is None else self.socket,
            given.timeout if self.timeout is None else self.timeout,
            self.json or given.json,
        )

    def client(self) -> Client:
        try:
            return Client(self.socket, timeout=DEFAULT_TIMEOUT if self.timeout is None else self.timeout)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--timeout") from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"realtimectl {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def _options(
    context: typer.Context,
    socket: Annotated[str | None, _SOCKET] = None,
    timeout: Annotated[float | None, _TIMEOUT] = None,
    json: Annotated[bool, _JSON] = False,
    version: Annotated[  # noqa: ARG001  (its callback has done it)
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    context.obj = _Daemon(socket, timeout, json)


def _command(body: Callable[Concatenate[_Daemon, _Arguments], None]) -> None:
    """Make `body` a command: with the options that all have, and with exit statuses for what may go wrong."""

    def run(context: typer.Context, **given: Any) -> None:
        daemon = _Daemon(given.pop("socket"), given.pop("timeout"), given.pop("json")).or_else(context.obj)
        with _exit_status():
            body(daemon, **given)  # type: ignore[call-arg]  # typer calls with what the signature below says

    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    for name, kind, option in (
        ("socket", str | None, _SOCKET),
        ("timeout", float | None, _TIMEOUT),
        ("json", bool, _JSON),
    ):
        default = False if kind is bool else None
        own.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    # typer reads a command's arguments and options from its signature.
    run.__signature__ = inspect.Signature([context, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (context, *own)}
    app.command(body.__name__, help=body.__doc__)(run)


@contextmanager
def _exit_status() -> Iterator[None]:
    try:
        yield
    except RealtimeError as error:
        typer.echo(f"realtimectl: {_visible(str(error))}", err=True)
        raise typer.Exit(_REFUSED if isinstance(error, RefusedError) else _UNREACHABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still flushes at exit
        raise typer.Exit(_PIPE_CLOSED) from None
    except OSError as error:  # those of the control socket are RealtimeErrors
        typer.echo(f"realtimectl: standard input or output: {error.strerror}", err=True)
        raise typer.Exit(_REFUSED) from None


# The commands. In their help, \b keeps the lines of a paragraph as they are (and has to be the character itself).

_Channel = Annotated[str, typer.Argument(metavar="CHANNEL", show_default=False)]


@_command
def broadcast(
    daemon: _Daemon,
    channel: _Channel,
    message: Annotated[
        str, typer.Argument(metavar="MSG", help="The message, or - to read it from standard input.", show_default=False)
    ],
    binary: Annotated[
        bool, typer.Option("--binary", help="Send the bytes as they are, as a binary message.", show_default=False)
    ] = False,
) -> None:
    """Send a message to all clients that watch a channel.

    \b
      realtimectl broadcast news hello
      realtimectl broadcast news -- -5          a message that begins with a dash
      jq -c . news.json | realtimectl broadcast news -
      realtimectl broadcast --binary thumbnails - < cat.png

    Standard input is sent as it is, with the newline at its end if there is one.
    """  # noqa: D301
    with daemon.client() as client:
        receipt = client.broadcast(channel, _message(message, binary=binary))
    if daemon.json:
        _print_json(receipt._asdict())
    else:
        clients = "1 client" if receipt.recipients == 1 else f"{receipt.recipients} clients"
        typer.echo(f"queued for {clients}, offset {receipt.offset}")


@_command
def channels(
    daemon: _Daemon,
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only names that begin so.", show_default=False)] = "",
) -> None:
    """List the channels that have subscribers.

    The offset is that of the newest message; it begins at 1 in every epoch.
    """
    with daemon.client() as client:
        found = client.channels(prefix)
    if daemon.json:
        _print_json({name: each._asdict() for name, each in found.items()})
    else:
        rows = [(name, each.subscribers, each.offset, each.epoch) for name, each in sorted(found.items())]
        _print_table(("CHANNEL", "SUBSCRIBERS", "OFFSET", "EPOCH"), rows)


@_command
def clients(daemon: _Daemon) -> None:
    """List the connected clients, the longest connected first.

    PENDING is how many bytes wait for a client that reads slowly.
    """
    with daemon.client() as client:
        found = sorted(client.clients(), key=lambda each: each.connected_since)
    if daemon.json:
        _print_json([each._asdict() for each in found])
    else:
        rows = [
            (each.id, each.protocol, each.address, _date(each.connected_since), each.pending, _some(each.channels))
            for each in found
        ]
        _print_table(("CLIENT", "PROTOCOL", "ADDRESS", "CONNECTED", "PENDING", "CHANNELS"), rows)


@_command
def disconnect(
    daemon: _Daemon,
    client_id: Annotated[str, typer.Argument(metavar="CLIENT", help="As `clients` shows it.", show_default=False)],
    code: Annotated[
        int, typer.Option(metavar="CODE", min=1000, max=4999, help="The close code: 1000, 1001, or 3000 to 4999.")
    ] = NOT_ALLOWED,
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The close reason, which the client sees.", show_default=False)
    ] = None,
) -> None:
    """Close a client's connection.

    \b
      realtimectl disconnect c-1f2e --reason 'You have been logged out'
    """  # noqa: D301
    with daemon.client() as client:
        found = client.disconnect(client_id, code, reason)
    if not found:
        raise RefusedError("unknown_client", f"no client {quoted(client_id)} is connected; see realtimectl clients")
    if daemon.json:
        _print_json({"disconnected": 1})


@_command
def tail(
    daemon: _Daemon,
    channels: Annotated[list[str], typer.Argument(metavar="CHANNEL", show_default=False)],
) -> None:
    """Print the messages of channels as they come, until Ctrl-C.

    \b
      realtimectl tail news sport
      realtimectl tail --json news | jq -r .message

    A line has the channel, the offset and the message. What could steer a terminal is escaped, and a binary message is
    shown as b'...'. With --json each line is an object with "channel", "offset" and "message", or "base64" in place
    of "message" if it is binary.
    """  # noqa: D301
    with daemon.client() as client, client.subscribe(*channels) as subscription:
        for message in subscription:
            if daemon.json:
                _print_json(_as_json(message))
            else:
                typer.echo(f"{message.channel} {message.offset} {_visible(message.message)}")


@_command
def stats(daemon: _Daemon) -> None:
    """Show the daemon's counters."""
    with daemon.client() as client:
        _print_map(client.stats(), json=daemon.json)


@_command
def ping(daemon: _Daemon) -> None:
    """Say whether the daemon answers, and how fast."""
    with daemon.client() as client:
        began = time.perf_counter()
        client.ping()
        milliseconds = round((time.perf_counter() - began) * 1000, 3)
    if daemon.json:
        _print_json({"milliseconds": milliseconds})
    else:
        typer.echo(f"the daemon at {_visible(client.socket)} answered after {milliseconds:g} ms")


@_command
def info(daemon: _Daemon) -> None:
    """Show the daemon's version, limits and start time."""
    with daemon.client() as client:
        _print_map(client.info(), json=daemon.json)


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


# How things are printed. What comes from clients and publishers reaches the terminal only through `_visible` or as JSON
# in ASCII, where no control character survives.


def _visible(value: object) -> str:
    """Return `value` as text that is safe to print: on one line, and with no power over the terminal."""
    return printable(ascii(value) if isinstance(value, bytes) else str(value))


def _some(names: Sequence[str], shown: int = 3) -> str:
    return " ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns, numbers to the right."""
    right = [bool(rows) and all(isinstance(row[at], int) for row in rows) for at in range(len(head))]
    cells = [head, *([_visible(value) for value in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )
    typer.echo("\n".join(lines))


def _print_map(values: dict[str, Any], *, json: bool) -> None:
    if json:
        _print_json(values)
        return
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [(f"{name} {key}", _visible(inner)) for key, inner in value.items()]
        elif isinstance(value, list):
            lines.append((name, _visible(" ".join(map(str, value)))))
        else:
            lines.append((name, _date(value) if name == "started" else _visible(value)))
    width = max((len(name) for name, _ in lines), default=0)
    typer.echo("\n".join(f"{_visible(name):{width}}  {value}" for name, value in lines))


def _as_json(message: ChannelMessage) -> dict[str, object]:
    if isinstance(message.message, bytes):
        return {"channel": message.channel, "offset": message.offset, "base64": b64encode(message.message).decode()}
    return {"channel": message.channel, "offset": message.offset, "message": message.message}


def _print_json(value: object) -> None:
    from json import dumps  # noqa: PLC0415  (most calls need none)

    typer.echo(dumps(value))


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    app(prog_name="realtimectl")


if __name__ == "__main__":
    main()
