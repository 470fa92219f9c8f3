"""The daemon as its users meet it: broadcasting, watching, slow clients, silence, limits, start and stop."""

from __future__ import annotations

import grp
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection
from wsproto.events import CloseConnection, Ping, TextMessage

from realtimed.rpc.wire import encode_notification, encode_request
from realtimed.websocket.frames import CloseCode
from tests.kit.clients import RawClient, publisher, raw_client, subscribe, until_subscribed, websocket
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, PartFailedError, running_daemon


async def test_a_broadcast_reaches_everyone_on_the_channel_and_nobody_else(daemon: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            websocket(daemon.websocket_socket) as plain,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as enveloped,
            websocket(daemon.websocket_socket) as elsewhere,
            publisher(daemon.control_socket) as sender,
        ):
            assert json.loads(await enveloped.get_message())["event"] == "welcome"
            await plain.send_message(subscribe("news"))
            await enveloped.send_message(subscribe("news"))
            await elsewhere.send_message(subscribe("sport"))
            assert json.loads(await enveloped.get_message())["event"] == "subscribed"
            await until_subscribed(sender, "news", 2)
            await until_subscribed(sender, "sport", 1)
            text = await sender.call("broadcast", "news", "hellö")
            binary = await sender.call("broadcast", "news", b"\xff\x00")
            await sender.call("broadcast", "sport", "goal")
            assert (text["recipients"], text["offset"]) == (2, 1)
            assert binary == {**text, "offset": 2}
            assert [await plain.get_message(), await plain.get_message()] == ["hellö", b"\xff\x00"]
            event = json.loads(await enveloped.get_message())
            assert event == {
                "event": "message", "channel": "news", "offset": 1, "time": event["time"], "data": "hellö",
            }  # fmt: skip
            assert json.loads(await enveloped.get_message())["base64"] == "/wA="
            assert await elsewhere.get_message() == "goal"


async def subscribe_all(clients: list[RawClient], channel: str) -> None:
    for client in clients:
        await client.send(TextMessage(data=subscribe(channel)))


async def test_one_that_stops_reading_and_one_that_pings_while_closing_disturb_none_of_999_others(
    runtime_dir: Path,
) -> None:
    message = "x" * 1000
    count = 3000  # 3 MB: more than the kernel keeps and the backlog may hold

    async with (
        # The stalled one is cut off early, and has to find its Close when it reads at last.
        running_daemon(runtime_dir, "--max-backlog", "256K", "--close-timeout", f"{PATIENCE}") as daemon,
        publisher(daemon.control_socket) as sender,
        raw_client(daemon.websocket_socket) as stalled,
        raw_client(daemon.websocket_socket) as pinging,
        trio.open_nursery() as nursery,
    ):
        nursery.cancel_scope.deadline = trio.current_time() + PATIENCE
        received: dict[int, int] = {}
        all_ready = trio.Event()

        async def read_everything(number: int, messages: int) -> None:
            async with raw_client(daemon.websocket_socket) as client:
                await subscribe_all([client], "news" if number < 20 else "quiet")
                received[number] = 0
                if len(received) == 998:
                    all_ready.set()
                while received[number] < messages:
                    client.frames.receive_data(await client.stream.receive_some(2**16))
                    for event in client.frames.events():
                        assert isinstance(event, (TextMessage, Ping))
                        received[number] += isinstance(event, TextMessage) and event.message_finished

        for number in range(998):  # 20 that share the channel with the stalled one, and many beside
            nursery.start_soon(read_everything, number, count if number < 20 else 1)
        await all_ready.wait()
        await subscribe_all([stalled, pinging], "news")
        await until_subscribed(sender, "news", 22)
        await until_subscribed(sender, "quiet", 978)
        await pinging.send(TextMessage(data="not JSON"), *[Ping()] * 10)
        for _ in range(count):
            await sender.call("broadcast", "news", message)
        await sender.call("broadcast", "quiet", "done")
        while received != {number: count if number < 20 else 1 for number in range(998)}:
            await trio.lowlevel.checkpoint()
        [close] = [each for each in await stalled.events_until_eof() if isinstance(each, CloseConnection)]
        assert close.code == CloseCode.SLOW_CONSUMER
        assert close.reason is not None
        assert "max-backlog, is 262144" in close.reason
        assert await pinging.close_code() == CloseCode.BAD_MESSAGE
        while (statistics := await sender.call("stats"))["clients"]:
            pass
        assert statistics["closed"] == {"1006": 998, "4400": 1, "4409": 1}, "those who have read everything hang up"
        assert "Traceback" not in daemon.log


async def test_a_backlog_has_a_deadline(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--backlog-timeout", "0.2", "--close-timeout", "0.5") as daemon,
            raw_client(daemon.websocket_socket) as stalled,
            publisher(daemon.control_socket) as sender,
        ):
            await subscribe_all([stalled], "news")
            await until_subscribed(sender, "news", 1)
            while not (await sender.call("stats"))["backlogged"]:
                await sender.call("broadcast", "news", "x" * 1000)
            while "4409" not in (await sender.call("stats"))["closed"]:
                pass
            events = await stalled.events_until_eof()
            assert isinstance(events[-1], CloseConnection)
            assert events[-1].code == CloseCode.SLOW_CONSUMER
            assert all(isinstance(event, TextMessage) for event in events[:-1])
            assert "a message has waited for 0.2 s" in daemon.log


async def test_a_client_that_pauses_has_everything_in_order(daemon: Daemon) -> None:
    messages = [f"{n} " + "x" * 997 for n in range(800)]
    with trio.fail_after(PATIENCE):
        async with raw_client(daemon.websocket_socket) as pausing, publisher(daemon.control_socket) as sender:
            await subscribe_all([pausing], "news")
            await until_subscribed(sender, "news", 1)
            for message in messages:
                await sender.call("broadcast", "news", message)
            assert (await sender.call("stats"))["backlogged"] == 1
            seen = ""
            while len(seen) < len("".join(messages)):
                pausing.frames.receive_data(await pausing.stream.receive_some(2**16))
                seen += "".join(event.data for event in pausing.frames.events() if isinstance(event, TextMessage))
            assert seen == "".join(messages)
            while (await sender.call("stats"))["backlog_bytes"]:
                pass
            await sender.call("broadcast", "news", "and on")
            assert await pausing.stream.receive_some(100) == b"\x81\x06and on"


async def test_clients_are_pinged_and_the_silent_are_sent_away(runtime_dir: Path) -> None:
    options = ("--heartbeat", "0.2", "--silence-timeout", "1", "--close-timeout", "0.5")
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, *options) as daemon,
            websocket(daemon.websocket_socket) as living,  # trio-websocket answers pings by itself
            raw_client(daemon.websocket_socket) as silent,
            publisher(daemon.control_socket) as asking,
        ):
            events = await silent.events_until_eof()
            assert isinstance(events[-1], CloseConnection)
            assert events[-1].code == CloseCode.SILENT
            assert events[:-1].count(Ping(payload=b"")) >= 3
            [left] = await asking.call("clients")
            await living.send_message(subscribe("news"))
            await until_subscribed(asking, "news", 1)
            assert re.fullmatch(r"c-[0-9a-f]{4}-1", left["id"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly(runtime_dir: Path, number: signal.Signals) -> None:
    async def goodbye(client: WebSocketConnection) -> list[Any]:
        seen: list[Any] = []
        try:
            while True:
                seen.append(json.loads(await client.get_message()))
        except ConnectionClosed:
            assert client.closed is not None
            return [*seen, client.closed.code, client.closed.reason]

    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as one,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as two,
            publisher(daemon.control_socket) as sender,
        ):
            for client in (one, two):
                await client.get_message()
                await client.send_message(subscribe("news"))
                await client.get_message()
            last_words = [encode_notification("broadcast", ["news", str(n)]) for n in range(500)]
            await sender.stream.send_all(b"".join(last_words) + encode_request(9, "ping", []))
            assert (await sender.answer()).result == "pong"
            daemon.process.send_signal(number)
            retries = set()
            for client in (one, two):
                *messages, farewell, code, reason = await goodbye(client)
                assert [message["data"] for message in messages] == [str(n) for n in range(500)]
                assert (farewell["event"], farewell["reason"]) == ("goodbye", "restart")
                assert (code, reason) == (
                    CloseCode.COME_BACK, f"restarting, come back in {farewell['retry_after_ms']} ms",
                )  # fmt: skip
                retries.add(farewell["retry_after_ms"])
            assert len(retries) == 2, "clients come back at different times"
            assert await sender.stream.receive_some() == b""
            assert await daemon.wait() == 0
            assert not daemon.control_socket.exists()
            assert not daemon.websocket_socket.exists()


async def test_stopping_does_not_wait_for_ever_for_those_who_do_not_answer(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--close-timeout", "0.3") as daemon,
            raw_client(daemon.websocket_socket),
            await trio.open_unix_socket(daemon.websocket_socket) as half,
        ):
            await half.send_all(b"GET /ws HTTP/1.1\r\n")
            daemon.process.terminate()
            assert await daemon.wait() == 0


async def test_a_dead_daemons_sockets_are_replaced_and_a_living_ones_are_not(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir) as daemon:
            daemon.process.kill()
            await daemon.wait()
            assert daemon.control_socket.exists()
        async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as asking:
            for options in (
                ("--socket", f"{daemon.control_socket}", "--websocket", "127.0.0.1:0"),
                ("--socket", f"{runtime_dir}/other.sock", "--websocket", f"unix:{daemon.websocket_socket}"),
            ):
                second = await trio.to_thread.run_sync(partial(realtimed, *options))
                assert second.returncode == 2
                assert "another process is listening there; is realtimed running already?" in second.stderr
            assert not (runtime_dir / "other.sock").exists()
            assert await asking.call("ping") == "pong"
            assert daemon.control_socket.exists()


async def test_what_is_not_a_socket_is_left_alone(runtime_dir: Path) -> None:
    (runtime_dir / "realtime.sock").write_text("precious")
    with pytest.raises(PartFailedError, match="not a socket; move it away"):
        async with running_daemon(runtime_dir):
            pass
    assert (runtime_dir / "realtime.sock").read_text() == "precious"
    assert not (runtime_dir / "realtime-ws.sock").exists()


async def test_the_sockets_have_the_configured_mode_and_group(runtime_dir: Path) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    async with running_daemon(runtime_dir, "--socket-mode", "0606", "--socket-group", group) as daemon:
        for path in (daemon.control_socket, daemon.websocket_socket):
            assert stat.S_IMODE(path.stat().st_mode) == 0o606
            assert path.stat().st_gid == os.getgid()
    async with running_daemon(runtime_dir) as daemon:
        assert stat.S_IMODE(daemon.control_socket.stat().st_mode) == 0o660


async def test_tcp_addresses_serve_as_well(runtime_dir: Path) -> None:
    addresses = ("--websocket", "127.0.0.1:0", "--websocket", "[::1]:0")
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, *addresses) as daemon:
            ports = re.search(r"127\.0\.0\.1:(\d+),\[::1\]:(\d+)", daemon.log)
            assert ports is not None
            for host, port in (("127.0.0.1", ports[1]), ("::1", ports[2])):
                async with await trio.open_tcp_stream(host, int(port)) as stream:
                    await stream.send_all(b"GET /ws HTTP/1.1\r\n\r\n")
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 426")


def realtimed(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "realtimed", *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = realtimed("--websocket", address, "--socket", "/nonexistent/rt.sock")
    assert result.returncode == 2
    assert result.stderr.startswith(f"realtimed: cannot listen at {address}: Address already in use")


def test_a_directory_that_is_missing_is_named() -> None:
    result = realtimed("--websocket", "127.0.0.1:0", "--socket", "/nonexistent/rt.sock")
    assert result.returncode == 2
    assert result.stderr == "realtimed: cannot listen at unix:/nonexistent/rt.sock: No such file or directory\n"


def test_check_says_all_that_is_wrong_and_starts_nothing() -> None:
    result = realtimed("--check", "--max-message", "lots", "--heartbeat", "0", REALTIME_SOCKET_MODE="rw")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert [line.partition(" above")[0].partition(", got")[0] for line in sorted(lines)] == [
        "realtimed: --heartbeat: expected a number of seconds",
        "realtimed: --max-message: expected a number of bytes",
        'realtimed: REALTIME_SOCKET_MODE: expected an octal number such as "0660"',
    ]
    assert realtimed("--check").stdout == "The configuration is valid.\n"


def test_help_names_every_option_and_its_variable() -> None:
    text = realtimed("--help", COLUMNS="200").stdout
    for word in ("--socket ", "REALTIME_WEBSOCKET", "--max-backlog", "default 1M", "--config", "--check"):
        assert word in text
