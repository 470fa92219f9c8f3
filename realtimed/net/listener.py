"""Listening sockets. A Unix socket appears with its mode and group in place, and never replaces one in use."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Generic, TypeVar

import trio

from realtimed.config.readers import Address
from realtimed.errors import ConfigurationError
from realtimed.text import printable

__all__ = ["SocketListener", "adopt_listener", "inherit_listener", "listen", "open_listener"]

_LISTEN_QUEUE: Final = 4096
"""Connections that the kernel keeps until they are accepted. Its own limit, net.core.somaxconn, may be lower."""

_LOCK_PATIENCE: Final = 10.0
"""Seconds that a start waits for a lock on its socket's directory. Daemons hold it for a millisecond."""

_LOCK_INTERVAL: Final = 0.05
"""Seconds between two tries to get that lock."""

StreamT = TypeVar("StreamT")


class SocketListener(trio.abc.AsyncResource, Generic[StreamT]):
    """Accepts connections and wraps them. Closing it unlinks `path`, if that is still this Unix socket.

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
        self._tcp = sock.family != socket.AF_UNIX
        self.name = str(self.address)
        """Its address as the log shows it."""

    @property
    def address(self) -> Address:
        """Its address. For port 0 it has the port that the kernel chose."""
        name = self._socket.getsockname()
        if self._socket.family == socket.AF_UNIX:
            # A name that begins with a zero byte is not a path but abstract. It is written with an @.
            return Address(path=Path(os.fsdecode(name).replace("\0", "@", 1)))
        host, port = name[:2]
        return Address(host=host, port=port)

    @property
    def path(self) -> Path | None:
        """The socket's file, if it is ours to remove."""
        return self._path

    @property
    def descriptor(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def disown(self) -> None:
        """Leave the socket's file to another process, which listens at the same socket."""
        self._path = None

    async def ready(self) -> None:
        """Wait until a peer connects."""
        sock = self._socket
        try:
            await trio.lowlevel.wait_readable(sock)
        except trio.ClosedResourceError:
            if sock is self._socket:
                raise
            # `renew` has replaced the socket, and a peer may already wait at the new one.

    def renew(self) -> bool:
        """Listen again if the socket file was removed, with a new socket at the same path. Return whether it did.

        Before that, the peers that connected to the old socket are accepted. Raises `OSError` if it cannot listen.
        """
        if self._path is None or self._reopen is None or self._socket.fileno() < 0:
            return False
        found = _inode(self._path)
        if found == self._inode:
            return False
        if found is not None:
            raise OSError(errno.EADDRINUSE, "there is something else now; is another realtimed running?")
        if _has_waiting(self._socket):
            return False
        old, self._socket = self._socket, self._reopen()
        self._inode = _inode(self._path)
        trio.lowlevel.notify_closing(old)
        old.close()
        return True

    def accept(self, limit: int) -> list[StreamT]:
        """Return the connections that wait, at most `limit`; possibly none.

        Raises `OSError` if the first cannot be accepted because the process or the system has reached a limit.
        """
        accepted: list[StreamT] = []
        try:
            while len(accepted) < limit:
                sock, _ = self._socket.accept()
                sock.setblocking(False)
                if self._tcp:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                accepted.append(self._wrap(sock))
        except (BlockingIOError, ConnectionAbortedError):
            pass  # no more wait, or the next one has gone while it waited
        except OSError:
            if not accepted:
                raise
        return accepted

    def last_ones(self) -> list[StreamT]:
        """Stop listening at the path, and return the connections that wait, as far as there are open files for them.

        Of an adopted socket it returns none: they wait for the next process that accepts there.
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
        """Remove the socket's file if it is ours. Only the first call does something."""
        if self._path is not None and _inode(self._path) == self._inode:
            with suppress(OSError):  # we may not write the directory any more; the next daemon replaces the file
                self._path.unlink()
        self._path = None


async def listen(
    where: Address | socket.socket, wrap: Callable[[socket.socket], StreamT], *, mode: int, group: str | None
) -> SocketListener[StreamT]:
    """Listen at an address, or at a socket that is already open. See `open_listener` and `adopt_listener`."""
    if isinstance(where, socket.socket):
        return adopt_listener(where, wrap)
    return await open_listener(where, wrap, mode=mode, group=group)


async def open_listener(
    address: Address, wrap: Callable[[socket.socket], StreamT], *, mode: int, group: str | None
) -> SocketListener[StreamT]:
    """Listen at `address`. A dead daemon's socket file is replaced. `mode` and `group` are for Unix sockets.

    Waits at most `_LOCK_PATIENCE` seconds while another daemon does the same in the same directory. It may be cancelled
    then, since nothing has been done yet. Raises `ConfigurationError`, which says why, if it cannot listen.
    """
    path = address.path
    try:
        if path is None:
            return SocketListener(_listen_tcp(address), wrap)
        sock = await _listen_when_unlocked(path, mode, group)
        return SocketListener(sock, wrap, path, partial(_listen_unix, path, mode, group))
    except OSError as error:
        raise ConfigurationError(printable(f"cannot listen at {address}: {error.strerror or error}")) from error
    except UnicodeError as error:
        raise ConfigurationError(printable(f"cannot listen at {address}: no host has such a name")) from error


def inherit_listener(
    sock: socket.socket, path: Path | None, wrap: Callable[[socket.socket], StreamT], *, mode: int, group: str | None
) -> SocketListener[StreamT]:
    """Accept connections at the socket of a process that ends. With a `path`, its file is ours from now on."""
    sock.setblocking(False)
    return SocketListener(sock, wrap, path, partial(_listen_unix, path, mode, group) if path is not None else None)


def adopt_listener(sock: socket.socket, wrap: Callable[[socket.socket], StreamT]) -> SocketListener[StreamT]:
    """Accept connections at a socket that another process has opened and keeps open.

    That process chooses path, mode and group. Connections that wait when the listener is closed wait for the next one.
    """
    sock.setblocking(False)
    return SocketListener(sock, wrap)


def _listen_tcp(address: Address) -> socket.socket:
    """Listen at a host and port. Raises `OSError`, and `UnicodeError` for what cannot be a host's name."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.create_server((address.host, address.port), family=family, backlog=_LISTEN_QUEUE)
    sock.setblocking(False)
    return sock


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
    """Listen at `path`. Nobody can connect until mode and group are in place, since it does not listen before.

    Raises `BlockingIOError` while another daemon does the same, and `OSError` if it cannot listen.
    """
    with _lock(path.parent), ExitStack() as undo:
        _make_free(path)
        sock = undo.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(os.fspath(path))
        undo.callback(path.unlink)
        if group is not None:
            _give_to(path, group)
        path.chmod(mode)
        sock.listen(_LISTEN_QUEUE)
        sock.setblocking(False)
        undo.pop_all()
        return sock


def _give_to(path: Path, group: str) -> None:
    """Change the group of a file. Raises `OSError` if that is not possible, or the group no longer exists."""
    try:
        shutil.chown(path, group=group)
    except LookupError as error:
        raise OSError(errno.ENOENT, str(error)) from error


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Lock a directory, so that two daemons that start at once do not both replace the same dead socket.

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
    """Remove a socket at `path` at which no process listens. Raises `OSError` if there is anything else."""
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


def _has_waiting(sock: socket.socket) -> bool:
    """Return whether a connection waits to be accepted."""
    readable = select.poll()
    readable.register(sock, select.POLLIN)
    return bool(readable.poll(0))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
