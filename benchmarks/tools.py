"""The programs that the suite needs beside the project: its C programs, and the servers to compare with.

Everything is kept in a cache outside the repository. What cannot be had here makes a peer *absent*, with a reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.processes import BenchmarkError

__all__ = [
    "CACHE",
    "HERE",
    "NODE_MODULES",
    "PYTHON_PACKAGES",
    "AbsentError",
    "compiled",
    "need_go_build",
    "need_go_program",
    "need_node",
    "need_program",
    "need_python",
]

HERE: Final = Path(__file__).resolve().parent
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realtimed-bench"
NODE_MODULES: Final = CACHE / "node" / "node_modules"
PYTHON_PACKAGES: Final = CACHE / "python"
_INSTALL_TIMEOUT: Final = 300
_GO_BUILD_TIMEOUT: Final = 1200
"""Seconds: a first build of Caddy compiles some thousand packages."""
_SERVICE_POLICY: Final = Path("/usr/sbin/policy-rc.d")


class AbsentError(Exception):
    """A peer cannot be measured here; the message says what is missing."""


def compiled(name: str, directory: Path) -> Path:
    """Compile one of our C programs into `directory`. Raises `BenchmarkError` without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise BenchmarkError("the load client is written in C and needs a compiler: apt-get install gcc libc6-dev")
    program = directory / name
    subprocess.run(
        [compiler, "-O2", "-Wall", "-Wextra", "-pthread", "-o", program, HERE / f"{name}.c"], check=True, timeout=120
    )
    return program


def need_program(program: str, *packages: str) -> Path:
    """Return the path of a program, installing Debian packages if it is missing and we may.

    Raises `AbsentError` otherwise.
    """
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        with _without_services():
            _install(["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages])
        found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise AbsentError(f"{program} is not installed: apt-get install {' '.join(packages)}")
    return Path(found)


def need_go_program(program: str, module: str = "") -> Path:
    """Return the path of a program, building `module` if it is missing and Go is there.

    Raises `AbsentError` if that fails.
    """
    programs = CACHE / "bin"
    found = shutil.which(program) or shutil.which(program, path=programs)
    if found is None and module and shutil.which("go"):
        _install(["go", "install", f"{module}@latest"], GOBIN=str(programs))
        found = shutil.which(program, path=programs)
    if found is None:
        raise AbsentError(f"{program} is not on the PATH")
    return Path(found)


def need_go_build(module: str) -> Path:
    """Return the path of a peer of ours that is written in Go, building what has changed since the last time.

    Raises `AbsentError` if Go or a module that the peer needs is missing.
    """
    go = shutil.which("go")
    if go is None:
        raise AbsentError("Go is not installed")
    program = CACHE / "bin" / module
    _install(
        [go, "build", "-C", str(HERE / "peers" / module), "-trimpath", "-buildvcs=false", "-o", str(program), "."],
        timeout=_GO_BUILD_TIMEOUT,
    )
    return program


def need_node(*packages: str) -> Path:
    """Return Node's path after installing npm packages into the cache. Raises `AbsentError` if that fails."""
    node = shutil.which("node")
    if node is None:
        raise AbsentError("Node is not installed")
    missing = [each for each in packages if not (NODE_MODULES / each).exists()]
    if missing:
        NODE_MODULES.parent.mkdir(parents=True, exist_ok=True)
        _install(
            ["npm", "install", "--no-package-lock", "--no-save", "--no-audit", "--no-fund",
             "--prefix", str(NODE_MODULES.parent), *packages]
        )  # fmt: skip
    return Path(node)


def need_python(*packages: str) -> Path:
    """Return our Python's path after installing packages into the cache. Raises `AbsentError` if that fails."""
    if not all((PYTHON_PACKAGES / each).exists() for each in packages):
        _install(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             "--target", str(PYTHON_PACKAGES), *packages]
        )  # fmt: skip
    return Path(sys.executable)


@contextmanager
def _without_services() -> Iterator[None]:
    """Keep Debian's packages from starting what they install as a service; see invoke-rc.d(8)."""
    ours = not _SERVICE_POLICY.exists()
    if ours:
        _SERVICE_POLICY.write_text("#!/bin/sh\nexit 101\n")
        _SERVICE_POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            _SERVICE_POLICY.unlink()


def _install(command: Sequence[str], timeout: float = _INSTALL_TIMEOUT, **variables: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1", **variables}
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AbsentError(f"{' '.join(command[:2])} failed: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise AbsentError(f"{' '.join(command[:2])} failed: {lines[-1] if lines else done.returncode}")
