"""Checks of who may open the sockets: PHP the control socket, not everybody; Caddy the WebSocket sockets."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realtimed.cli.doctor.access import Credentials, obstacle, of_us, of_user
from realtimed.cli.doctor.finding import FAILED, OK, SKIPPED, Finding, Patient
from realtimed.cli.doctor.running import before, pools, serving

__all__ = ["exposure", "php_access", "websocket_socket"]


def exposure(patient: Patient, info: Mapping[str, Any] | None) -> Finding:
    """Check that not everybody on this machine may publish."""
    check = "control socket's mode"
    try:
        mode = stat.S_IMODE(Path(patient.client.socket).stat().st_mode)
    except OSError as error:
        return Finding(check, SKIPPED, f"there is no socket to look at: {error.strerror}")
    if not mode & 0o002 or (info is not None and (info.get("allow_user") or info.get("allow_group"))):
        return Finding(check, OK, f"mode {mode:04o}")
    return Finding(
        check,
        FAILED,
        f"mode {mode:04o}: everybody on this machine may publish, list the clients and disconnect them",
        "Start realtimed with --socket-mode 0660 and --socket-group, or limit it with --allow-user.",
    )


def php_access(patient: Patient, info: Mapping[str, Any] | None) -> Finding:
    """Check that PHP may open the control socket: as the user given, else as the pools that Caddy asks, else as we."""
    check = "PHP's access"
    path = Path(patient.client.socket)
    if patient.php_user is None:
        found = serving(pools(), before((info or {}).get("websocket", [])))
        everybody = [each.credentials for each in found] or [of_us()]
        remark = "" if found else "no PHP-FPM is running here; "
    else:
        try:
            everybody, remark = [of_user(patient.php_user)], ""
        except KeyError:
            return Finding(
                check, FAILED, f"there is no user {patient.php_user}", "Say which user PHP runs as: --php-user NAME."
            )
    if info is None and not path.exists():
        return Finding(check, SKIPPED, "there is no socket to look at")
    faults = [(_php_fault(path, each, info), each) for each in everybody]
    if any(fault is None for fault, _ in faults):
        able = ", ".join(each.name.removesuffix(",") for fault, each in faults if fault is None)
        others = [each.name.removesuffix(",") for fault, each in faults if fault is not None]
        rest = f"; {', '.join(others)} may not" if others else ""
        return Finding(check, OK, f"{remark}{able} may open {path}{rest}")
    [(seen, advice), *_] = [fault for fault, _ in faults if fault is not None]
    return Finding(check, FAILED, remark + seen, advice)


def _php_fault(path: Path, php: Credentials, info: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Return why the daemon at `path` does not serve PHP, and what to do about it; or None if it does."""
    seen = _obstacle(path, php)
    if seen is not None:
        return seen, (
            "Start realtimed with --socket-group and a group of PHP's user, in a directory that it may enter; or is"
            " PHP's user another one (--php-user)?"
        )
    users, groups = (info or {}).get("allow_user") or [], (info or {}).get("allow_group") or []
    if (users or groups) and php.uid not in users and php.groups.isdisjoint(groups):
        return (
            f"{php.name} may open {path}, but is not of those that the daemon serves",
            f"Start realtimed with --allow-user {php.uid} as well.",
        )
    return None


def websocket_socket(patient: Patient, info: Mapping[str, Any] | None) -> Finding:
    """Check that Caddy may open every Unix socket on which WebSockets are accepted."""
    check = "Caddy's access"
    if info is None:
        return Finding(check, SKIPPED, "the daemon did not say where its WebSocket sockets are")
    paths = [Path(each.removeprefix("unix:")) for each in info.get("websocket", []) if each.startswith("unix:")]
    if not paths:
        return Finding(check, OK, "WebSockets come in at a port, which needs no permission")
    everybody = _caddy_credentials(patient.caddy_user, info)
    if not everybody:
        return Finding(
            check,
            FAILED,
            f"there is no user {patient.caddy_user}"
            if patient.caddy_user is not None
            else "no Caddy is running here, and there is no user caddy",
            "Start Caddy, or say which user it runs as: --caddy-user NAME.",
        )
    for path, seen in [(path, _obstacle(path, each)) for path in paths for each in everybody]:
        if seen is not None:
            return Finding(
                check,
                FAILED,
                seen,
                f"Put Caddy's user into the group of {path} (usermod --append --groups GROUP USER) and restart Caddy,"
                " or start realtimed with another --socket-group.",
            )
    return Finding(check, OK, f"{everybody[0].name} may open {paths[0]}")


def _caddy_credentials(user: str | None, info: Mapping[str, Any]) -> list[Credentials]:
    """Return the credentials of the Caddys that lead to this daemon, or only of `user`'s; if none runs, the user's."""
    try:
        known = of_user(user or "caddy")
    except KeyError:
        known = None
    running = [each.credentials for each in before(info.get("websocket", []))]
    if user is not None:
        running = [each for each in running if known is not None and each.uid == known.uid]
    return running or ([known] if known is not None else [])


def _obstacle(path: Path, who: Credentials) -> str | None:
    try:
        return obstacle(path, who)
    except OSError as error:
        return f"cannot look at {path}: {error.strerror}; run this as root"
