"""Many publishers at once: commands that come in pieces, end in the wrong order, or never end."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from realtimed.rpc.wire import Response, encode_request
from tests.kit.peers import InMemory

CROWD = 200


async def test_commands_that_end_in_the_wrong_order_are_each_answered_to_their_own_publisher() -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({}, nursery)
        publishers = [await peers.publisher() for _ in range(CROWD)]
        commands = [encode_request(number, "broadcast", [f"c{number}", "hello"]) for number in range(CROWD)]
        for publisher, command in zip(publishers, commands, strict=True):
            await publisher.send(command[:-1])
        await wait_all_tasks_blocked()
        assert peers.core.hub.publications == 0
        for publisher, command in reversed(list(zip(publishers, commands, strict=True))):
            await publisher.send(command[-1:])
        for number, publisher in enumerate(publishers):
            answer = await publisher.answer()
            assert (answer.id, answer.error) == (number, None)
        assert peers.core.hub.publications == CROWD
        nursery.cancel_scope.cancel()


async def test_commands_that_never_end_keep_no_other_publisher_waiting(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({"command_timeout": 5}, nursery)
        endless = [await peers.publisher() for _ in range(CROWD)]
        for publisher in endless:
            await publisher.send(encode_request(1, "broadcast", ["news", "hello"])[:-1])
        await wait_all_tasks_blocked()
        began = autojump_clock.current_time()
        other = await peers.publisher()
        for _ in range(10):
            await other.call("broadcast", "news", "hello")
        assert autojump_clock.current_time() == began
        for publisher in endless:
            answer = await publisher.receive()
            assert isinstance(answer, Response)
            assert answer.id is None
            assert await publisher.receive() is None, "the daemon hangs up"
        assert 5 <= autojump_clock.current_time() - began < 7
        assert peers.core.hub.publications == 10
        nursery.cancel_scope.cancel()
