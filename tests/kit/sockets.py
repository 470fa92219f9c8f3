"""What tests do to sockets."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["RESET_AT_CLOSE"]

RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER for no time at all: the peer sees a reset, and what is in flight is gone (socket(7))."""
