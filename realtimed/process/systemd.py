"""What the daemon and systemd exchange: sockets handed over, readiness, status, watchdog.

The two protocols, sd_listen_fds(3) and sd_notify(3), are small enough to need no library. Anything else that speaks
them, such as a container's init or a test, works as well.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Final

import trio

from realtimed.errors import ConfigurationError
from realtimed.process.logs import Event
from realtimed.text import quoted

__all__ = ["Handover", "ServiceManager", "receive_sockets"]

_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3): the sockets handed over have this number and the next ones."""

_CONTROL: Final = "control"
_WEBSOCKET: Final = "websocket"

_PATIENCE: Final = 0.2
"""Seconds that a notification may wait for a service manager that does not read. Nothing else runs meanwhile."""

_DIGITS: Final = 18
"""Digits of a number in a variable: as many as fit into 64 bits."""

_STATUS_INTERVAL: Final = 5.0
"""Seconds between two checks whether the status has changed."""

log = logging.getLogger(__name__)


@dataclass
class Handover:
    """The listening sockets that the daemon was started with. They belong to the service manager."""

    control: socket.socket | None = None
    websocket: list[socket.socket] = field(default_factory=list)


def receive_sockets(environ: MutableMapping[str, str]) -> Handover:
    """Take the sockets that `environ` announces, and remove the announcement, so that no child process reads it.

    They are told apart by their names: ``FileDescriptorName=`` in a socket unit, ``LISTEN_FDNAMES`` in `environ`.

    Raises `ConfigurationError`, and closes all of them, if one cannot be used.
    """
    announced = {name: environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")}
    handover = Handover()
    if announced["LISTEN_PID"] != str(os.getpid()):
        return handover  # nothing was announced, or it was meant for the process that started this one
    count = _number("LISTEN_FDS", announced["LISTEN_FDS"])
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if _FIRST_FD + count > open_files:
        raise ConfigurationError(
            f"LISTEN_FDS: no {count} sockets can be open, as the limit of open files is {open_files}"
        )
    names = announced["LISTEN_FDNAMES"].split(":") if announced["LISTEN_FDNAMES"] else ["unknown"] * count
    if len(names) != count:
        raise ConfigurationError(f"LISTEN_FDNAMES: {len(names)} names for {count} sockets (LISTEN_FDS)")
    sockets = [_adopt(fd) for fd in range(_FIRST_FD, _FIRST_FD + count)]
    try:
        for fd, (name, sock) in enumerate(zip(names, sockets, strict=True), _FIRST_FD):
            _take(handover, name, sock, f"LISTEN_FDNAMES: file descriptor {fd}, called {quoted(name)},")
    except ConfigurationError:
        for sock in sockets:
            if sock is not None:
                sock.close()
        raise
    return handover


def _adopt(fd: int) -> socket.socket | None:
    """Return the socket with this number, or None if there is no socket."""
    try:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    except OSError:
        return None


def _take(handover: Handover, name: str, sock: socket.socket | None, subject: str) -> None:
    if sock is None:
        raise ConfigurationError(f"{subject} is not a socket")
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listening:
        raise ConfigurationError(f"{subject} is not a listening stream socket: use ListenStream= and Accept=no")
    if name == _WEBSOCKET:
        handover.websocket.append(sock)
    elif name != _CONTROL:
        raise ConfigurationError(
            f"{subject} has a name that says nothing here: FileDescriptorName= is {_CONTROL} or {_WEBSOCKET}"
        )
    elif sock.family != socket.AF_UNIX:
        raise ConfigurationError(f"{subject} is not a Unix socket: the control socket is never on the network")
    elif handover.control is not None:
        raise ConfigurationError(f"{subject} is a second one: there is one control socket")
    else:
        handover.control = sock


class ServiceManager:
    """Tells the service manager how the daemon is doing; without a service manager, every call does nothing.

    A notification that cannot be delivered is logged, once until the next one can, and the daemon goes on.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take the variables of sd_notify(3) and sd_watchdog_enabled(3) out of `environ`.

        Raises `ConfigurationError` if their values are not valid.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        interval = environ.pop("WATCHDOG_USEC", "")
        watched = environ.pop("WATCHDOG_PID", "")
        self._socket: socket.socket | None = None
        self._address = ""
        self._watchdog: float | None = None
        self._status = ""
        self._failing = False
        self._ready = trio.Event()
        if not address:
            return
        if address[0] not in "/@":
            raise ConfigurationError(f"NOTIFY_SOCKET: expected a path or @NAME, got {quoted(address)}")
        if interval and watched in ("", str(os.getpid())):
            self._watchdog = max(_number("WATCHDOG_USEC", interval), 1) / 1e6
        self._address = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_PATIENCE)

    def close(self) -> None:
        """Send no more notifications."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """Say that the daemon serves: for the first time, or again after `reloading`."""
        self._status = status
        self._tell("READY=1", f"STATUS={status}")
        self._ready.set()

    def reloading(self) -> None:
        """Say that the configuration is being reloaded. `ready` has to follow."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def announce(self, pid: int) -> None:
        """Say which process is the main one from now on: one that has been started by this one, or this one again."""
        self._tell(f"MAINPID={pid}")

    def stopping(self, status: str, seconds: float) -> None:
        """Say that the daemon is stopping and needs up to `seconds`, whatever TimeoutStopSec= says."""
        self._status = status
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        if status != self._status:
            self._status = status
            self._tell(f"STATUS={status}")

    async def watch(self, describe: Callable[[], str]) -> None:
        """Once `ready`, feed the watchdog and keep the status up to date, forever. `describe` returns the status.

        This is a task and not a thread: if the event loop hangs, so does this, and the watchdog ends the process.
        """
        if self._socket is None:
            return
        await self._ready.wait()
        async with trio.open_nursery() as nursery:
            if self._watchdog is not None:
                nursery.start_soon(self._feed_watchdog, self._watchdog / 2)
            while True:
                await trio.sleep(_STATUS_INTERVAL)
                self.status(describe())

    async def _feed_watchdog(self, interval: float) -> None:
        while True:
            self._tell("WATCHDOG=1")
            await trio.sleep(interval)

    def _tell(self, *assignments: str) -> None:
        if self._socket is not None:
            try:
                self._socket.sendto("\n".join(assignments).encode(errors="backslashreplace"), self._address)
            except OSError as error:
                if not self._failing:
                    log.warning(Event("service manager not notified", reason=error.strerror or str(error)))
                self._failing = True
            else:
                self._failing = False


def _number(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise ConfigurationError(f"{variable}: expected a number, got {quoted(text)}")
    return int(text)
