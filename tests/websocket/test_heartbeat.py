"""Many clients are pinged one after the other, each once a heartbeat."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, cast

import trio
from trio.testing import MockClock

from realtimed.config.settings import Config
from realtimed.websocket.frames import PING
from realtimed.websocket.heartbeat import Heartbeat
from realtimed.websocket.sessions import Sessions

HEARTBEAT = Config().heartbeat


class Client:
    """A session that has been heard just now, and its stream."""

    expires_at = math.inf
    pending = 0

    def __init__(self, number: int) -> None:
        self.id = f"c-{number}"
        self.rank = number
        self.stream = self
        self.pinged_at: list[float] = []

    @property
    def heard_at(self) -> float:
        return trio.current_time()

    def write(self, data: bytes) -> None:
        assert data == PING
        self.pinged_at.append(trio.current_time())


async def beat(clients: list[Client], seconds: float) -> None:
    members = {client.id: client for client in clients}
    sessions = cast("Sessions", type("Members", (), {"members": members, "share": 0}))
    with trio.move_on_after(seconds):
        await Heartbeat(sessions, Config).run()


async def test_each_client_is_pinged_once_a_heartbeat(autojump_clock: MockClock) -> None:
    for count in (1, 3, 10_000):
        began = autojump_clock.current_time()
        clients = [Client(number) for number in range(count)]
        await beat(clients, 4 * HEARTBEAT + 1.5)
        assert autojump_clock.current_time() - began == 4 * HEARTBEAT + 1.5
        for client in clients:
            gaps = [later - sooner for sooner, later in zip(client.pinged_at, client.pinged_at[1:], strict=False)]
            assert len(gaps) >= 2
            assert all(abs(gap - HEARTBEAT) <= 1 for gap in gaps)


async def test_no_more_than_a_few_are_pinged_at_once(
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    clients = [Client(number) for number in range(10_000)]
    await beat(clients, 2 * HEARTBEAT)
    pings = Counter(time for client in clients for time in client.pinged_at)
    assert max(pings.values()) <= 10_000 / HEARTBEAT / 50 + 1


async def test_who_leaves_or_falls_behind_is_not_pinged(
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    gone, slow, other = (Client(number) for number in range(3))
    slow.pending = 1
    members: dict[str, Any] = {client.id: client for client in (gone, slow, other)}

    async def leave() -> None:
        await trio.sleep(1.5)  # it has been found due, and its turn is to come
        del members[gone.id]

    gone.rank = 1
    with trio.move_on_after(2 * HEARTBEAT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            await Heartbeat(cast("Sessions", type("Members", (), {"members": members, "share": 0})), Config).run()
    assert (gone.pinged_at, slow.pinged_at) == ([], [])
    assert other.pinged_at
