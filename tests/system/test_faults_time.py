"""Clocks that are set, and processes that stand still for longer than they may be silent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from realtimed.rpc.wire import encode_request
from realtimed.websocket.frames import CloseCode
from tests.kit.clients import (
    REQUEST,
    Publisher,
    closing,
    publisher,
    subscribe,
    undisturbed,
    until_subscribed,
    websocket,
)
from tests.kit.patience import PATIENCE
from tests.kit.plug import running_plug
from tests.kit.stack import ROOT, Daemon, find_php, free_port, running_caddy, running_daemon, standing_still

YEAR: Final = 365 * 86400
OBSERVED: Final = "tests.kit.observed_daemon"


async def event(client: WebSocketConnection) -> dict[str, Any]:
    message = json.loads(await client.get_message())
    assert isinstance(message, dict)
    return message


@asynccontextmanager
async def daemon_with_a_clock(directory: Path, offset: Path, *options: str) -> AsyncIterator[Daemon]:
    async with running_daemon(
        directory, *options, environment={"CLOCK_OFFSET": str(offset)}, module="tests.kit.wandering_clock_daemon"
    ) as daemon:
        yield daemon


@pytest.mark.parametrize("years", [-20, 20])
async def test_a_time_of_day_that_is_set_changes_no_deadline_and_no_age(runtime_dir: Path, years: int) -> None:
    """Twenty years forth or back cut nobody off, forget neither history nor keys, and make no duration wrong."""
    offset = runtime_dir / "offset"
    offset.write_text("0")
    liveliness = ["--heartbeat", "0.2", "--silence-timeout", "1", "--max-age", "1000", "--drain", "0.1"]
    with trio.fail_after(PATIENCE):
        async with (
            daemon_with_a_clock(runtime_dir, offset, *liveliness) as daemon,
            undisturbed(daemon),
            publisher(daemon.control_socket) as sender,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
        ):
            first = await sender.call("broadcast", "news", "before", "a key")
            offset.write_text(str(years * YEAR))
            async with websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]):
                since_when = [each["connected_since"] for each in await sender.call("clients")]
            assert any(abs(moment - time.time()) > 19 * YEAR for moment in since_when), "the clock has been set"
            await trio.sleep(1.3)  # longer than a silence may be
            assert await sender.call("broadcast", "news", "before", "a key") == {**first, "repeated": True}
            since = {"epoch": first["epoch"], "offset": 0}
            await client.send_message(subscribe("news", since=since))
            assert (await event(client))["event"] == "welcome"
            subscribed, missed = await event(client), await event(client)
            assert (subscribed["recovered"], missed["data"]) == (True, "before")
            assert abs(missed["time"] / 1000 - time.time()) < PATIENCE, "it keeps its time"
            assert (await sender.call("broadcast", "news", "after"))["offset"] == 2
            moved = (await event(client))["time"] - missed["time"]
            assert abs(moved / 1000 - years * YEAR) < PATIENCE, "and the next has that of the clock as it is now"
            assert 0 < (await sender.call("stats"))["uptime"] < PATIENCE
    closed = re.findall(r"client closed .* code=(\d+) .*seconds=(\S+)", daemon.log)
    assert {code for code, _ in closed} <= {"1006", "4503"}
    assert all(0 <= float(seconds) < PATIENCE for _, seconds in closed)


@pytest.mark.parametrize(("ahead", "recovered"), [(-20 * YEAR, True), (20 * YEAR, False)])
async def test_history_that_seems_old_is_not_taken_over_and_history_of_the_future_is(
    runtime_dir: Path, ahead: int, recovered: bool
) -> None:
    """A clock that was set between two daemons leads to whole history or to none, never to a part of it."""
    offset, state = runtime_dir / "offset", runtime_dir / "state"
    with trio.fail_after(PATIENCE):
        offset.write_text("0")
        async with (
            daemon_with_a_clock(runtime_dir, offset, "--state-file", str(state)) as daemon,
            publisher(daemon.control_socket) as sender,
        ):
            receipts = [await sender.call("broadcast", "news", f"{number}") for number in range(3)]
        offset.write_text(str(ahead))
        async with (
            daemon_with_a_clock(runtime_dir, offset, "--state-file", str(state)) as daemon,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
        ):
            assert (await event(client))["event"] == "welcome"
            await client.send_message(subscribe("news", since={"epoch": receipts[0]["epoch"], "offset": 1}))
            answer = await event(client)
            assert answer["recovered"] is recovered
            if recovered:
                missed = [await event(client) for _ in range(2)]
                assert [each["data"] for each in missed] == ["1", "2"]
                assert all(abs(each["time"] / 1000 - time.time()) < PATIENCE for each in missed), (
                    "they keep their times"
                )


# Processes that stand still.


async def test_a_handshake_that_arrived_while_the_daemon_stood_still_is_answered(runtime_dir: Path) -> None:
    """Who has sent the whole request, half of it before and half during a standstill, gets its 101."""
    async with (
        running_daemon(runtime_dir, "--handshake-timeout", "0.5", module=OBSERVED) as daemon,
        undisturbed(daemon),
        publisher(daemon.control_socket) as asking,
    ):
        before = await settled(asking)
        async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
            await stream.send_all(REQUEST[:40])
            while (await asking.call("stats"))["descriptors"] == before["descriptors"]:
                pass
            with standing_still(daemon.process.pid):
                await stream.send_all(REQUEST[40:])
                await trio.sleep(0.7)  # longer than the handshake may take
            assert (await stream.receive_some(12)) == b"HTTP/1.1 101"


async def settled(asking: Publisher) -> Any:
    """Return the statistics when the connections of those who have looked whether the daemon serves are over."""
    while (stats := await asking.call("stats"))["publishers"] > 2:
        pass
    return stats


async def line(process: trio.Process) -> str:
    """Return what a process says up to the end of a line."""
    said = b""
    assert process.stdout is not None
    while not said.endswith(b"\n"):
        more = await process.stdout.receive_some()
        assert more, said
        said += more
    return said.decode().rstrip("\n")


CLIENT: Final = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(bytes.fromhex(sys.argv[2]))
print(sock.recv(12).decode(), flush=True)
while sock.recv(4096):
    pass
"""
"""A program that opens a WebSocket and only reads. It need not answer pings while it is stopped, so it never does."""


async def test_a_client_whose_process_stands_still_is_closed_and_forgotten(runtime_dir: Path) -> None:
    """Of a client that is stopped for longer than the silence-timeout nothing is left after the close-timeout."""
    options = ["--heartbeat", "0.2", "--silence-timeout", "0.8", "--close-timeout", "0.2"]
    async with (
        running_daemon(runtime_dir, *options, module=OBSERVED) as daemon,
        undisturbed(daemon),
        publisher(daemon.control_socket) as asking,
    ):
        before = await settled(asking)
        command = [sys.executable, "-c", CLIENT, str(daemon.websocket_socket), REQUEST.hex()]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            async with process.stdout:
                assert await line(process) == "HTTP/1.1 101"
                with standing_still(process.pid):
                    await until_as(asking, before)
                    assert (await asking.call("stats"))["closed"] == {"4408": 1}
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_a_client_whose_network_vanishes_is_closed_and_forgotten(runtime_dir: Path) -> None:
    """Of a client that is cut off without a FIN, in the middle of a stream, nothing is left after its timeouts."""
    options = ["--heartbeat", "0.2", "--silence-timeout", "0.8", "--close-timeout", "0.2", "--websocket", "127.0.0.1:0"]
    async with running_daemon(runtime_dir, *options, module=OBSERVED) as daemon, undisturbed(daemon):
        match = re.search(r"127\.0\.0\.1:(\d+)", daemon.log)
        assert match is not None
        async with publisher(daemon.control_socket) as asking, running_plug(free_port(), int(match[1])) as plug:
            before = await settled(asking)
            async with websocket(plug.port) as client:
                await client.send_message(subscribe("news"))
                await until_subscribed(asking, "news", 1)
                plug.clog()
                for _ in range(100):  # 6 MB: more than the network holds
                    await asking.call("broadcast", "news", "x" * 60_000)
                while not (await asking.call("stats"))["closed"]:
                    pass
                await until_as(asking, before)
                stats = await asking.call("stats")
                assert set(stats["closed"]) <= {"4408", "4409"}
                assert stats["backlog_bytes"] == 0
                plug.pull()


async def until_as(asking: Publisher, before: Any) -> None:
    """Wait until there are as many clients, tasks and descriptors as before."""
    now: Any = {}
    while any(now.get(key) != before[key] for key in ("clients", "tasks", "descriptors")):
        now = await asking.call("stats")


PUBLISHING: Final = """
$socket = stream_socket_client('unix://' . $argv[1]);
fwrite($socket, hex2bin($argv[2]));
echo "half\n";
fgets(STDIN);
@fwrite($socket, hex2bin($argv[3]));
echo bin2hex((string) fread($socket, 4096)), "\n";
"""


@pytest.mark.parametrize("standstill", [0.1, 1.2])
async def test_a_php_that_stands_still_in_a_command_holds_up_nobody(runtime_dir: Path, standstill: float) -> None:
    """A command whose second half comes within command-timeout is carried out; a later one has no effect at all."""
    command = encode_request(1, "broadcast", ("news", "from PHP"))
    async with running_daemon(runtime_dir, "--command-timeout", "1") as daemon, undisturbed(daemon):
        arguments = [str(daemon.control_socket), command[:-4].hex(), command[-4:].hex()]
        process = await trio.lowlevel.open_process(
            [find_php(), "-r", PUBLISHING, "--", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            async with process.stdout, process.stdin, publisher(daemon.control_socket) as other:
                assert await line(process) == "half"
                with standing_still(process.pid):
                    await process.stdin.send_all(b"\n")
                    until = trio.current_time() + standstill
                    count = 0
                    while trio.current_time() < until:
                        assert (await other.call("broadcast", "other", "hello"))["recipients"] == 0
                        count += 1
                answer = bytes.fromhex(await line(process))
                published = (await other.call("stats"))["publications"]
            late = b"command-timeout, is 1 s" in answer
            assert late is (standstill > 1)
            assert published == count + (0 if late else 1)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_clients_of_a_caddy_that_stood_still_miss_nothing(runtime_dir: Path) -> None:
    """After SIGCONT each of them has everything, or is closed with 4409 and has the rest when it resumes."""
    count, message = 2000, "x" * 4000  # 8 MB for each client: more than the kernel, Caddy and a backlog hold
    options = ["--max-backlog", "256K", "--history-size", str(count), "--heartbeat", "1", "--silence-timeout", "20"]
    async with (
        running_daemon(runtime_dir, *options) as daemon,
        undisturbed(daemon),
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket) as caddy,
        publisher(daemon.control_socket) as sender,
        AsyncExitStack() as stack,
    ):
        through_caddy = {"subprotocols": ["realtime.v1"], "headers": [("Origin", f"http://localhost:{caddy.port}")]}
        clients = []
        for _ in range(3):
            client = await stack.enter_async_context(websocket(caddy.port, **through_caddy))  # type: ignore[arg-type]
            await client.send_message(subscribe("news"))
            assert [(await event(client))["event"] for _ in range(2)] == ["welcome", "subscribed"]
            clients.append(client)
        with standing_still(caddy.process.pid):
            for _ in range(count):
                receipt = await sender.call("broadcast", "news", message)
            assert (await sender.call("stats"))["backlog_bytes"] <= 3 * 2**18
        cut = 0
        for client in clients:
            offsets, code = await offsets_until(client, count)
            while offsets[-1] < count:
                assert code == CloseCode.SLOW_CONSUMER
                cut += 1
                async with websocket(caddy.port, **through_caddy) as again:  # type: ignore[arg-type]
                    await again.send_message(
                        subscribe("news", since={"epoch": receipt["epoch"], "offset": offsets[-1]})
                    )
                    assert (await event(again))["event"] == "welcome"
                    assert (await event(again))["recovered"] is True
                    more, code = await offsets_until(again, count)
                    offsets += more
            assert offsets == list(range(1, count + 1))
        assert cut, "more was published than fits between the daemon and a client"


async def offsets_until(client: WebSocketConnection, last: int) -> tuple[list[int], int]:
    """Read messages up to the offset `last`; return their offsets, and the code if the connection ends before."""
    offsets: list[int] = []
    try:
        while not offsets or offsets[-1] < last:
            message = await event(client)
            assert message["event"] == "message"
            offsets.append(message["offset"])
    except ConnectionClosed:
        code, _ = await closing(client)
        return offsets, code
    return offsets, 0
