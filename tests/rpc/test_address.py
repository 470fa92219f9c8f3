"""The spellings of a control socket's path: the same for the daemon, realtimectl, and the clients in Python and PHP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtimed import Client
from realtimed.config.loading import load
from realtimed.errors import ConfigurationError, NoDaemonError
from tests.kit.blocking import Opener, daemon_in_thread
from tests.kit.php import PhpError, php_output, running_php
from tests.kit.realtimectl import run
from tests.kit.stack import ROOT, Daemon, running_daemon, runtime_directory

SPELLINGS = ["{}", "unix:{}", "unix://{}", "//{}"]

WRONG = [
    ("127.0.0.1:9999", "a Unix socket has no port, but a file, whose permissions say who may connect"),
    ("unix:localhost:9999", "a Unix socket has no port"),
    ("[::1]:9999", "a Unix socket has no port"),
    (":9999", "a Unix socket has no port"),
    ("9999", "a Unix socket has no port"),
    ("tcp://127.0.0.1:9999", "it is a path, not a URL"),
    ("http://localhost/run/x", "it is a path, not a URL"),
    ("@realtime", "a socket without a file has no permissions"),
    ("unix//run/x", "Caddy writes an address so; here it is"),
    ("unix:", "that is not the path of a socket"),
    ("", "that is not the path of a socket"),
    ("unix:/" + "x" * 107, "the path of a socket has at most 107 bytes"),
]


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory) as running:
        yield running


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_the_daemon_listens_where_it_is_told(spelling: str, runtime_dir: Path) -> None:
    other = runtime_dir / "other.sock"
    written = spelling.format(other)
    assert load({}, {"REALTIME_SOCKET": written}).socket == other
    async with running_daemon(runtime_dir, "--socket", written, ready_at=other):
        assert other.is_socket()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_python_finds_it(spelling: str, daemon: Daemon, connect: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    written = spelling.format(daemon.control_socket)
    connect(written).ping()
    monkeypatch.setenv("REALTIME_SOCKET", written)
    with Client() as client:
        client.ping()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_php_finds_it(spelling: str, daemon: Daemon) -> None:
    written = spelling.format(daemon.control_socket)
    with running_php(written) as php:
        assert php.run("$client->ping(); return $client->socket;") == str(daemon.control_socket)
    code = f"require '{ROOT}/app/realtime.php'; broadcast('news', 'hello'); echo 'sent';"
    assert php_output("-r", code, env={**os.environ, "REALTIME_SOCKET": written}) == "sent"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_realtimectl_finds_it(spelling: str, daemon: Daemon) -> None:
    written = spelling.format(daemon.control_socket)
    assert run("--socket", written, "ping").status == 0
    assert run("ping", REALTIME_SOCKET=written).status == 0


@pytest.mark.parametrize(("written", "why"), WRONG)
def test_the_daemon_says_why_it_is_no_path(written: str, why: str) -> None:
    for options, environ, named in (
        ({"socket": written}, {}, "--socket"),
        ({}, {"REALTIME_SOCKET": written}, "REALTIME_SOCKET"),
    ):
        with pytest.raises(ConfigurationError) as error:
            load(options, environ)
        assert str(error.value).startswith(f"{named}: expected PATH or unix:PATH; {why}")


@pytest.mark.parametrize(("written", "why"), WRONG)
def test_python_says_why_it_is_no_path(written: str, why: str, connect: Opener) -> None:
    with pytest.raises(NoDaemonError, match="no daemon can be at") as error:
        connect(written).ping()
    assert why in str(error.value)


@pytest.mark.parametrize(("written", "why"), WRONG)
def test_php_says_why_it_is_no_path(written: str, why: str) -> None:
    with running_php(written) as php, pytest.raises(PhpError) as error:
        php.run("return $client->ping();")
    assert error.value.kind == "NoDaemonException"
    assert error.value.message.startswith("no daemon can be at")
    assert why in error.value.message


def test_realtimectl_says_why_it_is_no_path() -> None:
    done = run("ping", "--socket", "127.0.0.1:9999")
    assert (done.status, done.out) == (3, "")
    assert "a Unix socket has no port" in done.err


def test_no_file_is_made_that_has_the_name_of_a_port(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "realtimed", "--socket", "127.0.0.1:9999"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []
