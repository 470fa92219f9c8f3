"""Section 5 of docs/protocol.md: close codes, over real sockets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trio
from wsproto.events import Event, TextMessage

from realtimed.websocket.frames import CloseCode
from tests.kit.clients import close_of, closing, publisher, raw_client, stalled, subscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.peers import SMALL, SMALL_BACKLOG, STRICT, Daemons, Opening
from tests.kit.stack import Daemon, running_daemon

# 5. Close codes


async def closed_after(daemon: Daemon, sent: bytes | Event) -> tuple[int, str]:
    """Send something on a connection of its own, and return the code and the reason of the Close."""
    with trio.fail_after(PATIENCE):
        async with raw_client(daemon.websocket_socket) as client:
            if isinstance(sent, bytes):
                await client.stream.send_all(sent)
            else:
                await client.send(sent)
            return close_of(await client.events_until_eof())


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x81\x05hello", 1002),
        (b"\x81\x81\x00\x00\x00\x00\xff", 1007),
        (TextMessage(data="x" * 1001), 1009),
        (TextMessage(data="not JSON"), 4400),
        (TextMessage(data=subscribe("x " * 25)), 4400),
        (b"\x89\x80mask" * 11, 4429),
    ],
)
async def test_5_1_every_close_has_a_reason_of_123_bytes_at_most(
    strict: Daemon, sent: bytes | Event, code: int
) -> None:
    closed_with, reason = await closed_after(strict, sent)
    assert closed_with == code
    assert 5 < len(reason.encode()) <= 123


@pytest.mark.parametrize(
    "frames",
    [
        b"\x81\x05hello",  # not masked
        b"\xf1\x80mask",  # reserved bits
        b"\x83\x80mask",  # reserved opcode
        b"\x09\x80mask",  # a fragmented ping
        b"\x89\xfe\x00\x7e",  # a ping of 126 bytes
        b"\x80\x80mask",  # a continuation of nothing
        b"\x88\x81maskx",  # half a close code
    ],
)
async def test_5_2_what_breaks_the_websocket_protocol_is_1002(strict: Daemon, frames: bytes) -> None:
    assert (await closed_after(strict, frames))[0] == 1002


async def test_5_3_text_that_is_not_utf_8_is_1007(strict: Daemon) -> None:
    assert (await closed_after(strict, b"\x81\x82\x00\x00\x00\x00\xff\xff"))[0] == 1007


async def test_5_4_a_message_above_max_inbound_is_1009(strict: Daemon) -> None:
    code, reason = await closed_after(strict, TextMessage(data="x" * 1001))
    assert (code, reason) == (1009, "the limit, max-inbound, is 1000 bytes a message")


async def test_5_5_a_bad_message_is_4400(open_peers: Opening) -> None:
    browser = await (await open_peers()).browser()
    await browser.send("hello")
    code, reason = await browser.closing()
    assert code == 4400
    assert reason.startswith("not JSON")


async def test_5_6_who_is_disconnected_has_4403(shared: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            websocket(shared.websocket_socket, subprotocols=["realtime.v1"]) as client,
            publisher(shared.control_socket) as admin,
        ):
            name = json.loads(await client.get_message())["client"]
            assert await admin.call("disconnect", name) == {"disconnected": 1}
            assert await closing(client) == (4403, "disconnected by an administrator")


async def test_5_7_a_path_that_does_not_exist_is_4404(shared: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with websocket(shared.websocket_socket, resource="/nope") as client:
            assert (await closing(client))[0] == 4404


async def test_5_8_silence_is_4408(lively: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(lively.websocket_socket) as silent:
            assert close_of(await silent.events_until_eof())[0] == 4408
            assert "client closed" in lively.log
            assert "code=4408" in lively.log


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (SMALL_BACKLOG, "the limit, max-backlog, is 500000"),
        (STRICT, "a message has waited for 0.2 s; the limit is backlog-timeout"),
        ({"max_backlog_total": 65536, "close_timeout": 0.2}, "for all clients; the limit, max-backlog-total, is 65536"),
    ],
)
async def test_5_9_a_slow_consumer_has_4409(
    daemons: Daemons, channel: str, settings: dict[str, object], says: str
) -> None:
    daemon = await trio.to_thread.run_sync(daemons.get, settings)
    with trio.fail_after(PATIENCE):
        async with raw_client(daemon.websocket_socket) as client, publisher(daemon.control_socket) as sender:
            code, reason = await stalled(sender, client, channel, 20, 50_000)
    assert code == 4409
    assert says in reason


async def test_5_10_too_much_is_4429(strict: Daemon, open_peers: Opening, channel: str) -> None:
    code, reason = await closed_after(strict, b"\x89\x80mask" * 11)
    assert (code, reason) == (
        4429, "the limit is 0.001 frames a second (inbound-rate), 10 at once (inbound-burst)",
    )  # fmt: skip
    browser = await (await open_peers(**SMALL)).browser()
    for number in range(3):
        await browser.say("subscribe", f"{channel}-{number}")
    assert (await browser.closing())[0] == 4429


async def test_5_11_a_restart_is_4503(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir) as daemon, websocket(daemon.websocket_socket) as client:
            daemon.process.terminate()
            code, reason = await closing(client)
    assert code == 4503
    assert re.fullmatch(r"restarting, come back in \d+ ms", reason)


async def test_5_11_an_age_of_max_age_is_4503(runtime_dir: Path) -> None:
    options = ("--max-age", "0.2", "--heartbeat", "0.1")
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon, websocket(daemon.websocket_socket) as client:
            code, reason = await closing(client)
    assert code == 4503
    assert re.fullmatch(r"connected for max-age, come back in \d+ ms", reason)


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_5_12_an_administrator_may_choose_the_code(shared: Daemon, code: int) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            websocket(shared.websocket_socket, subprotocols=["realtime.v1"]) as client,
            publisher(shared.control_socket) as admin,
        ):
            name = json.loads(await client.get_message())["client"]
            assert await admin.call("disconnect", name, code, "ä" * 61) == {"disconnected": 1}
            assert await closing(client) == (code, "ä" * 61)


async def test_5_13_a_connection_that_broke_counts_as_1006(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as asking:
            async with raw_client(daemon.websocket_socket):
                pass
            while (await asking.call("stats"))["closed"] != {"1006": 1}:
                pass
            assert "client closed" in daemon.log
            assert "code=1006" in daemon.log


def test_5_1_every_code_has_a_clause() -> None:
    document = Path(__file__).parents[2].joinpath("docs", "protocol.md").read_text()
    documented = set(map(int, re.findall(r"^\| 5\.\d+ \| (\d{4}) ", document, re.MULTILINE)))
    assert documented == set(CloseCode) - {CloseCode.NORMAL, CloseCode.GOING_AWAY}
