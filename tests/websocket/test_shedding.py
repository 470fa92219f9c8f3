"""Who holds most is disconnected when too much waits for all, whatever else happens to them at that moment."""

from __future__ import annotations

import trio

from realtimed.websocket.frames import binary_frame
from realtimed.websocket.shedding import shed_slowest
from tests.kit.clients import REQUEST, subscribe
from tests.kit.sessions import connect, running_sessions
from tests.load.attackers import text_frame

CLIENTS = 300
WAITING = 500_000
"""Bytes for each client: half a megabyte is more than the kernel takes, and less than `max-backlog`."""


async def test_clients_that_hang_up_while_others_are_disconnected_are_no_trouble() -> None:
    with trio.fail_after(30):
        async with running_sessions(max_backlog_total=2 * 2**20) as sessions:
            sessions.nursery.start_soon(shed_slowest, sessions, list)
            peers = [connect(sessions, REQUEST + text_frame(subscribe("news"))) for _ in range(CLIENTS)]
            while sessions.hub.subscriptions < CLIENTS:
                await trio.lowlevel.checkpoint()
            for session in list(sessions.members.values()):
                session.stream.write(binary_frame(bytes(WAITING)))
            for peer in peers[60:80]:  # some of the last whose turn it is
                peer.close()
            backlogs = sessions.backlogs
            while len(sessions.members) > CLIENTS - 20 or backlogs.held > backlogs.total_limit:
                await trio.lowlevel.checkpoint()
    for peer in peers:
        peer.close()
