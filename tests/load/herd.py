"""Thousands of WebSocket clients that cost next to nothing: raw sockets, one thread, frames told apart at the end."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wsproto.connection import Connection, ConnectionType
from wsproto.events import TextMessage

from tests.kit.clients import REQUEST, subscribe

__all__ = ["Member", "herd"]

_SUBPROTOCOL = b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"


class Member:
    """One client, and what it has been sent so far."""

    def __init__(self, sock: socket.socket, *, enveloped: bool) -> None:
        self.sock = sock
        self.enveloped = enveloped
        self.received = bytearray()
        self.messages: list[str] = []
        self.goodbye: dict[str, object] | None = None
        self.close: tuple[int, str] | None = None

    def read_frames(self) -> None:
        """Sort what has been received into messages, goodbye and Close; nothing may follow the Close."""
        head, _, rest = bytes(self.received).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        at = 0
        while at < len(rest):
            assert self.close is None, "nothing follows a Close"
            size, begin = rest[at + 1], at + 2
            if size == 126:
                [size], begin = struct.unpack_from("!H", rest, begin), begin + 2
            payload = rest[begin : begin + size]
            assert len(payload) == size, "no frame is cut short"
            self._take(rest[at] & 0x0F, payload)
            at = begin + size

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == 0x8:
            self.close = int.from_bytes(payload[:2], "big"), payload[2:].decode()
        elif opcode == 0x1 and not self.enveloped:
            self.messages.append(payload.decode())
        elif opcode == 0x1:
            event = json.loads(payload)
            if event["event"] == "message":
                assert self.goodbye is None, "nothing but a Close follows a goodbye"
                self.messages.append(event["data"])
            elif event["event"] == "goodbye":
                self.goodbye = event

    @property
    def told_to_close(self) -> bool:
        """Whether the end of what has been received looks like a Close that says when to come back."""
        return re.search(rb"\x88.\x11\x97[^\x88]* ms$", self.received, re.DOTALL) is not None


@contextmanager
def herd(path: Path, channel: str, *, plain: int, enveloped: int) -> Iterator[Sequence[Member]]:
    """Connect and subscribe many clients, some of each protocol. They hang up when they are told to."""
    members: dict[int, Member] = {}
    wanted = Connection(ConnectionType.CLIENT).send(TextMessage(data=subscribe(channel)))
    leave, left = os.pipe()
    with select.epoll() as poll:
        for number in range(plain + enveloped):
            sock = socket.socket(socket.AF_UNIX)
            # Not settimeout(): that would make connect() fail when the queue of those who wait is full.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 60, 0))
            sock.connect(str(path))
            request = REQUEST if number < plain else REQUEST.removesuffix(b"\r\n") + _SUBPROTOCOL
            sock.sendall(request + wanted)
            members[sock.fileno()] = Member(sock, enveloped=number >= plain)
            poll.register(sock, select.EPOLLIN)
        everyone = list(members.values())
        poll.register(leave, select.EPOLLIN)

        def read() -> None:
            while members:
                for fd, _ in poll.poll():
                    if fd == leave:
                        return
                    data = members[fd].sock.recv(2**16)
                    members[fd].received += data
                    if not data or members[fd].told_to_close:
                        poll.unregister(fd)
                        members.pop(fd).sock.close()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield everyone
        finally:
            os.close(left)
            reader.join()
            os.close(leave)
            for member in everyone:
                member.sock.close()
