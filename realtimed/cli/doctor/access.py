"""Who may open a Unix socket, by its permission bits."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["Credentials", "obstacle", "of_us", "of_user"]


class Credentials(NamedTuple):
    """A user's numbers, with those of all groups, and a name for messages."""

    name: str
    uid: int
    groups: frozenset[int]


def of_user(name: str) -> Credentials:
    """Return a user's credentials after a fresh login. Raises `KeyError` if there is no such user."""
    user = pwd.getpwnam(name)
    return Credentials(f"user {name}", user.pw_uid, frozenset(os.getgrouplist(name, user.pw_gid)))


def of_us() -> Credentials:
    """Return the credentials of this process."""
    uid = os.geteuid()
    try:
        name = f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        name = f"uid {uid}"
    return Credentials(name, uid, frozenset([os.getegid(), *os.getgroups()]))


def obstacle(path: Path, who: Credentials) -> str | None:
    """Return what keeps `who` from opening the Unix socket at `path`, or None if nothing does.

    Connecting needs write permission on the socket, and search permission on every directory above it (unix(7)).
    Raises `OSError` if the permissions cannot be read.
    """
    real = path.resolve()
    for directory in reversed(real.parents):
        if not _may(directory, who, 0o1):
            return f"{who.name} may not enter {directory} ({_described(directory)})"
    if not _may(real, who, 0o2):
        return f"{who.name} may not write to {path} ({_described(real)})"
    return None


def _may(path: Path, who: Credentials, bit: int) -> bool:
    """Return whether `who` has a permission, given as the bit that others would need (1 search, 2 write)."""
    status = path.stat()
    if who.uid == 0:
        return True
    if who.uid == status.st_uid:
        bit <<= 6
    elif status.st_gid in who.groups:
        bit <<= 3
    return bool(status.st_mode & bit)


def _described(path: Path) -> str:
    status = path.stat()
    try:
        owner, group = path.owner(), path.group()
    except KeyError:
        owner, group = str(status.st_uid), str(status.st_gid)
    return f"mode {stat.S_IMODE(status.st_mode):04o}, owner {owner}, group {group}"
