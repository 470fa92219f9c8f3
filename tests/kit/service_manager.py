"""The service manager's side of sd_notify(3) and sd_listen_fds(3), for tests."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from tests.kit.stack import MissingComponentError

__all__ = ["Manager", "find_systemd", "listening", "service_manager"]


def find_systemd(program: str) -> Path:
    """Return one of the programs that come with systemd."""
    found = shutil.which(program)
    if found is None:
        raise MissingComponentError(f"{program} is not installed: apt-get install systemd")
    return Path(found)


class Manager:
    """A socket that notifications are sent to, and all that have come so far."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address = address
        self.environment = {"NOTIFY_SOCKET": address}
        self.socket = sock
        self.told: list[dict[str, str]] = []

    async def next(self) -> dict[str, str]:
        """Wait for a notification and return its assignments."""
        await trio.lowlevel.wait_readable(self.socket)
        return self._take(self.socket.recv(4096))

    async def until(self, variable: str, pattern: str = "") -> dict[str, str]:
        """Wait for a notification that assigns to `variable` a value in which `pattern` is found."""
        while True:
            told = await self.next()
            if variable in told and re.search(pattern, told[variable]):
                return told

    def rest(self) -> list[dict[str, str]]:
        """Return the notifications that lie there unread."""
        found = []
        try:
            while True:
                found.append(self._take(self.socket.recv(4096)))
        except BlockingIOError:
            return found

    def _take(self, data: bytes) -> dict[str, str]:
        told = dict(line.split("=", 1) for line in data.decode().splitlines())
        self.told.append(told)
        return told


@contextmanager
def service_manager(address: str | Path) -> Iterator[Manager]:
    """Listen for notifications at a path, or at an abstract name that begins with an @."""
    name = str(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name[0] == "@" else name)
        sock.setblocking(False)
        yield Manager(sock, name)


@contextmanager
def listening(directory: Path) -> Iterator[dict[str, socket.socket]]:
    """Open the two sockets that systemd/*.socket describe, in `directory`."""
    with ExitStack() as open_sockets:
        sockets = {}
        for name, path in (("control", "realtime.sock"), ("websocket", "realtime-ws.sock")):
            sockets[name] = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
            sockets[name].bind(str(directory / path))
            sockets[name].listen(4096)
        yield sockets
