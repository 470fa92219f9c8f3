"""The `websockets` library, used as its documentation on broadcasting recommends: `broadcast()`, no compression.

Usage: python websockets_broadcast.py WEBSOCKET-PATH CONTROL-PATH. A client subscribes to the channel that its path
names. On the control socket a message is a big-endian length (4 bytes), a channel (8 bytes) and the message itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from typing import Any

from websockets.asyncio.server import broadcast, unix_serve  # type: ignore[import-not-found, unused-ignore]

subscribers: defaultdict[str, set[Any]] = defaultdict(set)


async def _serve_client(websocket: Any) -> None:
    channel = subscribers[websocket.request.path.removeprefix("/")]
    channel.add(websocket)
    try:
        await websocket.wait_closed()
    finally:
        channel.discard(websocket)


async def _serve_publisher(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    while True:
        length = int.from_bytes(await reader.readexactly(4), "big")
        content = await reader.readexactly(length)
        broadcast(subscribers[content[:8].decode()], content[8:].decode())


async def _main(websocket: str, control: str) -> None:
    async with (
        unix_serve(_serve_client, websocket, compression=None, ping_interval=None, backlog=4096),
        await asyncio.start_unix_server(_serve_publisher, control, limit=2**22) as publishers,
    ):
        await publishers.serve_forever()


asyncio.run(_main(sys.argv[1], sys.argv[2]))
