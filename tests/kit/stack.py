"""The whole stack: the daemon, PHP-FPM and Caddy as child processes, for tests and for `make run`.

Each `running_*` context manager starts one part with its sockets and logs in the caller's directory, hands it over when
it is ready to serve, and ends it on the way out, also when cancelled. `python -m tests.kit.stack` runs them all until
Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import trio

from realtimed.cli.doctor.origins import mistakes
from realtimed.cli.doctor.probe import site_of
from tests.kit.caddy import Caddy, find_caddy, running_caddy
from tests.kit.daemon import Daemon, running_daemon, until_serving
from tests.kit.parts import (
    APP,
    CADDYFILE,
    ROOT,
    MissingComponentError,
    Part,
    PartFailedError,
    free_port,
    runtime_directory,
    standing_still,
)
from tests.kit.php_fpm import PhpFpm, find_php, running_php_fpm

__all__ = [
    "APP",
    "CADDYFILE",
    "ROOT",
    "Caddy",
    "Daemon",
    "MissingComponentError",
    "Part",
    "PartFailedError",
    "PhpFpm",
    "find_caddy",
    "find_php",
    "free_port",
    "running_caddy",
    "running_daemon",
    "running_php_fpm",
    "runtime_directory",
    "standing_still",
    "until_serving",
]


# `make run`.


class _AddressError(Exception):
    """The demo cannot be served at SERVER_ADDRESS, or to ALLOWED_ORIGINS."""


def _origin_of(address: str) -> str:
    """Return the origin of the pages that Caddy serves at one site address, such as ``:8080`` or ``example.com``."""
    try:
        return site_of(address)
    except ValueError as error:
        raise _AddressError(f"SERVER_ADDRESS: {error}") from None


def origins_of(address: str) -> list[str]:
    """Return the origins of the pages at a site address. Where no host is named, this machine has three names."""
    origin = _origin_of(address)
    if origin.startswith("http://localhost") and "localhost" not in address:
        return [origin, *(origin.replace("localhost", name, 1) for name in ("127.0.0.1", "[::1]"))]
    return [origin]


def _require_free(origin: str) -> None:
    """Raise `_AddressError` if another program has the port of `origin`.

    Caddy would not notice: it lets several processes listen at one port, and each would get some of the requests.
    """
    parts = urlsplit(origin)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    instead = "\n  make run SERVER_ADDRESS=:"
    try:
        socket.create_server(("", port)).close()
    except PermissionError:
        raise _AddressError(f"Only root may listen at port {port}. Choose another:{instead}8080") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _AddressError(f"Port {port} is taken by another program. Choose another:{instead}{port + 1}") from None


def _check_origins(origins: str) -> None:
    """Raise `_AddressError` if one of `origins` is what no browser sends: Caddy would take it and let nobody in."""
    lines = [
        f"ALLOWED_ORIGINS: expected origins as browsers send them, separated by spaces, got {mistake}"
        for mistake in mistakes(origins)
    ]
    if lines:
        raise _AddressError("\n".join(lines))


def _guide(daemon: Daemon, origin: str) -> str:
    def shown(path: Path) -> str:
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    here = Path.cwd()
    programs = Path(sys.executable).parent
    php = f'require "{shown(APP / "realtime.php")}"; broadcast("news", "Hello from PHP");'
    python = 'from realtimed import broadcast; broadcast("news", "Hello from Python")'
    return f"""
  realtimed is running. Open

      {origin}

  in two tabs, and broadcast with the page's form or from a second shell:

      export REALTIME_SOCKET={daemon.control_socket}
      {shlex.quote(shown(programs / "realtimectl"))} broadcast news 'Hello from the shell'
      php -r {shlex.quote(php)}
      {shlex.quote(shown(programs / "python"))} -c {shlex.quote(python)}
      {shlex.quote(shown(programs / "realtimectl"))} doctor --url {origin}

  Replace the daemon by a new process, and see that the open pages do not notice:

      {shlex.quote(shown(programs / "realtimectl"))} upgrade

  Logs are in {daemon.log_file.parent}. Ctrl-C ends everything.
"""


async def _cancel_on_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
            return


def server_options(origins: Iterable[str]) -> str | None:
    """Return CADDY_SERVER_OPTIONS for a Caddy that serves pages of these origins.

    Without TLS browsers speak HTTP/1.1 only. A Caddy that is told so holds less for each WebSocket. With TLS they would
    lose HTTP/2 and HTTP/3.
    """
    return "protocols h1" if all(origin.startswith("http:") for origin in origins) else None


async def _run(server_address: str, allowed_origins: str | None) -> None:
    addresses = re.split(r"[\s,]+", server_address.strip())
    for address in addresses:
        _require_free(_origin_of(address))
    own_origins = [origin for address in addresses for origin in origins_of(address)]
    _check_origins(allowed_origins or "")
    environment = {
        "SERVER_ADDRESS": server_address,
        "ALLOWED_ORIGINS": allowed_origins or " ".join(own_origins),
        "CADDY_SERVER_OPTIONS": server_options(own_origins),
    }
    async with trio.open_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        with runtime_directory() as directory:
            async with (
                running_daemon(directory) as daemon,
                running_php_fpm(directory, {"REALTIME_SOCKET": str(daemon.control_socket)}) as fpm,
                running_caddy(
                    directory,
                    websocket_socket=daemon.websocket_socket,
                    php_socket=fpm.socket,
                    environment=environment,
                    own_storage=own_origins[0].startswith("http:"),  # where there are no certificates to keep
                ) as caddy,
            ):
                print(_guide(daemon, own_origins[0]), flush=True)
                for part in (daemon, fpm, caddy):
                    nursery.start_soon(part.fail_if_it_ends)
                try:
                    await trio.sleep_forever()
                finally:
                    await daemon.stop()  # first, while its goodbyes still find their way through Caddy


def main() -> int:
    """Run the stack until SIGINT or SIGTERM; return the exit status."""
    status = 0
    try:
        trio.run(_run, os.environ.get("SERVER_ADDRESS") or ":8080", os.environ.get("ALLOWED_ORIGINS"))
    except* (MissingComponentError, PartFailedError, _AddressError) as group:
        for error in group.exceptions:
            print(error, file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
