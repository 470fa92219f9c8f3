"""Section 6 of docs/protocol.md, from watching on: watching, access, the methods and the error codes."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from realtimed import __version__
from realtimed.errors import RefusedError
from realtimed.rpc.wire import encode_notification, encode_request
from tests.kit.clients import closing, publisher, raw_client, subscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.peers import ALONE, FEW, FLEETING, FORGETFUL, SMALL, InMemory, Opening, OverSockets, Publisher, Settings
from tests.kit.stack import Daemon, running_daemon

MIB = 2**20


async def refusal(sender: Publisher, method: str, *params: object) -> RefusedError:
    """Return with what a method refuses, after which the connection has to go on."""
    with pytest.raises(RefusedError) as refused:
        await sender.call(method, *params)
    assert await sender.call("ping") == "pong"
    return refused.value


# 6.9 Watching


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        ("{}:*", ["{}:1", "{}:", "{}:1:2"]),
        ("{}:1", ["{}:1"]),
        ("{}*2", ["{}:1:2"]),
        ("*{}:1*", ["{}:1", "{}:1:2"]),
        ("{}.1", []),
    ],
)
async def test_6_9_1_a_star_stands_for_any_characters(
    open_peers: Opening, channel: str, pattern: str, seen: list[str]
) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    name = channel[:60]
    await watcher.call("watch", pattern.format(name))
    await watcher.call("watch", f"{channel}-end")
    for suffix in (":1", ":", ":1:2"):
        await sender.call("broadcast", name + suffix, "x")
    await sender.call("broadcast", f"{channel}-end", "x")
    expected = [*(each.format(name) for each in seen), f"{channel}-end"]
    assert [(await watcher.message())[0] for _ in expected] == expected


@pytest.mark.parametrize("pattern", ["", "a b", "*" * 201, "[a]", "?", 5, None])
async def test_6_9_1_what_is_no_pattern_is_refused(open_peers: Opening, pattern: object) -> None:
    watcher = await (await open_peers()).publisher()
    error = await refusal(watcher, "watch", pattern)
    assert error.code == "invalid_channel"
    assert "is not a pattern" in error.message


async def test_6_9_2_a_watcher_is_no_subscriber(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FORGETFUL)
    watcher, sender = await peers.publisher(), await peers.publisher()
    await watcher.call("watch", f"{channel}*")
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 0
    assert await watcher.message() == [channel, "x", 1]
    assert (await sender.call("history", channel))["epoch"] == ""
    assert channel not in await sender.call("channels")


@pytest.mark.parametrize(("settings", "offsets"), [({}, [1, 2]), (FORGETFUL, [1, 1])])
async def test_6_9_3_messages_to_nobody_are_shown(
    open_peers: Opening, channel: str, settings: Settings, offsets: list[int]
) -> None:
    peers = await open_peers(**settings)
    watcher, sender = await peers.publisher(), await peers.publisher()
    await watcher.call("watch", channel)
    for _ in offsets:
        await sender.call("broadcast", channel, "x")
    assert [await watcher.message() for _ in offsets] == [[channel, "x", offset] for offset in offsets]


async def test_6_9_4_a_message_comes_once_for_watching_and_once_for_a_subscription(
    open_peers: Opening, channel: str
) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    for pattern in (channel, f"{channel}*", f"*{channel}"):
        await watcher.call("watch", pattern)
    await sender.call("broadcast", channel, "1")
    assert await watcher.message() == [channel, "1", 1]
    await watcher.call("subscribe", channel)
    await sender.call("broadcast", channel, "2")
    assert [await watcher.message() for _ in range(2)] == [[channel, "2", 2]] * 2
    assert await watcher.call("unsubscribe", channel) == {"unsubscribed": True}
    await sender.call("broadcast", channel, "3")
    assert await watcher.message() == [channel, "3", 3]
    await watcher.call("ping")
    assert not watcher.notified


async def test_6_9_5_each_kind_comes_in_the_order_published(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    names = [f"{channel}-{number}" for number in range(3)]
    await watcher.call("watch", f"{channel}-*")
    for name in names:
        await watcher.call("subscribe", name)
    await sender.send(b"".join(encode_notification("broadcast", [names[n % 3], str(n)]) for n in range(300)))
    heard: dict[object, list[object]] = {}
    for _ in range(600):
        _, message, _ = await watcher.message()
        heard.setdefault(message, []).append(message)
    assert list(heard) == [str(n) for n in range(300)], "each was heard first after the one before it"
    assert all(len(each) == 2 for each in heard.values())


async def test_6_9_6_a_connection_may_watch_max_channels_patterns(open_peers: Opening, channel: str) -> None:
    watcher = await (await open_peers(**SMALL)).publisher()
    for number in (1, 2, 2):
        assert await watcher.call("watch", f"{channel}-{number}") == {"watched": True}
    assert (await refusal(watcher, "watch", channel)).code == "too_many_channels"
    await watcher.call("unwatch", f"{channel}-1")
    assert await watcher.call("watch", channel) == {"watched": True}


async def test_6_9_7_sixteen_connections_may_watch(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**ALONE)
    watchers = [await peers.publisher()]
    await watchers[0].until_alone()
    watchers += [await peers.publisher() for _ in range(16)]
    for watcher in watchers[:16]:
        await watcher.call("watch", channel)
    assert (await refusal(watchers[16], "watch", channel)).code == "too_many_watchers"
    await watchers[0].call("unwatch", channel)
    assert await watchers[16].call("watch", channel) == {"watched": True}


async def test_6_10_who_is_not_allowed_gets_not_allowed_for_everything(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(allow_user=[54321])).publisher()
    for method, params in (("broadcast", [channel, "x"]), ("clients", []), ("ping", []), ("nope", [])):
        with pytest.raises(RefusedError, match="allow-user") as refused:
            await sender.call(method, *params)
        assert refused.value.code == "not_allowed"


@pytest.mark.parametrize("setting", ["allow_user", "allow_group"])
async def test_6_10_who_is_allowed_is_served(open_peers: Opening, setting: str) -> None:
    own = {"allow_user": [2, os.geteuid()], "allow_group": [4, os.getegid()]}[setting]  # in memory, and over sockets
    sender = await (await open_peers(**{setting: own})).publisher()
    assert await sender.call("ping") == "pong"


# 6.11 The methods


async def test_6_11_1_broadcast_answers_with_a_receipt(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    epoch = (await browser.ask("subscribe", channel))["epoch"]
    for offset in (1, 2):
        receipt = await sender.call("broadcast", channel, "x")
        assert receipt == {"recipients": 1, "epoch": epoch, "offset": offset}


async def test_6_11_2_broadcast_many_publishes_on_all_or_none(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    a, b, c = (f"{channel}-{letter}" for letter in "abc")
    for name in (a, b):
        await browser.say("subscribe", name)
        await sender.until_subscribed(name)
    receipts = await sender.call("broadcast_many", [a, c, b, a], "hello")
    assert [(receipt["recipients"], receipt["offset"]) for receipt in receipts] == [(1, 1), (0, 1), (1, 1), (1, 2)]
    assert await sender.call("broadcast_many", [], "hello") == []
    for named, message in (([a, "no spaces"], "x"), ([a, b], "x" * 65537), ([a, 5], "x"), ([a], 5)):
        await refusal(sender, "broadcast_many", named, message)
    assert (await sender.call("broadcast", b, "end"))["offset"] == 2
    assert [await browser.receive() for _ in range(4)] == ["hello", "hello", "hello", "end"]


async def test_6_11_3_channels_tells_of_those_with_subscribers(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    epoch = (await browser.ask("subscribe", f"{channel}-1"))["epoch"]
    for name in (f"{channel}-1", f"{channel}-2"):
        await sender.call("broadcast", name, "x")
    told = {"subscribers": 1, "epoch": epoch, "offset": 1, "history": 1}
    assert (await sender.call("channels"))[f"{channel}-1"] == told
    assert await sender.call("channels", channel) == {f"{channel}-1": told}
    assert await sender.call("channels", f"{channel}-2") == {}


async def test_6_11_4_history_tells_the_newest_oldest_first(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(history_size=150)).publisher()
    for number in range(1, 161):
        epoch = (await sender.call("broadcast", channel, str(number)))["epoch"]
    for params, first in (([], 61), ([2], 159), ([0], 161), ([1000], 11)):
        history = await sender.call("history", channel, *params)
        assert (history["epoch"], history["offset"]) == (epoch, 160)
        assert history["messages"] == [[number, str(number)] for number in range(first, 161)]


async def test_6_11_5_a_channel_that_does_not_exist_has_no_history(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    assert await sender.call("history", channel) == {"epoch": "", "offset": 0, "messages": []}


async def test_6_11_6_clients_tells_of_each_websocket(shared: Daemon, channel: str) -> None:
    headers = [("X-Forwarded-For", "203.0.113.1, 198.51.100.7")]
    with trio.fail_after(PATIENCE):
        async with (
            websocket(shared.websocket_socket, subprotocols=["realtime.v1"], headers=headers) as enveloped,
            websocket(shared.websocket_socket) as plain,
            publisher(shared.control_socket) as asking,
        ):
            name = json.loads(await enveloped.get_message())["client"]
            for number in (2, 1):
                await enveloped.send_message(subscribe(f"{channel}-{number}"))
                await enveloped.get_message()
            await plain.send_message(subscribe(channel))
            while channel not in await asking.call("channels"):
                pass
            listed = {each["id"]: each for each in await asking.call("clients")}
            assert abs(listed[name].pop("connected_since") - time.time()) < PATIENCE
            assert listed[name] == {
                "id": name, "protocol": "realtime.v1", "channels": [f"{channel}-1", f"{channel}-2"],
                "address": "198.51.100.7", "pending": 0,
            }  # fmt: skip
            [other] = [each for each in listed.values() if each["channels"] == [channel]]
            assert (other["protocol"], other["address"]) == ("plain", "")


async def test_6_11_7_disconnect_closes_a_client(shared: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            websocket(shared.websocket_socket, subprotocols=["realtime.v1"]) as client,
            publisher(shared.control_socket) as admin,
        ):
            name = json.loads(await client.get_message())["client"]
            assert await admin.call("disconnect", "c-nobody") == {"disconnected": 0}
            for code in (999, 1002, 1006, 2999, 5000, True, -1):
                assert (await admin.call("disconnect", name, code))["code"] == "invalid_params"
            assert (await admin.call("disconnect", name, 4000, "ü" * 62))["code"] == "invalid_params"
            assert await admin.call("disconnect", name, 4000, "enough") == {"disconnected": 1}
            assert await admin.call("disconnect", name, 4001, "never said") == {"disconnected": 0}, "it is closing"
            assert await closing(client) == (4000, "enough")


async def test_6_11_8_subscribe_is_followed_by_messages(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    epoch = (await sender.call("broadcast", channel, "before"))["epoch"]
    assert await watcher.call("subscribe", channel) == {"epoch": epoch, "offset": 1}
    await sender.call("broadcast", channel, "hello")
    await sender.call("broadcast", channel, b"\xff")
    assert [await watcher.message() for _ in range(2)] == [[channel, "hello", 2], [channel, b"\xff", 3]]


async def test_6_11_9_with_a_position_what_was_missed_follows_the_answer(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(history_size=3)
    watcher, sender = await peers.publisher(), await peers.publisher()
    for number in range(1, 6):
        epoch = (await sender.call("broadcast", channel, str(number)))["epoch"]
    answer = {"epoch": epoch, "offset": 5}
    for offset, missed in ((1, None), (2, [3, 4, 5]), (5, []), (6, None)):
        told = await watcher.call("subscribe", channel, {"epoch": epoch, "offset": offset})
        assert told == {**answer, "recovered": missed is not None}
        assert not watcher.notified, "nothing comes before the answer"
        assert [(await watcher.message())[2] for _ in missed or []] == (missed or [])
    assert await watcher.call("subscribe", channel, {"epoch": "another", "offset": 5}) == {**answer, "recovered": False}


async def test_6_11_10_unsubscribe_tells_whether_there_was_a_subscription(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    commands = [("subscribe", [channel]), ("broadcast", [channel, "x"]), ("unsubscribe", [channel]), ("ping", [])]
    await watcher.send(b"".join(encode_request(id, method, params) for id, (method, params) in enumerate(commands)))
    heard = [await watcher.receive() for _ in range(5)]
    assert heard[0] is not None
    assert [getattr(each, "id", None) for each in heard] == [0, 1, None, 2, 3], "what was published comes before"
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 0
    assert await watcher.call("unsubscribe", channel) == {"unsubscribed": False}
    assert not watcher.notified


async def test_6_11_11_watch_is_followed_by_messages(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    for _ in range(2):
        assert await watcher.call("watch", f"{channel}*") == {"watched": True}
    await sender.call("broadcast", channel, "hello")
    await sender.call("broadcast", f"{channel}-2", b"\xff")
    assert [await watcher.message() for _ in range(2)] == [[channel, "hello", 1], [f"{channel}-2", b"\xff", 1]]


async def test_6_11_12_unwatch_ends_watching(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, sender = await peers.publisher(), await peers.publisher()
    await watcher.call("watch", channel)
    await watcher.call("watch", f"{channel}-2")
    assert [await watcher.call("unwatch", channel) for _ in range(2)] == [{"unwatched": True}, {"unwatched": False}]
    await sender.call("broadcast", channel, "x")
    await sender.call("broadcast", f"{channel}-2", "y")
    assert await watcher.message() == [f"{channel}-2", "y", 1]


async def test_6_11_13_stats_counts(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**ALONE)
    sender = await peers.publisher()
    await sender.until_alone()
    browser = await peers.enveloped()
    await browser.ask("subscribe", channel)
    before = await sender.call("stats")
    for _ in range(10):
        await sender.call("broadcast", channel, "x")
    await sender.call("broadcast", f"{channel}-2", "x")
    await refusal(sender, "broadcast", "no spaces", "x")
    for _ in range(10):
        await browser.event()
    after = await sender.call("stats")
    grown = {name: after[name] - before[name] for name in before if type(before[name]) is int}
    assert (grown["publications"], grown["deliveries"], grown["history_publications"]) == (11, 10, 11)
    assert (grown["commands"], grown["commands_refused"]) == (14, 1)
    assert (after["backlogged"], after["backlog_bytes"], after["publishers"]) == (0, 0, 1)


async def test_6_11_14_ping_is_answered_with_pong(open_peers: Opening) -> None:
    assert await (await (await open_peers()).publisher()).call("ping") == "pong"


async def test_6_11_15_info_tells_the_version_and_the_limits(open_peers: Opening) -> None:
    peers = await open_peers(**SMALL)
    info = await (await peers.publisher()).call("info")
    assert info["version"] == __version__
    assert info["protocols"] == ["plain", "realtime.v1"]
    assert info["limits"]["max_message"] == 100
    assert abs(info["started"] - time.time()) < 1000
    assert (info["pid"] == os.getpid()) is isinstance(peers, InMemory)


async def test_6_11_16_info_tells_the_busiest_address(open_peers: Opening) -> None:
    peers = await open_peers(max_channels=76)  # a daemon of its own
    sender = await peers.publisher()
    assert (await sender.call("info"))["busiest_address"] is None
    async with AsyncExitStack() as stack:
        for address in ("203.0.113.7", "2001:db8::1", "", "2001:db8::2"):
            if isinstance(peers, InMemory):
                peers.core.admission.admit(address)
            else:
                assert isinstance(peers, OverSockets)
                await stack.enter_async_context(raw_client(peers.daemon.websocket_socket, address))
        busiest = (await sender.call("info"))["busiest_address"]
    assert busiest == {"address": "2001:db8::/64", "connections": 2, "of": 4}


def timed(message: list[Any]) -> list[Any]:
    """Return a message without its time, which has to be about now."""
    *rest, more = message
    assert list(more) == ["time"]
    assert type(more["time"]) is int
    assert abs(more["time"] / 1000 - time.time()) < 60
    return rest


async def test_6_11_23_history_tells_the_time_where_it_is_asked_for(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    for message in ("1", b"\xff", "3"):
        await sender.call("broadcast", channel, message)
    history = await sender.call("history", channel, 2, {"time": True})
    assert [timed(each) for each in history["messages"]] == [[2, b"\xff"], [3, "3"]]
    for options in ([], [2], [2, {}], [2, {"time": False}]):
        told = (await sender.call("history", channel, *options))["messages"]
        assert [len(each) for each in told] == [2] * len(told)
    assert (await sender.call("history", f"{channel}-2", 2, {"time": True}))["messages"] == []


async def test_6_11_24_messages_come_with_the_time_once_it_was_asked_for(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, other, sender = await peers.publisher(), await peers.publisher(), await peers.publisher()
    names = [channel, f"{channel}-2", f"{channel}-3"]
    for listening in (watcher, other):
        await listening.call("subscribe", names[0])
    epoch = (await sender.call("broadcast", names[0], "1"))["epoch"]
    assert await watcher.call("subscribe", names[1], None, {"time": True}) == {
        "epoch": (await sender.call("broadcast", names[1], "1"))["epoch"], "offset": 0,
    }  # fmt: skip
    await watcher.call("subscribe", names[2])
    for name in names:
        await sender.call("broadcast", name, b"\xff")
    assert await watcher.message() == [names[0], "1", 1], "that was published before"
    heard = [timed(await watcher.message()) for _ in range(4)]
    assert heard == [[names[1], "1", 1], [names[0], b"\xff", 2], [names[1], b"\xff", 2], [names[2], b"\xff", 1]]
    await watcher.call("subscribe", names[0], {"epoch": epoch, "offset": 0})
    assert [timed(await watcher.message())[2] for _ in range(2)] == [1, 2]
    assert [await other.message() for _ in range(2)] == [[names[0], "1", 1], [names[0], b"\xff", 2]]
    assert await watcher.call("unsubscribe", names[0]) == {"unsubscribed": True}
    assert (await sender.call("broadcast", names[0], "x"))["recipients"] == 1


async def test_6_11_24_watched_messages_have_the_time_too(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    watcher, other, sender = await peers.publisher(), await peers.publisher(), await peers.publisher()
    assert await watcher.call("watch", f"{channel}*", {"time": True}) == {"watched": True}
    assert await other.call("watch", f"{channel}*", {"time": False}) == {"watched": True}
    await sender.call("broadcast", channel, "1")
    assert timed(await watcher.message()) == [channel, "1", 1]
    await watcher.call("subscribe", channel, {"epoch": "another", "offset": 0}, {"time": False})
    await sender.call("broadcast", channel, b"2")
    assert [timed(await watcher.message()) for _ in range(2)] == [[channel, b"2", 2]] * 2
    assert [await other.message() for _ in range(2)] == [[channel, "1", 1], [channel, b"2", 2]]


@pytest.mark.parametrize(("last", "first"), [(0, 6), (2, 4), (3, 3), (2**64 - 1, 3)])
async def test_6_11_25_last_brings_the_newest_that_are_kept(
    open_peers: Opening, channel: str, last: int, first: int
) -> None:
    peers = await open_peers(history_size=3)
    watcher, sender = await peers.publisher(), await peers.publisher()
    for number in range(1, 6):
        epoch = (await sender.call("broadcast", channel, str(number)))["epoch"]
    told = await watcher.call("subscribe", channel, None, {"last": last})
    assert told == {"epoch": epoch, "offset": 5, "last": 6 - first}
    assert not watcher.notified, "nothing comes before the answer"
    await sender.call("broadcast", channel, "6")
    assert [await watcher.message() for _ in range(first, 7)] == [[channel, str(n), n] for n in range(first, 7)]
    again = await watcher.call("subscribe", channel, None, {"last": 1, "time": True})
    assert again["last"] == 1
    assert timed(await watcher.message()) == [channel, "6", 6]


@pytest.mark.parametrize(
    "command",
    [
        ["history", 5, {"times": True}],
        ["history", 5, {"last": 5}],
        ["history", 5, {"time": 1}],
        ["history", 5, {"time": None}],
        ["history", None, {"time": True}],
        ["history", {"time": True}],
        ["subscribe", None, {"time": "yes"}],
        ["subscribe", None, {"time": True, "last": -1}],
        ["subscribe", None, {"time": True, "last": 1.0}],
        ["subscribe", None, {"time": True, "last": True}],
        ["subscribe", None, {"time": True, "more": 1}],
        ["subscribe", None, {"time": True, 5: 1}],
        ["subscribe", {"epoch": "e", "offset": 0}, {"time": True, "last": 1}],
        ["subscribe", {"epoch": "e"}, {"time": True}],
        ["subscribe", {"time": True}],
        ["subscribe", None, [], {}],
        ["watch", {"time": 0}],
        ["watch", {"last": 5}],
        ["watch", None, {"time": True}],
    ],
    ids=str,
)
async def test_6_11_26_other_options_are_refused_and_change_nothing(
    open_peers: Opening, channel: str, command: list[Any]
) -> None:
    peers = await open_peers()
    sender, other = await peers.publisher(), await peers.publisher()
    method, *options = command
    await sender.call("subscribe", f"{channel}-2")
    error = await refusal(sender, method, channel, *options)
    assert error.code == "invalid_params"
    assert len(error.message) > 20
    assert (await other.call("broadcast", channel, "x"))["recipients"] == 0
    await other.call("broadcast", f"{channel}-2", "x")
    assert await sender.message() == [f"{channel}-2", "x", 1]
    assert not sender.notified


async def test_6_11_26_what_cannot_be_subscribed_to_changes_nothing(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, other = await peers.publisher(), await peers.publisher()
    await sender.call("subscribe", channel)
    for command in (["subscribe", "a b", None, {"time": True}], ["watch", "", {"time": True}]):
        assert (await refusal(sender, *command)).code == "invalid_channel"
    await other.call("broadcast", channel, "x")
    assert await sender.message() == [channel, "x", 1]


# 6.12 Error codes


@pytest.mark.parametrize("name", ["", "no spaces", "x" * 201, 5, None, ["news"], b"news"])
async def test_6_12_1_invalid_channel(open_peers: Opening, name: object) -> None:
    sender = await (await open_peers()).publisher()
    commands: list[list[Any]] = [
        ["broadcast", name, "x"],
        ["broadcast", name, "x", "key"],
        ["broadcast_many", ["news", name], "x"],
        ["broadcast_many", [name], "x", "key"],
        ["history", name],
        ["subscribe", name],
        ["subscribe", name, {"epoch": "e", "offset": 0}],
        ["unsubscribe", name],
        ["watch", name],
    ]
    for command in commands:
        assert (await refusal(sender, *command)).code == "invalid_channel", command


async def test_6_12_2_not_allowed(open_peers: Opening) -> None:
    sender = await (await open_peers(allow_user=[54321])).publisher()
    with pytest.raises(RefusedError, match="not_allowed"):
        await sender.call("ping")


async def test_6_12_3_too_many_watchers(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**ALONE)
    await (await peers.publisher()).until_alone()
    for _ in range(16):
        await (await peers.publisher()).call("watch", channel)
    assert (await refusal(await peers.publisher(), "watch", channel)).code == "too_many_watchers"


async def test_6_12_4_invalid_utf8(open_peers: Opening) -> None:
    sender = await (await open_peers()).publisher()
    await sender.send(b"\x94\x00\x07\xa9broadcast\x92\xa4news\xa3a\xffb")
    answer = await sender.answer()
    assert isinstance(answer.error, dict)
    assert (answer.id, answer.error["code"]) == (7, "invalid_utf8")
    assert "at character 1" in answer.error["message"]
    assert await sender.call("ping") == "pong"


@pytest.mark.parametrize("size", [101, 2 * MIB])
async def test_6_12_5_message_too_large(open_peers: Opening, channel: str, size: int) -> None:
    sender = await (await open_peers(**SMALL)).publisher()
    error = await refusal(sender, "broadcast", channel, "x" * size)
    assert error.code == "message_too_large"
    assert "max-message, is 100" in error.message


@pytest.mark.parametrize(("more", "code"), [(0, None), (1, "message_too_large")])
async def test_6_12_5_a_command_may_be_1_mib_above_the_message(
    open_peers: Opening, more: int, code: str | None
) -> None:
    sender = await (await open_peers(**SMALL)).publisher()
    padding = "x" * (100 + MIB + more - len(encode_request(1, "channels", ["x" * MIB])) + MIB)
    assert len(encode_request(1, "channels", [padding])) == 100 + MIB + more
    if code is None:
        assert await sender.call("channels", padding) == {}
    else:
        assert (await refusal(sender, "channels", padding)).code == code


@pytest.mark.parametrize(
    "command",
    [
        ["broadcast"],
        ["broadcast", "news"],
        ["broadcast", "news", 5],
        ["broadcast", "news", None],
        ["broadcast", "news", "x", "key", "more"],
        ["broadcast_many", "news", "x"],
        ["broadcast_many", ["news"], 5],
        ["channels", 5],
        ["history"],
        ["history", "news", "5"],
        ["history", "news", -1],
        ["history", "news", True],
        ["history", "news", 1.5],
        ["clients", 1],
        ["disconnect"],
        ["disconnect", 5],
        ["disconnect", "c-1", "4403"],
        ["disconnect", "c-1", 999],
        ["disconnect", "c-1", 4000, 5],
        ["subscribe"],
        ["subscribe", "news", None],
        ["subscribe", "news", {"epoch": "e"}],
        ["subscribe", "news", {"epoch": "e", "offset": -1}],
        ["subscribe", "news", {"epoch": "e", "offset": True}],
        ["subscribe", "news", {"epoch": 5, "offset": 1}],
        ["unsubscribe"],
        ["watch"],
        ["unwatch", "a", "b"],
        ["stats", 1],
        ["ping", 1],
        ["info", {}],
    ],
    ids=str,
)
async def test_6_12_6_invalid_params(open_peers: Opening, command: list[Any]) -> None:
    sender = await (await open_peers()).publisher()
    error = await refusal(sender, *command)
    assert error.code == "invalid_params"
    assert len(error.message) > 20


async def test_6_12_7_unknown_method(open_peers: Opening) -> None:
    sender = await (await open_peers()).publisher()
    for method in ("dance", "", "Broadcast"):
        error = await refusal(sender, method)
        assert error.code == "unknown_method"
        assert "the methods are broadcast, " in error.message


async def test_6_12_8_too_many_channels(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(**SMALL)).publisher()
    for number in (1, 2, 2):
        await sender.call("subscribe", f"{channel}-{number}")
    assert (await refusal(sender, "subscribe", channel)).code == "too_many_channels"
    await sender.call("unsubscribe", f"{channel}-1")
    assert (await sender.call("subscribe", channel))["offset"] == 0


async def test_6_12_9_protocol_error(open_peers: Opening) -> None:
    bad = await (await open_peers()).publisher()
    await bad.send(b"\xc1")
    last = await bad.answer()
    assert isinstance(last.error, dict)
    assert last.error["code"] == "protocol_error"


async def test_6_12_10_timeout(open_peers: Opening) -> None:
    bad = await (await open_peers(**FLEETING)).publisher()
    await bad.send(b"\x94")
    last = await bad.answer()
    assert isinstance(last.error, dict)
    assert last.error["code"] == "timeout"


async def test_6_12_11_too_many_subscriptions(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers(**FEW)).publisher()
    while channel not in await sender.call("channels"):
        with suppress(RefusedError):  # whom an earlier test has had on the same daemon may not have left
            await sender.call("subscribe", channel)
    await sender.call("subscribe", f"{channel}-2")
    assert (await refusal(sender, "subscribe", f"{channel}-3")).code == "too_many_subscriptions"
    await sender.call("unsubscribe", channel)
    assert (await sender.call("subscribe", f"{channel}-3"))["offset"] == 0


async def test_6_12_12_answer_too_large(open_peers: Opening) -> None:
    sender = await (await open_peers(max_answers_total="4M")).publisher()
    for _ in range(20):
        await sender.call("broadcast", "large", "x" * 60_000)
    assert (await refusal(sender, "history", "large")).code == "answer_too_large"
    assert await sender.call("ping") == "pong"


async def test_6_12_5_a_reload_changes_what_an_open_connection_may_send(runtime_dir: Path) -> None:
    path = runtime_dir / "realtimed.toml"
    path.write_text('max_message = "100"\n')
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir, "--config", str(path), "--max-backlog", "4M") as daemon,
            publisher(daemon.control_socket) as sender,
        ):
            large = "x" * (2 * 2**20)
            assert (await sender.call("broadcast", "news", large))["code"] == "message_too_large"
            path.write_text('max_message = "3M"\n')
            daemon.process.send_signal(signal.SIGHUP)
            while (await sender.call("info"))["limits"]["max_message"] != 3 * 2**20:
                pass
            assert (await sender.call("broadcast", "news", large))["offset"] == 1
            path.write_text('max_message = "100"\n')
            daemon.process.send_signal(signal.SIGHUP)
            while (await sender.call("info"))["limits"]["max_message"] != 100:
                pass
            refused = await sender.call("broadcast", "news", large)
            assert "the command has more than 1048676 bytes" in refused["message"]
