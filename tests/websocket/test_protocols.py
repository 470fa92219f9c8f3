"""What is said over a WebSocket, in memory: each message of the plain protocol and of realtime.v1, and each mistake."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, TextMessage

from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending, Frames, Publication
from realtimed.websocket.protocols import Conversation, ViolationError, choose
from realtimed.websocket.protocols.plain import Plain
from realtimed.websocket.protocols.v1 import RealtimeV1
from tests.kit.clients import subscribe, unsubscribe
from tests.kit.hubs import fan_out
from tests.kit.subscribers import Listener


def converse(protocol: type[Conversation], **limits: int) -> tuple[Conversation, Hub, Listener]:
    history = History(limit=2**20, clock=lambda: 0.0, default=Retention(3, 60))
    times = count(0, 1_000_000)  # a millisecond for each publication
    hub = Hub(
        max_message=1000,
        max_channels=limits.get("max_channels", 3),
        history=history,
        time_ns=lambda: next(times),
    )
    listener = Listener(form=protocol.form)
    return protocol(hub, listener), hub, listener


def read(*frames: Frames) -> list[Any]:
    """Return a server's frames as a client reads them: parsed JSON for text."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(b"".join(frames))
    return [json.loads(event.data) for event in client.events() if isinstance(event, TextMessage)]


def ask(conversation: Conversation, message: str | bytes) -> dict[str, Any]:
    [answer] = read(*conversation.receive(message))
    assert isinstance(answer, dict)
    return answer


def test_the_subprotocol_is_chosen_from_what_the_client_offers() -> None:
    assert choose([]) is Plain
    assert choose(["graphql-ws"]) is Plain
    assert choose(["other", "realtime.v1"]) is RealtimeV1


class TestPlain:
    def test_subscribing_and_unsubscribing_have_no_answer(self) -> None:
        conversation, hub, _ = converse(Plain)
        assert conversation.greeting("c-1", 25) == b""
        assert not conversation.receive(subscribe("news"))
        assert hub.channels["news"].count == 1
        assert not conversation.receive(unsubscribe("news"))
        assert not hub.subscriptions

    def test_messages_arrive_as_they_were_published(self) -> None:
        client = Connection(ConnectionType.CLIENT)
        client.receive_data(Plain.form.encode(Publication("news", "ä".encode(), True, 1)))
        client.receive_data(Plain.form.encode(Publication("news", b"\xff", False, 2)))
        assert list(client.events()) == [TextMessage(data="ä"), BytesMessage(data=b"\xff")]

    def test_fields_it_does_not_know_are_ignored(self) -> None:
        conversation, hub, _ = converse(Plain)
        conversation.receive(subscribe("news", id=7))
        assert set(hub.channels) == {"news"}

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            ("hello", "not JSON"),
            ("", "not JSON"),
            ("{", "not JSON: it ends too early"),
            ('{"action":"subscribe","channel":"\\ud800"}', "not JSON: half a surrogate pair"),
            ('{"action":NaN}', "not JSON: invalid character (byte 10)"),
            ('"\ud800"', "not JSON"),
            ("[]", "Expected `object`, got `array`"),
            ("5", "Expected `object`, got `int`"),
            ("{}", "missing required field `action`"),
            ('{"action":"subscribe"}', "missing required field `channel`"),
            ('{"action":"publish","channel":"news"}', "got 'publish'"),
            (subscribe(5), "Expected `str`, got `int` - at `$.channel`"),
            (subscribe(""), "'' is not a channel name"),
            (subscribe("a b"), "'a b' is not a channel name"),
            (b"\x00", "got a binary frame"),
            ('{"deep":' + "[" * 16_000, "nested too deeply"),
        ],
    )
    def test_a_mistake_ends_the_connection_with_a_reason(self, message: str | bytes, reason: str) -> None:
        conversation, hub, _ = converse(Plain)
        with pytest.raises(ViolationError) as violation:
            conversation.receive(message)
        assert violation.value.ending is Ending.BAD_MESSAGE
        assert reason in violation.value.reason
        assert hub.channels == {}

    def test_one_channel_too_many_is_a_code_of_its_own(self) -> None:
        conversation, _, _ = converse(Plain, max_channels=1)
        conversation.receive(subscribe("a"))
        with pytest.raises(ViolationError) as violation:
            conversation.receive(subscribe("b"))
        assert violation.value.ending is Ending.TOO_MANY
        assert "max-channels, is 1" in violation.value.reason


class TestRealtimeV1:
    def test_welcome_tells_the_client_its_name_and_the_heartbeat(self) -> None:
        conversation, _, _ = converse(RealtimeV1)
        assert read(conversation.greeting("c-1f", 25.0)) == [{"event": "welcome", "client": "c-1f", "heartbeat": 25.0}]

    @pytest.mark.parametrize("id", [7, 0, "seven", None])
    def test_answers_bear_the_clients_id(self, id: int | str | None) -> None:
        conversation, hub, _ = converse(RealtimeV1)
        more = {} if id is None else {"id": id}
        subscribed = ask(conversation, subscribe("news", **more))
        epoch = hub.channels["news"].epoch
        assert subscribed == {"event": "subscribed", "channel": "news", **more, "epoch": epoch, "offset": 0}
        assert ask(conversation, unsubscribe("news", **more)) == {"event": "unsubscribed", "channel": "news", **more}

    def test_subscribed_says_where_the_channel_stands(self) -> None:
        conversation, hub, listener = converse(RealtimeV1)
        hub.subscribe(Listener(), "news")
        for _ in range(3):
            hub.publish("news", "x")
        assert ask(conversation, subscribe("news"))["offset"] == 3
        assert listener.received == b""

    def test_subscribing_twice_is_answered_twice(self) -> None:
        conversation, hub, _ = converse(RealtimeV1)
        assert ask(conversation, subscribe("news")) == ask(conversation, subscribe("news"))
        assert hub.subscriptions == 1

    def test_messages_come_in_envelopes(self) -> None:
        encode = RealtimeV1.form.encode
        text = Publication("news", 'ä"\n'.encode(), True, 41, 1767225600123)
        binary = Publication("news", b"\xff\x00", False, 42, -1)
        assert read(encode(text)) == [
            {"event": "message", "channel": "news", "offset": 41, "time": 1767225600123, "data": 'ä"\n'}
        ]
        assert read(encode(binary)) == [
            {"event": "message", "channel": "news", "offset": 42, "time": -1, "base64": "/wA="}
        ]

    def test_ping_is_answered(self) -> None:
        conversation, _, _ = converse(RealtimeV1)
        assert ask(conversation, '{"action":"ping"}') == {"event": "pong"}

    def test_goodbye_says_when_to_come_back(self) -> None:
        conversation, _, _ = converse(RealtimeV1)
        goodbye = {"event": "goodbye", "reason": "restart", "retry_after_ms": 1740}
        assert read(conversation.farewell(Ending.RESTART, 1.74)) == [goodbye]

    @pytest.mark.parametrize(
        ("message", "code", "says", "id"),
        [
            ("hello", "invalid_message", "not JSON", None),
            ('"\ud800"', "invalid_message", "not JSON", None),
            (b"{}", "invalid_message", "got a binary frame", None),
            ("[]", "invalid_message", "Expected `object`, got `array`", None),
            ('{"deep":' + "[" * 16_000, "invalid_message", "nested too deeply", None),
            ('{"id":3}', "invalid_message", "missing required field `action`", 3),
            ('{"action":"dance","id":"x"}', "invalid_message", "dance", "x"),
            ('{"action":"subscribe","id":4}', "invalid_message", "missing required field `channel`", 4),
            (subscribe(5, id=5), "invalid_message", "Expected `str`, got `int` - at `$.channel`", 5),
            (subscribe("news", id=[1]), "invalid_message", "`$.id`", None),
            (subscribe("a b", id=6), "invalid_channel", "'a b' is not a channel name", 6),
            (unsubscribe("", id=7), "invalid_channel", "'' is not a channel name", 7),
        ],
    )
    def test_a_mistake_is_answered_and_ends_nothing(
        self, message: str | bytes, code: str, says: str, id: int | str | None
    ) -> None:
        conversation, _, _ = converse(RealtimeV1)
        error = ask(conversation, message)
        assert (error["event"], error["code"], error["id"]) == ("error", code, id)
        assert says in error["message"]
        assert ask(conversation, '{"action":"ping"}') == {"event": "pong"}

    def test_one_channel_too_many_is_an_error(self) -> None:
        conversation, _, _ = converse(RealtimeV1, max_channels=1)
        ask(conversation, subscribe("a"))
        assert ask(conversation, subscribe("b", id=2))["code"] == "too_many_channels"

    def test_since_brings_what_was_missed_behind_the_answer_and_before_anything_newer(self) -> None:
        conversation, hub, listener = converse(RealtimeV1)
        epoch = hub.publish("news", "1").epoch
        for message in ("2", b"\x00\x01", "4"):
            hub.publish("news", message)
        command = subscribe("news", id=7, since={"epoch": epoch, "offset": 1})
        assert read(*conversation.receive(command)) == [
            {"event": "subscribed", "channel": "news", "id": 7, "epoch": epoch, "offset": 4, "recovered": True},
            {"event": "message", "channel": "news", "offset": 2, "time": 1, "data": "2"},
            {"event": "message", "channel": "news", "offset": 3, "time": 2, "base64": "AAE="},
            {"event": "message", "channel": "news", "offset": 4, "time": 3, "data": "4"},
        ]
        hub.publish("news", "5")
        fan_out(hub)
        assert [message["offset"] for message in read(listener.received)] == [5]

    @pytest.mark.parametrize("since", [{"offset": 0}, {"offset": 5}, {"epoch": "another", "offset": 4}])
    def test_what_is_not_known_any_more_is_said_and_nothing_is_replayed(self, since: dict[str, object]) -> None:
        conversation, hub, _ = converse(RealtimeV1)
        for message in "1234":
            epoch = hub.publish("news", message).epoch
        answer = ask(conversation, subscribe("news", since={"epoch": epoch, **since}))
        assert answer == {
            "event": "subscribed", "channel": "news", "epoch": epoch, "offset": 4, "recovered": False
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("since", "sentence"),
        [
            ({"epoch": "e", "offset": -1}, "Expected `int` >= 0 - at `$.since.offset`"),
            ({"epoch": "e"}, "Object missing required field `offset` - at `$.since`"),
            ({"epoch": 5, "offset": 1}, "Expected `str`, got `int` - at `$.since.epoch`"),
            (41, "Expected `object | null`, got `int` - at `$.since`"),
        ],
    )
    def test_a_wrong_since_is_told_which_field_and_what_was_expected(self, since: object, sentence: str) -> None:
        conversation, hub, _ = converse(RealtimeV1)
        answer = ask(conversation, subscribe("news", id="a", since=since))
        assert answer == {"event": "error", "id": "a", "code": "invalid_message", "message": sentence}
        assert not hub.channels
