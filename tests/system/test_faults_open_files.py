"""When there are no more open files, or no memory for connections: who is there is served, and the rest waits."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from realtimed.net.accepting import ClientFiles, accept
from realtimed.net.listener import SocketListener
from tests.kit.budget import processor_time
from tests.kit.clients import REQUEST, publisher, raw_client, subscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, running_daemon

OPEN_FILES: Final = 128
FOR_CLIENTS: Final = OPEN_FILES - 64 + 16
"""What the daemon lets WebSockets take of them, those that are shaking hands included."""


@asynccontextmanager
async def daemon_with_few_files(directory: Path, *options: str) -> AsyncIterator[Daemon]:
    async with running_daemon(directory, *options) as daemon:
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        daemon.process.send_signal(signal.SIGHUP)
        with trio.fail_after(PATIENCE):
            await daemon.until_logged(" reloaded ")
        yield daemon


def connect(path: Path, files: ExitStack) -> socket.socket:
    sock = files.enter_context(socket.socket(socket.AF_UNIX))
    sock.connect(str(path))
    return sock


async def readyz(path: Path) -> bytes:
    async with await trio.open_unix_socket(path) as asking:
        await asking.send_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        return b"".join([bytes(data) async for data in asking])


async def test_those_that_connect_and_say_nothing_leave_files_for_publishers_and_for_who_is_there(
    runtime_dir: Path,
) -> None:
    """However many connections say nothing, clients and publishers that are there go on, and new publishers come in."""
    async with daemon_with_few_files(runtime_dir, "--http", f"unix:{runtime_dir}/http.sock") as daemon:
        with trio.fail_after(PATIENCE), ExitStack() as silent:
            async with websocket(daemon.websocket_socket) as client, publisher(daemon.control_socket) as sender:
                await client.send_message(subscribe("news"))
                while "news" not in await sender.call("channels"):
                    pass
                for _ in range(2 * OPEN_FILES):
                    connect(daemon.websocket_socket, silent)
                await daemon.until_logged("cannot accept")
                for number in range(20):
                    async with publisher(daemon.control_socket) as newcomer:
                        assert (await newcomer.call("broadcast", "news", f"{number}"))["recipients"] == 1
                    assert await client.get_message() == f"{number}"
                answer = await readyz(runtime_dir / "http.sock")
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert f"leaves room for {FOR_CLIENTS} WebSockets and handshakes".encode() in answer
                silent.close()
                async with raw_client(daemon.websocket_socket):
                    while not (await readyz(runtime_dir / "http.sock")).startswith(b"HTTP/1.1 200 "):
                        pass
        assert daemon.log.count("cannot accept") == 1
        assert f"leaves room for {FOR_CLIENTS} WebSockets" in daemon.log


async def test_without_files_it_waits_without_work_and_accepts_as_soon_as_there_are_some(runtime_dir: Path) -> None:
    """While files are out, waiting costs next to no processor time and one line of the log; then all come in."""
    async with daemon_with_few_files(runtime_dir) as daemon:
        with trio.fail_after(PATIENCE), ExitStack() as newcomers, ExitStack() as publishers:
            for _ in range(OPEN_FILES):  # more than there are: nobody keeps anything back for WebSockets
                connect(daemon.control_socket, publishers)
            await daemon.until_logged("listener=unix:" + str(daemon.control_socket))
            waiting = [connect(daemon.websocket_socket, newcomers) for _ in range(3)]
            for sock in waiting:
                sock.sendall(REQUEST)
            await daemon.until_logged("listener=unix:" + str(daemon.websocket_socket))
            before, began = processor_time(daemon.process.pid), time.monotonic()
            await trio.sleep(1)  # what it does in a second is what is to be seen
            share = (processor_time(daemon.process.pid) - before) / (time.monotonic() - began)
            assert share < 0.1
            publishers.close()
            for sock in waiting:
                sock.settimeout(PATIENCE)
                assert await trio.to_thread.run_sync(sock.recv, 12) == b"HTTP/1.1 101"
            while daemon.log.count("accepting again") < 2:
                await trio.lowlevel.checkpoint()
        assert daemon.log.count("cannot accept") == 2, "once for each listener"


async def test_who_comes_and_goes_while_files_are_out_does_not_fill_the_log(runtime_dir: Path) -> None:
    """Where each file that is closed is opened again at once, the log has one line and not one for each of them."""
    async with daemon_with_few_files(runtime_dir) as daemon:
        with trio.fail_after(PATIENCE), ExitStack() as others:
            held = deque(connect(daemon.websocket_socket, others) for _ in range(2 * FOR_CLIENTS))
            await daemon.until_logged("cannot accept")
            deadline = trio.current_time() + 1.2  # longer than it takes to call the trouble over
            while trio.current_time() < deadline:
                held.popleft().close()
                held.append(connect(daemon.websocket_socket, others))
                async with publisher(daemon.control_socket) as asking:
                    await asking.call("ping")
            assert (daemon.log.count("cannot accept"), daemon.log.count("accepting again")) == (1, 0)


# What the kernel may say of a connection that it has, from a socket that says it.


class Troubled(socket.socket):
    """A listening socket whose `accept` fails with each of `errors` first."""

    errors: deque[int]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            number = self.errors.popleft()
            raise OSError(number, os.strerror(number))
        return super().accept()


async def accepted_after(errors: list[int], path: Path, check: Callable[[], Awaitable[None]]) -> None:
    """Have a connection accepted after these errors, within which `check` is done."""
    with Troubled(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as peer:
        listening.errors = deque(errors)
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        peer.connect(str(path))
        listener = SocketListener(listening, lambda sock: trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        served = trio.Event()

        def serve(stream: trio.SocketStream) -> None:
            stream.socket.close()
            served.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, listener, serve)
            await served.wait()
            await check()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPROTO, errno.EPERM])
async def test_whatever_accept_says_it_is_tried_again_and_said_once(
    runtime_dir: Path,
    number: int,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of accept(2) ends nothing: it is logged once, tried again ten times a second, and its end is logged."""
    caplog.set_level("INFO")

    async def check() -> None:
        assert autojump_clock.current_time() - began == pytest.approx(2)
        await trio.sleep(1.5)  # on a clock that jumps: so long after the last error the trouble is over

    began = autojump_clock.current_time()
    with trio.fail_after(PATIENCE):
        await accepted_after([number] * 20, runtime_dir / "l", check)
    assert [str(record.msg).partition(" listener=")[0] for record in caplog.records] == [
        f"cannot accept reason='{os.strerror(number)}'",
        "accepting again",
    ]


async def test_a_connection_that_went_away_while_it_waited_is_nobodys_trouble(
    runtime_dir: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """ECONNABORTED and EAGAIN are no reason to wait, nor to say anything."""

    async def check() -> None:
        assert autojump_clock.current_time() == began
        await trio.lowlevel.checkpoint()

    began = autojump_clock.current_time()
    with trio.fail_after(PATIENCE):
        await accepted_after([errno.ECONNABORTED, errno.EAGAIN] * 10, runtime_dir / "l", check)
    assert caplog.records == []


async def test_a_signal_in_the_middle_of_everything_interrupts_nothing(runtime_dir: Path) -> None:
    """Reloads, each a signal that interrupts system calls (EINTR), disturb neither handshakes nor broadcasts."""
    async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as sender:
        with trio.fail_after(PATIENCE):
            for number in range(100):
                daemon.process.send_signal(signal.SIGHUP)
                async with raw_client(daemon.websocket_socket):
                    daemon.process.send_signal(signal.SIGHUP)
                    assert (await sender.call("broadcast", "news", "x" * 60_000))["offset"] == number + 1
    assert "Traceback" not in daemon.log


async def test_room_for_clients_is_a_number_or_an_error_that_says_why() -> None:
    """A `ClientFiles` says how many may come, and who keeps them out when none may."""
    room = ClientFiles(2)
    assert (await room.places(), room.obstacle) == (2, None)
    room.taken = 2
    assert room.obstacle == "the limit of open files leaves room for 2 WebSockets and handshakes"
    with pytest.raises(OSError, match="leaves room for 2 WebSockets") as raised:
        await room.places()
    assert raised.value.errno == errno.EMFILE
