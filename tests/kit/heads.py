"""Heads of handshakes that are let pass, and how trio-websocket answers them."""

from __future__ import annotations

from typing import Final

import trio
from trio.testing import memory_stream_pair
from trio_websocket import wrap_server_stream
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request
from wsproto.utilities import RemoteProtocolError

from realtimed.net.head import Head
from tests.kit.clients import REQUEST

__all__ = ["HEADS", "KEY", "answer_of_the_library", "answer_of_trio_websocket", "key_of", "own_request", "with_"]

KEY: Final = b"dGhlIHNhbXBsZSBub25jZQ=="
"""The key of `REQUEST`, which is that of the example in RFC 6455 section 1.3."""


def with_(*lines: bytes) -> bytes:
    """Return `REQUEST` with further headers."""
    return b"\r\n".join([REQUEST.removesuffix(b"\r\n\r\n"), *lines, b"", b""])


def _to(target: bytes) -> bytes:
    return REQUEST.replace(b"/ws", target)


HEADS: Final = (
    REQUEST,
    with_(b"Sec-WebSocket-Protocol: realtime.v1"),
    with_(b"Sec-WebSocket-Protocol: graphql-ws, realtime.v1, realtime.v1"),
    with_(b"Sec-WebSocket-Protocol: graphql-ws, realtime.v2"),
    with_(b"Sec-WebSocket-Protocol: b,\ta ,,", b"sec-websocket-protocol: realtime.v1"),
    with_(b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-else"),
    with_(b"X-Forwarded-For: 203.0.113.1, 198.51.100.7"),
    with_(b"X-Forwarded-For: fe80::1%eth1"),
    with_(b"X-Forwarded-For: unknown"),
    with_(b"Cookie: name=J\xfcrgen", b"User-Agent: \xe2\x80\xa6", b"Origin: http://\xff"),
    with_(b"Content-Length: 0"),
    with_(b"Content-Length: 00"),
    with_(b"Expect: 100-continue"),
    with_(b"X: a" + b" " * 15_000 + b"b"),
    with_(*[b"a:"] * 250),
    REQUEST.replace(b"Upgrade: websocket", b"Upgrade: h2c, WebSocket"),
    REQUEST.replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nUpgrade: h2c"),
    REQUEST.replace(b"Connection: Upgrade", b"Connection: keep-alive\r\nConnection: ,upgrade,"),
    REQUEST.replace(b"Connection: Upgrade", b"Connection: upgrade\r\nConnection: keep-alive"),
    REQUEST.replace(b"Connection: Upgrade", b"connection:close, UPGRADE"),
    REQUEST.replace(b"Sec-WebSocket-Key: ", b"SEC-websocket-KEY:\t "),
    REQUEST.replace(b"Host: localhost", b"Host: xn--zzzzzz"),
    REQUEST.replace(b"Host: localhost", b"Host: [::1]:8080"),
    REQUEST.replace(b"Host: localhost", b"Host:"),
    *map(_to, (b"/", b"/WS", b"//ws", b"/%77s", b"/ws?/nope", b"/ws#a", b"/nope", b"HTTPS://x:443/ws?y", b"/" * 1024)),
)
"""One of each kind that any test sends."""


def own_request(key: bytes, subprotocol: str) -> bytes:
    """Return a request with nothing but what the library needs. `subprotocol` is the only one in it; "" for none."""
    offer = b"Sec-WebSocket-Protocol: %b\r\n" % subprotocol.encode() if subprotocol else b""
    return (
        b"GET / HTTP/1.1\r\nHost: realtimed\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n%b\r\n" % (key, offer)
    )


def answer_of_the_library(request: bytes, subprotocol: str) -> bytes | None:
    """Return how wsproto answers a request, called as trio-websocket does; None if it refuses."""
    library = WSConnection(ConnectionType.SERVER)
    try:
        library.receive_data(request)
    except (RemoteProtocolError, UnicodeError):  # the latter for a Host that is no international name
        return None
    [event] = library.events()
    assert isinstance(event, Request)
    return library.send(AcceptConnection(subprotocol=subprotocol or None, extra_headers=[]))


def answer_of_trio_websocket(request: bytes, subprotocol: str) -> bytes:
    """Return how a real trio-websocket answers a request."""

    async def answer() -> bytes:
        peer, stream = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            await peer.send_all(request)
            proposal = await wrap_server_stream(nursery, stream)
            await proposal.accept(subprotocol=subprotocol or None)
            heard = await peer.receive_some()
            nursery.cancel_scope.cancel()
        return bytes(heard)

    return trio.run(answer)


def key_of(head: Head) -> bytes:
    """Return the key of a handshake."""
    [key] = head.fields[b"sec-websocket-key"]
    return key
