"""Sections 3 and 4 of docs/protocol.md: the plain protocol and realtime.v1."""

from __future__ import annotations

import base64
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.clients import closing, publisher, subscribe, unsubscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.peers import FEW, FORGETFUL, LIVELY, SMALL, Browser, InMemory, Opening, Settings
from tests.kit.stack import Daemon, running_daemon, runtime_directory

# 3. The plain protocol


async def test_3_1_1_subscribe_brings_what_is_published_from_then_on(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await sender.call("broadcast", channel, "before")
    await browser.say("subscribe", channel)
    await sender.until_subscribed(channel)
    await sender.call("broadcast", f"{channel}-2", "elsewhere")
    await sender.call("broadcast", channel, "after")
    assert await browser.receive() == "after"


async def test_3_1_2_unsubscribe_ends_that(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    for name in (channel, f"{channel}-2"):
        await browser.say("subscribe", name)
        await sender.until_subscribed(name)
    await browser.say("unsubscribe", channel)
    await sender.until_subscribed(channel, 0)
    assert (await sender.call("broadcast", channel, "left"))["recipients"] == 0
    await sender.call("broadcast", f"{channel}-2", "kept")
    assert await browser.receive() == "kept"


async def test_3_1_3_other_fields_are_ignored(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await browser.say("subscribe", channel, id=[7], since=5, more={"a": None})
    await sender.until_subscribed(channel)


async def test_3_2_1_nothing_is_answered(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await browser.say("subscribe", f"{channel}-2")
    await browser.say("unsubscribe", f"{channel}-2")
    await browser.say("subscribe", channel)
    await sender.until_subscribed(channel)
    await sender.call("broadcast", channel, "the first that comes")
    assert await browser.receive() == "the first that comes"


async def test_3_2_2_doing_it_twice_changes_nothing(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await browser.say("unsubscribe", channel)
    for _ in range(2):
        await browser.say("subscribe", channel)
    await browser.say("subscribe", f"{channel}-2")
    await sender.until_subscribed(f"{channel}-2")
    assert (await sender.call("broadcast", channel, "once"))["recipients"] == 1
    await sender.call("broadcast", f"{channel}-2", "next")
    assert [await browser.receive(), await browser.receive()] == ["once", "next"]
    await browser.say("unsubscribe", channel)
    await sender.until_subscribed(channel, 0)


async def test_3_3_messages_have_nothing_around_them(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.browser()
    await browser.say("subscribe", channel)
    await sender.until_subscribed(channel)
    messages = ["x" * length for length in (0, 1, 125, 126, 60_000)] + [b"\x00" * 60_000]
    for message in messages:
        await sender.call("broadcast", channel, message)
    assert [await browser.receive() for _ in messages] == messages


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", """not JSON: invalid character (byte 0); expected {"action":"subscribe","channel":"…"}"""),
        ("", """; expected {"action":"subscribe","channel":"…"}"""),
        ('{"action":"' + "é" * 500 + '","channel":"x"}', """, got 'éééééééééééééééééééé'… - at `$.action`"""),
        (subscribe("ÿ" * 190), "'ÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿ'… is not a channel name: 1 to 200 characters of"),
        ("{", "not JSON"),
        ('{"action":"subscribe","channel":"a"} more', "not JSON"),
        ('{"deep":' + "[" * 16_000, "JSON is nested too deeply"),
        ("[]", "Expected `object`, got `array`"),
        ("null", "Expected `object`, got `null`"),
        ("{}", "missing required field `action`"),
        ('{"action":"subscribe"}', "missing required field `channel`"),
        ('{"channel":"news"}', "missing required field `action`"),
        ('{"action":"publish","channel":"news"}', """Expected "subscribe" or "unsubscribe", got 'publish'"""),
        ('{"action":"ping"}', """Expected "subscribe" or "unsubscribe", got 'ping'"""),
        ('{"action":7,"channel":"news"}', "Expected `str`, got `int`"),
        (subscribe(5), "Expected `str`, got `int` - at `$.channel`"),
        (subscribe(None), "Expected `str`, got `null` - at `$.channel`"),
        (subscribe(""), "'' is not a channel name"),
        (subscribe("a b"), "'a b' is not a channel name"),
        (unsubscribe("a b"), "'a b' is not a channel name"),
        (subscribe("x" * 201), "is not a channel name"),
        (b"{}", "got a binary frame"),
    ],
)
async def test_3_4_1_anything_else_closes_with_4400(open_peers: Opening, message: str | bytes, reason: str) -> None:
    browser = await (await open_peers()).browser()
    await browser.send(message)
    code, because = await browser.closing()
    assert code == 4400
    assert reason in because


async def test_3_4_2_one_channel_too_many_closes_with_4429(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers(**SMALL)).browser()
    for number in range(3):
        await browser.say("subscribe", f"{channel}-{number}")
    assert await browser.closing() == (4429, "the limit, max-channels, is 2 channels a client")


async def test_3_4_3_one_subscription_too_many_of_all_closes_with_4429(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FEW)
    first, second = await peers.enveloped(), await peers.browser()
    for number in range(2):
        await until_subscribed(first, f"{channel}-{number}")
    await second.say("subscribe", channel)
    assert await second.closing() == (
        4429, "the limit, max-subscriptions, is 2 subscriptions of all clients together",
    )  # fmt: skip


# 4. realtime.v1


def without_time(event: dict[str, Any]) -> dict[str, Any]:
    """Return a message event without its time, which is another for each run; `test_4_6_3_…` looks at it."""
    assert event.pop("time")
    return event


async def test_4_1_1_welcome_is_the_first_event(open_peers: Opening) -> None:
    for settings, heartbeat in (({}, 25), (LIVELY, 0.1)):
        browser = await (await open_peers(**settings)).browser("realtime.v1")
        welcome = await browser.event()
        assert welcome == {"event": "welcome", "client": welcome["client"], "heartbeat": heartbeat}
        assert type(welcome["heartbeat"]) is type(heartbeat)


async def test_4_1_2_the_client_has_the_name_that_clients_shows(runtime_dir: Path) -> None:
    names = []
    with trio.fail_after(PATIENCE):
        for _ in range(2):
            async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as asking:
                for _ in range(2):
                    async with websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client:
                        names.append(json.loads(await client.get_message())["client"])
                        assert names[-1] in [each["id"] for each in await asking.call("clients")]
    assert len(set(names)) == 4


async def test_4_1_3_fields_that_are_not_listed_are_ignored(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers()).enveloped()
    assert (await browser.ask("subscribe", channel, more=[{}], offset="x"))["event"] == "subscribed"
    assert (await browser.ask("unsubscribe", channel, since=5, epoch=None))["event"] == "unsubscribed"
    assert await browser.ask("ping", channel, data="x") == {"event": "pong"}


@pytest.mark.parametrize("id", [7, 0, -1, 2**63, "seven", "", "ä\n\u2028", None])
async def test_4_1_4_an_id_comes_back_as_it_was(open_peers: Opening, channel: str, id: int | str | None) -> None:
    browser = await (await open_peers()).enveloped()
    expected = {} if id is None else {"id": id}
    for action, named in (("subscribe", channel), ("unsubscribe", channel), ("ping", None)):
        answer = await browser.ask(action, named, id=id)
        assert {name: value for name, value in answer.items() if name == "id"} == expected
    assert (await browser.ask("subscribe", "no spaces", id=id))["id"] == id


@pytest.mark.parametrize("id", [[1], {}, True, 7.5])
async def test_4_1_4_nothing_else_is_an_id(open_peers: Opening, channel: str, id: object) -> None:
    browser = await (await open_peers()).enveloped()
    answer = await browser.ask("subscribe", channel, id=id)
    assert (answer["event"], answer["code"], answer["id"]) == ("error", "invalid_message", None)


async def test_4_1_5_answers_come_in_the_order_of_the_actions(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers()).enveloped()
    actions = [("subscribe", channel), ("ping", None), ("dance", None), ("unsubscribe", channel)] * 10
    for number, (action, named) in enumerate(actions):
        await browser.say(action, named, id=number)
    answers = [await browser.event() for _ in actions]
    assert [answer["id"] for answer in answers] == list(range(40))
    assert [answer["event"] for answer in answers] == ["subscribed", "pong", "error", "unsubscribed"] * 10


async def test_4_2_1_subscribed_says_where_the_channel_is(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    for _ in range(3):
        epoch = (await sender.call("broadcast", channel, "x"))["epoch"]
    assert await browser.ask("subscribe", channel, id=7) == {
        "event": "subscribed", "channel": channel, "id": 7, "epoch": epoch, "offset": 3,
    }  # fmt: skip


async def test_4_2_2_the_offset_is_0_if_nothing_was_published(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    subscribed = await browser.ask("subscribe", channel)
    assert subscribed["offset"] == 0
    receipt = await sender.call("broadcast", channel, "x")
    assert (receipt["epoch"], receipt["offset"]) == (subscribed["epoch"], 1)


async def test_4_2_3_every_later_message_follows(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    for _ in range(3):
        await sender.call("broadcast", channel, "before")
    assert (await browser.ask("subscribe", channel))["offset"] == 3
    for number in range(50):
        await sender.call("broadcast", channel, str(number))
    messages = [await browser.event() for _ in range(50)]
    assert [(message["offset"], message["data"]) for message in messages] == [(n + 4, str(n)) for n in range(50)]


async def test_4_2_4_subscribing_again_is_answered_again(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    assert await browser.ask("subscribe", channel) == await browser.ask("subscribe", channel)
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 1
    assert (await browser.event())["event"] == "message"
    assert (await browser.ask("subscribe", channel))["offset"] == 1
    await browser.nothing_more()


@pytest.mark.parametrize("last", [1, 3, 100, 2**53, 10**30])
async def test_4_2_5_last_brings_the_newest_that_are_kept(open_peers: Opening, channel: str, last: int) -> None:
    peers = await open_peers(**SMALL)  # three are kept
    sender, browser = await peers.publisher(), await peers.enveloped()
    for number in range(1, 6):
        epoch = (await sender.call("broadcast", channel, str(number)))["epoch"]
    await browser.say("subscribe", channel, id=7, last=last)
    assert await browser.event() == {"event": "subscribed", "channel": channel, "id": 7, "epoch": epoch, "offset": 5}
    await sender.call("broadcast", channel, "6")
    first = max(6 - last, 3)
    events = [await browser.event() for _ in range(first, 7)]
    assert [(event["offset"], event["data"]) for event in events] == [(n, str(n)) for n in range(first, 7)]
    await browser.nothing_more()


@pytest.mark.parametrize("settings", [{}, FORGETFUL])
async def test_4_2_5_where_nothing_is_kept_nothing_follows(
    open_peers: Opening, channel: str, settings: Settings
) -> None:
    peers = await open_peers(**settings)
    sender, browser, other = await peers.publisher(), await peers.enveloped(), await peers.enveloped()
    await other.ask("subscribe", channel)
    if settings:
        await sender.call("broadcast", channel, "not kept")
    assert (await browser.ask("subscribe", channel, last=20))["event"] == "subscribed"
    await browser.nothing_more()
    await sender.call("broadcast", channel, "new")
    assert (await browser.event())["data"] == "new"


async def test_4_2_6_no_last_and_0_bring_nothing(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await sender.call("broadcast", channel, "before")
    for fields in ({}, {"last": 0}, {"last": None}, {"last": None, "since": None}):
        assert (await browser.ask("subscribe", channel, **fields))["offset"] == 1
        await browser.nothing_more()


async def test_4_2_7_last_is_answered_to_who_is_subscribed_already(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    for number in range(3):
        await sender.call("broadcast", channel, str(number))
        assert (await browser.event())["data"] == str(number)
    assert "recovered" not in await browser.ask("subscribe", channel, last=2)
    assert [(await browser.event())["offset"] for _ in range(2)] == [2, 3]
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 1
    assert (await browser.event())["offset"] == 4
    await browser.nothing_more()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"last": -1}, "Expected `int` >= 0 - at `$.last`"),
        ({"last": 2.5}, "Expected `int | null`, got `float` - at `$.last`"),
        ({"last": "2"}, "Expected `int | null`, got `str` - at `$.last`"),
        ({"last": True}, "Expected `int | null`, got `bool` - at `$.last`"),
        ({"last": 1, "since": {"epoch": "e", "offset": 1}}, "`since` and `last` exclude each other: give one of them"),
        ({"last": 0, "since": {"epoch": "e", "offset": 1}}, "`since` and `last` exclude each other: give one of them"),
    ],
)
async def test_4_2_8_a_wrong_last_is_an_error(
    open_peers: Opening, channel: str, fields: dict[str, object], sentence: str
) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    answer = await browser.ask("subscribe", channel, id="a", **fields)
    assert answer == {"event": "error", "id": "a", "code": "invalid_message", "message": sentence}
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 0


@pytest.mark.parametrize("seen", [0, 2, 4])
async def test_4_3_1_since_replays_everything_missed(open_peers: Opening, channel: str, seen: int) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    epoch = ""
    for message in ("1", b"\x00\x01", "3", "4", "5"):
        epoch = (await sender.call("broadcast", channel, message))["epoch"]
    await browser.say("subscribe", channel, id=7, since={"epoch": epoch, "offset": seen})
    assert await browser.event() == {
        "event": "subscribed", "channel": channel, "id": 7, "epoch": epoch, "offset": 5, "recovered": True,
    }  # fmt: skip
    await sender.call("broadcast", channel, "6")
    contents = [{"data": "1"}, {"base64": "AAE="}, {"data": "3"}, {"data": "4"}, {"data": "5"}, {"data": "6"}]
    for offset, content in list(enumerate(contents, 1))[seen:]:
        assert without_time(await browser.event()) == {
            "event": "message", "channel": channel, "offset": offset, **content,
        }  # fmt: skip
    await browser.nothing_more()


@pytest.mark.parametrize("since", [{"offset": 1}, {"offset": 6}, {"epoch": "another"}, {"epoch": "", "offset": 0}])
async def test_4_3_2_what_is_not_known_any_more_is_never_replayed_in_part(
    open_peers: Opening, channel: str, since: dict[str, object]
) -> None:
    peers = await open_peers(**SMALL)
    sender, browser = await peers.publisher(), await peers.enveloped()
    for number in range(5):
        epoch = (await sender.call("broadcast", channel, str(number)))["epoch"]
    answer = await browser.ask("subscribe", channel, since={"epoch": epoch, "offset": 5, **since})
    assert answer == {"event": "subscribed", "channel": channel, "epoch": epoch, "offset": 5, "recovered": False}
    await sender.call("broadcast", channel, "5")
    assert (await browser.event())["offset"] == 6


@pytest.mark.parametrize("settings", [FORGETFUL, SMALL])
async def test_4_3_3_who_has_missed_nothing_is_up_to_date(
    open_peers: Opening, channel: str, settings: Settings
) -> None:
    peers = await open_peers(**settings)
    sender, browser, other = await peers.publisher(), await peers.enveloped(), await peers.enveloped()
    assert (await other.ask("subscribe", channel))["offset"] == 0
    receipt = await sender.call("broadcast", channel, "x")
    since = {"epoch": receipt["epoch"], "offset": 1}
    assert (await browser.ask("subscribe", channel, since=since))["recovered"] is True
    await browser.nothing_more()


async def test_4_3_4_without_since_nothing_is_said_of_recovery(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers()).enveloped()
    assert "recovered" not in await browser.ask("subscribe", channel)
    assert "recovered" not in await browser.ask("subscribe", channel, since=None)


async def test_4_3_5_since_is_answered_to_who_is_subscribed_already(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    epoch = (await browser.ask("subscribe", channel))["epoch"]
    for number in range(3):
        await sender.call("broadcast", channel, str(number))
        assert (await browser.event())["data"] == str(number)
    assert (await browser.ask("subscribe", channel, since={"epoch": epoch, "offset": 1}))["recovered"] is True
    assert [(await browser.event())["offset"] for _ in range(2)] == [2, 3]
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 1
    assert (await browser.event())["offset"] == 4
    await browser.nothing_more()


@pytest.mark.parametrize(
    ("since", "sentence"),
    [
        ({"epoch": "e", "offset": -1}, "Expected `int` >= 0 - at `$.since.offset`"),
        ({"epoch": "e", "offset": 1.5}, "Expected `int`, got `float` - at `$.since.offset`"),
        ({"epoch": "e", "offset": "1"}, "Expected `int`, got `str` - at `$.since.offset`"),
        ({"epoch": "e"}, "Object missing required field `offset` - at `$.since`"),
        ({"offset": 1}, "Object missing required field `epoch` - at `$.since`"),
        ({"epoch": 5, "offset": 1}, "Expected `str`, got `int` - at `$.since.epoch`"),
        (41, "Expected `object | null`, got `int` - at `$.since`"),
    ],
)
async def test_4_3_6_a_wrong_since_is_an_error(open_peers: Opening, channel: str, since: object, sentence: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    answer = await browser.ask("subscribe", channel, id="a", since=since)
    assert answer == {"event": "error", "id": "a", "code": "invalid_message", "message": sentence}
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 0


async def fill(sender: Any, channel: str, size: int) -> dict[str, object]:
    """Publish 100 messages of 60,000 bytes, and return the position before them."""
    for number in range(100):
        receipt = await sender.call("broadcast", channel, str(number).ljust(size))
    return {"epoch": receipt["epoch"], "offset": 0}


async def test_4_4_1_a_replay_does_not_count_against_the_backlog(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(max_backlog=65536)
    sender, browser = await peers.publisher(), await peers.enveloped()
    since = await fill(sender, channel, 60_000)
    assert (await browser.ask("subscribe", channel, since=since))["recovered"] is True
    await sender.call("broadcast", channel, "behind it")
    if not isinstance(peers, InMemory):
        stats = await sender.call("stats")
        assert (stats["clients"], stats["backlogged"]) == (1, 1), "megabytes are still to come"
    assert [(await browser.event())["offset"] for _ in range(101)] == list(range(1, 102))


async def test_4_4_2_nothing_else_is_answered_before_a_replay_is_through(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(max_backlog=65536)
    sender, browser = await peers.publisher(), await peers.enveloped()
    since = await fill(sender, channel, 60_000)
    await browser.say("subscribe", channel, since=since)
    await browser.say("ping", id=1)
    *messages, pong = (await browser.until("pong"))[1:]
    assert [message["offset"] for message in messages] == list(range(1, 101))
    assert pong["id"] == 1


async def test_4_4_3_who_does_not_read_its_replay_is_a_slow_consumer(open_sockets: Opening, channel: str) -> None:
    peers = await open_sockets(max_backlog=65536, backlog_timeout=0.3)
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.say("subscribe", channel, since=await fill(sender, channel, 60_000))
    with trio.fail_after(PATIENCE):
        while not (await sender.call("stats"))["closed"].get("4409"):
            pass
    messages, code, reason = await browser.rest()
    assert code == 4409
    assert "backlog-timeout" in reason
    assert len(messages) < 101


async def test_4_5_1_unsubscribing_is_answered(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers()).enveloped()
    await browser.ask("subscribe", channel)
    assert await browser.ask("unsubscribe", channel, id=8) == {"event": "unsubscribed", "channel": channel, "id": 8}


async def test_4_5_2_nothing_of_the_channel_follows_the_answer(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    published = [(await sender.call("broadcast", channel, "x"))["recipients"] for _ in range(20)]
    await browser.say("unsubscribe", channel)
    assert published == [1] * 20
    assert [event["event"] for event in await browser.until("unsubscribed")] == ["message"] * 20 + ["unsubscribed"]
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 0
    await browser.nothing_more()


async def test_4_5_3_it_is_answered_alike_without_a_subscription(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers()).enveloped()
    assert await browser.ask("unsubscribe", channel) == {"event": "unsubscribed", "channel": channel}


@pytest.mark.parametrize("text", ["hello", "", 'ä"\\\n\u2028\0🎈', "x" * 60_000])
async def test_4_6_1_text_comes_as_data(open_peers: Opening, channel: str, text: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    await sender.call("broadcast", channel, text)
    event = without_time(await browser.event())
    assert event == {"event": "message", "channel": channel, "offset": 1, "data": text}


@pytest.mark.parametrize("data", [b"\xff\x00", b"", b"\xfb\xff\xfe?>", bytes(range(256))])
async def test_4_6_2_bytes_come_as_base64(open_peers: Opening, channel: str, data: bytes) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    await sender.call("broadcast", channel, data)
    encoded = base64.b64encode(data).decode()
    event = without_time(await browser.event())
    assert event == {"event": "message", "channel": channel, "offset": 1, "base64": encoded}


async def test_4_6_3_a_message_has_its_time_of_publication(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    for message in ("text", b"\xff"):
        before = time.time_ns() // 1_000_000
        epoch = (await sender.call("broadcast", channel, message))["epoch"]
        event = await browser.event()
        assert type(event["time"]) is int
        assert before <= event["time"] <= time.time_ns() // 1_000_000
        other = await peers.enveloped()
        await other.ask("subscribe", channel, since={"epoch": epoch, "offset": event["offset"] - 1})
        assert await other.event() == event, "a replay tells when it was published"


async def test_4_7_ping_is_answered_with_pong(open_peers: Opening) -> None:
    browser = await (await open_peers()).enveloped()
    assert await browser.ask("ping") == {"event": "pong"}


async def test_4_8_1_a_mistake_is_answered_and_ends_nothing(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    error = await browser.ask("subscribe", "a b", id=7)
    assert error["message"].startswith("'a b' is not a channel name: ")
    assert error == {"event": "error", "id": 7, "code": "invalid_channel", "message": error["message"]}
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 1
    assert (await browser.event())["data"] == "x"


@pytest.mark.parametrize(
    ("message", "id"),
    [
        ("hello", None),
        ('"id"', None),
        ('{"id":3}', 3),
        ('{"action":"dance","id":"x"}', "x"),
        ('{"action":"subscribe","id":4}', 4),
        ('{"action":"subscribe","channel":5,"id":5}', 5),
        ('{"action":"dance","id":[6]}', None),
        ('{"action":"dance","id":7', None),
    ],
)
async def test_4_8_2_an_error_bears_the_id_that_could_be_read(
    open_peers: Opening, message: str, id: int | str | None
) -> None:
    browser = await (await open_peers()).enveloped()
    await browser.send(message)
    assert (await browser.event())["id"] == id


async def test_4_8_3_what_was_refused_has_changed_nothing(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**SMALL)
    sender, browser = await peers.publisher(), await peers.enveloped()
    for fields in ({"id": [1]}, {"since": 5}):
        assert (await browser.ask("subscribe", channel, **fields))["event"] == "error"
    assert (await sender.call("history", channel))["epoch"] == ""
    for name in (channel, f"{channel}-1"):
        await browser.ask("subscribe", name)
    assert (await browser.ask("subscribe", f"{channel}-2"))["event"] == "error"
    assert (await browser.ask("unsubscribe", channel, id=[1]))["event"] == "error"
    assert (await sender.call("history", f"{channel}-2"))["epoch"] == ""
    assert (await sender.call("broadcast", channel, "x"))["recipients"] == 1


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("hello", "not JSON"),
        ('{"deep":' + "[" * 16_000, "JSON is nested too deeply"),
        ('{"action":"ping"}{}', "not JSON"),
        (b"{}", "got a binary frame"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `action`"),
        ('{"action":"dance"}', """Expected "subscribe", "unsubscribe" or "ping", got 'dance'"""),
        ('{"action":7}', "Expected `str`"),
        ('{"action":"subscribe"}', "missing required field `channel`"),
        ('{"action":"unsubscribe"}', "missing required field `channel`"),
        (subscribe(5), "Expected `str`, got `int` - at `$.channel`"),
    ],
)
async def test_4_8_4_invalid_message(open_peers: Opening, message: str | bytes, says: str) -> None:
    browser = await (await open_peers()).enveloped()
    await browser.send(message)
    error = await browser.event()
    assert (error["event"], error["code"]) == ("error", "invalid_message")
    assert says in error["message"]
    await browser.nothing_more()


@pytest.mark.parametrize("name", ["", "a b", "x" * 201, "ä"])
@pytest.mark.parametrize("action", ["subscribe", "unsubscribe"])
async def test_4_8_5_invalid_channel(open_peers: Opening, action: str, name: str) -> None:
    browser = await (await open_peers()).enveloped()
    error = await browser.ask(action, name)
    assert (error["event"], error["code"]) == ("error", "invalid_channel")
    assert "1 to 200 characters" in error["message"]


async def test_4_8_6_too_many_channels(open_peers: Opening, channel: str) -> None:
    browser = await (await open_peers(**SMALL)).enveloped()
    names = [f"{channel}-{number}" for number in range(3)]
    answers = [await browser.ask("subscribe", name) for name in names]
    assert [answer.get("code") for answer in answers] == [None, None, "too_many_channels"]
    assert "max-channels, is 2" in answers[-1]["message"]
    await browser.ask("unsubscribe", names[0])
    assert (await browser.ask("subscribe", names[2]))["event"] == "subscribed"


async def test_4_8_7_too_many_subscriptions_of_all_clients_together(open_peers: Opening, channel: str) -> None:
    peers = await open_peers(**FEW)
    first, second = await peers.enveloped(), await peers.enveloped()
    for each in (first, second):
        await until_subscribed(each, channel)
    refused = await second.ask("subscribe", f"{channel}-2")
    assert refused["code"] == "too_many_subscriptions"
    assert "max-subscriptions, is 2" in refused["message"]
    assert (await second.ask("subscribe", channel))["event"] == "subscribed"  # again: that is not one more
    await first.ask("unsubscribe", channel)
    assert (await second.ask("subscribe", f"{channel}-2"))["event"] == "subscribed"


async def until_subscribed(browser: Browser, channel: str) -> None:
    """Subscribe as soon as those have left whom an earlier test has had on the same daemon."""
    while (await browser.ask("subscribe", channel))["event"] != "subscribed":
        pass


async def goodbyes(*options: str, stop: bool) -> list[dict[str, Any]]:
    """Return the goodbyes of ten clients of a daemon, each with the code and the reason of the Close behind it."""
    heard: list[dict[str, Any]] = []
    welcomed: list[object] = []

    async def listen(daemon: Daemon) -> None:
        async with websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client:
            assert json.loads(await client.get_message())["event"] == "welcome"
            welcomed.append(client)
            if stop and len(welcomed) == 10:
                daemon.process.terminate()
            goodbye = json.loads(await client.get_message())
            code, reason = await closing(client)
            heard.append({**goodbye, "code": code, "words": reason})

    with trio.fail_after(PATIENCE), runtime_directory() as directory:
        async with running_daemon(directory, *options) as daemon, trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(listen, daemon)
    return heard


@pytest.fixture(scope="module")
def farewells() -> list[dict[str, Any]]:
    """What clients of a daemon that stops are told."""
    return trio.run(partial(goodbyes, stop=True))


def test_4_9_1_goodbye_comes_before_a_close_with_4503(farewells: list[dict[str, Any]]) -> None:
    for goodbye in farewells:
        assert set(goodbye) == {"event", "reason", "retry_after_ms", "code", "words"}
        assert (goodbye["event"], goodbye["code"]) == ("goodbye", 4503)
        assert isinstance(goodbye["retry_after_ms"], int)
        assert goodbye["words"] == f"restarting, come back in {goodbye['retry_after_ms']} ms"


def test_4_9_2_the_reason_is_restart_when_the_daemon_stops(farewells: list[dict[str, Any]]) -> None:
    assert [goodbye["reason"] for goodbye in farewells] == ["restart"] * 10


async def test_4_9_3_the_reason_is_max_age_for_one_that_is_old() -> None:
    began = trio.current_time()
    heard = await goodbyes("--max-age", "0.6", "--heartbeat", "0.1", stop=False)
    assert trio.current_time() - began >= 0.3
    assert [(goodbye["reason"], goodbye["code"]) for goodbye in heard] == [("max-age", 4503)] * 10
    assert all(0 <= goodbye["retry_after_ms"] <= 1000 for goodbye in heard)


def test_4_9_4_each_client_gets_a_time_of_its_own(farewells: list[dict[str, Any]]) -> None:
    times = {goodbye["retry_after_ms"] for goodbye in farewells}
    assert len(times) >= 8, "of ten times within a second or more, two may be the same by chance"
    assert min(times) >= 1000
