"""A blocking WebSocket client that connects to a site as a page of some origin would."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Event, RejectConnection, RejectData, Request, TextMessage
from wsproto.utilities import RemoteProtocolError

from realtimed.errors import ProtocolError

__all__ = ["Probe", "site_of"]

_SUBPROTOCOL: Final = "realtime.v1"
_SHOWN: Final = 300
"""Characters that are kept of the text of a refusal."""


def site_of(address: str) -> str:
    """Return the URL of the site that Caddy serves at an address such as ``:8080`` or ``example.com``.

    Raises `ValueError` if Caddy would not take `address`.
    """
    match = re.fullmatch(r"(?:(https?)://)?(\[[^\]]*\]|[^:/@\s]*)(?::(\d+))?/?", address)
    if match is None:
        raise ValueError(f"expected a site address such as :8080 or example.com, got {address!r}")
    scheme, host, port = match[1], match[2], match[3]
    if port is not None and not 0 < int(port) < 65536:
        raise ValueError(f"a port is a number from 1 to 65535, got {address!r}")
    if host.isdigit():
        raise ValueError(f"{address!r} would be the name of a host; did you mean :{host}?")
    if not scheme:
        scheme = "http" if port == "80" or (not host and port != "443") else "https"
    default_port = {"http": "80", "https": "443"}[scheme]
    return f"{scheme}://{host or 'localhost'}" + (f":{port}" if port not in (None, default_port) else "")


class Probe:
    """One WebSocket at the ``/ws`` of a site, opened with some ``Origin``.

    After `open`, `status` is that of the answer, 101 for a WebSocket, and `text` is the body of a refusal. All calls
    raise `OSError` (`TimeoutError` and `ssl.SSLError` are subclasses), and `ProtocolError` if the other side does not
    speak HTTP or WebSocket. `timeout` is in seconds, for all calls together.
    """

    def __init__(self, site: str, timeout: float) -> None:
        self.status = 0
        self.text = ""
        self._site = urlsplit(site)
        self._deadline = time.monotonic() + timeout
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._messages: list[str] = []
        self._partial = ""
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._socket is not None:
            self._socket.close()

    def open(self, origin: str | None) -> int:
        """Ask for a WebSocket, and return the status of the answer."""
        secure = self._site.scheme == "https"
        host, port = self._site.hostname or "localhost", self._site.port or (443 if secure else 80)
        self._socket = socket.create_connection((host, port), timeout=self._left())
        if secure:
            self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
        headers = [(b"Origin", origin.encode())] if origin is not None else []
        request = Request(self._site.netloc, "/ws", subprotocols=[_SUBPROTOCOL], extra_headers=headers)
        self._socket.sendall(self._connection.send(request))
        finished = False
        while not finished:
            for event in self._events():
                finished |= self._note(event)
        return self.status

    def send(self, **fields: object) -> None:
        """Send a message of the protocol ``realtime.v1``."""
        if self._socket is not None:
            self._socket.settimeout(self._left())
            self._socket.sendall(self._connection.send(TextMessage(data=json.dumps(fields))))

    def receive(self, event: str) -> dict[str, Any]:
        """Return the next message with this `event`, and skip others."""
        while True:
            while self._messages:
                text = self._messages.pop(0)
                try:
                    message = json.loads(text)
                except ValueError:
                    message = None
                if not isinstance(message, dict):
                    raise ProtocolError("what answers there does not speak realtime.v1")
                if message.get("event") == event:
                    return message
            for each in self._events():
                self._note(each)

    def _note(self, event: Event) -> bool:
        """Record an event, and return whether it completes the answer to the handshake."""
        match event:
            case AcceptConnection():
                self.status = 101
                return True
            case RejectConnection():
                self.status = event.status_code
                return not event.has_body
            case RejectData():
                self.text = (self.text + event.data.decode("utf-8", "replace"))[:_SHOWN]
                return event.body_finished
            case TextMessage():
                self._partial += event.data
                if event.message_finished:
                    self._messages.append(self._partial)
                    self._partial = ""
        return False

    def _events(self) -> list[Event]:
        """Wait for bytes, and return the events in them."""
        if self._socket is None:
            raise ProtocolError("this probe is not open")
        self._socket.settimeout(self._left())
        data = self._socket.recv(2**16)
        try:
            self._connection.receive_data(data or None)
            events = list(self._connection.events())
        except RemoteProtocolError as error:
            raise ProtocolError(f"what answers there does not speak HTTP or WebSocket: {error}") from None
        if not data and not events:
            raise ProtocolError("what answers there hung up")
        return events

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left
