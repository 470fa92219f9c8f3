"""What `realtimectl doctor` examines, and the result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from realtimed.client.blocking import Client

__all__ = ["FAILED", "OK", "SKIPPED", "WARNING", "Finding", "Patient"]

OK: Final = "ok"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"
WARNING: Final = "warning"
"""It may be a fault, or intended."""


class Finding(NamedTuple):
    """The result of one check: its status, what was seen, and what to do about a fault or a warning."""

    check: str
    status: str
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """What to examine: the daemon behind `client`, and the `site` that serves it to pages of `origin`.

    Without `php_user` and `caddy_user`, the users of the running processes count. `caddy` is the path of the program.
    `allowed_origins` is the variable ALLOWED_ORIGINS in doctor's own environment.
    """

    client: Client
    site: str
    origin: str
    php_user: str | None
    caddy_user: str | None
    caddy: str | None
    allowed_origins: str | None = None
