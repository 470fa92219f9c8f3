"""Accepting connections: others get their turn, however many connect."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import trio

from realtimed.config.readers import Address
from realtimed.net.accepting import accept
from realtimed.net.listener import open_listener
from tests.kit.turns import Turns

CROWD = 500
A_TURN = 32
"""Connections that may be accepted in one turn of the event loop."""


async def test_a_crowd_is_accepted_in_many_turns(runtime_dir: Path) -> None:
    turns = Turns()
    begun: Counter[int] = Counter()

    def serve(stream: trio.SocketStream) -> None:
        begun[turns.count] += 1
        stream.socket.close()
        if begun.total() == CROWD:
            nursery.cancel_scope.cancel()

    def wrap(sock: socket.socket) -> trio.SocketStream:
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    path = runtime_dir / "crowd.sock"
    trio.lowlevel.add_instrument(turns)
    try:
        with trio.fail_after(20), ExitStack() as crowd:
            async with await open_listener(Address(path=path), wrap, mode=0o600, group=None) as listener:
                for _ in range(CROWD):
                    crowd.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(accept, listener, serve)
    finally:
        trio.lowlevel.remove_instrument(turns)
    assert begun.total() == CROWD
    assert max(begun.values()) <= A_TURN
