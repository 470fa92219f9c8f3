"""Accepting connections: others get their turn, however many connect."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import trio

from realtimed.accepting import accept
from realtimed.config import Address
from realtimed.listener import open_listener

CROWD = 500
A_TURN = 8
"""Connections that may be accepted in one turn of the event loop."""


async def test_a_crowd_is_accepted_in_many_turns(runtime_dir: Path) -> None:
    turn = 0
    accepted: list[int] = []

    async def handle(stream: trio.SocketStream) -> None:
        accepted.append(turn)
        async with stream:
            pass
        if len(accepted) == CROWD:
            nursery.cancel_scope.cancel()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await trio.lowlevel.checkpoint()
            turn += 1

    def wrap(sock: socket.socket) -> trio.SocketStream:
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    path = runtime_dir / "crowd.sock"
    with trio.fail_after(20), ExitStack() as crowd:
        async with open_listener(Address(path=path), wrap, mode=0o600, group=None) as listener:
            for _ in range(CROWD):
                crowd.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(count_turns)
                nursery.start_soon(accept, listener, handle, nursery)
    assert len(accepted) == CROWD
    assert max(Counter(accepted).values()) <= A_TURN
