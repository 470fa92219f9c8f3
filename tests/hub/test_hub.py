"""The hub: order, exactly once, and what subscribing, unsubscribing and leaving do in the middle of a round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtimed.errors import RefusedError
from realtimed.hub.hub import Hub
from realtimed.hub.position import Receipt
from realtimed.hub.publication import Publication
from realtimed.hub.rounds import Batch, send_each
from tests.kit.hubs import MODEL_RUNS, fan_out, make_hub
from tests.kit.subscribers import LINES, LOUD_LINES, OTHER_LINES, Lines, Listener


class LongLines(Lines):
    def encode(self, publication: Publication) -> bytes:
        return publication.payload * 1000


def test_everyone_on_the_channel_has_every_message_once_and_in_order() -> None:
    hub = make_hub()
    listeners = [Listener() for _ in range(5)]
    for each in listeners:
        hub.subscribe(each, "news")
    hub.subscribe(bystander := Listener(), "other")
    receipts = [hub.publish("news", f"m{n}") for n in range(3)]
    fan_out(hub)
    assert [each.messages for each in listeners] == [["m0", "m1", "m2"]] * 5
    assert bystander.messages == []
    assert [receipt.offset for receipt in receipts] == [1, 2, 3]
    assert {receipt.recipients for receipt in receipts} == {5}


def test_publications_that_come_together_are_one_send_a_subscriber() -> None:
    hub = make_hub()
    listeners = [Listener() for _ in range(4)]
    for each in listeners:
        hub.subscribe(each, "a")
        hub.subscribe(each, "b")
    for n in range(10):
        hub.publish("ab"[n % 2], f"m{n}")
    fan_out(hub)
    assert [each.sends for each in listeners] == [1] * 4
    assert listeners[0].messages == [f"m{n}" for n in range(10)]


def test_a_publication_is_encoded_once_for_each_format_and_only_if_needed() -> None:
    hub = make_hub()
    for form in (LINES, OTHER_LINES):
        for _ in range(3):
            hub.subscribe(Listener(form=form), "news")
    before = LINES.encoded, OTHER_LINES.encoded
    hub.publish("news", "x")
    fan_out(hub)
    hub.publish("nobody", "x")
    fan_out(hub)
    assert (LINES.encoded - before[0], OTHER_LINES.encoded - before[1]) == (1, 1)


def test_a_channel_is_forgotten_with_its_last_subscriber_and_begins_a_new_epoch() -> None:
    hub = make_hub()
    first = Listener()
    epoch = hub.subscribe(first, "news").epoch
    hub.publish("news", "x")
    hub.unsubscribe(first, "news")
    assert hub.channels == {}
    again = hub.subscribe(first, "news")
    assert again.epoch != epoch
    assert again.offset == 0


def test_a_broadcast_to_nobody_leaves_nothing_behind() -> None:
    hub = make_hub()
    receipts = [hub.publish("nobody", "x") for _ in range(2)]
    assert [(each.recipients, each.offset) for each in receipts] == [(0, 1), (0, 1)]
    assert receipts[0].epoch != receipts[1].epoch, "offsets began anew"
    assert hub.idle
    assert hub.channels == {}


def test_subscribing_between_publishing_and_fan_out_brings_only_what_comes_later() -> None:
    hub = make_hub()
    hub.subscribe(early := Listener(), "news")
    hub.publish("news", "before")
    hub.subscribe(late := Listener(), "news")
    hub.publish("news", "after")
    fan_out(hub)
    assert early.messages == ["before", "after"]
    assert late.messages == ["after"]


def test_unsubscribing_hands_over_what_was_published_before() -> None:
    hub = make_hub()
    hub.subscribe(listener := Listener(), "news")
    hub.publish("news", "before")
    hub.unsubscribe(listener, "news")
    assert listener.messages == ["before"]
    hub.publish("news", "after")
    fan_out(hub)
    assert listener.messages == ["before"]


def test_subscribing_again_in_the_middle_of_a_round_brings_nothing_twice() -> None:
    hub = make_hub()
    listeners = [Listener() for _ in range(6)]
    for each in listeners:
        hub.subscribe(each, "news")
    hub.publish("news", "m")
    turn = hub.next_round()
    assert turn is not None
    assert turn.step(2)
    for each in listeners:
        hub.unsubscribe(each, "news")
        hub.subscribe(each, "news")
    while turn.step(1):
        pass
    fan_out(hub)
    assert [each.messages for each in listeners] == [["m"]] * 6


@pytest.mark.parametrize(
    "name", ["", "a b", "ä", "x" * 201, "a\n", "a\x00", "news!", 5, None, ["news"], b"news", "\udcff"]
)
def test_bad_channel_names_are_refused_everywhere(name: object) -> None:
    hub = make_hub()
    for attempt in (
        lambda: hub.publish(name, "x"),
        lambda: hub.subscribe(Listener(), name),
        lambda: hub.unsubscribe(Listener(), name),
    ):
        with pytest.raises(RefusedError) as refused:
            attempt()
        assert refused.value.code == "invalid_channel"


def test_every_allowed_character_and_length_is_a_channel_name() -> None:
    hub = make_hub()
    for name in ("AZaz09_-=@,.;:/", "x" * 200, "x"):
        hub.subscribe(Listener(), name)
        assert name in hub.channels


@pytest.mark.parametrize(
    ("message", "code"),
    [("x" * 1001, "message_too_large"), ("ä" * 501, "message_too_large"), ("a\udcff", "invalid_utf8"),
     (5, "invalid_params"), (None, "invalid_params")],
)  # fmt: skip
def test_bad_messages_are_refused(message: object, code: str) -> None:
    hub = make_hub()
    hub.subscribe(Listener(), "news")
    with pytest.raises(RefusedError) as refused:
        hub.publish("news", message)
    assert refused.value.code == code
    assert hub.idle


def test_the_largest_message_is_accepted() -> None:
    assert make_hub().publish("news", "ä" * 500).recipients == 0


def test_one_channel_too_many_is_refused_and_changes_nothing() -> None:
    hub = make_hub(max_channels=2)
    listener = Listener()
    hub.subscribe(listener, "a")
    hub.subscribe(listener, "b")
    hub.subscribe(listener, "b")  # again is none too many
    with pytest.raises(RefusedError) as refused:
        hub.subscribe(listener, "c")
    assert refused.value.code == "too_many_channels"
    assert sorted(channel.name for channel in listener.channels) == ["a", "b"]
    assert hub.subscriptions == 2


def test_a_long_log_is_delivered_in_several_rounds_in_order() -> None:
    hub = make_hub(max_message=100_000)
    hub.subscribe(listener := Listener(), "news")
    messages = [f"m{n}" for n in range(2000)] + [f"{n}" + "x" * 90_000 for n in range(7)]
    for message in messages:
        hub.publish("news", message)
    fan_out(hub)
    assert listener.messages == messages
    assert hub.log_bytes == 0
    assert hub.rounds > 4


def test_channels_with_very_many_subscriptions_are_spread_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtimed.hub.log._ROUND_MEMBERS", 10)
    hub = make_hub()
    listeners = [Listener() for _ in range(4)]
    for each in listeners:
        for name in "abcdef":
            hub.subscribe(each, name)
    for number in range(60):
        hub.publish("abcdef"[number % 6], str(number))
    fan_out(hub)
    assert [each.messages for each in listeners] == [[str(number) for number in range(60)]] * 4
    assert hub.rounds > 20


def test_waking_happens_once_for_all_that_is_published_together() -> None:
    hub = make_hub()
    wakes: list[Receipt | None] = []
    hub.wake = lambda: wakes.append(None)
    hub.subscribe(Listener(), "news")
    hub.publish("news", "1")
    hub.publish("news", "2")
    hub.publish("nobody", "3")
    assert len(wakes) == 1
    fan_out(hub)
    hub.publish("news", "4")
    assert len(wakes) == 2


@settings(max_examples=MODEL_RUNS, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 150))
def test_the_hub_agrees_with_a_model_that_delivers_at_once(seed: int, steps: int) -> None:
    """Whatever happens in between, each listener gets what a hub without rounds would have given it."""
    chance = random.Random(seed)
    hub = make_hub()
    listeners = [Listener(form=chance.choice([LINES, OTHER_LINES])) for _ in range(6)]
    expected: dict[Listener, list[str]] = {each: [] for each in listeners}
    subscribed: dict[str, set[Listener]] = {name: set() for name in "abc"}
    turn = None
    for number in range(steps):
        who, where = chance.choice(listeners), chance.choice("abc")
        match chance.choice([
            "subscribe", "unsubscribe", "publish", "publish", "publish", "catch up", "change form", "step", "step",
        ]):  # fmt: skip
            case "subscribe":
                hub.subscribe(who, where)
                subscribed[where].add(who)
            case "unsubscribe":
                assert hub.unsubscribe(who, where) == (who in subscribed[where])
                subscribed[where].discard(who)
            case "publish":
                assert hub.publish(where, str(number)).recipients == len(subscribed[where])
                for each in subscribed[where]:
                    expected[each].append(f"{number}!" if each.form is LOUD_LINES else str(number))
            case "change form":
                hub.change_form(who, chance.choice([LINES, OTHER_LINES, LOUD_LINES]))
            case "catch up":
                hub.catch_up(who)
                assert who.messages == expected[who]
            case _:
                turn = turn or hub.next_round()
                if turn is not None and not turn.step(chance.randint(1, 4)):
                    turn = None
    while turn is not None and turn.step(1):
        pass
    fan_out(hub)
    assert {each: each.messages for each in listeners} == expected
    assert hub.idle
    assert hub.subscriptions == sum(map(len, subscribed.values()))
    assert set(hub.channels) == {name for name, members in subscribed.items() if members}
    for each in listeners:
        hub.leave(each)
    assert hub.channels == {}


@dataclass(eq=False)
class Overwhelmed(Listener):
    """One that leaves when it is handed anything, as a client does that has too much waiting."""

    hub: Hub = field(default_factory=make_hub)

    def take(self, data: bytes) -> None:
        self.hub.leave(self)


@pytest.mark.parametrize("in_round", [False, True])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (Hub.subscribe, "news"), (Hub.subscribe, "new"), (Hub.unsubscribe, "news"), (Hub.unsubscribe, "sport"),
        (lambda hub, leaving, _: hub.change_form(leaving, LOUD_LINES), "any"),
    ],
)  # fmt: skip
def test_who_leaves_over_what_it_is_handed_first_is_gone(
    change: Callable[[Hub, Listener, str], object], name: str, in_round: bool
) -> None:
    hub = make_hub()
    leaving, other = Overwhelmed(hub=hub), Listener()
    hub.subscribe(leaving, "news")
    hub.subscribe(leaving, "sport")
    hub.subscribe(other, "news")
    hub.publish("news", "1")
    turn = hub.next_round() if in_round else None
    change(hub, leaving, name)
    assert not leaving.channels
    assert hub.subscriptions == 1
    assert list(hub.channels) == ["news"]
    hub.publish("news", "2")
    while turn is not None and turn.step(1):
        pass
    fan_out(hub)
    assert other.messages == ["1", "2"]
    assert hub.publish("news", "3").recipients == 1


def test_of_many_mixes_a_step_makes_no_more_than_it_sends() -> None:
    """What a mix is worth shows when it is made: if all were made at once, a round could take any amount of memory."""
    batches: list[int] = []

    def deliver(batch: Batch) -> None:
        batches.append(sum(len(part[0]) for part in batch))
        send_each(batch)

    hub = make_hub()
    hub.deliver = deliver
    channels = [f"c{number}" for number in range(10)]
    pairs = list(combinations(channels, 2))
    listeners = [Listener(form=LongLines()) for _ in pairs]
    for listener, pair in zip(listeners, pairs, strict=True):
        for channel in pair:
            hub.subscribe(listener, channel)
    for number, channel in enumerate(channels):
        hub.publish(channel, f"{number}" * 100)
    turn = hub.next_round()
    assert turn is not None
    while turn.step(100):
        pass
    assert sum(batches) == sum(len(each.received) for each in listeners) == len(pairs) * 2 * 100_000
    assert max(batches) <= 100 * 4096 + 2 * 100_000
    assert hub.sends == len(pairs)


def test_many_who_have_been_caught_up_make_a_round_of_many_channels_little_dearer() -> None:
    hub = make_hub(max_channels=1000)
    crowd = [Listener() for _ in range(3000)]
    for each in crowd:
        hub.subscribe(each, "mine")
    other = Listener()
    for number in range(512):
        hub.subscribe(other, f"news-{number}")

    def seconds(*, late: bool) -> float:
        for number in range(512):
            hub.publish(f"news-{number}", "x")
        for each in crowd if late else ():
            hub.catch_up(each)
        began = time.process_time()
        a_round = hub.next_round()
        lasted = time.process_time() - began
        assert a_round is not None
        while a_round.step(512):
            pass
        return lasted

    assert min(seconds(late=True) for _ in range(5)) < min(seconds(late=False) for _ in range(5)) + 0.02
