"""Default values of parameters of the control socket's commands, for both of its ends."""

from __future__ import annotations

from typing import Final

__all__ = ["HISTORY_SHOWN", "NOT_ALLOWED"]

HISTORY_SHOWN: Final = 100
"""Messages that ``history`` returns."""

NOT_ALLOWED: Final = 4403
"""The close code that ``disconnect`` uses: the client should not come back by itself."""
