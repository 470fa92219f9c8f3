"""Section 6.11 of docs/protocol.md, as far as it is about upgrades."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from realtimed.rpc.wire import encode_request
from tests.kit.blocking import daemon_in_thread
from tests.kit.clients import Publisher, publisher
from tests.kit.failing_successor import CRASH, fail_at
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import Daemon
from tests.kit.successors import ended

NOBODY = 65534


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    options = ("--socket-mode", "0666")
    with daemon_in_thread(runtime_dir, *options, module="tests.kit.failing_successor") as daemon, ended(daemon):
        yield daemon


async def result(asking: Publisher) -> Any:
    return (await asking.answer()).result


async def test_6_11_27_an_upgrade_is_answered_by_the_new_process(daemon: Daemon) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with publisher(daemon.control_socket) as asking:
            before = await asking.call("broadcast", "news", "before")
            commands = [("upgrade", ()), ("info", ()), ("broadcast", ("news", "after")), ("ping", ())]
            await asking.stream.send_all(b"".join(encode_request(7, *each) for each in commands))
            upgrade, info, receipt, pong = [await result(asking) for _ in commands]
    assert upgrade["former_pid"] == daemon.process.pid
    assert upgrade["pid"] == info["pid"] != daemon.process.pid
    assert upgrade["version"] == upgrade["former_version"] == info["version"]
    assert 0 < upgrade["pause"] < upgrade["seconds"]
    assert (upgrade["clients"], upgrade["publishers"]) == (0, 1)
    assert receipt == {**before, "offset": before["offset"] + 1}
    assert pong == "pong"


async def test_6_11_28_an_upgrade_that_fails_changes_nothing(daemon: Daemon) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with publisher(daemon.control_socket) as asking, publisher(daemon.control_socket) as other:
            with fail_at(daemon, CRASH):
                await asking.stream.send_all(encode_request(7, "upgrade", ()) + encode_request(8, "info", ()))
                await daemon.until_logged("INFO upgrading")  # the new process takes a while to start
                refusal = await other.call("upgrade")
                first, second = await asking.answer(), await asking.answer()
            assert refusal == {"code": "upgrade_failed", "message": "another upgrade is under way"}
            assert isinstance(first.error, dict)
            assert (first.id, first.error["code"]) == (7, "upgrade_failed")
            assert "its exit status is 3" in first.error["message"]
            assert isinstance(second.result, dict)
            assert (second.id, second.result["pid"]) == (8, daemon.process.pid)
            assert (await other.call("upgrade"))["former_pid"] == daemon.process.pid


async def test_6_11_29_only_root_and_the_daemons_user_may_upgrade(daemon: Daemon) -> None:
    daemon.control_socket.parent.chmod(0o755)
    os.seteuid(NOBODY)  # what counts is who connects
    try:
        stream = publisher(daemon.control_socket)
        other = await stream.__aenter__()
    finally:
        os.seteuid(0)
    refusal = await other.call("upgrade")
    await stream.__aexit__(None, None, None)
    assert refusal["code"] == "not_allowed"
    assert refusal["message"] == f"only root and the daemon's own user, {os.geteuid()}, may upgrade it"
    async with publisher(daemon.control_socket) as own:
        assert (await own.call("upgrade"))["pid"] != daemon.process.pid


async def test_6_12_13_upgrade_failed(daemon: Daemon) -> None:
    async with publisher(daemon.control_socket) as asking:
        with fail_at(daemon, CRASH):
            assert (await asking.call("upgrade"))["code"] == "upgrade_failed"
        assert await asking.call("ping") == "pong"
