"""What `realtimectl doctor` looks at, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from realtimed.client.blocking import Client

__all__ = ["FAILED", "OK", "SKIPPED", "WARNING", "Finding", "Patient"]

OK: Final = "ok"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"
WARNING: Final = "warning"
"""What may be a fault or may be meant."""


class Finding(NamedTuple):
    """What came of one check: its status, what was seen, and what to do about a fault or a warning."""

    check: str
    status: str
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is to be examined. Without `php_user` and `caddy_user` it is seen who runs here.

    `allowed_origins` is the variable ALLOWED_ORIGINS in doctor's own environment.
    """

    client: Client
    site: str
    origin: str
    php_user: str | None
    caddy_user: str | None
    caddy: str | None
    allowed_origins: str | None = None
