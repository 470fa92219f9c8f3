"""What every broker promises, and that a daemon that is alone answers in the same turn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from realtimed.broker.base import Broker, Message
from realtimed.broker.local import LocalBroker
from realtimed.errors import RefusedError
from realtimed.hub.hub import Hub
from realtimed.hub.position import Receipt
from tests.kit.hubs import fan_out, hub_with_history
from tests.kit.subscribers import Listener


class Answers:
    """What a broker has answered."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Receipt]] = []

    def __call__(self, receipts: Sequence[Receipt]) -> None:
        self.batches.append(receipts)


def made() -> tuple[Hub, Broker]:
    hub = hub_with_history()
    return hub, LocalBroker(hub)


def test_a_batch_is_published_in_order_and_answered_once() -> None:
    hub, broker = made()
    hub.subscribe(listener := Listener(), "news")
    answers = Answers()
    broker.publish([Message("news", "1"), Message("sport", b"2", b"2"), Message("news", "3")], answers)
    [[first, second, third]] = answers.batches
    assert [(each.recipients, each.offset) for each in (first, second, third)] == [(1, 1), (0, 1), (1, 2)]
    assert first.epoch == third.epoch == hub.channels["news"].epoch
    assert not any(each.repeated for each in (first, second, third))
    fan_out(hub)
    assert listener.messages == ["1", "3"]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Message("a b", "x"), "invalid_channel"),
        (Message(["news"], "x"), "invalid_channel"),
        (Message("news", 5), "invalid_params"),
        (Message("news", "a\udcff"), "invalid_utf8"),
        (Message("news", "x" * 100_001), "message_too_large"),
    ],
)
def test_of_a_batch_with_something_wrong_nothing_is_published(wrong: Message, code: str) -> None:
    hub, broker = made()
    answers = Answers()
    with pytest.raises(RefusedError) as refused:
        broker.publish([Message("news", "1"), wrong, Message("news", "3")], answers)
    assert refused.value.code == code
    assert not answers.batches
    assert (hub.publications, hub.channels) == (0, {})


def test_an_empty_batch_is_answered() -> None:
    _, broker = made()
    answers = Answers()
    broker.publish([], answers)
    assert list(map(list, answers.batches)) == [[]]


async def test_alone_nobody_waits_for_a_broker() -> None:
    _, broker = made()
    turns: list[None] = []

    async def other() -> None:
        turns.append(None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await broker.room()
        await broker.known("news")
        broker.counted("news", 5)
        assert not turns, "no other task had its turn meanwhile"
