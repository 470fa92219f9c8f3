"""PHP-FPM as a child process, and where PHP's programs are."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kit.parts import MissingComponentError, Part, ending, environment_with, notifications, start, until_ready

__all__ = ["PhpFpm", "find_php", "find_php_fpm", "running_php_fpm"]


@dataclass(frozen=True)
class PhpFpm(Part):
    """A running PHP-FPM."""

    socket: Path


@asynccontextmanager
async def running_php_fpm(
    directory: Path,
    environment: Mapping[str, str] | None = None,
    *,
    settings: Sequence[str] = (),
    pool_settings: Sequence[str] = (),
) -> AsyncIterator[PhpFpm]:
    """Run PHP-FPM as the current user, with its socket in `directory`; PHP sees `environment`.

    `settings` are lines for the section ``[global]`` of its configuration, `pool_settings` for that of its pool.
    """
    fastcgi = directory / "php-fpm.sock"
    sessions = directory / "php-sessions"
    sessions.mkdir(exist_ok=True)
    as_root = os.geteuid() == 0
    config = directory / "php-fpm.conf"
    config.write_text(
        "[global]\n"
        "error_log = /proc/self/fd/2\n"
        + "".join(f"{setting}\n" for setting in settings)
        + "[realtime]\n"
        + ("user = root\n" if as_root else "")  # for root PHP-FPM insists on a name; for others it cannot change user
        + f"listen = {fastcgi}\n"
        "listen.mode = 0600\n"
        "pm = ondemand\n"
        "pm.max_children = 16\n"
        "catch_workers_output = yes\n"
        "clear_env = no\n"  # REALTIME_SOCKET is to reach the pages
        f"php_value[session.save_path] = {sessions}\n"
        "php_flag[display_errors] = off\n"
        "php_admin_flag[log_errors] = on\n"
        "php_value[opcache.revalidate_freq] = 0\n"  # an edited page shows at the next request
         + "".join(f"{setting}\n" for setting in pool_settings)
    )
    command: list[str | Path] = [
        find_php_fpm(),
        "--nodaemonize",
        "--fpm-config",
        config,
        *(["--allow-to-run-as-root"] if as_root else []),
    ]
    with notifications(directory / "php-fpm-ready.sock") as (variable, said_ready):
        process, log_file = start("php-fpm", command, directory, {**environment_with(environment or {}), **variable})
        fpm = PhpFpm("PHP-FPM", process, log_file, fastcgi)
        async with ending(fpm):
            await until_ready(fpm, said_ready)
            yield fpm


def find_php() -> Path:
    """Return PHP's command line interpreter."""
    found = shutil.which("php")
    if found is None:
        raise MissingComponentError("PHP is not installed: apt-get install php-cli")
    return Path(found)


def find_php_fpm() -> Path:
    plain = shutil.which("php-fpm")
    if plain is not None:
        return Path(plain)
    # Debian and Ubuntu name the binary after its version and keep it out of the PATH of ordinary users.
    versions = {
        (int(match[1]), int(match[2])): path
        for path in Path("/usr/sbin").glob("php-fpm*")
        if (match := re.fullmatch(r"php-fpm(\d+)\.(\d+)", path.name))
    }
    if not versions:
        raise MissingComponentError("PHP-FPM is not installed: apt-get install php-fpm php-cli")
    return versions[max(versions)]
