"""Section 7 of docs/protocol.md: limits, over real sockets; what is just within, and what is just beyond."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from wsproto.events import BytesMessage, Event, TextMessage

from realtimed.rpc.wire import encode_request
from tests.kit.clients import (
    REQUEST,
    accepted_head,
    close_of,
    handshake_of,
    http_answer,
    publisher,
    raw_client,
    stalled,
    subscribe,
    websocket,
)
from tests.kit.patience import PATIENCE
from tests.kit.peers import SMALL_BACKLOG, Daemons, Opening
from tests.kit.stack import Daemon, running_daemon

# 7. Limits: what is just within, and what is just beyond.


@pytest.mark.parametrize("kind", ["text", "binary"])
async def test_7_1_max_inbound_bounds_all_fragments_together(strict: Daemon, kind: str) -> None:
    def part(size: int, *, last: bool) -> Event:
        if kind == "text":
            return TextMessage(data="ä" * (size // 2) + "x" * (size % 2), message_finished=last)
        return BytesMessage(data=b"x" * size, message_finished=last)

    with trio.fail_after(PATIENCE):
        for beyond in (0, 1):
            async with raw_client(strict.websocket_socket) as client:
                await client.send(part(500, last=False), part(500 + beyond, last=True))
                code, _ = close_of(await client.events_until_eof())
                assert code == (1009 if beyond else 4400), "what is within is read, and is no JSON"


async def test_7_2_inbound_burst_bounds_frames_of_every_kind(strict: Daemon) -> None:
    within = b"\x89\x80mask" * 9 + b"\x8a\x80mask"
    with trio.fail_after(PATIENCE):
        async with raw_client(strict.websocket_socket) as client:
            await client.stream.send_all(within)
            pongs = b""
            while len(pongs) < 18:
                pongs += await client.stream.receive_some()
            assert pongs == b"\x8a\x00" * 9
            await client.stream.send_all(b"\x8a\x80mask")
            assert close_of(await client.events_until_eof())[0] == 4429


async def test_7_2_inbound_rate_lets_more_come_with_time(runtime_dir: Path) -> None:
    options = ("--inbound-rate", "50", "--inbound-burst", "1", "--close-timeout", "0.2")
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon, raw_client(daemon.websocket_socket) as client:
            for _ in range(5):
                await client.stream.send_all(b"\x89\x80mask")
                assert await client.stream.receive_some() == b"\x8a\x00"
                await trio.sleep(0.05)  # at 50 a second, there is another one to be had after 0.02
            await client.stream.send_all(b"\x89\x80mask" * 3)
            assert close_of(await client.events_until_eof())[0] == 4429


async def test_7_3_max_channels_bounds_subscriptions(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers(inbound_burst=200)).enveloped()
    answers = [await browser.ask("subscribe", f"{channel}-{number}") for number in range(129)]
    assert [answer["event"] for answer in answers] == ["subscribed"] * 128 + ["error"]
    assert answers[-1]["code"] == "too_many_channels"


async def test_7_4_handshake_timeout_bounds_the_request(strict: Daemon) -> None:
    began = trio.current_time()
    assert "408" in await http_answer(strict.websocket_socket, REQUEST[:-1])
    assert trio.current_time() - began >= 0.2


async def test_7_5_max_backlog_bounds_what_waits(daemons: Daemons, channel: str) -> None:
    daemon = await trio.to_thread.run_sync(daemons.get, SMALL_BACKLOG)
    with trio.fail_after(PATIENCE):
        async with raw_client(daemon.websocket_socket) as client, publisher(daemon.control_socket) as sender:
            await client.send(TextMessage(data=subscribe(channel)))
            while channel not in await sender.call("channels"):
                pass

            async def settled() -> Any:
                while (stats := await sender.call("stats"))["unsent_bytes"]:
                    pass
                return stats

            while not (await settled())["backlogged"]:
                await sender.call("broadcast", channel, "x" * 40_000)
            while (waiting := (await settled())["backlog_bytes"]) < 460_000:
                assert (await sender.call("broadcast", channel, "x" * 20_000))["recipients"] == 1
            await sender.call("broadcast", channel, "x" * (500_000 - waiting - 14))  # 10 bytes below the limit
            assert (await sender.call("ping")) == "pong"
            assert channel in await sender.call("channels")
            await sender.call("broadcast", channel, "x" * 20)
            while channel in await sender.call("channels"):
                pass
            assert close_of(await client.events_until_eof())[0] == 4409


async def test_7_6_backlog_timeout_bounds_how_long(strict: Daemon, channel: str) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(strict.websocket_socket) as client, publisher(strict.control_socket) as sender:
            began = trio.current_time()
            code, reason = await stalled(sender, client, channel, 10, 60_000)
    assert (code, "backlog-timeout" in reason) == (4409, True)
    assert trio.current_time() - began >= 0.2


async def test_7_7_close_timeout_bounds_the_goodbye(strict: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(strict.websocket_socket) as client:
            began = trio.current_time()
            await client.send(TextMessage(data="not JSON"))
            assert await client.close_code() == 4400
            assert 0.2 <= trio.current_time() - began < 5


async def test_7_8_max_message_bounds_a_broadcast(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    await sender.call("broadcast", channel, "x" * 65536)
    with pytest.raises(Exception, match="65537 bytes; the limit, max-message, is 65536"):
        await sender.call("broadcast", channel, "x" * 65537)


async def test_7_9_command_timeout_bounds_a_command(strict: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with publisher(strict.control_socket) as sender:
            began = trio.current_time()
            await sender.stream.send_all(encode_request(1, "ping", [])[:-1])
            assert (await sender.answer()).id is None
            assert await sender.stream.receive_some() == b""
            assert trio.current_time() - began >= 0.2


async def test_7_10_history_size_bounds_a_channel(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    for _ in range(105):
        await sender.call("broadcast", channel, "x")
    history = await sender.call("history", channel, 1000)
    assert [offset for offset, _ in history["messages"]] == list(range(6, 106))


async def test_7_11_history_total_bounds_all_channels(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(history_total=4140)).publisher()
    for number in range(10):
        await sender.call("broadcast", f"{channel}-{number}", "x" * 500)
    assert 2000 < (await sender.call("stats"))["history_bytes"] <= 4140
    assert (await sender.call("history", f"{channel}-0"))["messages"] == []
    assert len((await sender.call("history", f"{channel}-9"))["messages"]) == 1


async def test_7_12_max_connections_bounds_websockets(narrow: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with publisher(narrow.control_socket) as asking:
            while (await asking.call("stats"))["clients"]:
                pass
            async with raw_client(narrow.websocket_socket), raw_client(narrow.websocket_socket):
                assert "503" in await http_answer(narrow.websocket_socket, REQUEST)
                assert (await asking.call("stats"))["clients"] == 2


async def test_7_13_max_subscriptions_bounds_those_of_all_clients(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--max-subscriptions", "3") as daemon,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as one,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as other,
        ):
            answers = []
            for client in (one, other):
                await client.get_message()
                for number in range(2):
                    await client.send_message(subscribe(f"news-{number}"))
                    answers.append(json.loads(await client.get_message())["event"])
            assert answers == ["subscribed"] * 3 + ["error"]


async def test_7_14_max_backlog_total_bounds_what_waits_for_all(daemons: Daemons, channel: str) -> None:
    daemon = await trio.to_thread.run_sync(daemons.get, {"max_backlog_total": 65536, "close_timeout": 0.2})
    with trio.fail_after(PATIENCE):
        async with publisher(daemon.control_socket) as sender:
            for number in range(3):
                async with raw_client(daemon.websocket_socket) as client:
                    code, reason = await stalled(sender, client, f"{channel}-{number}", 20, 50_000)
                assert code == 4409
                assert "the limit, max-backlog-total, is 65536" in reason
                assert (await sender.call("stats"))["backlog_bytes"] <= 65536


async def test_7_15_max_connections_per_address_bounds_those_of_one_address(one_each: Daemon) -> None:
    path = one_each.websocket_socket
    with trio.fail_after(PATIENCE):
        async with raw_client(path, "198.51.100.1"):
            assert "503" in await http_answer(path, handshake_of("198.51.100.1"))


async def test_7_16_handshakes_per_address_bounds_those_of_one_address(slow_going: Daemon) -> None:
    path = slow_going.websocket_socket
    with trio.fail_after(PATIENCE):
        for _ in range(2):
            await accepted_head(path, handshake_of("198.51.100.1"))
        assert "503" in await http_answer(path, handshake_of("198.51.100.1"))


async def test_7_17_max_answers_total_bounds_what_publishers_hold(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(daemons.get, {"max_answers_total": 2**20})
    unfinished = encode_request(1, "broadcast", ["news", "x" * 60_000])[:-1]
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            for _ in range(40):
                stream = await stack.enter_async_context(await trio.open_unix_socket(daemon.control_socket))
                await stream.send_all(unfinished)
            while daemon.log.count("the limit, max-answers-total, is 1048576") < 20:
                await trio.lowlevel.checkpoint()
        async with publisher(daemon.control_socket) as asking:
            assert (await asking.call("stats"))["answers_bytes"] <= 2**20


async def test_7_18_max_keys_bytes_bounds_keys(daemons: Daemons, channel: str) -> None:
    daemon = await trio.to_thread.run_sync(daemons.get, {"max_keys_bytes": 10_000})
    with trio.fail_after(PATIENCE):
        async with publisher(daemon.control_socket) as sender:
            for number in range(100):
                await sender.call("broadcast", channel, "x", str(number))
            assert (await sender.call("stats"))["keys_bytes"] <= 10_000
            assert (await sender.call("broadcast", channel, "x", "99"))["repeated"]
            assert "repeated" not in await sender.call("broadcast", channel, "x", "0")


async def test_7_19_a_command_has_8192_values_nested_32_deep(shared: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with publisher(shared.control_socket) as sender:
            for values, code in ((8193, "message_too_large"), (8000, "invalid_params")):
                assert (await sender.call("ping", *range(values)))["code"] == code
            nested: list[Any] = []
            for _ in range(32):
                nested = [nested]
            await sender.stream.send_all(encode_request(1, "ping", [nested]))
            answer = await sender.answer()
            assert isinstance(answer.error, dict)
            assert answer.error["code"] == "protocol_error"


async def test_7_20_a_broadcast_many_names_5000_channels(shared: Daemon, channel: str) -> None:
    names = [channel] * 5001
    with trio.fail_after(PATIENCE):
        async with publisher(shared.control_socket) as sender:
            refused = await sender.call("broadcast_many", names, "x")
            assert refused["code"] == "too_many_channels"
            assert "the limit is 5000 a command" in refused["message"]
            assert len(await sender.call("broadcast_many", names[1:], "x")) == 5000
