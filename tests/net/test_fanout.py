"""What a publisher that is alone publishes goes out at once, and the rest later, whatever goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import pytest
import trio
import trio.testing

from realtimed.hub.channel import Subscriber
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Publication
from realtimed.hub.watch import Watcher
from realtimed.net.fanout import FanOut
from tests.kit.hubs import make_hub
from tests.kit.subscribers import Lines, Listener


class Faulty(Listener):
    """One that fails, the first time, as only a bug would."""

    failed = False

    def write(self, data: bytes, sent: int = 0) -> None:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError
        super().write(data, sent)


def nobody(given_up: Collection[Subscriber | Watcher]) -> None:
    assert not given_up


class Unencodable(Lines):
    """A format with a bug."""

    def encode(self, publication: Publication) -> bytes:
        raise MemoryError


async def at_once(
    hub: Hub, publish: Callable[[], None], outcome: AbstractContextManager[object]
) -> list[Subscriber | Watcher]:
    """Publish while the fan-out's task is asleep, wait until all has gone out, and return those that were given up."""
    given_up: list[Subscriber | Watcher] = []
    fan_out = FanOut(hub, given_up.extend)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fan_out.run)
        await trio.testing.wait_all_tasks_blocked()
        with outcome:
            fan_out.publish_now(publish)
        with trio.fail_after(10):
            await fan_out.settle()
        nursery.cancel_scope.cancel()
    return given_up


@pytest.mark.parametrize("count", [1, 5, 513, 1500])
async def test_all_that_is_published_at_once_goes_out(count: int) -> None:
    hub, listener = make_hub(), Listener()
    hub.subscribe(listener, "news")

    def publish() -> None:
        for number in range(count):
            hub.publish("news", str(number))

    await at_once(hub, publish, nullcontext())
    assert listener.messages == [str(number) for number in range(count)]


async def test_what_was_published_before_an_error_goes_out() -> None:
    hub, listener = make_hub(), Listener()
    hub.subscribe(listener, "news")

    def publish() -> None:
        for number in range(600):
            hub.publish("news", str(number))
        raise LookupError

    await at_once(hub, publish, pytest.raises(LookupError))
    assert listener.messages == [str(number) for number in range(600)]


async def test_a_fault_on_the_way_to_one_ends_those_who_may_have_missed_something(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub, faulty, same_channel, other_channel = make_hub(), Faulty(), Listener(), Listener()
    hub.subscribe(faulty, "broken")
    hub.subscribe(same_channel, "broken")
    hub.subscribe(other_channel, "news")

    def publish() -> None:
        for _ in range(600):  # more than a round takes
            hub.publish("broken", "x")
        hub.publish("news", "hello")

    given_up = await at_once(hub, publish, nullcontext())
    assert other_channel.messages == ["hello"]
    assert len(given_up) == 2
    assert set(given_up) == {faulty, same_channel}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_a_round_that_cannot_be_made_ends_those_for_whom_it_was(caplog: pytest.LogCaptureFixture) -> None:
    hub, listener, after = make_hub(), Listener(form=Unencodable()), Listener()
    hub.subscribe(listener, "broken")

    def publish() -> None:
        hub.publish("broken", "x")

    assert await at_once(hub, publish, nullcontext()) == [listener]
    assert "MemoryError" in caplog.text
    hub.leave(listener)
    hub.subscribe(after, "broken")
    await at_once(hub, publish, nullcontext())
    assert after.messages == ["x"]


async def test_watchers_see_all_and_publishers_wait_for_them() -> None:
    hub, watcher = Hub(max_message=1000, max_channels=128), Listener()
    hub.watchers.add(watcher, "*0")
    for number in range(20):
        hub.watchers.add(watcher, "*a" * 90 + f"*b{number}*")
    fan_out, late = FanOut(hub, nobody), []

    def publish() -> None:
        for number in range(5000):
            hub.publish("a" * 190 + str(number), "x" * 900)

    async def publish_more() -> None:
        await fan_out.room()
        late.append(hub.unsent_bytes)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fan_out.run)
        await trio.testing.wait_all_tasks_blocked()
        fan_out.publish_now(publish)
        assert hub.unsent_bytes > 4 * 2**20
        nursery.start_soon(publish_more)
        with trio.fail_after(60):
            await fan_out.settle()
        assert hub.idle
        assert hub.unsent_bytes == 0
        nursery.cancel_scope.cancel()
    assert 0 < late[0] <= 4 * 2**20, "the publisher went on as soon as there was room, not when all was shown"
    names = [message.partition("/")[0] for message in watcher.received.decode().split(";") if message]
    assert names == ["a" * 190 + str(number) for number in range(0, 5000, 10)]


async def test_a_fault_on_the_way_to_a_watcher_ends_watchers_and_nobody_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub, faulty, listener = make_hub(), Listener(form=Unencodable()), Listener()
    hub.watchers.add(faulty, "*")
    hub.subscribe(listener, "news")

    def publish() -> None:
        hub.publish("news", "x")

    for _ in range(2):  # the second finds nothing left of the first
        assert await at_once(hub, publish, nullcontext()) == [faulty]
    assert listener.messages == ["x", "x"]
    assert hub.idle
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2


async def test_who_waits_for_room_goes_on_when_the_last_watcher_leaves() -> None:
    """What waited for the watcher, and held publishers up, is gone with it."""
    hub, watcher = make_hub(), Listener()
    fan_out = FanOut(hub, nobody)
    hub.watchers.add(watcher, "*")
    for _ in range(20_000):
        hub.publish("news", "x" * 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fan_out.run)
        while hub.watchers.idle or hub.log_bytes:  # all of it waits for the watcher
            await trio.lowlevel.checkpoint()
        nursery.start_soon(fan_out.room)
        nursery.start_soon(fan_out.settle)
        await trio.lowlevel.checkpoint()
        assert hub.unsent_bytes > 4 * 2**20
        hub.watchers.leave(watcher)
        with trio.fail_after(10):
            await fan_out.room()
            await fan_out.settle()
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1, "all but the fan-out have gone on"
        nursery.cancel_scope.cancel()
