"""Which settings can change while the daemon runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from realtimed.config.settings import Config
from realtimed.errors import ConfigurationError
from realtimed.process.logs import Event

__all__ = ["Change", "Reloader", "compare"]

log = logging.getLogger(__name__)

_LIVE: Final = frozenset({
    # At once, for all connections.
    "max_channels", "max_backlog", "backlog_timeout", "max_backlog_total", "silence_timeout", "max_message",
    "max_connections", "max_connections_per_address", "handshakes_per_address", "max_subscriptions",
    "max_answers_total", "max_keys_bytes", "drain", "log_level", "command_timeout", "handshake_timeout",
    "close_timeout",
    # For new WebSockets.
    "max_inbound", "inbound_rate", "inbound_burst", "max_age",
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


class Reloader:
    """Rereads the configuration of a running daemon, and logs what came of it.

    `reread` returns the configuration as it is now, or raises `ConfigurationError`; `apply` puts a configuration into
    effect that differs from `config` only in settings that can change. `note` is what a status should say about it.
    """

    def __init__(self, config: Config, reread: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        self.config = config
        self.note = ""
        self._reread = reread
        self._apply = apply

    def reload(self) -> None:
        """Read the configuration again, and apply what can be applied. A wrong configuration changes nothing."""
        try:
            change = compare(self.config, self._reread())
        except ConfigurationError as error:
            for line in str(error).splitlines():
                log.error(Event("not reloaded", reason=line))
            self.note = f"; not reloaded: {error}".partition("\n")[0]
            return
        self.config = change.config
        self._apply(change.config)
        applied, waiting = ", ".join(change.applied), ", ".join(change.needs_restart)
        if waiting:
            log.warning(Event("reloaded", applied=applied, needs_restart=waiting))
        else:
            log.info(Event("reloaded", applied=applied, needs_restart=waiting))
        self.note = f"; only a restart applies {waiting}" if waiting else ""
