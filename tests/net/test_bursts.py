"""Many streams at once: some are read in the wrong order, some are never read."""

from __future__ import annotations

import socket

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from realtimed.net.backlogs import Backlogs
from realtimed.net.stream import QueuedStream
from tests.kit.subscribers import Owner

CROWD = 60
TIMEOUT = 10.0


async def test_streams_read_last_come_first_lose_nothing_and_those_never_read_are_slow(
    autojump_clock: MockClock,
) -> None:
    backlogs = Backlogs(limit=2**30, timeout=TIMEOUT, total_limit=2**30)
    messages = [bytes([number]) * 30_000 for number in range(30)]
    peers, owners = [], [Owner() for _ in range(CROWD)]
    async with trio.open_nursery() as nursery:
        streams = []
        for owner in owners:
            ours, peer = socket.socketpair()
            for sock in (ours, peer):
                sock.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            streams.append(QueuedStream(ours, backlogs))
            owner.stream = streams[-1]
            streams[-1].attach(nursery, owner)
            peers.append(peer)
        for message in messages:
            for stream in streams:
                stream.write(message)
        await wait_all_tasks_blocked()
        assert all(stream.pending for stream in streams)
        began = autojump_clock.current_time()
        for peer in reversed(peers[::2]):
            received = b""
            while len(received) < 30 * 30_000:
                await trio.lowlevel.wait_readable(peer)
                received += peer.recv(2**16)
            assert received == b"".join(messages)
        assert autojump_clock.current_time() == began, "nobody waits for those that do not read"
        await trio.sleep(TIMEOUT + 1)
        assert not any(owner.said for owner in owners[::2])
        assert all(len(owner.said) == 1 and "backlog-timeout" in owner.said[0] for owner in owners[1::2])
        nursery.cancel_scope.cancel()
        for stream in streams:
            stream.shut()
    assert backlogs.held == 0
    for peer in peers:
        peer.close()
