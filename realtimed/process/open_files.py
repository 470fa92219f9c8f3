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
"""How many of these may be connections in their handshake, or waiting for a refusal."""

_FEW: Final = 4000
"""Below this many connections, a daemon without `max-connections` logs how to allow more."""

_ADVICE: Final = "raise LimitNOFILE or ulimit -n"

log = logging.getLogger(__name__)


def connection_limit(wanted: int | None) -> int:
    """Raise the soft limit of open files to the hard limit, and return how many WebSockets may be open.

    That is `wanted`, or fewer if the limit of open files allows no more; without `wanted`, as many as it allows. A
    limit that is below `wanted`, or low without `wanted`, is logged.
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
    """Return how many open files WebSockets may take under the present limit; the rest is for other uses."""
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_KEPT + _HANDSHAKES, 2)
