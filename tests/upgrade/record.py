"""Records a state of this version, for tests of later ones: `python -m tests.upgrade.record`.

It is `states/N` for version N. It may be recorded anew as long as no release has had this version.
"""

from __future__ import annotations

import socket
import zlib
from pathlib import Path
from typing import Final

import msgspec
import trio
from trio.testing import wait_all_tasks_blocked

from realtimed.rpc.wire import encode_request
from realtimed.upgrade import VERSION
from tests.kit.clients import REQUEST, subscribe
from tests.kit.frames import masked_frame
from tests.kit.handovers import at_rest, connected, publisher, running_core, said

__all__ = ["HALF", "RECORDED", "Recorded"]

Recorded = list[tuple[int, bool, bytes, int]]
"""The part's number, whether it is the rest, the data, and the number of files."""

RECORDED: Final = Path(__file__).parent / "states"

HALF: Final = 7
"""Bytes that have come of a client's ping, and of a publisher's."""

_V1: Final = REQUEST.removesuffix(b"\r\n") + b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"


async def _record() -> Recorded:
    async with running_core(max_message="1M") as core:
        peers: list[socket.socket] = []
        subscribing = masked_frame(subscribe("news").encode())
        peers.append(connected(core, _V1 + subscribing + masked_frame(b'{"action":"ping"}')[:HALF]))
        peers.append(connected(core, REQUEST + subscribing))
        peers.append(connected(core, _V1[:50]))
        peers.append(publisher(core, encode_request(1, "watch", ("ne*",)) + encode_request(2, "ping", ())[:HALF]))
        await wait_all_tasks_blocked()
        core.hub.publish("news", "1")
        core.hub.publish("news", b"\xff")
        await core.fan_out.settle()
        first = list(said(core, last=False))
        core.keyed_receipts.remember("news", "key", [core.hub.publish("news", "x" * 300_000)])
        await core.fan_out.settle()
        assert core.backlogs.streams == 2, "something waits for each client"
        await at_rest(core)
        recorded: Recorded = []
        for number, last, portion in [*first, *said(core, last=True)]:
            recorded.append((number, last, portion.data, len(portion.descriptors)))
            for fd in portion.descriptors:
                socket.close(fd)
        for peer in peers:
            peer.close()
        return recorded


def main() -> None:
    """Record."""
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / str(VERSION)).write_bytes(zlib.compress(msgspec.msgpack.encode(trio.run(_record))))


if __name__ == "__main__":
    main()
