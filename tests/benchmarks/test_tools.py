"""What a benchmark needs and does not find makes a peer absent, with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tools


def install_go(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this script the only program that is found, under the name of Go."""
    go = directory / "go"
    go.write_text(f"#!/bin/sh\n{script}\n")
    go.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_without_go_a_peer_written_in_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tools.AbsentError, match=r"^Go is not installed$"):
        tools.need_go_build("caddyhub")


def test_a_peer_that_does_not_build_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_go(tmp_path, "echo downloading >&2\necho 'no such module' >&2\nexit 1", monkeypatch)
    with pytest.raises(tools.AbsentError, match=r"^\S+ build failed: no such module$"):
        tools.need_go_build("caddyhub")


def test_a_peer_is_built_from_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_go(tmp_path, 'echo "$*" > "$CALLED"', monkeypatch)
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))
    program = tools.need_go_build("caddyhub")
    words = (tmp_path / "called").read_text().split()
    module = Path(words[words.index("-C") + 1])
    assert (module / "go.mod").read_text().startswith("module caddyhub\n")
    assert words[words.index("-o") + 1] == str(program)
