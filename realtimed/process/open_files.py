"""The limit of open files, which is the limit of connections."""

from __future__ import annotations

import logging
import resource
from typing import Final

from realtimed.process.logs import Event

__all__ = ["connection_limit", "files_for_clients"]

_FILES_KEPT: Final = 64
"""Open files that are not WebSockets: listeners, publishers, the log, Python's own."""

_HANDSHAKES: Final = 16
"""How many of these may be connections on their way to become WebSockets, or to hear that there are too many."""

_FEW: Final = 4000
"""Below so many connections, a daemon whose limit nobody has chosen says how to have more."""

_ADVICE: Final = "raise LimitNOFILE or ulimit -n"

log = logging.getLogger(__name__)


def connection_limit(wanted: int | None) -> int:
    """Raise the soft limit of open files as far as it goes; return how many WebSockets may be open.

    That is `wanted`, or fewer if the limit of open files allows no more; without `wanted`, as many as it allows. A
    limit that is in the way, or that is low while nobody has chosen one, is logged.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # fs.nr_open may have been lowered since the limit was set
            log.warning(Event("open files not raised", soft=soft, hard=hard, reason=str(error)))
        else:
            soft = hard
    possible = max(soft - _FILES_KEPT, 1)
    if wanted is None:
        if possible < _FEW:
            log.warning(Event("few open files", open_files=soft, allowed=possible, advice=_ADVICE))
        return possible
    if wanted > possible:
        log.warning(
            Event(
                "max-connections too high",
                max_connections=wanted,
                open_files=soft,
                allowed=possible,
                advice=_ADVICE,
            )
        )
    return min(wanted, possible)


def files_for_clients() -> int:
    """Return how many open files the sockets of WebSockets may take, as the limit is now; the rest are for others."""
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_KEPT + _HANDSHAKES, 2)
