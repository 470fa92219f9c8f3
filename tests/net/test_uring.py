"""Sends through io_uring do what the loop over `transmit` does, whatever the sockets are in the middle of."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path

import pytest
import trio
from wsproto.events import TextMessage

from realtimed.config.loading import load
from realtimed.daemon import Daemon
from realtimed.hub.channel import Roster
from realtimed.hub.rounds import Batch, send_each
from realtimed.net.uring import SendRing
from tests.kit.clients import publisher, raw_client, subscribe
from tests.kit.io_uring import needs_io_uring
from tests.kit.stack import running_daemon
from tests.kit.subscribers import SocketListener


def to(members: list[SocketListener], data: bytes) -> tuple[bytes, Roster, int, int]:
    return data, Roster(members), 0, len(members)


@pytest.fixture
def sockets() -> Iterator[Callable[[int], list[SocketListener]]]:
    with ExitStack() as stack:

        def make(count: int) -> list[SocketListener]:
            made = [SocketListener() for _ in range(count)]
            for each in made:
                stack.enter_context(each.socket)
                stack.enter_context(each.peer)
            return made

        yield make


@pytest.fixture(params=[pytest.param("io_uring", marks=needs_io_uring), "loop"])
def deliver(request: pytest.FixtureRequest) -> Iterator[Callable[[Batch], None]]:
    if request.param == "loop":
        yield send_each
    else:
        ring = SendRing()
        yield ring
        ring.close()


def test_everyone_gets_their_bytes_in_order_around_the_end_of_the_queue(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    everyone = sockets(400)
    expected: list[bytes] = [b""] * 400
    for turn in range(12):  # 1,024 entries: the queue's end is passed at a different place each time
        cut = 70 + 17 * turn
        first, second = b"%d," % turn * (turn + 1), b"[%d]" % turn
        deliver([to(everyone[:cut], first), to(everyone[cut:], second)])
        expected = [old + (first if place < cut else second) for place, old in enumerate(expected)]
    assert [each.received() for each in everyone] == expected
    assert not any(each.kept or each.errors for each in everyone)


def test_more_receivers_than_a_system_call_takes(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    few = sockets(300)
    deliver([to(few * 8, b"x")])
    assert {each.received() for each in few} == {b"x" * 8}


def test_what_is_not_taken_is_held_and_what_is_blocked_is_not_overtaken(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    everyone = sockets(100)
    full, blocked, gone = everyone[10], everyone[20], everyone[30]
    room = 0
    with suppress(BlockingIOError):
        while True:
            room += full.socket.send(bytes(1000))
    blocked.block()
    gone.peer.close()
    deliver([to(everyone, b"hello")])
    assert full.kept == [(b"hello", 0)]
    assert [type(error) for error in gone.errors] == [BrokenPipeError]
    assert blocked.kept == [(b"hello", 0)]
    assert full.received() == bytes(room)
    assert blocked.received() == b""
    others = [each for each in everyone if each not in (full, blocked, gone)]
    assert {each.received() for each in others} == {b"hello"}


def test_in_a_batch_for_many_rosters_everyone_has_their_own_bytes_whoever_stalls(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    everyone = sockets(120)
    full, blocked, gone = everyone[10::30], everyone[20::30], everyone[25::30]
    room = 0
    for each in full:
        with suppress(BlockingIOError):
            while True:
                room += each.socket.send(bytes(1000))
    for each in blocked:
        each.block()
    for each in gone:
        each.peer.close()
    parts: list[tuple[bytes, list[SocketListener]]] = []
    at = 0
    for size in (1, 2, 1, 5, 30, 1, 64, 1, 2, 13):
        parts.append((b"%d," % size * size, everyone[at : at + size]))
        at += size
    deliver([to(members, data) for data, members in parts])
    assert at == len(everyone)
    for data, members in parts:
        for each in members:
            if each in full:
                assert each.kept == [(data, 0)]
            elif each in gone:
                assert [type(error) for error in each.errors] == [BrokenPipeError]
            elif each in blocked:
                assert (each.kept, each.received()) == ([(data, 0)], b"")
            else:
                assert (each.received(), each.kept, each.errors) == (data, [], [])
    assert sum(len(each.received()) for each in full) == room


def test_a_part_is_held_from_where_the_kernel_stopped(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    everyone = sockets(64)
    data = os.urandom(900_000)
    deliver([to(everyone, data)])
    for each in everyone:
        [(kept, sent)] = each.kept
        assert 0 < sent < len(data)
        assert each.received() + kept[sent:] == data


def test_messages_that_fit_on_the_stage_only_one_by_one(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    everyone = sockets(40)
    data = [bytes([number]) * 100_000 for number in range(20)]
    deliver([to(everyone[2 * number : 2 * number + 2], each) for number, each in enumerate(data)])
    for place, each in enumerate(everyone):
        assert (each.received(), each.kept) == (data[place // 2], [])


def test_a_message_larger_than_the_stage_goes_the_other_way(
    deliver: Callable[[Batch], None], sockets: Callable[[int], list[SocketListener]]
) -> None:
    everyone = sockets(64)
    data = bytes(3 * 2**20)
    deliver([to(everyone, data), to(everyone[:1], b"small")])
    for each in everyone:
        kept, sent = each.kept[0]
        assert (kept, len(each.received())) == (data, sent)


class Refusing:
    """A kernel that takes some submissions of each call, or none."""

    def __init__(self, real: Callable[..., int], takes: int) -> None:
        self.real = real
        self.takes = takes

    def __call__(self, number: int, *numbers: int) -> int:
        descriptor, count, *rest = numbers
        if self.takes == 0:
            raise OSError(errno.EBUSY, "busy")
        return self.real(number, descriptor, min(count, self.takes), *rest)


@needs_io_uring
@pytest.mark.parametrize("takes", [0, 1, 99])
def test_what_the_kernel_does_not_take_is_written_in_another_way(
    takes: int, sockets: Callable[[int], list[SocketListener]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = SendRing()
    everyone = sockets(100)
    monkeypatch.setattr(ring.queues, "call", Refusing(ring.queues.call, takes))
    for turn in range(30):
        deliver_to = everyone[turn % 3 :]
        ring([to(deliver_to, b"hello")])
        for place, each in enumerate(deliver_to):
            assert (each.received(), each.writes) == (b"hello", 0 if place < takes else 1)
            each.writes = 0
    ring.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOMEM])
async def test_where_io_uring_is_refused_the_daemon_says_so_and_uses_the_loop(
    number: int, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> SendRing:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("realtimed.net.uring.SendRing", refuse)
    options = {"socket": str(runtime_dir / "c.sock"), "websocket": [f"unix:{runtime_dir / 'w.sock'}"]}
    daemon = Daemon(load(options))
    with caplog.at_level(logging.INFO), trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon.serve)
            async with publisher(runtime_dir / "c.sock") as sender:
                assert (await sender.call("info"))["io_uring"] is False
            daemon.stop()
    assert f"io_uring is not used reason={os.strerror(number)!r}" in caplog.messages
    assert daemon.hub.deliver is send_each


@pytest.mark.parametrize("choice", [pytest.param("auto", marks=needs_io_uring), "off"])
async def test_the_daemon_serves_either_way_and_says_which(choice: str, runtime_dir: Path) -> None:
    text = "hello " * 100
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(running_daemon(runtime_dir, "--io-uring", choice))
            sender = await stack.enter_async_context(publisher(daemon.control_socket))
            assert (await sender.call("info"))["io_uring"] is (choice == "auto")
            clients = [await stack.enter_async_context(raw_client(daemon.websocket_socket)) for _ in range(150)]
            for client in clients:
                await client.send(TextMessage(data=subscribe("news")))
            while (await sender.call("channels")).get("news", {}).get("subscribers") != len(clients):
                pass
            reading = clients[10:]  # the first ten never read; their bytes end up in a backlog
            for _ in range(500):
                assert (await sender.call("broadcast", "news", text))["recipients"] == len(clients)
                for client in reading:
                    size = 0
                    while size < len(text) + 4:
                        size += len(await client.stream.receive_some())
            stats = await sender.call("stats")
            assert stats["backlogged"] == 10
            for client in clients[:10]:
                size = 0
                while size < 500 * (len(text) + 4):
                    size += len(await client.stream.receive_some())
