"""Section 6 of docs/protocol.md, up to what is uncertain: requests, refusals, the end, back-pressure, idempotency."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from wsproto.events import TextMessage

from benchmarks.machine import resident_bytes
from realtimed.control.idempotency import KeyedReceipts
from realtimed.errors import RefusedError
from realtimed.hub.position import Receipt
from realtimed.rpc.wire import Response, encode_notification, encode_request, encode_response
from tests.kit.clients import publisher, raw_client, subscribe, undisturbed, websocket
from tests.kit.patience import PATIENCE
from tests.kit.peers import ALONE, FLEETING, SMALL, InMemory, Opening, Publisher
from tests.kit.service_manager import listening
from tests.kit.stack import running_daemon

MIB = 2**20


async def last_words(bad: Publisher) -> dict[str, Any]:
    """Return the error that ends a connection, which is the last that comes on it."""
    last = await bad.answer()
    assert (last.id, last.result) == (None, None)
    assert isinstance(last.error, dict)
    assert set(last.error) == {"code", "message"}
    assert await bad.receive() is None
    return last.error


# 6.1 Requests and answers


async def test_6_1_1_requests_are_carried_out_and_answered_in_order(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    commands = [encode_request(n, "broadcast", [channel, str(n)]) for n in range(500)]
    await sender.send(b"".join(commands))
    answers = [await sender.answer() for _ in commands]
    assert [answer.id for answer in answers] == list(range(500))
    assert [answer.result["offset"] for answer in answers] == list(range(1, 501))  # type: ignore[index]
    assert [(await browser.event())["data"] for _ in commands] == [str(n) for n in range(500)]


async def test_6_1_2_commands_may_come_together_and_in_pieces(open_peers: Opening) -> None:
    sender = await (await open_peers()).publisher()
    commands = encode_request(1, "ping", []) + encode_request(2, "ping", [])
    for at in range(len(commands)):
        await sender.send(commands[at : at + 1])
    await sender.send(commands * 10)
    assert [(await sender.answer()).id for _ in range(22)] == [1, 2] * 11


async def test_6_1_3_an_answer_bears_the_id_of_its_request(open_peers: Opening) -> None:
    sender = await (await open_peers()).publisher()
    ids = [2**32 - 1, 0, 7, 7]
    await sender.send(b"".join(encode_request(id, "ping", []) for id in ids))
    assert [await sender.answer() for _ in ids] == [Response(id, None, "pong") for id in ids]


async def test_6_1_4_a_notification_is_carried_out_and_not_answered(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    await sender.send(
        encode_notification("broadcast", [channel, "hello"]) + encode_notification("subscribe", [channel])
    )
    assert await sender.call("ping") == "pong"
    assert (await browser.event())["data"] == "hello"
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 2
    assert await sender.message() == [channel, "x", 2]


# 6.2 What is refused


async def test_6_2_1_an_error_ends_nothing(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    bad = encode_request(7, "broadcast", ["no spaces", "x"])
    await sender.send(bad + encode_request(8, "broadcast", [channel, "x"]))
    refusal, receipt = await sender.answer(), await sender.answer()
    assert isinstance(refusal.error, dict)
    assert (refusal.id, refusal.result, refusal.error["code"]) == (7, None, "invalid_channel")
    assert isinstance(refusal.error["message"], str)
    assert (receipt.id, receipt.error) == (8, None)


async def test_6_2_2_a_refused_notification_is_counted_and_the_first_is_logged(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as bad:
            await bad.stream.send_all(encode_notification("broadcast", ["no\x1bspaces", "x"]) * 3)
            stats = await bad.call("stats")
            assert stats["commands_refused_with"] == {"invalid_channel": 3}
            assert daemon.log.count("notification refused code=invalid_channel") == 1
            assert "\x1b" not in daemon.log


async def test_6_2_3_a_response_is_treated_like_a_refused_notification(open_peers: Opening) -> None:
    sender = await (await open_peers(**ALONE)).publisher()
    await sender.until_alone()
    before = (await sender.call("stats"))["commands_refused_with"].get("invalid_params", 0)
    await sender.send(encode_response(7, None, "for nobody"))
    assert (await sender.call("stats"))["commands_refused_with"]["invalid_params"] == before + 1


@pytest.mark.parametrize(("more", "code"), [(0, None), (1, "message_too_large")])
async def test_6_2_4_a_command_has_at_most_8192_values(open_peers: Opening, more: int, code: str | None) -> None:
    sender = await (await open_peers()).publisher()
    # The command, its kind, id and method, the params and their array are six.
    await sender.send(encode_request(7, "ping", [[[]] * (8192 - 6 + more)]) + encode_request(8, "ping", []))
    first, second = await sender.answer(), await sender.answer()
    assert isinstance(first.error, dict)
    assert first.error["code"] == (code or "invalid_params")
    if code is not None:
        assert "8192 MessagePack values" in first.error["message"]
    assert (second.id, second.result) == (8, "pong")


# 6.3 What ends a connection


@pytest.mark.parametrize("sent", [b"\xc1", b"\x94\x00\x01\xc1", b"\x91" * 2000])
async def test_6_3_1_bytes_that_are_not_messagepack_end_the_connection(open_peers: Opening, sent: bytes) -> None:
    bad = await (await open_peers()).publisher()
    await bad.send(sent)
    error = await last_words(bad)
    assert error["code"] == "protocol_error"
    assert "not MessagePack" in error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x90",
        b"\x05",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x93\x00\x01\x02",
        b"\x94\x00\xff\xa4ping\x90",  # an id of -1
        b"\x94\x00\xcf\x00\x00\x00\x01\x00\x00\x00\x00\xa4ping\x90",  # an id of 2**32
        b"\x94\x00\xc3\xa4ping\x90",  # an id that is true
        b"\x94\x00\x01\xa4ping\xc0",  # params that are nil
        b"\x94\x00\x01\xc4\x04ping\x90",  # a method that is bin
        b"\x94\x03\x01\xa4ping\x90",
    ],
)
async def test_6_3_2_messagepack_that_is_not_rpc_ends_the_connection(open_peers: Opening, sent: bytes) -> None:
    bad = await (await open_peers()).publisher()
    await bad.send(sent)
    error = await last_words(bad)
    assert error["code"] == "protocol_error"
    assert "not MessagePack-RPC" in error["message"]


async def test_6_3_3_what_came_before_bad_bytes_is_carried_out(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    bad, other = await peers.publisher(), await peers.publisher()
    commands = [encode_request(n, "broadcast", [channel, "x"]) for n in range(3)]
    await bad.send(b"".join(commands) + b"\xc1" + encode_request(4, "broadcast", [channel, "behind"]))
    assert [(await bad.answer()).id for _ in range(3)] == [0, 1, 2]
    assert (await last_words(bad))["code"] == "protocol_error"
    assert (await other.call("history", channel))["offset"] == 3


@pytest.mark.parametrize("begun", [b"\x94", encode_request(1, "broadcast", ["news", "x"])[:-1]])
async def test_6_3_4_a_command_that_does_not_end_has_a_deadline(open_peers: Opening, begun: bytes) -> None:
    bad = await (await open_peers(**FLEETING)).publisher()
    assert await bad.call("ping") == "pong"
    began = trio.current_time()
    await bad.send(begun)
    error = await last_words(bad)
    assert error["code"] == "timeout"
    assert "command-timeout, is 0.2 s" in error["message"]
    assert trio.current_time() - began >= 0.2


async def test_6_3_5_an_idle_connection_has_no_deadline(open_peers: Opening) -> None:
    peers = await open_peers(**FLEETING)
    idle, never = await peers.publisher(), await peers.publisher()
    assert await idle.call("ping") == "pong"
    for _ in range(2):  # the deadline passes for one who is in the middle of a command
        slow = await peers.publisher()
        await slow.send(b"\x94")
        assert (await last_words(slow))["code"] == "timeout"
    assert [await idle.call("ping"), await never.call("ping")] == ["pong", "pong"]


def nested(depth: int) -> bytes:
    """Return a command in which arrays are nested so deep."""
    return b"\x94\x00\x07\xa4ping" + b"\x91" * (depth - 1) + b"\x05"


async def test_6_3_6_nesting_is_bounded(open_peers: Opening) -> None:
    peers = await open_peers()
    deep, deeper = await peers.publisher(), await peers.publisher()
    await deep.send(nested(32) + encode_request(8, "ping", []))
    assert isinstance((answer := await deep.answer()).error, dict)
    assert answer.error["code"] == "invalid_params"
    assert (await deep.answer()).result == "pong"
    await deeper.send(nested(33))
    error = await last_words(deeper)
    assert error["code"] == "protocol_error"
    assert "may be nested 32 deep" in error["message"]


# 6.4 When the daemon stops


async def test_6_4_1_publishers_are_served_as_long_as_clients_are_closed(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--drain", "1") as daemon,
            websocket(daemon.websocket_socket) as client,
            publisher(daemon.control_socket) as old,
        ):
            await client.send_message(subscribe("news"))
            while not await old.call("channels"):
                pass
            daemon.process.terminate()
            while daemon.websocket_socket.exists():
                assert await old.call("ping") == "pong"
            async with publisher(daemon.control_socket) as new:
                for each in (old, new):
                    assert (await each.call("broadcast", "news", "while draining"))["recipients"] == 1
            assert [await client.get_message() for _ in range(2)] == ["while draining"] * 2


async def test_6_4_2_a_command_that_has_begun_is_taken(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            publisher(daemon.control_socket) as slow,
            publisher(daemon.control_socket) as asking,
        ):
            assert await slow.call("ping") == "pong"
            await slow.stream.send_all(b"\x94\x00\x07")
            while (await asking.call("stats"))["publishers"] != 2:
                pass
            daemon.process.terminate()
            while daemon.control_socket.exists():
                await trio.lowlevel.checkpoint()
            await slow.stream.send_all(b"\xa4ping\x90")
            answer = await slow.answer()
            assert (answer.id, answer.result) == (7, "pong")
            assert await slow.stream.receive_some() == b""
            assert await daemon.wait() == 0


async def test_6_4_3_a_first_command_is_taken_if_it_comes_within_a_second(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            publisher(daemon.control_socket) as new,
            publisher(daemon.control_socket) as mute,
            publisher(daemon.control_socket) as asking,
        ):
            while (await asking.call("stats"))["publishers"] != 3:
                pass
            daemon.process.terminate()
            while daemon.control_socket.exists():
                await trio.lowlevel.checkpoint()
            assert await new.call("ping") == "pong"
            assert await new.stream.receive_some() == b""
            began = trio.current_time()
            assert await mute.stream.receive_some() == b""
            assert trio.current_time() - began > 0.5
            assert await daemon.wait() == 0


async def test_6_4_4_a_publisher_has_an_answer_or_knows_that_nothing_was_taken(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as sender:
            assert await sender.call("ping") == "pong"
            daemon.process.terminate()
            sent = 0
            try:
                while True:
                    await sender.stream.send_all(encode_request(sent, "ping", []))
                    sent += 1
            except trio.BrokenResourceError:
                pass
            assert [(await sender.answer()).id for _ in range(sent)] == list(range(sent))
            assert await daemon.wait() == 0


async def test_6_4_5_at_a_socket_of_systemd_new_connections_wait_for_the_next_daemon(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE), listening(runtime_dir) as sockets:
        async with running_daemon(runtime_dir, sockets=sockets) as daemon:
            async with publisher(daemon.control_socket) as asking:
                assert await asking.call("ping") == "pong"
            assert await daemon.stop() == 0
        async with publisher(daemon.control_socket) as early:
            await early.stream.send_all(encode_request(7, "ping", []))
            async with running_daemon(runtime_dir, sockets=sockets):
                assert (await early.answer()).id == 7


@pytest.mark.parametrize("command", [("watch", "*"), ("subscribe", "news")])
async def test_6_4_6_those_who_listen_are_closed_last(runtime_dir: Path, command: tuple[str, str]) -> None:
    heard = answered = 0
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            publisher(daemon.control_socket) as listener,
            publisher(daemon.control_socket) as sender,
        ):
            await listener.call(*command)

            async def send() -> None:
                with suppress(trio.BrokenResourceError):  # what the daemon does not take any more
                    await sender.stream.send_all(encode_request(1, "broadcast", ["news", "x" * 1000]) * 20_000)

            async def count() -> None:
                nonlocal answered
                told, unpacker = False, msgpack.Unpacker()
                async for data in sender.stream:
                    unpacker.feed(data)
                    answered += sum(1 for _ in unpacker)
                    if answered > 100 and not told:
                        daemon.process.terminate()
                        told = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(count)
                unpacker = msgpack.Unpacker()
                async for data in listener.stream:
                    unpacker.feed(data)
                    heard += sum(1 for _ in unpacker)
            assert await daemon.wait() == 0
    assert heard == answered > 100


# 6.5 Back-pressure


async def test_6_5_1_who_reads_no_answers_is_not_read_and_then_ended(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--backlog-timeout", "0.5") as daemon,
        undisturbed(daemon),
        publisher(daemon.control_socket) as bad,
    ):
        before = resident_bytes(daemon.process.pid)
        flood = encode_request(1, "info", []) * 1000

        async def send_without_end() -> None:
            while True:
                await bad.stream.send_all(flood)

        with pytest.raises(trio.BrokenResourceError):
            await send_without_end()
        assert resident_bytes(daemon.process.pid) - before < 30 * MIB
    assert "it does not read its answers" in daemon.log


async def test_6_5_2_publishers_wait_while_watchers_are_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({}, nursery, fan_out=False)
        sender, watcher = await peers.publisher(), await peers.publisher()
        await watcher.call("watch", "*")
        hub = peers.core.hub
        with monkeypatch.context() as patches:
            patches.setattr(hub.watchers, "step", lambda: True)  # as if each step matched one pattern with one name
            nursery.start_soon(peers.core.fan_out.run)
            await sender.send(encode_request(1, "broadcast", ["news", "x" * 65536]) * 200)
            for _ in range(2000):
                await trio.lowlevel.checkpoint()
            assert hub.log_bytes == 0
            assert 4 * MIB < hub.watchers.queued_bytes <= 4 * MIB + 2 * 65536
        assert [(await sender.answer()).error for _ in range(200)] == [None] * 200
        assert [(await watcher.message())[0] for _ in range(200)] == ["news"] * 200
        assert hub.watchers.idle
        nursery.cancel_scope.cancel()


async def test_6_5_2_publishers_wait_while_the_fan_out_is_behind() -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({}, nursery, fan_out=False)
        sender, browser = await peers.publisher(), await peers.enveloped()
        await peers.publisher()  # one alone would have its messages fanned out at once
        await browser.ask("subscribe", "news")
        await sender.send(encode_request(1, "broadcast", ["news", "x" * 65536]) * 100)
        await wait_all_tasks_blocked()
        assert 4 * MIB < peers.core.hub.log_bytes <= 4 * MIB + 2 * 65536
        nursery.start_soon(peers.core.fan_out.run)
        assert [(await sender.answer()).error for _ in range(100)] == [None] * 100
        assert [(await browser.event())["offset"] for _ in range(100)] == list(range(1, 101))
        nursery.cancel_scope.cancel()


async def test_6_5_3_publishers_wait_while_too_much_waits_for_slow_clients() -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({"max_backlog_total": MIB}, nursery)
        sender = await peers.publisher()
        peers.core.backlogs.total += MIB + 1  # as slow clients do
        assert await sender.call("ping") == "pong", "the first shows that it is too much"
        await sender.send(encode_request(2, "ping", []))
        await wait_all_tasks_blocked()
        assert peers.core.service.commands == 1
        peers.core.backlogs.total -= MIB + 1
        peers.core.backlogs.freed()
        assert (await sender.answer()).id == 2
        nursery.cancel_scope.cancel()


async def test_6_5_4_those_that_most_waits_for_are_closed_soon(runtime_dir: Path) -> None:
    """Six clients, each within its own limit and deadline, take more memory together than there is for all."""
    options = ("--max-backlog-total", "2M", "--max-backlog", "1M", "--backlog-timeout", "600")
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(running_daemon(runtime_dir, *options))
            sender = await stack.enter_async_context(publisher(daemon.control_socket))
            for number in range(6):
                client = await stack.enter_async_context(raw_client(daemon.websocket_socket))
                await client.send(TextMessage(data=subscribe(f"news-{number}")))
            while len(await sender.call("channels")) != 6:
                pass
            message = "x" * 50_000
            for offset in range(1, 23):  # 208 KiB of each client's are in the kernel, 1 MiB may wait
                for number in range(6):
                    assert (await sender.call("broadcast", f"news-{number}", message))["offset"] == offset
            while (stats := await sender.call("stats"))["closed"].get("4409", 0) < 4:
                pass
            assert stats["backlog_bytes"] <= 2 * MIB
            assert stats["closed"] == {"4409": 4}


async def test_6_5_4_what_many_wait_for_counts_once(runtime_dir: Path) -> None:
    options = ("--max-backlog-total", "2M", "--max-backlog", "1M", "--backlog-timeout", "600")
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(running_daemon(runtime_dir, *options))
            sender = await stack.enter_async_context(publisher(daemon.control_socket))
            for _ in range(6):
                client = await stack.enter_async_context(raw_client(daemon.websocket_socket))
                await client.send(TextMessage(data=subscribe("news")))
            while (await sender.call("channels")).get("news", {}).get("subscribers") != 6:
                pass
            for offset in range(1, 23):
                assert (await sender.call("broadcast", "news", "x" * 50_000))["offset"] == offset
            stats = await sender.call("stats")
            assert stats["backlogged"] == 6
            assert MIB // 2 < stats["backlog_bytes"] < 2 * MIB
            assert not stats["closed"]


async def test_6_5_5_nothing_is_carried_out_while_answers_wait_to_be_read(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            publisher(daemon.control_socket) as bad,
            publisher(daemon.control_socket) as asking,
        ):
            for _ in range(20):
                await asking.call("broadcast", "news", "x" * 65_000)
            before = (await asking.call("stats"))["commands"]
            await bad.stream.send_all(b"".join(encode_request(id, "history", ["news"]) for id in range(100)))
            while not (held := (await asking.call("stats"))["answers_bytes"]):
                pass
            for _ in range(100):
                stats = await asking.call("stats")
            assert stats["commands"] - before < 110, (
                "of the hundred, those that the kernel has room for were carried out"
            )
            assert held <= stats["answers_bytes"] < 2 * MIB
            for id in range(100):
                answer = await bad.answer()
                assert answer.id == id
                assert len(answer.result["messages"]) == 20  # type: ignore[index]


async def test_6_5_6_those_that_hold_most_are_ended(runtime_dir: Path) -> None:
    begun = encode_request(1, "broadcast", ["news", "x" * 900_000])[:-1]
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(running_daemon(runtime_dir, "--max-answers-total", "4M"))
            asking = await stack.enter_async_context(publisher(daemon.control_socket))
            small = await stack.enter_async_context(publisher(daemon.control_socket))
            await small.stream.send_all(begun[:1000])
            large = [await stack.enter_async_context(publisher(daemon.control_socket)) for _ in range(8)]
            for each in large:
                with suppress(trio.BrokenResourceError):
                    await each.stream.send_all(begun)
            while (stats := await asking.call("stats"))["publishers"] > 6:
                pass
            assert 3 * MIB < stats["answers_bytes"] <= 4 * MIB
            await small.stream.send_all(begun[1000:] + b"x")
            assert (await small.answer()).id == 1, "it held less"
        assert "publisher disconnected code=too_much reason='it holds 9" in daemon.log
        assert "the limit, max-answers-total, is 4194304" in daemon.log


async def test_6_5_6_a_reload_changes_the_limit_for_open_connections(runtime_dir: Path) -> None:
    path = runtime_dir / "realtimed.toml"
    path.write_text('max_answers_total = "16M"\n')
    begun = encode_request(1, "broadcast", ["news", "x" * 900_000])[:-1]
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(running_daemon(runtime_dir, "--config", str(path)))
            asking = await stack.enter_async_context(publisher(daemon.control_socket))
            for _ in range(8):
                each = await stack.enter_async_context(publisher(daemon.control_socket))
                await each.stream.send_all(begun)
            while (stats := await asking.call("stats"))["answers_bytes"] < 7_000_000:
                pass
            assert stats["publishers"] == 9
            path.write_text('max_answers_total = "4M"\n')
            daemon.process.send_signal(signal.SIGHUP)
            while (stats := await asking.call("stats"))["publishers"] > 6:
                pass
            assert stats["answers_bytes"] <= 4 * MIB


async def test_6_5_7_an_answer_that_is_too_large_is_refused_and_says_what_to_do(open_peers: Opening) -> None:
    peers = await open_peers(max_answers_total=8 * MIB, history_size=100)
    sender = await peers.publisher()
    for _ in range(40):
        await sender.call("broadcast", "large", "x" * 65_000)
    with pytest.raises(
        RefusedError, match=r"more than 2097152 bytes.* max-answers-total.* history \[channel, count\]"
    ) as no:
        await sender.call("history", "large")
    assert no.value.code == "answer_too_large"
    assert len((await sender.call("history", "large", 20))["messages"]) == 20
    for number in range(90):
        browser = await peers.browser()
        for place in range(100):
            await browser.say("subscribe", f"{number}-{place}-".ljust(200, "x"))
    whole = 90 * 100
    with trio.fail_after(PATIENCE):
        while (await sender.call("channels", {"count": True}))["count"] < whole:
            pass
    with pytest.raises(RefusedError, match=r'"limit": …, "after": ….*"prefix": …') as no:
        await sender.call("channels")
    assert no.value.code == "answer_too_large"
    assert len((await sender.call("channels", {"limit": 5}))["channels"]) == 5


# 6.6 Messages


async def test_6_6_1_str_is_text_and_bin_is_bytes_both_ways(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser, watcher = await peers.publisher(), await peers.browser(), await peers.publisher()
    await browser.say("subscribe", channel)
    await watcher.call("subscribe", channel)
    await sender.until_subscribed(channel, 2)
    messages = ["hellö", b"hello"]
    for message in messages:
        await sender.call("broadcast", channel, message)
    assert [await browser.receive() for _ in messages] == messages
    assert [(await watcher.message())[1] for _ in messages] == messages
    assert (await sender.call("history", channel))["messages"] == [[1, "hellö"], [2, b"hello"]]


async def test_6_6_2_recipients_counts_the_subscribers(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, plain, enveloped = await peers.publisher(), await peers.browser(), await peers.enveloped()
    counts = [(await sender.call("broadcast", channel, "x"))["recipients"]]
    await plain.say("subscribe", channel)
    await sender.until_subscribed(channel)
    counts.append((await sender.call("broadcast", channel, "x"))["recipients"])
    await enveloped.ask("subscribe", channel)
    counts.append((await sender.call("broadcast", channel, "x"))["recipients"])
    await sender.call("subscribe", channel)
    counts.append((await sender.call("broadcast", channel, "x"))["recipients"])
    await enveloped.say("unsubscribe", channel)
    await enveloped.until("unsubscribed")
    counts.append((await sender.call("broadcast", channel, "x"))["recipients"])
    assert counts == [0, 1, 2, 3, 2]


# 6.7 Idempotency


async def test_6_7_1_a_broadcast_with_the_same_key_is_only_answered(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    one, other, browser = await peers.publisher(), await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    receipt = await one.call("broadcast", channel, "hello", "k")
    assert set(receipt) == {"recipients", "epoch", "offset"}
    for again in (one, other):
        assert await again.call("broadcast", channel, "something else", "k") == {**receipt, "repeated": True}
    receipts = await one.call("broadcast_many", [channel, f"{channel}-2"], "many", "k")
    repeated = [{**each, "repeated": True} for each in receipts]
    assert await other.call("broadcast_many", [channel, f"{channel}-2"], "many", "k") == repeated
    assert [(await browser.event())["data"] for _ in range(2)] == ["hello", "many"]
    await browser.nothing_more()


@pytest.mark.parametrize("key", ["x", "x" * 200, "ключ 🎉", " "])
async def test_6_7_2_a_key_is_a_str_of_up_to_200_characters(open_peers: Opening, channel: str, key: str) -> None:
    sender = await (await open_peers()).publisher()
    receipts = [await sender.call("broadcast", channel, "x", key) for _ in range(2)]
    assert ["repeated" in receipt for receipt in receipts] == [False, True]


@pytest.mark.parametrize("key", ["", "x" * 201, 7, None, b"k", ["k"]])
async def test_6_7_2_anything_else_is_no_key(open_peers: Opening, channel: str, key: object) -> None:
    sender = await (await open_peers()).publisher()
    for method, named in (("broadcast", channel), ("broadcast_many", [channel])):
        with pytest.raises(RefusedError, match="a str of 1 to 200 characters") as refused:
            await sender.call(method, named, "x", key)
        assert refused.value.code == "invalid_params"
    assert (await sender.call("history", channel))["offset"] == 0


async def test_6_7_3_a_key_holds_for_its_channels_alone(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    a, b = f"{channel}-a", f"{channel}-b"
    for named in ([a], [b], [a, b], [b, a], [a, b, b]):
        for repeated in (False, True):
            receipts = await sender.call("broadcast_many", named, "x", "k")
            assert [("repeated" in receipt) for receipt in receipts] == [repeated] * len(named)
    assert "repeated" not in await sender.call("broadcast", a, "x", "k"), "one channel is no list of one"


async def test_6_7_4_what_was_refused_is_not_remembered(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(**SMALL)).publisher()
    for method, named in (("broadcast", channel), ("broadcast_many", [channel])):
        with pytest.raises(RefusedError, match="message_too_large"):
            await sender.call(method, named, "x" * 101, "k")
        receipt = await sender.call(method, named, "x" * 100, "k")
        assert "repeated" not in (receipt[0] if isinstance(receipt, list) else receipt)


async def test_6_7_5_a_key_is_new_after_the_retry_window(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(**FLEETING)).publisher()
    began = trio.current_time()
    assert (await sender.call("broadcast", channel, "x", "k"))["offset"] == 1
    with trio.fail_after(PATIENCE):
        while "repeated" in (receipt := await sender.call("broadcast", channel, "x", "k")):
            pass
    assert receipt["offset"] == 2
    assert trio.current_time() - began >= 0.2


def test_6_7_6_the_newest_hundred_thousand_keys_are_known() -> None:
    answered = KeyedReceipts(300, lambda: 0.0)
    receipts = [Receipt(0, "e", 1)]
    for number in range(100_001):
        answered.remember("news", str(number), receipts)
    assert len(answered) == 100_000
    assert answered.known("news", "1") == receipts
    assert answered.known("news", "0") is None


def test_6_7_6_keys_take_a_bounded_amount_of_memory() -> None:
    answered = KeyedReceipts(300, lambda: 0.0, MIB)
    for number in range(10_000):
        answered.remember("news", str(number), [Receipt(0, "e", 1)])
    assert answered.bytes <= MIB
    assert 1000 < len(answered) < 2000
    assert answered.known("news", "9999") is not None
    assert answered.known("news", "5000") is None
    many = tuple(str(number) for number in range(5000))
    answered.remember(many, "k", [Receipt(0, "e", 1)] * 5000)
    assert answered.bytes > MIB
    assert answered.known(many, "k") is not None, "the newest is known, whatever it takes"
    assert len(answered) == 1
    answered.remember("news", "small", [Receipt(0, "e", 1)])
    assert (answered.known(many, "k"), len(answered)) == (None, 1)


async def test_6_7_7_a_restart_forgets_the_keys(runtime_dir: Path) -> None:
    receipts = []
    with trio.fail_after(PATIENCE):
        for _ in range(2):
            async with (
                running_daemon(runtime_dir, "--state-file", f"{runtime_dir}/state") as daemon,
                publisher(daemon.control_socket) as sender,
            ):
                receipts.append(await sender.call("broadcast", "news", "x", "k"))
    assert receipts == [{**receipts[0], "offset": 1}, {**receipts[0], "offset": 2}]


# 6.8 What is uncertain


async def test_6_8_1_a_repetition_after_a_broken_connection_is_delivered_once(
    open_peers: Opening, channel: str
) -> None:
    peers = await open_peers()
    broken, again, browser = await peers.publisher(), await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    await broken.send(encode_request(1, "broadcast", [channel, "hello", "k"]))  # its answer is never read
    assert (await browser.event())["data"] == "hello"
    receipt = await again.call("broadcast", channel, "hello", "k")
    assert receipt == {"recipients": 1, "epoch": receipt["epoch"], "offset": 1, "repeated": True}
    await browser.nothing_more()


async def test_6_8_2_a_killed_daemon_takes_its_keys_along(runtime_dir: Path) -> None:
    receipts = []
    with trio.fail_after(PATIENCE):
        for _ in range(2):
            async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as sender:
                receipts.append(await sender.call("broadcast", "news", "x", "k"))
                daemon.process.kill()
                await daemon.wait()
    assert [receipt["offset"] for receipt in receipts] == [1, 1]
    assert receipts[0]["epoch"] != receipts[1]["epoch"]
    assert "repeated" not in receipts[1]
