"""Many handshakes at once: in pieces, completed in the wrong order, or never."""

from __future__ import annotations

import socket

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from realtimed.config.settings import Config
from realtimed.hub.hub import Hub
from realtimed.net.admission import Admission
from realtimed.net.backlogs import Backlogs
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.stream import ClientStream
from tests.kit.clients import REQUEST, subscribe
from tests.load.attackers import text_frame

CROWD = 120


async def test_handshakes_completed_last_come_first_succeed_and_those_never_completed_time_out(
    autojump_clock: MockClock,
) -> None:
    backlogs = Backlogs(limit=2**20, timeout=10, total_limit=2**30)
    sessions = Sessions(Admission(1000, None, 0, trio.current_time), backlogs)
    hub = Hub(max_message=1000, max_channels=128)
    pairs = [socket.socketpair() for _ in range(CROWD)]
    peers = [peer for _, peer in pairs]
    async with trio.open_nursery() as nursery:
        for ours, peer in pairs:
            ours.setblocking(False)
            peer.setblocking(False)
            stream = ClientStream(ours, backlogs, max_inbound=16384, rate=50, burst=100)
            nursery.start_soon(Session(stream, hub, Config(), sessions).run)
            peer.sendall(REQUEST[:50])
        await wait_all_tasks_blocked()
        began = autojump_clock.current_time()
        endless, complete = peers[::3], [peer for number, peer in enumerate(peers) if number % 3]
        for peer in reversed(complete):
            peer.sendall(REQUEST[50:] + text_frame(subscribe("news")))
        while hub.subscriptions < len(complete):
            await trio.lowlevel.checkpoint()
        assert autojump_clock.current_time() == began, "nobody waits for those that do not go on"
        assert all(peer.recv(1000).startswith(b"HTTP/1.1 101 ") for peer in complete)
        for peer in endless:
            await trio.lowlevel.wait_readable(peer)
            assert peer.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert Config().handshake_timeout <= autojump_clock.current_time() - began < Config().handshake_timeout + 2
        nursery.cancel_scope.cancel()
    for peer in peers:
        peer.close()
