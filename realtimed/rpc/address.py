"""How the path of a Unix socket is written, for the daemon that listens and the clients that connect."""

from __future__ import annotations

import os
import re
from typing import Final

from realtimed.text import quoted

__all__ = ["DEFAULT", "LIMIT", "fault", "plain"]

DEFAULT: Final = "/run/realtime.sock"
"""The path of the control socket, unless a setting or the environment says otherwise."""

LIMIT: Final = 107
"""Bytes of a Unix socket's path, without the closing zero byte (unix(7), sun_path)."""

_PORT: Final = re.compile(r"[^/]*:[0-9]+|[0-9]+")
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def plain(text: str) -> str:
    """Return the path in `text`, which may be written PATH, unix:PATH or, as a URL, unix:///PATH."""
    path = text.removeprefix("unix:")
    return "/" + path.lstrip("/") if path.startswith("//") else path


def fault(text: str) -> str | None:
    """Return why `text`, written PATH or unix:PATH, is not the path of a Unix socket, as a clause; or None."""
    path = plain(text)
    if not path or "\0" in path:
        return "that is not the path of a socket"
    if len(os.fsencode(path)) > LIMIT:
        return f"the path of a socket has at most {LIMIT} bytes"
    if path.startswith("unix/"):
        return f"Caddy writes an address so; here it is {quoted(path.removeprefix('unix/'))}"
    if path.startswith("@"):
        return "a socket without a file has no permissions"
    if _PORT.fullmatch(path):
        return "a Unix socket has no port, but a file, whose permissions say who may connect"
    if _URL.match(path):
        return "it is a path, not a URL"
    return None
