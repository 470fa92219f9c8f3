"""Many handshakes at once: in pieces, completed in the wrong order, or never."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.kit.clients import REQUEST, subscribe
from tests.kit.sessions import connect, running_sessions
from tests.load.attackers import text_frame

CROWD = 120


async def test_handshakes_completed_last_come_first_succeed_and_those_never_completed_time_out(
    autojump_clock: MockClock,
) -> None:
    async with running_sessions(handshake_timeout=10.0) as sessions:
        peers = [connect(sessions, REQUEST[:50]) for _ in range(CROWD)]
        await wait_all_tasks_blocked()
        began = autojump_clock.current_time()
        endless, complete = peers[::3], [peer for number, peer in enumerate(peers) if number % 3]
        for peer in reversed(complete):
            peer.sendall(REQUEST[50:] + text_frame(subscribe("news")))
        while sessions.hub.subscriptions < len(complete):
            await trio.lowlevel.checkpoint()
        assert autojump_clock.current_time() == began, "nobody waits for those that do not go on"
        assert all(peer.recv(1000).startswith(b"HTTP/1.1 101 ") for peer in complete)
        for peer in endless:
            await trio.lowlevel.wait_readable(peer)
            assert peer.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert autojump_clock.current_time() == began + 10
    for peer in peers:
        peer.close()
