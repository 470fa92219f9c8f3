"""Who holds most is disconnected when too much waits for all, whatever else happens to them at that moment."""

from __future__ import annotations

import socket

import trio

from realtimed.config.settings import Config
from realtimed.hub.hub import Hub
from realtimed.net.admission import Admission
from realtimed.net.backlogs import Backlogs
from realtimed.websocket.frames import binary_frame
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.shedding import shed_slowest
from realtimed.websocket.stream import ClientStream
from tests.kit.clients import REQUEST, subscribe
from tests.load.attackers import text_frame

CLIENTS = 300
WAITING = 500_000
"""Bytes for each client: half a megabyte is more than the kernel takes, and less than `max-backlog`."""


async def test_clients_that_hang_up_while_others_are_disconnected_are_no_trouble() -> None:
    backlogs = Backlogs(limit=2**20, timeout=10, total_limit=2 * 2**20)
    sessions = Sessions(Admission(1000, None, 0, trio.current_time), backlogs)
    hub = Hub(max_message=2**20, max_channels=128)
    peers = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shed_slowest, sessions, list)
            for _ in range(CLIENTS):
                ours, peer = socket.socketpair()
                ours.setblocking(False)
                peers.append(peer)
                stream = ClientStream(ours, backlogs, max_inbound=16384, rate=50, burst=100)
                nursery.start_soon(Session(stream, hub, Config(), sessions).run)
                peer.sendall(REQUEST + text_frame(subscribe("news")))
            while hub.subscriptions < CLIENTS:
                await trio.lowlevel.checkpoint()
            for session in list(sessions.members.values()):
                session.stream.write(binary_frame(bytes(WAITING)))
            for peer in peers[60:80]:  # some of the last whose turn it is
                peer.close()
            while len(sessions.members) > CLIENTS - 20 or backlogs.held > backlogs.total_limit:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    for peer in peers:
        peer.close()
