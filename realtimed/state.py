"""The state file, in which a daemon that stops leaves its history to the next one.

Whatever is at its path, the daemon starts, serves and stops cleanly, and the log says what happened to the history.
Nothing is lost silently: a file that cannot be used is kept under another name, and what is not a file is not touched.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from realtimed.hub import snapshot
from realtimed.hub.hub import Hub
from realtimed.hub.snapshot import SnapshotError
from realtimed.process.logs import Event

__all__ = ["StateFile"]

_WRITTEN_AT_ONCE: Final = 2**20
"""Bytes of history collected before they are written."""

log = logging.getLogger(__name__)


class StateFile:
    """The file at `path`. A snapshot is written to ``.new`` beside it, and replaces it when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(path.name + ".new")

    def load(self, hub: Hub) -> None:
        """Load the previous daemon's history, if there is one, into a hub without channels, and remove the file.

        A file with wrong content is renamed to ``.damaged``, one that cannot be read to ``.unreadable``. If it kept its
        name, a later start that can read it would trust it, however much was published since.
        """
        try:
            saved = snapshot.read(_read(self._path), time.time())
            _remove(self._path)
        except FileNotFoundError:
            log.info(Event("history begins anew", state_file=str(self._path), reason="there is no such file"))
        except SnapshotError as error:
            self._begin_anew(str(error), self._set_aside(".damaged"))
        except MemoryError:
            self._begin_anew("there is not enough memory for it", self._set_aside(".unreadable"))
        except OSError as error:
            self._begin_anew(error.strerror or str(error), self._set_aside(".unreadable"))
        else:
            snapshot.restore(hub, saved)
            log.info(Event("history taken over", channels=len(saved.channels), bytes=hub.history.bytes))

    def _begin_anew(self, reason: str, kept_as: Path) -> None:
        log.warning(Event("history begins anew", state_file=str(self._path), reason=reason, kept_as=str(kept_as)))

    def _set_aside(self, suffix: str) -> Path:
        """Rename the file, if it is one, and return its path. An older file of that name is replaced."""
        aside = self._path.with_name(self._path.name + suffix)
        try:
            if stat.S_ISREG(self._path.lstat().st_mode):
                self._path.replace(aside)
                return aside
        except OSError:
            pass  # we may not write the directory, or there is a directory of that name
        return self._path

    async def save(self, hub: Hub) -> None:
        """Save the history for the next daemon. Nothing may be published afterwards."""
        try:
            size = await self._write(hub)
        except OSError as error:
            log.warning(Event("history is lost", state_file=str(self._new), reason=error.strerror or str(error)))
        else:
            log.info(Event("history saved", channels=hub.history.channels, bytes=size))

    async def _write(self, hub: Hub) -> int:
        """Write a snapshot and return its size. If it raises `OSError`, it leaves nothing unfinished behind."""
        async with await trio.open_file(self._new, "wb", opener=_create) as file:
            try:
                pending = bytearray()
                for part in snapshot.dump(hub, time.time()):
                    pending += part
                    if len(pending) > _WRITTEN_AT_ONCE:
                        await file.write(pending)
                        pending.clear()
                await file.write(pending)
                await file.flush()
                size = os.fstat(file.fileno()).st_size
                _require_file_or_nothing(self._path)
                self._new.replace(self._path)
            except OSError:
                with suppress(OSError):
                    self._new.unlink()  # a full disk needs the space
                raise
        return size


def _read(path: Path) -> bytes:
    """Return a file's content. Raises `OSError`, at once for what is not a file: a FIFO or a device might never end.

    Raises `SnapshotError` for a large file of another kind before it has read much of it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        _require_file(os.fstat(fd), path)
        snapshot.check_magic(file.read(snapshot.MAGIC_BYTES))
        file.seek(0)
        return file.read()


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise OSError(error.errno, f"it cannot be removed: {error.strerror}") from error


def _create(path: str, _: int) -> int:
    """Create a file that only we may open, whatever the umask. It replaces what a killed daemon left behind.

    Never opens what already exists: that may be a link to another file, or have another mode.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        status = os.lstat(path)
        # Removing a link does not touch its target.
        if not (stat.S_ISLNK(status.st_mode) or status.st_uid == os.geteuid()):
            raise OSError(errno.EEXIST, "there is a file of another user; move it away") from None
        if not stat.S_ISLNK(status.st_mode):
            _require_file(status, Path(path))
        Path(path).unlink()
        fd = os.open(path, flags, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def _require_file_or_nothing(path: Path) -> None:
    """Raise `OSError` if at `path` is anything but a file or a link, such as ``/dev/null``."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            _require_file(status, path)


def _require_file(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EEXIST, f"{path} is not a file, but a device, a FIFO or a socket; move it away")
