"""The commands of `realtimectl` for those who run the daemon: `disconnect`, `doctor` and `upgrade`."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Annotated, Any, Final

import typer

from realtimed.cli.command import REFUSED, Daemon
from realtimed.cli.output import print_json, visible
from realtimed.client.calls import NOT_ALLOWED
from realtimed.errors import RefusedError
from realtimed.text import quoted

__all__ = ["disconnect", "doctor", "upgrade"]

_PROCESSES: Final = (("former_pid", "former_version"), ("pid", "version"))

_UPGRADE_PATIENCE: Final = 120.0
"""Seconds that an upgrade may take unless ``--timeout`` says more: the new process has 30 for each step."""


def disconnect(
    context: typer.Context,
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

    A reason may have 123 bytes. If no such client is connected, it says so and the exit status is 1.
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
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


def upgrade(context: typer.Context) -> None:
    """Have a new process take the daemon's place, without anyone noticing.

    The daemon starts the version that is installed now, with its own options and environment, and leaves everything to
    it: connections, channels, history, what is half sent. No connection ends, and nothing is lost. If the new process
    fails, the daemon goes on as before, and the exit status is 1.

    Only root and the user that the daemon runs as may do this. A changed configuration is read; other addresses to
    listen at need a restart.

    \b
      pip install --upgrade realtimed && realtimectl upgrade
    """  # noqa: D301
    daemon = context.ensure_object(Daemon)
    patient = replace(daemon, timeout=max(daemon.timeout, _UPGRADE_PATIENCE))
    with patient.client() as client:
        outcome = client.upgrade()
    if daemon.json:
        print_json(outcome)
        return
    former, now = (f"process {outcome[pid]} ({outcome[version]})" for pid, version in _PROCESSES)
    held = f"{outcome['clients']:,} clients and {outcome['publishers']:,} publishers"
    pause, seconds = outcome.get("pause"), outcome.get("seconds")
    times = f": nobody was served for {pause * 1000:.0f} ms, and all of it took {seconds:.1f} s" if pause else ""
    typer.echo(visible(f"{now} has taken over {held} from {former}{times}"))


def _option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, show_default=False)


def doctor(
    context: typer.Context,
    url: Annotated[str | None, _option("URL", "The site; if not given, as SERVER_ADDRESS says it.")] = None,
    origin: Annotated[str | None, _option("ORIGIN", "The origin of your pages; if not given, the site's.")] = None,
    php_user: Annotated[
        str | None, _option("USER", "The user PHP runs as; if not given, those of PHP-FPM here, else you.")
    ] = None,
    caddy_user: Annotated[
        str | None, _option("USER", "The user Caddy runs as; if not given, that of the running Caddy, else caddy.")
    ] = None,
    caddy: Annotated[str | None, _option("PATH", "Caddy's program; if not given, the one installed here.")] = None,
) -> None:
    """Check every part between a PHP page and a browser, and say what to do about faults.

    Give it the environment that Caddy has (SERVER_ADDRESS, ALLOWED_ORIGINS), and run it as root if it says so. It
    opens a few WebSockets and broadcasts on a channel of its own. The exit status is 0 only if nothing failed; a
    warning may be what you intend.

    \b
      realtimectl doctor
      realtimectl doctor --url https://yourdomain.com --php-user deploy
    """  # noqa: D301
    from realtimed.cli.doctor.checks import examine  # noqa: PLC0415  (it takes time to import)
    from realtimed.cli.doctor.finding import FAILED, Patient  # noqa: PLC0415

    daemon = context.ensure_object(Daemon)
    site = _site(url)
    findings = []
    with daemon.client() as client:
        allowed = os.environ.get("ALLOWED_ORIGINS")
        for each in examine(Patient(client, site, origin or site, php_user, caddy_user, caddy, allowed)):
            findings.append(each)
            if not daemon.json:
                typer.echo(f"{each.status:7}  {each.check}: {visible(each.seen)}")
                if each.advice:
                    typer.echo(f"         → {visible(each.advice)}")
    failed = any(each.status == FAILED for each in findings)
    if daemon.json:
        print_json({"ok": not failed, "findings": [each._asdict() for each in findings]})
    if failed:
        raise typer.Exit(REFUSED)


def _site(url: str | None) -> str:
    """Return the site's URL, without a slash at its end. Raises `typer.BadParameter`."""
    from realtimed.cli.doctor.checks import default_site  # noqa: PLC0415  (it takes time to import)

    try:
        site = url if url is not None else default_site(os.environ)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SERVER_ADDRESS") from None
    if not re.fullmatch(r"https?://[^\s/?#@]+/?", site):
        raise typer.BadParameter(
            f"expected http://HOST or https://HOST, with or without a port, got {quoted(site)}",
            param_hint="--url" if url is not None else "SERVER_ADDRESS",
        )
    return site.removesuffix("/")
