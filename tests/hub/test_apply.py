"""Publications that were numbered elsewhere: known ones, gaps, other epochs, and replicas of a hub."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtimed.errors import RefusedError
from realtimed.hub.history import ENTRY_BYTES, RING_BYTES
from realtimed.hub.hub import Hub
from realtimed.hub.position import Position
from tests.kit.hubs import MODEL_RUNS, Clock, come_back, fan_out, hub_with_history, missed
from tests.kit.subscribers import LINES, Listener


def apply(hub: Hub, offset: int, epoch: str = "e", name: str = "news") -> int | None:
    return hub.apply(name, epoch, offset, str(offset).encode(), text=True, time=0)


def recovered(hub: Hub, offset: int, epoch: str = "e") -> bool | None:
    return come_back(hub, "news", Position(epoch, offset)).recovered


@pytest.mark.parametrize("size", [0, 100])
def test_a_publication_goes_to_subscribers_as_if_it_had_been_published_here(size: int) -> None:
    hub = hub_with_history(size)
    hub.subscribe(listener := Listener(), "news")
    wakes: list[None] = []
    hub.wake = lambda: wakes.append(None)
    assert [apply(hub, offset) for offset in (1, 2, 3)] == [1, 1, 1]
    fan_out(hub)
    assert listener.received == b"news/1/1;news/2/2;news/3/3;"
    assert (hub.publications, hub.deliveries, hub.sends, len(wakes)) == (3, 3, 1, 1)
    joined = come_back(hub, "news", Position("e", 1))
    assert (joined.epoch, joined.offset, joined.recovered) == ("e", 3, size > 0)


def test_text_binary_and_time_stay_what_they_were() -> None:
    hub = hub_with_history()
    hub.apply("news", "e", 1, b"\xff", text=False, time=5)
    hub.apply("news", "e", 2, b"a", text=True, time=-7)
    assert [(each.offset, each.message, each.time) for each in hub.recent("news", 9)[1]] == [
        (1, b"\xff", 5),
        (2, "a", -7),
    ]


def test_what_has_been_here_is_dropped() -> None:
    hub = hub_with_history()
    hub.subscribe(listener := Listener(), "news")
    for offset in (1, 2, 3):
        apply(hub, offset)
    before = hub.history.bytes
    assert [apply(hub, offset) for offset in (1, 3, 2)] == [None, None, None]
    assert apply(hub, 4) == 1
    fan_out(hub)
    assert listener.messages == ["1", "2", "3", "4"]
    assert (hub.publications, hub.skipped) == (4, 0)
    assert hub.history.bytes == before + ENTRY_BYTES + 1


def test_after_a_gap_the_history_begins_with_what_came_then() -> None:
    hub = hub_with_history()
    hub.subscribe(listener := Listener(), "news")
    for offset in (1, 2, 5, 6, 9):
        assert apply(hub, offset) == 1
    assert hub.skipped == 4
    fan_out(hub)
    assert listener.messages == ["1", "2", "5", "6", "9"]
    assert hub.history.bytes == RING_BYTES + ENTRY_BYTES + 1
    assert hub.history.publications == 1
    assert [recovered(hub, offset) for offset in (2, 6, 7, 8, 9, 10)] == [False, False, False, True, True, False]
    assert missed(come_back(hub, "news", Position("e", 8))) == ["9"]


def test_a_channel_begins_at_its_first_publication_which_is_no_gap() -> None:
    hub = hub_with_history()
    assert apply(hub, 7) == 0
    assert (hub.skipped, hub.channels["news"].offset) == (0, 7)
    assert [recovered(hub, offset) for offset in (5, 6, 7)] == [False, True, True]


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 90])
def test_in_another_epoch_the_channel_begins_anew(offset: int) -> None:
    hub = hub_with_history()
    hub.subscribe(listener := Listener(), "news")
    for number in (1, 2, 3):
        apply(hub, number)
    assert apply(hub, offset, "f") == 1
    fan_out(hub)
    assert listener.messages == ["1", "2", "3", str(offset)]
    assert hub.skipped == 0
    assert not recovered(hub, 3), "whatever the offset, that was another epoch"
    assert recovered(hub, offset - 1, "f")
    assert not recovered(hub, offset - 2, "f")
    assert (hub.history.publications, hub.history.channels) == (1, 1)
    assert apply(hub, offset + 1, "f") is not None
    assert apply(hub, offset + 1, "f") is None


def test_a_channel_that_was_subscribed_to_first_takes_the_epoch_of_its_publications() -> None:
    hub = hub_with_history()
    own = hub.subscribe(listener := Listener(), "news")
    assert apply(hub, 5) == 1
    fan_out(hub)
    assert listener.messages == ["5"]
    assert not recovered(hub, 0, own.epoch)
    assert recovered(hub, 4)


@pytest.mark.parametrize(("offset", "epoch"), [(20, "e"), (1, "f"), (12, "f")])
def test_a_replay_under_way_goes_on_over_gaps_and_epochs(offset: int, epoch: str) -> None:
    hub = hub_with_history(size=10)
    for number in range(1, 11):
        apply(hub, number)
    frames = iter(hub.replays.replay([], come_back(hub, "news", Position("e", 0)).missed, LINES))
    got = [next(frames), next(frames)]
    apply(hub, offset, epoch)
    apply(hub, offset + 1, epoch)
    got += frames
    assert b"".join(map(bytes, got)).decode() == "".join(f"news/{number}/{number};" for number in range(1, 11))
    assert hub.history.retained == 0


@pytest.mark.parametrize(("offset", "epoch"), [(20, "e"), (1, "f")])
def test_nothing_is_left_of_a_channel_that_began_anew_and_expires(offset: int, epoch: str) -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    hub.subscribe(listener := Listener(), "news")
    apply(hub, 1)
    hub.leave(listener)
    clock.now += 30
    apply(hub, offset, epoch)
    clock.now += 59
    hub.history.expire(10)
    assert hub.subscribe(listener, "news", Position(epoch, offset - 1)).recovered
    hub.leave(listener)
    clock.now += 61
    hub.history.expire(10)
    assert not hub.channels
    assert (hub.history.bytes, hub.history.channels, hub.history.publications) == (0, 0, 0)


def test_without_history_and_subscribers_nothing_is_left_behind() -> None:
    hub = hub_with_history(size=0)
    assert [apply(hub, offset) for offset in (1, 2)] == [0, 0]
    assert not hub.channels
    assert hub.idle


@pytest.mark.parametrize("name", ["", "a b", "x" * 201])
def test_bad_channel_names_are_refused(name: str) -> None:
    hub = hub_with_history()
    with pytest.raises(RefusedError, match="is not a channel name"):
        apply(hub, 1, name=name)
    assert not hub.channels


@settings(max_examples=MODEL_RUNS, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 100))
def test_a_replica_that_gets_everything_at_least_once_and_in_order_is_like_its_original(seed: int, steps: int) -> None:
    dice = random.Random(seed)
    original, replica = hub_with_history(size=5), hub_with_history(size=5)
    hubs = original, replica
    for name in "abc":  # with history, channels stay; so both go through the same epochs
        original.publish(name, "first")
    listeners = [Listener() for _ in hubs]
    applied: list[tuple[str, str, int, bytes, bool, int]] = []

    def follow(name: str) -> None:
        position, [newest] = original.recent(name, 1)
        applied.append((name, position.epoch, newest.offset, newest.payload, newest.text, newest.time))
        assert replica.apply(*applied[-1]) is not None

    for name in "abc":
        follow(name)
    for number in range(steps):
        name = dice.choice("abc")
        match dice.choice(["publish", "publish", "subscribe", "unsubscribe", "repeat", "come back"]):
            case "publish":
                original.publish(name, str(number))
                follow(name)
            case "subscribe":
                for hub, listener in zip(hubs, listeners, strict=True):
                    hub.subscribe(listener, name)
            case "unsubscribe":
                for hub, listener in zip(hubs, listeners, strict=True):
                    hub.unsubscribe(listener, name)
            case "repeat":
                assert replica.apply(*dice.choice(applied)) is None
            case _:
                since = Position(original.channels[name].epoch, dice.randint(0, original.channels[name].offset + 1))
                one, other = (come_back(hub, name, since) for hub in hubs)
                assert one[:3] == other[:3]
                assert missed(one) == missed(other)
    for hub in hubs:
        fan_out(hub)
    assert listeners[0].received == listeners[1].received
    assert original.history.bytes == replica.history.bytes
    assert replica.skipped == 0
