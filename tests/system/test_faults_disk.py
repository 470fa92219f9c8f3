"""History that cannot be saved or read costs the history, and neither a stop nor a start."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from realtimed.state import StateFile
from tests.kit.clients import publisher
from tests.kit.hubs import hub_with_history
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, running_daemon


def listen_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


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


def test_a_file_that_may_not_be_read_is_kept_and_not_taken_for_true_later(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place it would be read by a later daemon, after others have published in its epochs."""

    def refuse(path: Path, _: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = runtime_dir / "state"
    path.write_bytes(b"whatever it is")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may read everything
        StateFile(path).load(hub_with_history())
    assert not path.exists()
    assert path.with_name("state.unreadable").read_bytes() == b"whatever it is"
    assert [str(each.msg) for each in caplog.records] == [
        f"history begins anew state_file={path} reason='Permission denied' kept_as={path}.unreadable"
    ]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, listen_at], ids=["FIFO", "directory", "socket"])
async def test_what_is_no_file_holds_nothing_up_and_is_left_alone(
    make: Callable[[Path], object], runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A FIFO without a writer would be waited for without end; one put in the place of /dev/null would be missed."""
    path = runtime_dir / "state"
    make(path)
    before = path.lstat()
    state = StateFile(path)
    with trio.fail_after(PATIENCE):
        state.load(hub_with_history())
        await state.save(hub_with_history())
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(runtime_dir) == ["state"]  # noqa: PTH208  (not to be awaited)
    begins, lost = (str(each.msg) for each in caplog.records)
    assert begins.startswith(f"history begins anew state_file={path} reason=")
    assert begins.endswith(f" kept_as={path}")
    assert lost.startswith(f"history is lost state_file={path}.new reason=")


async def test_what_is_written_follows_no_link_and_takes_over_no_mode(runtime_dir: Path) -> None:
    path, new, other = (runtime_dir / name for name in ("state", "state.new", "other"))
    other.write_bytes(b"somebody's")
    other.chmod(0o666)
    hub = hub_with_history()
    hub.publish("news", "hello")
    for leftover in (new.symlink_to, new.hardlink_to):
        leftover(other)
        await StateFile(path).save(hub)
        assert stat.S_ISREG(path.lstat().st_mode)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert (other.read_bytes(), stat.S_IMODE(other.stat().st_mode)) == (b"somebody's", 0o666)
        assert set(os.listdir(runtime_dir)) == {"state", "other"}  # noqa: PTH208
    new.write_bytes(b"what a daemon that was killed had written")
    new.chmod(0o644)
    old_umask = os.umask(0o777)
    try:
        await StateFile(path).save(hub)
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    after = hub_with_history()
    StateFile(path).load(after)
    assert after.channels["news"].offset == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_a_file_of_another_user_is_not_removed(runtime_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, new = runtime_dir / "state", runtime_dir / "state.new"
    new.write_bytes(b"somebody's")
    os.chown(new, 65534, 65534)
    await StateFile(path).save(hub_with_history())
    assert new.read_bytes() == b"somebody's"
    assert not path.exists()
    assert [str(each.msg) for each in caplog.records] == [
        f"history is lost state_file={new} reason='there is a file of another user; move it away'"
    ]


async def test_a_state_file_that_cannot_be_removed_is_not_used(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later daemon would read it again, whatever was published meanwhile."""

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = runtime_dir / "state"
    hub = hub_with_history()
    hub.publish("news", "hello")
    await StateFile(path).save(hub)
    after = hub_with_history()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        patch.setattr(Path, "replace", refuse)
        StateFile(path).load(after)
    assert not after.channels
    assert str(caplog.records[-1].msg) == (
        f"history begins anew state_file={path} reason='it cannot be removed: Permission denied' kept_as={path}"
    )
