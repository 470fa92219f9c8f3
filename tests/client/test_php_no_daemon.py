"""What the PHP client says when nothing answers at the socket, and when PHP's settings keep it from looking."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.kit.blocking import daemon_in_thread
from tests.kit.fake_daemon import full_queue, listening
from tests.kit.patience import SHORT
from tests.kit.php import CLIENT, NOT_LOOKING, PhpError, denied, open_sockets, running_php
from tests.kit.stack import Daemon


def failure(path: Path | str, *options: str, **how: Any) -> PhpError:
    """Return what is thrown when a fresh client, of a PHP with these options, asks whether the daemon answers."""
    with running_php(path, *options, **how) as php, pytest.raises(PhpError) as error:
        php.run("return $client->ping();")
    return error.value


def test_a_missing_file_is_said_to_be_missing(path: Path) -> None:
    error = failure(path)
    assert error.kind == "NoDaemonException"
    assert error.message.startswith(f"no daemon at {path}: there is no such file. Is realtimed running")


def test_a_stale_socket_is_said_to_be_stale(path: Path) -> None:
    with listening(path, backlog=1):
        pass
    error = failure(path)
    assert error.kind == "NoDaemonException"
    assert error.message == (
        f"no daemon at {path}: the socket is left from one that has ended. Start realtimed, which replaces it"
    )


def test_a_file_that_is_no_socket_is_said_to_be_none(path: Path) -> None:
    path.touch()
    error = failure(path)
    assert (error.kind, error.message) == ("NoDaemonException", f"no daemon at {path}: this file is not a socket")


def test_who_may_not_open_the_socket_learns_who_may(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon, denied(daemon.control_socket) as user:
        path = daemon.control_socket
        error = failure(path, client=shutil.copy(CLIENT, runtime_dir), user=user)

        assert error.kind == "NoDaemonException"
        name = pwd.getpwuid(os.geteuid() if user is None else user).pw_name
        assert error.message.startswith(
            f"cannot open {path}: the user {name} may not write to this socket,"
            f" which has mode {path.stat().st_mode & 0o7777:04o}, owner {path.owner()} and group {path.group()}."
        )
        assert "--socket-group" in error.message


def test_who_may_not_enter_a_directory_learns_so(runtime_dir: Path) -> None:
    closed = runtime_dir / "closed"
    closed.mkdir(mode=0o000)
    with denied(runtime_dir / "closed") as user:
        error = failure(closed / "x.sock", client=shutil.copy(CLIENT, runtime_dir), user=user)
    closed.chmod(0o700)
    assert error.kind == "NoDaemonException"
    assert "may not enter a directory on the way" in error.message


@pytest.mark.parametrize("path", ["", "/tmp/" + "x" * 200])
def test_what_cannot_be_the_path_of_a_socket_is_said_to_be_none(path: str) -> None:
    error = failure(path)
    assert error.kind == "NoDaemonException"
    assert "the path of a socket" in error.message


def test_a_file_that_is_no_socket_is_said_to_be_none_to_whoever_may_not_write_to_it(path: Path) -> None:
    path.touch(0o400)
    with denied(path) as user:
        error = failure(path, client=shutil.copy(CLIENT, path.parent), user=user)
    assert error.message == f"no daemon at {path}: this file is not a socket"


# PHP's settings may keep it from looking at files. The client then says less, and nothing that it does not know.


@pytest.mark.parametrize("setting", NOT_LOOKING)
@pytest.mark.parametrize("socket_is_left", [True, False])
def test_where_php_may_not_look_nobody_listening_is_all_that_is_said(
    path: Path, setting: str, socket_is_left: bool
) -> None:
    if socket_is_left:
        with listening(path, backlog=1):
            pass
    else:
        path.touch()
    error = failure(path, "-d", setting.format(client=CLIENT))
    assert error.kind == "NoDaemonException"
    nobody = "nothing listens there. The socket is left from a daemon that has ended, or the file is not a socket"
    assert error.message == f"no daemon at {path}: {nobody}"


@pytest.mark.parametrize("setting", NOT_LOOKING)
def test_where_php_may_not_look_no_permission_is_all_that_is_said(path: Path, setting: str) -> None:
    with listening(path, backlog=1), denied(path) as user:
        path.chmod(0o640)
        copy = shutil.copy(CLIENT, path.parent)
        error = failure(path, "-d", setting.format(client=copy), client=copy, user=user)
    assert error.kind == "NoDaemonException"
    assert error.message.endswith("may not write to this socket, or may not enter a directory on the way")


@pytest.mark.parametrize("setting", NOT_LOOKING)
def test_where_php_may_not_look_a_missing_file_is_missing_all_the_same(path: Path, setting: str) -> None:
    error = failure(path, "-d", setting.format(client=CLIENT))
    assert error.message.startswith(f"no daemon at {path}: there is no such file.")


@pytest.mark.parametrize(
    "settings",
    [
        "open_basedir=" + str(CLIENT),
        "disable_functions=stream_select,stat,clearstatcache,getenv,getmypid,posix_geteuid,posix_getpwuid,posix_getgrgid",
        "disable_functions=getmypid,posix_getpid",
    ],
)
def test_a_broadcast_needs_little_of_what_an_administrator_may_take_away(shared_daemon: Daemon, settings: str) -> None:
    with running_php(shared_daemon.control_socket, "-d", settings) as php:
        for _ in range(3):
            assert php.run('return $client->broadcast("nobody", str_repeat("x", 60000))->recipients;') == 0
        assert open_sockets(php) == 1


def test_a_function_that_was_taken_away_and_is_needed_is_named(path: Path) -> None:
    error = failure(path, "-d", "disable_functions=stream_socket_client")
    assert (error.kind, error.message) == (
        "NoDaemonException",
        f"cannot connect to {path}: PHP's disable_functions takes away stream_socket_client(), which is needed",
    )


def test_too_many_open_files_are_named_as_what_may_be_the_reason(path: Path) -> None:
    exhaust = "while ($file = @fopen('/dev/null', 'r')) { $files[] = $file; }"
    with listening(path, backlog=1), running_php(path) as php:
        php.run("set_error_handler(null); posix_setrlimit(POSIX_RLIMIT_NOFILE, 64, 64); return 0;")
        with pytest.raises(PhpError) as error:
            php.run(exhaust + "return $client->ping();")
    assert error.value.kind == "NoDaemonException"
    assert "too many files are open" in error.value.message


def test_a_daemon_whose_queue_of_connections_stays_full_is_a_timeout(path: Path) -> None:
    with listening(path, backlog=0), full_queue(path):
        error = failure(path, timeout=SHORT)
    assert error.kind == "TimeoutException"
    assert error.message == (f"the daemon at {path} did not accept the connection within {SHORT:g} s; nothing was sent")
