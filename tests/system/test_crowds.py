"""Thousands that come, speak and go at the same moment: limits are exact, and nobody is forgotten."""

from __future__ import annotations

import resource
import selectors
import socket
from collections import Counter
from pathlib import Path
from typing import cast

from realtimed import Client
from tests.kit.blocking import daemon_in_thread
from tests.kit.clients import REQUEST, subscribe
from tests.kit.patience import LONG_PATIENCE
from tests.load.attackers import Bystander, text_frame

CROWD = 3000
PLACES = 1000
NOTICED = 0.05
"""Seconds that a bystander's pings may take."""


def answers_to(path: Path, sent: bytes, count: int) -> tuple[list[socket.socket], Counter[bytes]]:
    """Open connections as fast as possible, all with the same bytes; return those let in, and the answers' statuses."""
    waiting: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(LONG_PATIENCE)
            sock.connect(str(path))
            sock.sendall(sent)
            waiting[sock] = b""
            selector.register(sock, selectors.EVENT_READ)
        statuses: Counter[bytes] = Counter()
        let_in = []
        while waiting:
            for key, _ in selector.select(LONG_PATIENCE):
                sock = cast("socket.socket", key.fileobj)
                waiting[sock] += sock.recv(2**12)
                if b"\r\n\r\n" not in waiting[sock]:
                    continue
                selector.unregister(sock)
                status = waiting.pop(sock)[9:12]
                statuses[status] += 1
                if status == b"101":
                    let_in.append(sock)
                else:
                    sock.close()
    return let_in, statuses


def test_as_many_are_let_in_as_there_are_places_however_many_come_at_once(runtime_dir: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    subscribing = REQUEST + text_frame(subscribe("crowd"))
    with (
        daemon_in_thread(runtime_dir, "--max-connections", str(PLACES + 1), module="tests.kit.timed_daemon") as daemon,
        Client(daemon.control_socket, timeout=LONG_PATIENCE) as client,
        Bystander(daemon) as bystander,
    ):
        for _ in range(3):
            let_in, statuses = answers_to(daemon.websocket_socket, subscribing, CROWD)
            assert statuses == {b"101": PLACES, b"503": CROWD - PLACES}
            while (stats := client.stats())["subscriptions"] < PLACES + 1:
                pass
            assert (stats["clients"], stats["subscriptions"]) == (PLACES + 1, PLACES + 1)
            for sock in let_in:  # all speak at once, and leave
                sock.sendall(text_frame(subscribe("other")))
            while client.stats()["subscriptions"] < 2 * PLACES + 1:
                pass
            for number, sock in enumerate(let_in):
                if number % 2:
                    sock.sendall(b"\x88\x80\0\0\0\0")
                sock.close()
            while (stats := client.stats())["clients"] > 1:
                pass
            assert stats["subscriptions"] == 1
        turn = client.stats()["turn_p99"]
    assert min(bystander.ping_p99, 2 * turn) < NOTICED
    assert "Traceback" not in daemon.log
