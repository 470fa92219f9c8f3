"""History that cannot be saved or read costs the history, and neither a stop nor a start."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.clients import publisher
from tests.stack import Daemon, running_daemon

PATIENCE: Final = 30
"""Seconds after which a test has failed; what it waits for takes far less."""


def directory_is_gone(_: Daemon, directory: Path) -> None:
    shutil.rmtree(directory)


def no_open_files(daemon: Daemon, _: Path) -> None:
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (4, 4))  # it has more, and opens none


def name_is_taken(_: Daemon, directory: Path) -> None:
    (directory / "state.new").mkdir()


@pytest.mark.parametrize(
    ("fault", "number"),
    [(directory_is_gone, errno.ENOENT), (no_open_files, errno.EMFILE), (name_is_taken, errno.EISDIR)],
)
async def test_history_that_cannot_be_saved_does_not_spoil_a_clean_stop(
    runtime_dir: Path, fault: Callable[[Daemon, Path], None], number: int
) -> None:
    """Whatever keeps the state file from being written, the stop is clean, the log names the file and the reason."""
    directory = runtime_dir / "state"
    directory.mkdir()
    state = directory / "state"
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, "--state-file", str(state)) as daemon:
            async with publisher(daemon.control_socket) as sender:
                await sender.call("broadcast", "news", "hello")
            fault(daemon, directory)
            assert await daemon.stop() == 0
    assert f"WARNING history is lost state_file={state}.new reason='{os.strerror(number)}'\n" in daemon.log
    assert daemon.log.endswith("INFO stopped\n")
    assert not state.exists()


async def test_a_state_file_that_cannot_be_read_does_not_spoil_a_start(runtime_dir: Path) -> None:
    """Whatever is in its place, the daemon serves, with history that begins anew, and says why."""
    state = runtime_dir / "state"
    state.mkdir()
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--state-file", str(state)) as daemon,
            publisher(daemon.control_socket) as sender,
        ):
            assert (await sender.call("broadcast", "news", "hello"))["offset"] == 1
    assert f"WARNING history begins anew state_file={state} reason=" in daemon.log
    assert os.strerror(errno.EISDIR) in daemon.log
