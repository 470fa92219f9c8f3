"""What a publisher that is alone publishes goes out at once, and the rest later, whatever goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import trio
import trio.testing

from realtimed.fanout import FanOut
from realtimed.hub import Hub
from tests.test_hub import Listener, make_hub


class Faulty(Listener):
    """One that fails, the first time, as only a bug would."""

    failed = False

    def transmit(self, data: bytes) -> int:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError
        return super().transmit(data)


async def at_once(hub: Hub, publish: Callable[[], None], outcome: AbstractContextManager[object]) -> None:
    """Publish while the fan-out's task is asleep, and wait until all has gone out."""
    fan_out = FanOut(hub)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fan_out.run)
        await trio.testing.wait_all_tasks_blocked()
        with outcome:
            fan_out.at_once(publish)
        with trio.fail_after(10):
            await fan_out.settle()
        nursery.cancel_scope.cancel()


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


async def test_a_fault_on_the_way_to_one_holds_up_nothing_behind_it() -> None:
    hub, listener = make_hub(), Listener()
    hub.subscribe(Faulty(), "broken")
    hub.subscribe(listener, "news")

    def publish() -> None:
        for _ in range(600):  # more than a round takes
            hub.publish("broken", "x")
        hub.publish("news", "hello")

    await at_once(hub, publish, pytest.raises(ZeroDivisionError))
    assert listener.messages == ["hello"]
