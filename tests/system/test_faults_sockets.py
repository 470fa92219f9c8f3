"""Socket files that are removed under the running daemon come back, and are never taken from another daemon."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from realtimed.config.readers import Address
from realtimed.errors import ConfigurationError
from realtimed.net.listener import open_listener
from tests.kit.clients import REQUEST, publisher, raw_client, undisturbed
from tests.kit.patience import PATIENCE
from tests.kit.stack import ROOT, Daemon, running_daemon


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def ready(daemon: Daemon) -> bytes:
    """Return the status and the body of /readyz."""
    match = re.search(r"http=127\.0\.0\.1:(\d+)", daemon.log)
    assert match is not None
    async with await trio.open_tcp_stream("127.0.0.1", int(match[1])) as stream:
        await stream.send_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join([bytes(data) async for data in stream])
    return answer[9:13] + answer.partition(b"\r\n\r\n")[2]


async def test_a_socket_whose_file_is_removed_is_made_anew(runtime_dir: Path) -> None:
    """Who is there notices nothing, newcomers find the way again within a second or two, and the log says so."""
    http = runtime_dir / "http.sock"
    async with (
        running_daemon(runtime_dir, "--http", f"unix:{http}", "--socket-mode", "0600") as daemon,
        undisturbed(daemon),
    ):
        paths = [daemon.control_socket, daemon.websocket_socket, http]
        for path in paths:
            path.unlink()
        for path in paths:
            name = f"unix:{path}"
            await daemon.until_logged(f"WARNING socket made anew listener={name}\n")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with publisher(daemon.control_socket) as newcomer, raw_client(daemon.websocket_socket):
            assert (await newcomer.call("stats"))["clients"] == 2
        async with await trio.open_unix_socket(http) as asking:
            await asking.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asking.receive_some()).startswith(b"HTTP/1.1 200 ")
        assert daemon.log.count("socket made anew") == len(paths)
    assert not any(path.exists() for path in paths), "a clean stop removes what was made anew"


async def test_while_its_directory_is_gone_the_daemon_says_so_and_serves_who_is_there(runtime_dir: Path) -> None:
    """Without the directory nobody is disturbed, /readyz and one line of the log tell, and with it all is well."""
    directory, elsewhere = runtime_dir / "run", runtime_dir / "elsewhere"
    directory.mkdir()
    async with running_daemon(directory, "--http", "127.0.0.1:0") as started:
        daemon = replace(started, log_file=elsewhere / started.log_file.name)
        assert await ready(started) == b"200 ready\n"
        async with undisturbed(started, daemon):
            directory.rename(elsewhere)
            reason = "No such file or directory"
            for path in (daemon.control_socket, daemon.websocket_socket):
                await daemon.until_logged(f"WARNING socket is gone listener=unix:{path} reason='{reason}'\n")
            assert (
                await ready(daemon)
            ).decode() == f"503 not ready: unix:{daemon.websocket_socket} is gone: {reason}\n"
            directory.mkdir()
            for path in (daemon.control_socket, daemon.websocket_socket):
                await daemon.until_logged(f"WARNING socket made anew listener=unix:{path}\n")
            async with publisher(daemon.control_socket) as newcomer, raw_client(daemon.websocket_socket):
                assert await newcomer.call("ping") == "pong"
            assert await ready(daemon) == b"200 ready\n"
            assert daemon.log.count("socket is gone") == 2


async def test_who_had_connected_before_the_file_was_removed_is_served(runtime_dir: Path) -> None:
    """A connection that waits to be accepted while the file is removed is accepted, however long that takes."""
    async with running_daemon(runtime_dir) as daemon, undisturbed(daemon):
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (100, 100))
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.until_logged(" reloaded ")
        with ExitStack() as silent, socket.socket(socket.AF_UNIX) as waiting:
            for _ in range(100):
                silent.enter_context(socket.socket(socket.AF_UNIX)).connect(str(daemon.websocket_socket))
            waiting.connect(str(daemon.websocket_socket))
            waiting.sendall(REQUEST)
            await daemon.until_logged("cannot accept")
            daemon.websocket_socket.unlink()
            await trio.sleep(2.2)  # in two looks at the file nothing may be done about it
            assert "made anew" not in daemon.log
            silent.close()
            waiting.settimeout(PATIENCE)
            assert (await trio.to_thread.run_sync(waiting.recv, 12)) == b"HTTP/1.1 101"
        await daemon.until_logged(f"made anew listener=unix:{daemon.websocket_socket}\n")


async def test_a_second_daemon_may_take_the_place_of_one_whose_socket_was_removed(runtime_dir: Path) -> None:
    """The second starts cleanly, the first says that it is out of reach, and takes nothing with it when it ends."""
    other = runtime_dir / "other"
    other.mkdir()
    async with running_daemon(runtime_dir, "--http", "127.0.0.1:0") as first, AsyncExitStack() as later:
        sockets = ["--socket", str(first.control_socket), "--websocket", f"unix:{first.websocket_socket}"]
        (other / "realtime.sock").symlink_to(first.control_socket)  # where the second one is waited for
        async with undisturbed(first):
            os.kill(first.process.pid, signal.SIGSTOP)  # or it would be back before the second one is there
            try:
                first.control_socket.unlink()
                first.websocket_socket.unlink()
                second = await later.enter_async_context(running_daemon(other, *sockets))
            finally:
                os.kill(first.process.pid, signal.SIGCONT)
            await first.until_logged("socket is gone")
            assert (await ready(first)).startswith(b"503 not ready: ")
        assert await first.stop() == 0
        async with publisher(first.control_socket) as asking, raw_client(first.websocket_socket):
            assert (await asking.call("info"))["pid"] == second.process.pid
            assert (await asking.call("stats"))["clients"] == 1
    assert "is another realtimed running?" in first.log
    assert "WARNING" not in second.log


async def test_a_group_that_is_gone_is_said_and_leaves_no_file(runtime_dir: Path) -> None:
    """Where the group of the sockets is removed from the system, that is an error as any, at the start or later."""
    path = runtime_dir / "l"
    with pytest.raises(ConfigurationError, match=r"cannot listen at unix:.*: no such group: 'gone'"):
        await open_listener(Address(path=path), stream_of, mode=0o600, group="gone")
    assert not path.exists()


async def test_a_socket_file_that_cannot_be_removed_does_not_spoil_a_clean_stop(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that may not be written any more leaves a file for the next daemon, and no error."""

    def unlink(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = runtime_dir / "l"
    listener = await open_listener(Address(path=path), stream_of, mode=0o600, group=None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        await listener.aclose()
    assert path.exists()
    await (await open_listener(Address(path=path), stream_of, mode=0o600, group=None)).aclose()
    assert not path.exists()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, as anybody may who can read it."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


async def test_a_lock_on_the_directory_that_nobody_gives_back_is_said(
    runtime_dir: Path,
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    """A start waits ten seconds, and then says which directory it is."""
    path = runtime_dir / "l"
    began = trio.current_time()
    with locked(runtime_dir), pytest.raises(ConfigurationError) as raised:
        await open_listener(Address(path=path), stream_of, mode=0o600, group=None)
    assert str(raised.value).startswith(
        f"cannot listen at unix:{path}: another process holds a lock on the directory {runtime_dir};"
    )
    assert trio.current_time() - began == pytest.approx(10, abs=0.1)
    assert not path.exists()


async def test_a_lock_on_the_directory_that_is_given_back_is_waited_for(
    runtime_dir: Path,
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    async def give_back() -> None:
        with locked(runtime_dir):
            task_holds.set()
            await trio.sleep(5)

    task_holds = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_back)
        await task_holds.wait()
        listener = await open_listener(Address(path=runtime_dir / "l"), stream_of, mode=0o600, group=None)
    await listener.aclose()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_start_that_waits_for_a_lock_heeds_signals(runtime_dir: Path, number: signal.Signals) -> None:
    """It ends at once, cleanly, and what it had opened by then is gone."""
    other = runtime_dir / "other"
    other.mkdir()
    waiting = ["--websocket", f"unix:{other}/ws", "--http", f"unix:{runtime_dir}/http", "--drain", "5"]
    with locked(other), trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    [sys.executable, "-m", "realtimed", "--socket", f"{other}/control", *waiting],
                    cwd=ROOT,
                    stderr=subprocess.PIPE,
                )
            )
            assert process.stderr is not None
            while not (runtime_dir / "http").exists():
                await trio.lowlevel.checkpoint()
            began = trio.current_time()
            process.send_signal(signal.SIGHUP)
            process.send_signal(number)
            said = b"".join([part async for part in process.stderr])
            assert await process.wait() == 0
            assert trio.current_time() - began < 3
    assert said.decode().endswith("INFO stopped\n")
    assert os.listdir(runtime_dir) == ["other"]  # noqa: PTH208  (not to be awaited)
    assert os.listdir(other) == []  # noqa: PTH208
