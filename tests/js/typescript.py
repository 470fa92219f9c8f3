"""TypeScript, for the types of app/realtime.js: `python -m tests.js.typescript` writes app/realtime.d.ts."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import playwright

from tests.kit.stack import APP, ROOT

__all__ = ["DECLARATIONS", "SCRIPT", "TYPESCRIPT", "compiled", "declarations", "find_node"]

SCRIPT: Final = APP / "realtime.js"
DECLARATIONS: Final = APP / "realtime.d.ts"
TYPESCRIPT: Final = ROOT / ".cache" / "node_modules" / "typescript" / "bin" / "tsc"
"""Where the Makefile installs it, in the version that it names."""

_OPTIONS: Final = ["--strict", "--target", "es2022", "--lib", "es2022,dom,dom.iterable", "--module", "nodenext"]


def find_node() -> str | None:
    """Find a Node that has a WebSocket class: the one that Playwright brings along, or the system's."""
    bundled = Path(playwright.__file__).parent / "driver" / "node"
    return str(bundled) if bundled.exists() else shutil.which("node")


def compiled(*arguments: str | Path) -> str:
    """Run the compiler, and return its complaints."""
    node = find_node()
    assert node is not None, "Node.js is not installed: apt-get install nodejs (version 22 or later)"
    assert TYPESCRIPT.exists(), "TypeScript is not installed: `make types` does it"
    command = [node, TYPESCRIPT, *_OPTIONS, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False).stdout


def declarations() -> str:
    """Return what the compiler makes of the comments in app/realtime.js, which it checks as well."""
    with tempfile.TemporaryDirectory() as directory:
        emit = ["--declaration", "--emitDeclarationOnly", "--outDir", directory]
        complaints = compiled("--allowJs", "--checkJs", *emit, SCRIPT)
        assert complaints == "", complaints
        made = (Path(directory) / DECLARATIONS.name).read_text()
    return f"// Made from {SCRIPT.name} by TypeScript: `make types`.\n\n{made}"


if __name__ == "__main__":
    DECLARATIONS.write_text(declarations())
