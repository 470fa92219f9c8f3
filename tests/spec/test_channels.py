"""Sections 1 and 8 of docs/protocol.md: channels, messages, history, and what is guaranteed."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from realtimed.errors import RefusedError
from realtimed.rpc.wire import encode_notification, encode_request
from tests.kit.clients import closing, publisher, subscribe, websocket
from tests.kit.hubs import sealed
from tests.kit.patience import PATIENCE
from tests.kit.peers import FLEETING, FORGETFUL, SMALL, Opening, Publisher
from tests.kit.stack import running_daemon


async def kept(asking: Publisher, channel: str) -> list[object]:
    """Return the messages that are kept of a channel."""
    return [message for _, message in (await asking.call("history", channel))["messages"]]


# 1. Channels and messages


async def test_1_1_a_channel_is_a_name_of_allowed_characters(open_peers: Opening) -> None:
    peers = await open_peers()
    sender, browser, plain = await peers.publisher(), await peers.enveloped(), await peers.browser()
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=@,.;:/"
    for name in (*alphabet, alphabet, "x" * 200):
        assert (await sender.call("history", name))["offset"] >= 0
    for name in ("", "x" * 201, "a b", "a\n", "ä", "*", "a#b", "a\0"):
        with pytest.raises(RefusedError, match="invalid_channel"):
            await sender.call("broadcast", name, "x")
        assert (await browser.ask("subscribe", name))["code"] == "invalid_channel"
    await plain.say("subscribe", "a b")
    assert (await plain.closing())[0] == 4400


async def test_1_2_1_text_stays_text_and_bytes_stay_bytes(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await browser.say("subscribe", channel)
    await sender.until_subscribed(channel)
    messages = ["hellö 🎈", b"\x00\xff", "{}", b"text"]
    for message in messages:
        await sender.call("broadcast", channel, message)
    assert [await browser.receive() for _ in messages] == messages


@pytest.mark.parametrize("largest", ["x" * 100, "ä" * 50, b"x" * 100], ids=["ascii", "two bytes each", "bytes"])
async def test_1_2_2_a_message_has_at_most_max_message_bytes(
    open_peers: Opening, channel: str, largest: str | bytes
) -> None:
    sender = await (await open_peers(**SMALL)).publisher()
    assert (await sender.call("broadcast", channel, largest))["offset"] == 1
    with pytest.raises(RefusedError, match=r"max-message, is 100 \(message_too_large\)"):
        await sender.call("broadcast", channel, largest + largest[:1])  # type: ignore[operator]  # either kind
    assert await kept(sender, channel) == [largest]


async def test_1_2_3_a_message_may_be_empty(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await browser.say("subscribe", channel)
    await sender.until_subscribed(channel)
    for message in ("", b""):
        await sender.call("broadcast", channel, message)
        assert await browser.receive() == message


async def test_1_3_1_offsets_count_from_one(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    assert [(await sender.call("broadcast", channel, "x"))["offset"] for _ in range(2)] == [1, 2]
    assert (await browser.ask("subscribe", channel))["offset"] == 2
    assert (await sender.call("broadcast", channel, "x"))["offset"] == 3
    assert (await browser.event())["offset"] == 3


async def test_1_3_2_epochs_never_repeat(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FORGETFUL)
    sender, browser = await peers.publisher(), await peers.enveloped()
    epochs = set()
    for _ in range(20):  # each time the channel is forgotten at once
        epochs.add((await browser.ask("subscribe", channel))["epoch"])
        assert (await sender.call("broadcast", channel, "x"))["epoch"] in epochs
        await browser.event()
        await browser.ask("unsubscribe", channel)
        epochs.add((await sender.call("broadcast", channel, "x"))["epoch"])
    assert len(epochs) == 40
    assert all(isinstance(epoch, str) and epoch for epoch in epochs)


async def test_1_4_1_the_newest_history_size_publications_are_kept(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(**SMALL)).publisher()
    for number in range(5):
        await sender.call("broadcast", channel, str(number))
    assert (await sender.call("history", channel))["messages"] == [[3, "2"], [4, "3"], [5, "4"]]


async def test_1_4_2_a_publication_is_kept_for_history_age(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(**FLEETING)).publisher()
    began = trio.current_time()
    await sender.call("broadcast", channel, "x")
    with trio.fail_after(PATIENCE):
        while await kept(sender, channel):
            pass
    assert trio.current_time() - began >= 0.3


async def test_1_4_3_beyond_history_total_the_oldest_go_first(open_peers: Opening, channel: str) -> None:
    room_for_three = 3 * (1024 + 168 + 100)
    for total, expected in ((room_for_three, [0, 1, 1, 1]), (room_for_three - 1, [0, 0, 1, 1])):
        sender = await (await open_peers(history_total=total)).publisher()
        names = [f"{channel}-{total}-{number}" for number in range(4)]
        for name in names:
            await sender.call("broadcast", name, "x" * 100)
        assert [len(await kept(sender, name)) for name in names] == expected


async def test_1_4_4_channels_may_have_other_bounds(open_peers: Opening) -> None:
    rules = [{"match": "few:*", "history_size": 1}, {"match": "none", "history_size": 0}]
    sender = await (await open_peers(history_size=3, channels=rules)).publisher()
    for name in ("few:1", "none", "usual"):
        for _ in range(5):
            await sender.call("broadcast", name, "x")
    assert [len(await kept(sender, name)) for name in ("few:1", "none", "usual")] == [1, 0, 3]


async def test_1_5_1_nothing_has_to_be_created(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    assert (await sender.call("history", channel))["epoch"] == ""
    await sender.call("broadcast", channel, "x")
    assert (await sender.call("history", channel))["epoch"] != ""
    assert (await browser.ask("subscribe", f"{channel}-2"))["event"] == "subscribed"
    assert (await sender.call("history", f"{channel}-2"))["epoch"] != ""


async def test_1_5_2_a_channel_is_forgotten_after_history_age(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FLEETING)
    sender, browser = await peers.publisher(), await peers.enveloped()

    async def epoch() -> object:
        return (await sender.call("history", channel))["epoch"]

    with trio.fail_after(PATIENCE):
        first = (await browser.ask("subscribe", channel))["epoch"]
        await sender.call("broadcast", channel, "x")
        while await kept(sender, channel):
            pass
        assert await epoch() == first, "it has a subscriber"
        await browser.event()
        began = trio.current_time()
        await browser.ask("unsubscribe", channel)
        while await epoch() == first:
            pass
        assert trio.current_time() - began >= 0.3
        assert await epoch() == ""


async def test_1_5_2_a_channel_without_history_is_forgotten_at_once(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FORGETFUL)
    sender, browser = await peers.publisher(), await peers.enveloped()
    epoch = (await browser.ask("subscribe", channel))["epoch"]
    assert (await sender.call("history", channel))["epoch"] == epoch
    await browser.ask("unsubscribe", channel)
    assert (await sender.call("history", channel))["epoch"] == ""


async def test_1_5_3_a_channel_that_comes_back_begins_anew(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FORGETFUL)
    sender, browser = await peers.publisher(), await peers.enveloped()
    first = await browser.ask("subscribe", channel)
    assert [(await sender.call("broadcast", channel, "x"))["offset"] for _ in range(2)] == [1, 2]
    assert [(await browser.event())["offset"] for _ in range(2)] == [1, 2]
    await browser.ask("unsubscribe", channel)
    again = await browser.ask("subscribe", channel)
    assert again["offset"] == 0
    assert again["epoch"] != first["epoch"]
    assert (await sender.call("broadcast", channel, "x"))["offset"] == 1


@pytest.mark.parametrize("goes_on", [True, False])
async def test_1_5_4_a_clean_restart_with_a_state_file_goes_on(runtime_dir: Path, goes_on: bool) -> None:
    options = ("--state-file", f"{runtime_dir}/state") if goes_on else ()
    receipts = []
    with trio.fail_after(PATIENCE):
        for _ in range(2):
            async with running_daemon(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as sender:
                receipts.append(await sender.call("broadcast", "news", "x"))
    first, second = receipts
    assert (second["epoch"] == first["epoch"]) is goes_on
    assert [first["offset"], second["offset"]] == ([1, 2] if goes_on else [1, 1])


async def test_1_5_4_a_crash_begins_anew(runtime_dir: Path) -> None:
    receipts = []
    with trio.fail_after(PATIENCE):
        for _ in range(2):
            async with (
                running_daemon(runtime_dir, "--state-file", f"{runtime_dir}/state") as daemon,
                publisher(daemon.control_socket) as sender,
            ):
                receipts.append(await sender.call("broadcast", "news", "x"))
                daemon.process.kill()
                await daemon.wait()
    assert receipts[0]["epoch"] != receipts[1]["epoch"]
    assert receipts[1]["offset"] == 1


def now() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


async def next_millisecond() -> None:
    """Wait until the clock shows another time."""
    before = now()
    while now() == before:
        await trio.lowlevel.checkpoint()


async def times(asking: Any, channel: str) -> list[int]:
    """Return the times of publication of what is kept of a channel."""
    messages = (await asking.call("history", channel, 100, {"time": True}))["messages"]
    assert all(list(more) == ["time"] and type(more["time"]) is int for _, _, more in messages)
    return [more["time"] for _, _, more in messages]


async def test_1_6_1_a_publication_has_the_time_when_it_was_published(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    moments = [now()]
    for number in range(3):
        await sender.call("broadcast", channel, str(number))
        moments.append(now())
        await next_millisecond()
    for number, published in enumerate(await times(sender, channel)):
        assert moments[number] <= published <= moments[number + 1]


async def test_1_6_2_it_is_the_same_whenever_it_is_told(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser, late = await peers.publisher(), await peers.enveloped(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    for message in ("1", b"\xff", "3"):
        epoch = (await sender.call("broadcast", channel, message))["epoch"]
    live = [await browser.event() for _ in range(3)]
    await next_millisecond()
    assert await times(sender, channel) == [event["time"] for event in live]
    for fields in ({"since": {"epoch": epoch, "offset": 0}}, {"last": 3}):
        await late.ask("subscribe", channel, **fields)
        assert [await late.event() for _ in range(3)] == live


async def test_1_6_2_it_is_the_same_after_a_restart(runtime_dir: Path) -> None:
    options = ("--state-file", f"{runtime_dir}/state")
    told = []
    with trio.fail_after(PATIENCE):
        for number in range(3):
            async with running_daemon(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as sender:
                told.append(await times(sender, "news"))
                await sender.call("broadcast", "news", str(number))
    assert told[0] == []
    assert told[1] == told[2][:1]
    assert told[2] == sorted(set(told[2]))


async def test_1_6_2_a_state_file_without_times_has_those_of_its_ages(runtime_dir: Path) -> None:
    state = runtime_dir / "state"
    written = now() - 5000
    state.write_bytes(
        sealed(
            ["news", "abc1", 2, [[2.5, b"a", True], [1.0, b"b", True]]],
            end=struct.pack("!Id", 0, written / 1000),
            version=1,
        )
    )
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--state-file", str(state)) as daemon,
            publisher(daemon.control_socket) as sender,
        ):
            assert await times(sender, "news") == [written - 2500, written - 1000]


async def test_1_6_3_a_clock_that_is_set_back_changes_no_order_and_no_age(runtime_dir: Path) -> None:
    offset = runtime_dir / "offset"
    offset.write_text("0")
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(
                runtime_dir, environment={"CLOCK_OFFSET": str(offset)}, module="tests.kit.wandering_clock_daemon"
            ) as daemon,
            publisher(daemon.control_socket) as sender,
        ):
            for number, seconds in enumerate((0, -86400, 0)):
                offset.write_text(str(seconds))
                await sender.call("broadcast", "news", str(number))
            messages = (await sender.call("history", "news"))["messages"]
            assert messages == [[1, "0"], [2, "1"], [3, "2"]]
            first, second, third = await times(sender, "news")
    assert second < first <= third
    assert 0 <= first - second - (86400_000 - PATIENCE * 1000) < PATIENCE * 2000


# 8. What is guaranteed


async def test_8_1_one_publisher_is_heard_in_order_across_channels(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    names = [f"{channel}-{number}" for number in range(3)]
    for name in names:
        await browser.say("subscribe", name)
        await sender.until_subscribed(name)
    await sender.send(b"".join(encode_notification("broadcast", [names[n % 3], str(n)]) for n in range(3000)))
    assert [await browser.receive() for _ in range(3000)] == [str(n) for n in range(3000)]


async def test_8_2_each_message_comes_once(open_peers: Opening, channel: str) -> None:
    """Though the client unsubscribes, and asks for replays, while everything is on its way."""
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    epoch = (await browser.ask("subscribe", channel))["epoch"]
    offsets = [0]

    def take(events: list[dict[str, Any]]) -> None:
        offsets.extend(event["offset"] for event in events if event["event"] == "message")

    for _ in range(20):
        await sender.send(encode_notification("broadcast", [channel, "x"]) * 10)
        await browser.say("unsubscribe", channel)
        take(await browser.until("unsubscribed"))
        await browser.say("subscribe", channel, since={"epoch": epoch, "offset": offsets[-1]})
        await browser.say("subscribe", channel)
        take(await browser.until("subscribed"))
        take(await browser.until("subscribed"))
    while len(offsets) < 201:
        take([await browser.event()])
    assert offsets == list(range(201))
    await browser.nothing_more()


async def test_8_3_who_reads_too_slowly_has_all_up_to_a_close(open_sockets: Opening, channel: str) -> None:
    peers = await open_sockets(max_backlog=65536)
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    for _ in range(200):  # 4 MB, of which the client reads nothing meanwhile
        await sender.call("broadcast", channel, "x" * 20_000)
    messages, code, _ = await browser.rest()
    assert code == 4409
    assert 0 < len(messages) < 200
    assert [json.loads(message)["offset"] for message in messages] == list(range(1, len(messages) + 1))


async def test_8_4_what_was_accepted_is_delivered_before_the_end(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            websocket(daemon.websocket_socket) as client,
            publisher(daemon.control_socket) as sender,
        ):
            await client.send_message(subscribe("news"))
            while not await sender.call("channels"):
                pass
            commands = [encode_notification("broadcast", ["news", str(n)]) for n in range(500)]
            await sender.stream.send_all(b"".join(commands) + encode_request(9, "ping", []))
            assert (await sender.answer()).result == "pong"
            daemon.process.terminate()
            assert [await client.get_message() for _ in range(500)] == [str(n) for n in range(500)]
            assert (await closing(client))[0] == 4503


@pytest.mark.parametrize("far", [True, False])
async def test_8_5_who_comes_back_has_everything_or_is_told(open_peers: Opening, channel: str, far: bool) -> None:
    peers = await open_peers(**({} if far else SMALL))
    sender, browser = await peers.publisher(), await peers.enveloped()
    for number in range(6):
        receipt = await sender.call("broadcast", channel, str(number))
    answer = await browser.ask("subscribe", channel, since={"epoch": receipt["epoch"], "offset": 1})
    assert answer["recovered"] is far
    if answer["recovered"]:
        assert [(await browser.event())["data"] for _ in range(5)] == ["1", "2", "3", "4", "5"]
    await sender.call("broadcast", channel, "6")
    assert (await browser.event())["data"] == "6"


async def test_8_5_who_speaks_plain_gets_only_what_is_published_while_connected(
    open_peers: Opening, channel: str
) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await sender.call("broadcast", channel, "missed")
    await browser.say("subscribe", channel, since={"epoch": "x", "offset": 0})
    await sender.until_subscribed(channel)
    await sender.call("broadcast", channel, "heard")
    assert await browser.receive() == "heard"
