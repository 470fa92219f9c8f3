"""The command `realtimectl`: talks to a running daemon through its control socket.

It starts in the time that typer needs to be imported; the daemon and trio are left alone.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Concatenate, Final, NamedTuple, ParamSpec

import typer

from realtimed import __version__
from realtimed.cli.output import (
    as_json,
    date,
    line,
    print_json,
    print_map,
    print_table,
    say_what_failed,
    some,
    stop_printing,
    visible,
)
from realtimed.cli.since import following, parse_since
from realtimed.client.blocking import Client
from realtimed.client.calls import HISTORY_SHOWN, NOT_ALLOWED
from realtimed.client.connection import DEFAULT_TIMEOUT
from realtimed.config.units import as_seconds
from realtimed.errors import RealtimeError, RefusedError
from realtimed.text import quoted

__all__ = ["app", "main"]

_REFUSED: Final = 1
_UNREACHABLE: Final = 3
_INTERRUPTED: Final = 128 + 2  # as the shell reports SIGINT and SIGPIPE
_PIPE_CLOSED: Final = 128 + 13

_SHORTEST_INTERVAL: Final = 0.1
_LONGEST_INTERVAL: Final = 3600.0
"""Seconds between two looks of `top`."""

_STANDARD_STREAMS: Final = "standard input or output"

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
  1    refused, or nothing could be read or written: the reason is on standard error
  2    wrong usage
  3    no daemon there, or no answer in time
  130  ended by Ctrl-C
  141  whoever reads the output has closed it
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, and no rich to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _time(given: object) -> float:
    """Read a time, in seconds or with units, for typer."""
    try:
        return as_seconds(given)
    except ValueError:
        raise typer.BadParameter(
            f"expected a number of seconds, or a time such as 500ms, 90s or 5m, got {quoted(given)}"
        ) from None


def _interval(given: object) -> float:
    seconds = _time(given)
    if not _SHORTEST_INTERVAL <= seconds <= _LONGEST_INTERVAL:
        raise typer.BadParameter(f"expected a time from 100ms to 1h, got {quoted(given)}")
    return seconds


_SOCKET: Final = typer.Option(
    "--socket",
    metavar="PATH",
    help="The daemon's control socket, PATH or unix:PATH; else REALTIME_SOCKET says, else it is /run/realtime.sock.",
    show_default=False,
)
_TIMEOUT: Final = typer.Option(
    "--timeout",
    metavar="TIME",
    parser=_time,
    help=f"How long the daemon may take to answer, such as 10 or 500ms; else {DEFAULT_TIMEOUT:g}s.",
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
    summary, _, _ = (body.__doc__ or "").partition("\n")  # of itself the list of commands would cut it
    app.command(body.__name__, help=body.__doc__, short_help=summary)(run)


@contextmanager
def _exit_status() -> Iterator[None]:
    try:
        yield
    except RealtimeError as error:
        typer.echo(f"realtimectl: {visible(str(error))}", err=True)
        raise typer.Exit(_REFUSED if isinstance(error, RefusedError) else _UNREACHABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:  # `| head` has seen enough
        stop_printing()
        raise typer.Exit(_PIPE_CLOSED) from None
    except OSError as error:  # those of the control socket are RealtimeErrors
        say_what_failed("realtimectl", _STANDARD_STREAMS, error)
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
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="Send it only if nothing was sent to this channel with this key before (1 to 200 characters).",
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
    exit status 3: the message is sent once, and the answer to the others is marked as repeated. The daemon knows a key
    for its retry-window (300 s), and not beyond a restart.

    Standard input is sent as it is, with the newline at its end if there is one.
    """  # noqa: D301
    with daemon.client() as client:
        receipt = client.broadcast(channel, _message(message, binary=binary), key=key)
    if daemon.json:
        print_json(receipt._asdict())
    else:
        clients = "1 client" if receipt.recipients == 1 else f"{receipt.recipients} clients"
        repeated = " (repeated: it was sent before)" if receipt.repeated else ""
        typer.echo(f"queued for {clients}, offset {receipt.offset}, epoch {visible(receipt.epoch)}{repeated}")


_LIMIT: Final = typer.Option(
    "--limit", "-n", metavar="NUMBER", min=1, max=10**9, help="No more than so many.", show_default=False
)
_COUNT: Final = typer.Option("--count", help="Print only how many there are.", show_default=False)


@_command
def channels(
    daemon: _Daemon,
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only names that begin so.", show_default=False)] = "",
    limit: Annotated[int | None, _LIMIT] = None,
    count: Annotated[bool, _COUNT] = False,
) -> None:
    """List the channels that have subscribers.

    \b
      realtimectl channels chat:
      realtimectl channels chat: --count

    The offset is that of the newest message; it begins at 1 in every epoch. HISTORY is how many messages are kept. With
    --limit they are those that have been there for longest.
    """  # noqa: D301
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


@_command
def history(
    daemon: _Daemon,
    channel: _Channel,
    count: Annotated[
        int, typer.Option("--count", "-n", metavar="COUNT", min=1, max=10**9, help="No more than so many.")
    ] = (HISTORY_SHOWN),
) -> None:
    """Print the last messages of a channel that the daemon keeps, oldest first.

    \b
      realtimectl history news -n 5
      realtimectl history news --json | jq '.messages[].message'

    The lines are those of `tail`, each with the time when its message was published. With --json it is one object, with
    the channel's "epoch" and "offset" and a list of "messages".
    """  # noqa: D301
    with daemon.client() as client:
        position, messages = client.history(channel, count)
    if daemon.json:
        print_json({"channel": channel, **position._asdict(), "messages": list(map(as_json, messages))})
        return
    for message in messages:
        typer.echo(line(message))
    if not messages:
        typer.echo(f"realtimectl: nothing is kept of {channel}", err=True)


@_command
def clients(
    daemon: _Daemon,
    channel: Annotated[
        str | None,
        typer.Option(metavar="CHANNEL", help="Only those that are subscribed to it.", show_default=False),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Only those that come from there.", show_default=False)
    ] = None,
    limit: Annotated[int | None, _LIMIT] = None,
    count: Annotated[bool, _COUNT] = False,
) -> None:
    """List the connected clients, the longest connected first.

    \b
      realtimectl clients --channel news
      realtimectl clients --address 203.0.113.7 --count
      realtimectl clients --address 203.0.113.7 --json | jq -r '.[].id' | xargs -n 1 realtimectl disconnect

    PENDING is how many bytes wait for a client that reads slowly.
    """  # noqa: D301
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


def _print_count(daemon: _Daemon, count: int, limit: int | None) -> None:
    count = count if limit is None else min(count, limit)
    if daemon.json:
        print_json({"count": count})
    else:
        typer.echo(count)


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
      realtimectl disconnect c-9c31-1f --reason 'You have been logged out'

    A reason may have 123 bytes. When no such client is connected, it says so and the exit status is 1.
    """  # noqa: D301
    with daemon.client() as client:
        try:
            found = client.disconnect(client_id, code, reason)
        except RefusedError as error:
            if error.code == "invalid_params":
                raise typer.BadParameter(error.message) from None
            raise
    if not found:
        raise RefusedError("unknown_client", f"no client {quoted(client_id)} is connected; see realtimectl clients")
    if daemon.json:
        print_json({"disconnected": 1})


@_command
def tail(
    daemon: _Daemon,
    channels: Annotated[list[str], typer.Argument(metavar="CHANNEL", show_default=False)],
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="EPOCH:OFFSET|COUNT|all",
            help="Begin with messages that the daemon still has.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the messages of channels as they come, until Ctrl-C.

    \b
      realtimectl tail news sport
      realtimectl tail 'chat:*'
      realtimectl tail news --since 5
      realtimectl tail --json news | jq -r .message

    A channel may be a pattern, in which * stands for any characters. Then the channels are watched from outside: what
    is published to nobody is shown too, and publishers do not count this command as a recipient.

    It says on standard error when it has begun. A line has the time of publication, the channel, the offset and the
    message. The time is local, and of old messages it is when they were published, not when they are shown. What could
    steer a terminal is escaped, and a binary message is shown as b'...'. With --json each line is an object with
    "channel", "offset", "time" in seconds since 1970, and "message", or "base64" in place of "message" if it is binary.

    With --since 5 each channel begins with the last 5 messages that are kept, with --since all with all of them. With
    --since EPOCH:OFFSET, for one channel, everything after that place is shown, or nothing of it if not all is kept any
    more, which is said on standard error. The place is as `channels`, `broadcast` and `history --json` tell it.
    """  # noqa: D301
    begin = None if since is None else parse_since(since, channels)
    watching = any("*" in channel for channel in channels)
    if watching and begin is not None:
        raise typer.BadParameter("it is for channels, not for patterns", param_hint="--since")
    with (
        daemon.client() as client,
        client.watch(*channels) if watching else following(client, channels, begin) as messages,
    ):
        typer.echo(f"realtimectl: watching {visible(some(channels))}; Ctrl-C ends it", err=True)
        for message in messages:
            if daemon.json:
                print_json(as_json(message))
            else:
                typer.echo(line(message))


@_command
def top(
    daemon: _Daemon,
    interval: Annotated[
        float,
        typer.Option(
            metavar="TIME", parser=_interval, help="Time between two looks at the daemon, such as 5 or 500ms."
        ),
    ] = 1.0,
    count: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=1, help="End after so many looks.", show_default=False)
    ] = None,
) -> None:
    """Show what the daemon does in each second, until Ctrl-C.

    On a terminal the figures stay in place; in a pipe each look is a line, and with --json an object.

    \b
      realtimectl top --json --count 1 | jq .deliveries
    """  # noqa: D301
    from realtimed.cli.top import top as show  # noqa: PLC0415

    with daemon.client() as client:
        show(client, interval=interval, count=count, json=daemon.json)


@_command
def stats(daemon: _Daemon) -> None:
    """Show the daemon's counters."""
    with daemon.client() as client:
        print_map(client.stats(), json=daemon.json)


@_command
def ping(daemon: _Daemon) -> None:
    """Say whether the daemon answers, and how fast."""
    with daemon.client() as client:
        began = time.perf_counter()
        client.ping()
        milliseconds = round((time.perf_counter() - began) * 1000, 3)
    if daemon.json:
        print_json({"milliseconds": milliseconds})
    else:
        typer.echo(f"the daemon at {visible(client.socket)} answered after {milliseconds:g} ms")


@_command
def info(daemon: _Daemon) -> None:
    """Show the daemon's version, limits and start time."""
    with daemon.client() as client:
        print_map(client.info(), json=daemon.json)


@_command
def doctor(
    daemon: _Daemon,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The site; else as SERVER_ADDRESS says it.", show_default=False),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(metavar="ORIGIN", help="The origin of your pages; else that of the site.", show_default=False),
    ] = None,
    php_user: Annotated[
        str | None,
        typer.Option(
            metavar="USER", help="The user PHP runs as; else those of PHP-FPM here, else you.", show_default=False
        ),
    ] = None,
    caddy_user: Annotated[
        str | None,
        typer.Option(
            metavar="USER", help="The user Caddy runs as; else that of the running Caddy, or caddy.", show_default=False
        ),
    ] = None,
    caddy: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Caddy's program; else the one installed here.", show_default=False),
    ] = None,
) -> None:
    """Look at every part between a PHP page and a browser, and say what to do about what is wrong.

    Give it the environment that Caddy has (SERVER_ADDRESS, ALLOWED_ORIGINS), and run it as root if it says so. It
    opens a few WebSockets and broadcasts on a channel of its own. Exit status 0 only if nothing failed; warnings may
    be meant.

    \b
      realtimectl doctor
      realtimectl doctor --url https://yourdomain.com --php-user deploy
    """  # noqa: D301
    from realtimed.cli.doctor import default_site, examine  # noqa: PLC0415
    from realtimed.cli.finding import FAILED, Patient  # noqa: PLC0415

    try:
        site = url if url is not None else default_site(os.environ)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SERVER_ADDRESS") from None
    if not re.fullmatch(r"https?://[^\s/?#@]+/?", site):
        raise typer.BadParameter(
            f"expected http://HOST or https://HOST, with or without a port, got {quoted(site)}",
            param_hint="--url" if url is not None else "SERVER_ADDRESS",
        )
    site = site.removesuffix("/")
    failures = 0
    findings = []
    with daemon.client() as client:
        allowed = os.environ.get("ALLOWED_ORIGINS")
        patient = Patient(client, site, origin or site, php_user, caddy_user, caddy, allowed)
        for each in examine(patient):
            failures += each.status == FAILED
            findings.append(each._asdict())
            if not daemon.json:
                typer.echo(f"{each.status:7}  {each.check}: {visible(each.seen)}")
                if each.advice:
                    typer.echo(f"         → {visible(each.advice)}")
    if daemon.json:
        print_json({"ok": not failures, "findings": findings})
    if failures:
        raise typer.Exit(_REFUSED)


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


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    try:
        app(prog_name="realtimectl")
    except OSError as error:  # before a command begins: --version and --help
        say_what_failed("realtimectl", _STANDARD_STREAMS, error)
        sys.exit(_REFUSED)


if __name__ == "__main__":
    main()
