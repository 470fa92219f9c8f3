"""A mark for tests that need io_uring: not every kernel has it, and a container may forbid it."""

from __future__ import annotations

import pytest

from realtimed.net.uring import SendRing

__all__ = ["needs_io_uring"]


def _refusal() -> str:
    """Return why there is no io_uring here; "" if there is."""
    try:
        SendRing().close()
    except OSError as error:
        return f"no io_uring here: {error.strerror}"
    return ""


needs_io_uring = pytest.mark.skipif(bool(_refusal()), reason=_refusal())
