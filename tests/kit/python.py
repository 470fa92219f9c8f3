"""Python scripts for tests, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import ROOT

__all__ = ["run_python"]


def run_python(script: str, *arguments: str, strict: bool = True, **environment: str) -> str:
    """Run a script and return its output; it must have ended well, and if `strict`, without a warning."""
    options = ["-X", "dev", "-W", "error"] if strict else []
    done = subprocess.run(
        [sys.executable, *options, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=LONG_PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
