"""A first server with trio-websocket: a memory channel for each client, and `send_message` for each message.

Usage: python trio_websocket_plain.py WEBSOCKET-PATH CONTROL-PATH. A client subscribes to the channel that its path
names. On the control socket a message is a big-endian length (4 bytes), a channel (8 bytes) and the message itself.
"""

from __future__ import annotations

import socket
import sys
from collections import defaultdict

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, wrap_server_stream

subscribers: defaultdict[str, set[trio.MemorySendChannel[str]]] = defaultdict(set)


async def _serve_client(stream: trio.SocketStream) -> None:
    async with trio.open_nursery() as nursery:
        request: WebSocketRequest = await wrap_server_stream(nursery, stream)
        channel = subscribers[request.path.removeprefix("/")]
        send, receive = trio.open_memory_channel[str](10_000)
        websocket = await request.accept()
        channel.add(send)
        try:
            nursery.start_soon(_notice_end, websocket, nursery.cancel_scope)
            async for message in receive:
                await websocket.send_message(message)
        except ConnectionClosed:
            pass
        finally:
            channel.discard(send)
        nursery.cancel_scope.cancel()


async def _notice_end(websocket: WebSocketConnection, scope: trio.CancelScope) -> None:
    try:
        while True:
            await websocket.get_message()
    except ConnectionClosed:
        scope.cancel()


async def _serve_publisher(stream: trio.SocketStream) -> None:
    held = b""
    async for data in stream:
        held += data
        while len(held) >= 4 and len(held) >= 4 + (length := int.from_bytes(held[:4], "big")):
            message = held[12 : 4 + length].decode()
            for send in subscribers[held[4:12].decode()]:
                send.send_nowait(message)
            held = held[4 + length :]


async def _listen(path: str) -> trio.SocketListener:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(path)
    sock.listen(4096)
    return trio.SocketListener(sock)


async def _main(websocket: str, control: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, _serve_client, [await _listen(websocket)])
        nursery.start_soon(trio.serve_listeners, _serve_publisher, [await _listen(control)])


trio.run(_main, sys.argv[1], sys.argv[2])
