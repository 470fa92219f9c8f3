"""The Python client that awaits: cancelled calls, and one event loop after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from realtimed import AsyncClient, RequestTimeoutError
from tests.kit.fake_daemon import FakeDaemon, Peer, healthy
from tests.kit.patience import PATIENCE, SHORT
from tests.kit.stack import Daemon


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run an async function in an event loop of its own, which a test's function that is not async may do."""
    return partial(anyio.run, backend=request.param)


def test_a_cancelled_call_cannot_leave_its_answer_to_the_next_one(path: Path, run: Callable[..., Any]) -> None:
    asked, cancelled = threading.Event(), threading.Event()

    def late(peer: Peer) -> None:
        request = peer.request()
        asked.set()
        assert cancelled.wait(PATIENCE)
        with pytest.raises(BrokenPipeError):
            peer.receipt(request, 1)

    async def main() -> None:
        async with AsyncClient(path) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.broadcast, "news", "one")
                await anyio.to_thread.run_sync(asked.wait)
                group.cancel_scope.cancel()
            cancelled.set()
            assert (await client.broadcast("news", "two")).offset == 2

    with FakeDaemon(path, late, healthy):
        run(main)


def test_cancelling_those_who_wait_does_not_disturb_whose_turn_it_is(path: Path, run: Callable[..., Any]) -> None:
    asked, answer = threading.Event(), threading.Event()

    def patient(peer: Peer) -> None:
        request = peer.request()
        asked.set()
        assert answer.wait(PATIENCE)
        peer.receipt(request, 7)
        healthy(peer)

    async def main() -> None:
        received = []

        async def first() -> None:
            received.append(await client.broadcast("news", "one"))

        async with AsyncClient(path) as client, anyio.create_task_group() as group:
            group.start_soon(first)
            await anyio.to_thread.run_sync(asked.wait)
            async with anyio.create_task_group() as waiting:
                for _ in range(3):
                    waiting.start_soon(client.broadcast, "news", "never sent")
                await anyio.wait_all_tasks_blocked()
                waiting.cancel_scope.cancel()
            assert not received
            answer.set()
        assert [each.offset for each in received] == [7]

    with FakeDaemon(path, patient) as fake:
        run(main)
        assert fake.connections == 1


def test_a_task_does_not_wait_for_its_turn_for_ever(path: Path, run: Callable[..., Any]) -> None:
    over = threading.Event()

    def leisurely(peer: Peer) -> None:
        for request in peer.requests():
            over.wait(SHORT / 4)
            peer.receipt(request)

    async def main() -> None:
        async with AsyncClient(path, timeout=SHORT) as client, anyio.create_task_group() as group:
            group.start_soon(client.broadcast_each, [("news", "hello")] * 100)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RequestTimeoutError, match=r"kept the connection busy for 0.2 s; nothing was sent"):
                await client.broadcast("news", "hello")
            over.set()

    with FakeDaemon(path, leisurely):
        run(main)


def test_a_cancelled_receive_loses_no_message(daemon: Daemon, run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with AsyncClient(daemon.control_socket) as client, client.subscribe("news") as subscription:
            for number in range(50):
                with anyio.move_on_after(0):
                    await subscription.receive()
                async with anyio.create_task_group() as group:
                    group.start_soon(subscription.receive)
                    await anyio.wait_all_tasks_blocked()
                    group.cancel_scope.cancel()
                await client.broadcast("news", str(number))
                assert (await subscription.receive()).message == str(number)

    run(main)


def test_a_client_may_go_from_one_event_loop_to_the_next(daemon: Daemon, run: Callable[..., Any]) -> None:
    client = AsyncClient(daemon.control_socket)

    async def main(last: bool) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(client.ping)
        if last:
            await client.aclose()

    run(main, False)
    run(main, True)
