"""The watcher: edges are reported once, so nothing may be missed and nobody may wait for others."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from realtimed.net.gate import Gate
from realtimed.net.watcher import Watcher

A_SLICE = 32
"""Readers that are called before other tasks get their turn."""


class Reader:
    """Reads a little each time, and asks for another look if there may be more."""

    def __init__(self, watcher: Watcher, *, at_a_time: int = 4096) -> None:
        self.watcher = watcher
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.fd = self.ours.fileno()
        self.heard = b""
        self.calls = 0
        self.writable_calls = 0
        self.hung_up = False
        self.ended = False
        self.called: Callable[[], None] = lambda: None
        self._at_a_time = at_a_time

    def readable(self, *, hung_up: bool = False) -> None:
        self.calls += 1
        self.called()
        self.hung_up = self.hung_up or hung_up
        try:
            data = self.ours.recv(self._at_a_time)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.heard += data
        self.ended = not data
        if data and (len(data) == self._at_a_time or self.hung_up):
            self.watcher.again(self)

    def writable(self) -> None:
        self.writable_calls += 1

    def close(self) -> None:
        self.ours.close()
        self.peer.close()


@asynccontextmanager
async def watching() -> AsyncIterator[tuple[Watcher, Callable[..., Reader]]]:
    watcher, readers = Watcher(Gate()), list[Reader]()

    def watched(*, at_a_time: int = 4096) -> Reader:
        readers.append(Reader(watcher, at_a_time=at_a_time))
        watcher.add(readers[-1].fd, readers[-1])
        return readers[-1]

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watcher.run)
            yield watcher, watched
            nursery.cancel_scope.cancel()
    finally:
        watcher.close()
        for each in readers:
            each.close()


async def test_bytes_and_the_end_that_come_as_one_edge_are_both_read() -> None:
    async with watching() as (_, watched):
        readers = [watched(at_a_time=size) for size in (1, 3, 4096)]
        for each in readers:
            each.peer.sendall(b"bye")
            each.peer.close()
        await wait_all_tasks_blocked()
        assert [(each.heard, each.ended) for each in readers] == [(b"bye", True)] * 3


async def test_what_was_there_before_the_socket_was_watched_is_read() -> None:
    async with watching() as (watcher, _):
        early = Reader(watcher)
        early.peer.sendall(b"hello")
        watcher.add(early.fd, early)
        await wait_all_tasks_blocked()
        assert early.heard == b"hello"
        early.close()


async def test_a_look_that_is_asked_for_wakes_the_watcher() -> None:
    async with watching() as (watcher, watched):
        reader = watched()
        await wait_all_tasks_blocked()
        before = reader.calls
        for _ in range(3):  # an alarm works more than once
            watcher.again(reader)
            watcher.again(reader)
            await wait_all_tasks_blocked()
        assert reader.calls == before + 3, "each is called once a round"


async def test_all_that_are_ready_are_called_before_any_is_called_again() -> None:
    async with watching() as (_, watched):
        greedy, order = watched(at_a_time=1), list[str]()
        greedy.called = partial(order.append, "greedy")
        greedy.peer.sendall(bytes(200))
        others = [watched() for _ in range(100)]
        for number, each in enumerate(others):
            each.called = partial(order.append, str(number))
            each.peer.sendall(b"x")
        await wait_all_tasks_blocked()
        last = max(order.index(str(number)) for number in range(100))
        assert order[:last].count("greedy") <= 1 + 100 // A_SLICE
        assert order.count("greedy") >= 200


async def test_others_get_their_turn_after_every_few_readers() -> None:
    async with watching() as (_, watched):
        turns = calls = most = 0

        def called() -> None:
            nonlocal calls
            calls += 1

        readers = [watched() for _ in range(300)]
        for each in readers:
            each.called = called
            each.peer.sendall(b"x")
        while calls < len(readers):
            before = calls
            await trio.lowlevel.checkpoint()
            most = max(most, calls - before)
            turns += 1
        assert most <= 2 * A_SLICE, "between two turns of this task the watcher may have two"
        assert turns >= len(readers) // A_SLICE


async def test_an_event_of_a_descriptor_that_is_used_again_does_no_harm() -> None:
    async with watching() as (watcher, watched):
        first, second = watched(), watched()
        first.peer.sendall(b"x")  # the kernel reports it first
        second.peer.sendall(b"old")
        replaced = list[Reader]()

        def replace() -> None:  # while the event of `second` is under way
            if not replaced:
                watcher.remove(second.fd)
                second.ours.close()
                replaced.append(Reader(watcher))
                assert replaced[0].fd == second.fd, "the kernel gives out the lowest number that is free"
                watcher.add(replaced[0].fd, replaced[0])

        first.called = replace
        await wait_all_tasks_blocked()
        assert replaced[0].heard == b""
        assert not replaced[0].ended
        replaced[0].peer.sendall(b"new")
        await wait_all_tasks_blocked()
        assert (second.heard, replaced[0].heard) == (b"", b"new")
        watcher.remove(replaced[0].fd)
        replaced[0].close()


async def test_a_socket_that_somebody_else_has_open_is_watched_no_longer() -> None:
    """Closing alone would not end it: the kernel goes by the open socket, and another process may have it."""
    async with watching() as (watcher, watched):
        reader = watched()
        elsewhere = reader.ours.dup()
        watcher.remove(reader.fd)
        reader.ours.close()
        calls = reader.calls
        reader.peer.sendall(b"x")
        await wait_all_tasks_blocked()
        assert reader.calls == calls
        assert elsewhere.recv(1) == b"x"
        elsewhere.close()


async def test_who_replaces_a_reader_is_called_in_its_place() -> None:
    async with watching() as (watcher, watched):
        first, second = watched(), Reader(watcher)
        await wait_all_tasks_blocked()
        watcher.again(first)
        watcher.replace(first.fd, second)
        before = first.calls
        await wait_all_tasks_blocked()
        assert (first.calls, second.calls) == (before, 1)
        first.peer.sendall(b"x")
        await wait_all_tasks_blocked()
        assert (first.calls, second.calls) == (before, 2)
        second.close()


@pytest.mark.parametrize("reset", [False, True])
async def test_whoever_hangs_up_is_noticed(reset: bool) -> None:
    async with watching() as (_, watched):
        reader = watched()
        if reset:
            reader.ours.sendall(b"unread")  # on a Unix socket this makes a reset of the close
        reader.peer.close()
        await wait_all_tasks_blocked()
        assert reader.ended


async def test_a_socket_that_takes_more_is_reported_while_that_is_wanted() -> None:
    async with watching() as (watcher, watched):
        reader = watched()
        await wait_all_tasks_blocked()
        before = reader.writable_calls
        assert before == 0
        with suppress(BlockingIOError):
            while reader.ours.send(bytes(2**16)):
                pass
        watcher.watch_writable(reader.fd, True)
        await wait_all_tasks_blocked()
        assert reader.writable_calls == 0, "it takes nothing"
        reader.peer.setblocking(False)
        with suppress(BlockingIOError):
            while reader.peer.recv(2**16):
                pass
        await wait_all_tasks_blocked()
        called = reader.writable_calls
        assert called
        watcher.watch_writable(reader.fd, False)
        reader.ours.send(bytes(2**12))
        reader.peer.recv(2**16)
        await wait_all_tasks_blocked()
        assert reader.writable_calls == called


def test_a_descriptor_that_the_kernel_refuses_is_not_watched(tmp_path: Path) -> None:
    watcher = Watcher(Gate())
    reader = Reader(watcher)
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(PermissionError):  # there is no waiting for an ordinary file
            watcher.add(file.fileno(), reader)
        assert file.fileno() not in watcher
    reader.close()
    watcher.close()
