"""Processes on this machine between PHP and the browser: Caddys that lead to a daemon, and pools of PHP-FPM."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterable, Iterator, Mapping
from glob import iglob
from pathlib import Path
from typing import Final, NamedTuple

from realtimed.cli.doctor.access import Credentials, of_user

__all__ = ["Pool", "Process", "before", "configured_pools", "leading_to", "pools", "processes", "serving"]

_FPM: Final = re.compile(r"php-fpm[0-9.]*|php[0-9.]*-fpm")
_MASTER: Final = re.compile(r"php-fpm: master process \((.+?)\)\s*")
_WORKER: Final = re.compile(r"php-fpm: pool (\S+)\s*")

_FILES: Final = 200
"""At most this many files of PHP-FPM's configuration are read."""

_DEFAULT_UPSTREAM: Final = "unix//run/realtime-ws.sock"
_DEFAULT_FASTCGI: Final = "unix//run/php/php-fpm.sock"
"""The defaults of ``caddy/Caddyfile``."""


class Process(NamedTuple):
    """A running process. `environ` is None if we may not read it; `title` is its command line."""

    pid: int
    parent: int
    title: str
    environ: Mapping[str, str] | None
    credentials: Credentials


class Pool(NamedTuple):
    """A pool of PHP-FPM: its name, where it listens, and the credentials of its workers."""

    name: str
    listen: str
    credentials: Credentials


def processes(program: re.Pattern[str]) -> Iterator[Process]:
    """Yield the running processes whose name matches `program`, with the credentials that they were started with.

    A user's new group reaches a process only when it is restarted.
    """
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            name = (directory / "comm").read_text().strip()
            if program.fullmatch(name) is None:
                continue
            fields = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines() if ":" in line)
            title = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue  # the process has ended in the meantime
        uid, gid = int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])
        groups = frozenset([gid, *map(int, fields["Groups"].split())])
        who = Credentials(f"the running {name} (process {directory.name}, uid {uid})", uid, groups)
        yield Process(int(directory.name), int(fields["PPid"]), title, _environ(directory), who)


def _environ(directory: Path) -> Mapping[str, str] | None:
    try:
        pairs = (directory / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in (pair.partition(b"=") for pair in pairs)}


def leading_to(websockets: Iterable[str]) -> list[Process]:
    """Return the Caddys that, by their environment, lead to one of a daemon's `websockets`."""
    upstreams = {each.replace("unix:", "unix/", 1) if each.startswith("unix:") else each for each in websockets}
    caddys = processes(re.compile("caddy"))
    return [each for each in caddys if each.environ is not None and _upstream(each.environ) in upstreams]


def before(websockets: Iterable[str]) -> list[Process]:
    """Return the Caddys that lead to one of a daemon's `websockets`.

    If none is known to, return those whose environment we may not read; if there are none, all: another Caddyfile may
    not use the variables.
    """
    caddys = list(processes(re.compile("caddy")))
    return leading_to(websockets) or [each for each in caddys if each.environ is None] or caddys


def _upstream(environ: Mapping[str, str]) -> str:
    return environ.get("REALTIME_UPSTREAM", _DEFAULT_UPSTREAM)


def pools() -> list[Pool]:
    """Return the pools of all PHP-FPMs that run on this machine."""
    running = list(processes(_FPM))
    found = []
    for master in running:
        match = _MASTER.fullmatch(master.title)
        if match is None:
            continue
        workers = {
            worker[1]: each.credentials
            for each in running
            if each.parent == master.pid and (worker := _WORKER.fullmatch(each.title)) is not None
        }
        configured = configured_pools(Path(match[1]))
        for name in {**configured, **workers}:
            listen, user, group = configured.get(name, ("", "", ""))
            who = workers.get(name) or _of_pool(user, group) or master.credentials
            found.append(Pool(name, listen, who._replace(name=f"pool {name} of PHP-FPM, as {_user(who.uid)},")))
    return found


def serving(found: Iterable[Pool], caddys: Iterable[Process]) -> list[Pool]:
    """Return the pools that the Caddys ask, or all of them if that is not known."""
    asked = {(each.environ or {}).get("PHP_FASTCGI", _DEFAULT_FASTCGI) for each in caddys}
    places = {Path(each.removeprefix("unix/")).resolve() for each in asked if each.startswith("unix/")}
    every = list(found)
    return [each for each in every if each.listen in asked or Path(each.listen).resolve() in places] or every


def configured_pools(file: Path) -> dict[str, tuple[str, str, str]]:
    """Return each pool in PHP-FPM's configuration: where it listens, its user and its group."""
    sections: dict[str, dict[str, str]] = {}
    section = "global"
    files = [file]
    for number in range(_FILES):
        if number >= len(files):
            break
        try:
            lines = files[number].read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            text = line.partition(";")[0].strip()
            name, equals, value = (part.strip().strip("\"'") for part in text.partition("="))
            if text.startswith("[") and text.endswith("]"):
                section = text[1:-1].strip()
            elif equals and name == "include":
                files += map(Path, iglob(value))  # noqa: PTH207  (the pattern is absolute)
            elif equals:
                sections.setdefault(section, {})[name] = value.replace("$pool", section)
    return {
        name: (values.get("listen", ""), values.get("user", ""), values.get("group", ""))
        for name, values in sections.items()
        if name.lower() != "global"
    }


def _of_pool(user: str, group: str) -> Credentials | None:
    """Return the credentials that a pool's workers will have once there are some."""
    try:
        who = of_user(pwd.getpwuid(int(user)).pw_name if user.isdigit() else user)
        own = {int(group) if group.isdigit() else grp.getgrnam(group).gr_gid} if group else set()
    except KeyError:
        return None
    return who._replace(groups=who.groups | own)


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"
