"""Listening sockets: accepting connections, and Unix sockets that appear whole and are never stolen."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Generic, TypeVar

import trio

from realtimed.config.readers import Address
from realtimed.errors import ConfigurationError
from realtimed.text import printable

__all__ = ["SocketListener", "adopt_listener", "listen", "open_listener"]

_LISTEN_QUEUE: Final = 4096
"""Connections the kernel keeps until they are accepted; it takes the lower of this and net.core.somaxconn."""

_LOCK_PATIENCE: Final = 10.0
"""Seconds a start waits for a lock on the directory of its socket: daemons hold it for a millisecond."""

_LOCK_INTERVAL: Final = 0.05
"""Seconds between two tries to get it."""

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)


class SocketListener(trio.abc.AsyncResource, Generic[StreamT]):
    """Accepts connections and wraps them. Closing it unlinks the Unix socket at `path`, if that still leads there.

    `reopen` returns another socket that listens at `path`, or raises `OSError`; see `renew`.
    """

    def __init__(
        self,
        sock: socket.socket,
        wrap: Callable[[socket.socket], StreamT],
        path: Path | None = None,
        reopen: Callable[[], socket.socket] | None = None,
    ) -> None:
        self._socket = sock
        self._wrap = wrap
        self._path = path
        self._reopen = reopen
        self._inode = _inode(path) if path is not None else None
        self.name = str(self.address)
        """Where it listens, as the log says it."""

    @property
    def address(self) -> Address:
        """Where it listens; a port that was given as 0 is the one the kernel chose."""
        name = self._socket.getsockname()
        if self._socket.family == socket.AF_UNIX:
            # What begins with a zero byte is no path but an abstract name, which is written with an @.
            return Address(path=Path(os.fsdecode(name).replace("\0", "@", 1)))
        host, port = name[:2]
        return Address(host=host, port=port)

    async def ready(self) -> None:
        """Wait until somebody connects."""
        sock = self._socket
        try:
            await trio.lowlevel.wait_readable(sock)
        except trio.ClosedResourceError:
            if sock is self._socket:
                raise
            # Another one has taken its place, and may well have somebody waiting.

    def renew(self) -> bool:
        """Listen anew at a path from which the socket was removed; return whether that was so.

        Nobody could connect any more, and those who had are accepted. Raises `OSError` if it is not possible.
        """
        if self._path is None or self._reopen is None or self._socket.fileno() < 0:
            return False
        found = _inode(self._path)
        if found == self._inode:
            return False
        if found is not None:
            raise OSError(errno.EADDRINUSE, "there is something else now; is another realtimed running?")
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        if waiting.poll(0):
            return False  # whoever has connected is accepted first
        old, self._socket = self._socket, self._reopen()
        self._inode = _inode(self._path)
        trio.lowlevel.notify_closing(old)
        old.close()
        return True

    def accept(self, limit: int) -> list[StreamT]:
        """Return the connections that are there, up to `limit`; possibly none.

        Raises `OSError` when the process or the system can have no more of them for now.
        """
        accepted: list[StreamT] = []
        try:
            while len(accepted) < limit:
                sock, _ = self._socket.accept()
                sock.setblocking(False)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                accepted.append(self._wrap(sock))
        except (BlockingIOError, ConnectionAbortedError):
            pass  # these are all, or the next one went away while it was waiting
        except OSError:
            if not accepted:
                raise
        return accepted

    def last_ones(self) -> list[StreamT]:
        """Let nobody connect any more, and return the connections that wait, as far as there are open files for them.

        At a socket that was adopted they wait for whoever accepts there next.
        """
        if self._path is None:
            return []
        self._unlink()
        try:
            return self.accept(_LISTEN_QUEUE)
        except OSError:
            return []

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        if self._socket.fileno() >= 0:
            self._unlink()
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()

    def _unlink(self) -> None:
        """Remove the socket's file if it is ours, for good."""
        if self._path is not None and _inode(self._path) == self._inode:
            with suppress(OSError):  # a directory that may not be written any more; the next daemon replaces the file
                self._path.unlink()
        self._path = None


async def listen(
    where: Address | socket.socket, wrap: Callable[[socket.socket], StreamT], *, mode: int, group: str | None
) -> SocketListener[StreamT]:
    """Listen at an address, or at a socket that is open already; see `open_listener` and `adopt_listener`."""
    if isinstance(where, socket.socket):
        return adopt_listener(where, wrap)
    return await open_listener(where, wrap, mode=mode, group=group)


async def open_listener(
    address: Address, wrap: Callable[[socket.socket], StreamT], *, mode: int, group: str | None
) -> SocketListener[StreamT]:
    """Listen at `address`. A dead daemon's socket file is replaced; `mode` and `group` are for Unix sockets.

    Waits for `_LOCK_PATIENCE` seconds at most while another daemon does the same in the same directory; until then
    nothing has been done, so it may be cancelled. Raises `ConfigurationError` if that is not possible, saying why.
    """
    path = address.path
    reopen = None if path is None else partial(_listen_unix, path, mode, group)
    try:
        if path is None:
            sock = socket.create_server(
                (address.host, address.port),
                family=socket.AF_INET6 if ":" in address.host else socket.AF_INET,
                backlog=_LISTEN_QUEUE,
            )
        else:
            sock = await _listen_when_unlocked(path, mode, group)
    except OSError as error:
        raise ConfigurationError(printable(f"cannot listen at {address}: {error.strerror or error}")) from error
    except UnicodeError as error:
        raise ConfigurationError(printable(f"cannot listen at {address}: no host has such a name")) from error
    sock.setblocking(False)
    return SocketListener(sock, wrap, path, reopen)


def adopt_listener(sock: socket.socket, wrap: Callable[[socket.socket], StreamT]) -> SocketListener[StreamT]:
    """Accept connections at a socket that somebody else has opened and keeps open.

    Its path, mode and group are theirs. What is not accepted when the listener is closed waits for the next one.
    """
    sock.setblocking(False)
    return SocketListener(sock, wrap)


async def _listen_when_unlocked(path: Path, mode: int, group: str | None) -> socket.socket:
    deadline = trio.current_time() + _LOCK_PATIENCE
    while True:
        try:
            return _listen_unix(path, mode, group)
        except BlockingIOError:
            if trio.current_time() >= deadline:
                raise
        await trio.sleep(_LOCK_INTERVAL)  # flock(2) waits only in a way that cannot be cancelled


def _listen_unix(path: Path, mode: int, group: str | None) -> socket.socket:
    """Listen at `path`. Nobody can connect before its mode and group are in place, since it is not listening yet.

    Raises `BlockingIOError` while another daemon is doing the same, and `OSError` if it is not possible.
    """
    with _lock(path.parent):
        _make_free(path)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(os.fspath(path))
            try:
                if group is not None:
                    _give_to(path, group)
                path.chmod(mode)
                sock.listen(_LISTEN_QUEUE)
            except OSError:
                path.unlink()
                raise
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock


def _give_to(path: Path, group: str) -> None:
    """Change the group of a file. Raises `OSError` if that is not possible, or there is no such group any more."""
    try:
        shutil.chown(path, group=group)
    except LookupError as error:
        raise OSError(errno.ENOENT, str(error)) from error


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Keep two daemons that start at once from both replacing the same dead socket.

    Raises `BlockingIOError` while another process holds a lock on the directory.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = f"another process holds a lock on the directory {directory}; fuser -v {directory} shows which"
            raise BlockingIOError(error.errno, reason) from None
        yield
    finally:
        os.close(fd)


def _make_free(path: Path) -> None:
    """Remove a socket that nobody listens at. Raises `OSError` if there is anything else at `path`."""
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found):
        raise OSError(errno.EEXIST, "there is something that is not a socket; move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # a daemon that is too busy to accept is alive
    raise OSError(errno.EADDRINUSE, "another process is listening there; is realtimed running already?")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
