"""Which settings can change while the daemon runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from realtimed.config.settings import Config
from realtimed.errors import ConfigurationError

__all__ = ["Change", "compare"]

_LIVE: Final = frozenset({
    # At once, for all connections.
    "max_channels", "max_backlog", "backlog_timeout", "max_backlog_total", "silence_timeout", "max_message",
    "max_connections", "max_connections_per_address", "handshakes_per_address", "max_subscriptions",
    "max_answers_total", "max_keys_bytes", "drain", "log_level",
    # For new connections.
    "max_inbound", "inbound_rate", "inbound_burst", "handshake_timeout", "close_timeout", "max_age", "command_timeout",
})  # fmt: skip
"""Settings that a running daemon applies. All others need a restart, and so does a new one until it is listed here."""


@dataclass(frozen=True)
class Change:
    """A step from one configuration to another. Settings have the names that they have on the command line."""

    config: Config
    """The new configuration, except that settings which need a restart keep their old values."""
    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]


def compare(old: Config, new: Config) -> Change:
    """Return the step from `old` to `new` that a running daemon can take.

    Raises `ConfigurationError` if the settings that it can apply contradict those that it cannot.
    """
    changed = [each.name for each in fields(Config) if getattr(old, each.name) != getattr(new, each.name)]
    kept = [name for name in changed if name not in _LIVE]
    config = replace(new, **{name: getattr(old, name) for name in kept})
    problems = config.problems()
    if problems:
        raise ConfigurationError("\n".join(f"{problem}; a restart would help" for problem in problems))
    return Change(config, _named(name for name in changed if name in _LIVE), _named(kept))


def _named(settings: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", "-") for name in settings)
