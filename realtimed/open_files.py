"""The limit of open files, which is the limit of connections."""

from __future__ import annotations

import logging
import resource
from typing import Final

__all__ = ["connection_limit"]

_FILES_KEPT: Final = 64
"""Open files that are not WebSockets: listeners, publishers, the log, Python's own."""

_FEW: Final = 4000
"""Below so many connections, a daemon whose limit nobody has chosen says how to have more."""

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
            log.warning("cannot raise the limit of open files from %d to %d: %s", soft, hard, error)
        else:
            soft = hard
    possible = max(soft - _FILES_KEPT, 1)
    if wanted is None:
        if possible < _FEW:
            log.warning(
                "the limit of open files, %d, allows only %d connections: raise LimitNOFILE or ulimit -n",
                soft, possible,
            )  # fmt: skip
        return possible
    if wanted > possible:
        log.warning(
            "max-connections is %d, but the limit of open files, %d, allows only %d: raise LimitNOFILE or ulimit -n",
            wanted, soft, possible,
        )  # fmt: skip
    return min(wanted, possible)
