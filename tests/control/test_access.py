"""Who may publish: the users and groups of allow-user and allow-group, by what the kernel says of the peer."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from realtimed import Client, RefusedError
from realtimed.config.loading import load
from realtimed.errors import ConfigurationError
from realtimed.rpc.wire import Decoder, Response, encode_notification, encode_request
from tests.kit.clients import publisher
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, find_php, running_daemon

OWN_USER = pwd.getpwuid(os.geteuid()).pw_name
OWN_GROUP = grp.getgrgid(os.getegid()).gr_name
OTHER_USER = next(each for each in ("nobody", "www-data") if each != OWN_USER)
OTHER_GROUP = "daemon"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

ASK = (
    '$socket = stream_socket_client("unix://$argv[1]"); fwrite($socket, hex2bin($argv[2]));'
    "stream_socket_shutdown($socket, STREAM_SHUT_WR); echo stream_get_contents($socket);"
)


def let_others_in(daemon: Daemon) -> None:
    daemon.control_socket.parent.chmod(0o755)


async def ping_as(daemon: Daemon, user: str, group: str, *extra: str) -> Response:
    """Ping the daemon from a process of another user."""
    request = encode_request(7, "ping", []).hex()
    done: subprocess.CompletedProcess[bytes] = await trio.run_process(
        [find_php(), "-n", "-r", ASK, "--", daemon.control_socket, request],
        user=user, group=group, extra_groups=list(extra), cwd="/", capture_stdout=True,
    )  # fmt: skip
    [answer] = Decoder(2**16).feed(done.stdout)
    assert isinstance(answer, Response)
    assert answer.id == 7
    return answer


async def test_without_the_settings_whoever_can_open_the_socket_is_served(daemon: Daemon) -> None:
    async with publisher(daemon.control_socket) as sender:
        assert await sender.call("ping") == "pong"


@pytest.mark.parametrize("options", [("--allow-user", OTHER_USER), ("--allow-group", OTHER_GROUP)])
async def test_all_others_are_refused_with_words(runtime_dir: Path, options: tuple[str, str]) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as sender:
            for method, params in (("broadcast", ["news", "x"]), ("clients", []), ("watch", ["*"]), ("nope", [])):
                refusal = await sender.call(method, *params)
                assert refusal["code"] == "not_allowed"
                assert f"you are user {os.geteuid()} of group {os.getegid()}" in refusal["message"]
                assert "allow-user" in refusal["message"]
            for _ in range(10):
                await sender.stream.send_all(encode_notification("broadcast", ["news", "x"]))
            await sender.call("ping")
        refused = f"publisher not allowed pid={os.getpid()} uid={os.geteuid()} gid={os.getegid()}"
        assert daemon.log.count(refused) == 2, "once a connection: this one, and that of whoever waited for the daemon"
        assert daemon.log.count("notification refused code=not_allowed") == 1


async def test_python_and_the_shell_say_so(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir, "--allow-user", OTHER_USER) as daemon:

        def broadcast() -> str:
            with Client(daemon.control_socket) as client, pytest.raises(RefusedError) as refusal:
                client.broadcast("news", "hello")
            return refusal.value.code

        assert await trio.to_thread.run_sync(broadcast) == "not_allowed"
        command = [sys.executable, "-m", "realtimed.cli.realtimectl", "--socket", str(daemon.control_socket), "ping"]
        done = await trio.run_process(command, check=False, capture_stderr=True)
        assert done.returncode == 1
        assert b"(not_allowed)" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--allow-user", OWN_USER),
        ("--allow-user", str(os.geteuid())),
        ("--allow-group", OWN_GROUP),
        ("--allow-user", OTHER_USER, "--allow-group", OWN_GROUP),
        ("--allow-user", OTHER_USER, "--allow-user", OWN_USER),
    ],
)
async def test_who_is_named_is_served(runtime_dir: Path, options: tuple[str, ...]) -> None:
    async with running_daemon(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as sender:
        assert await sender.call("ping") == "pong"


@as_root
async def test_the_kernel_says_who_it_is(runtime_dir: Path) -> None:
    options = ("--socket-mode", "0666", "--allow-user", OTHER_USER, "--allow-group", OTHER_GROUP)
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon:
            let_others_in(daemon)
            assert (await ping_as(daemon, OTHER_USER, "nogroup")).result == "pong"
            assert (await ping_as(daemon, "games", OTHER_GROUP)).result == "pong"
            assert (await ping_as(daemon, "games", "games", OTHER_GROUP, "mail")).result == "pong", "supplementary"
            for user, groups in (("games", ["games"]), ("games", ["games", "mail"]), ("root", ["root"])):
                error: Any = (await ping_as(daemon, user, *groups)).error
                assert error["code"] == "not_allowed", user
                assert f"you are user {pwd.getpwnam(user).pw_uid} " in error["message"]


@as_root
async def test_who_connects_is_logged(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir, "--socket-mode", "0666", "--log-level", "debug") as daemon:
        let_others_in(daemon)
        await ping_as(daemon, OTHER_USER, "nogroup")
        user, group = pwd.getpwnam(OTHER_USER).pw_uid, grp.getgrnam("nogroup").gr_gid
        assert f" uid={user} gid={group}\n" in daemon.log


@pytest.mark.parametrize("value", ["nobody games", ["nobody", "games"], ("65534", 5)])
def test_names_numbers_and_lists(value: object) -> None:
    assert load({"allow_user": value}).allow_user == (65534, 5)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("no\x1bbody", r"expected a user of this system; there is none called 'no\\x1bbody'"),
        ("", "expected the name or number of at least one user"),
        ([], "expected the name or number of at least one user"),
        (True, "expected the name or number of at least one user"),
    ],
)
def test_a_user_that_does_not_exist_is_an_error(value: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load({"allow_user": value})
