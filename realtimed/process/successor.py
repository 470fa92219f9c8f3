"""The next process, as a child of this one: how it is started, talked to, and ended if it fails.

The successor is started with this process's own program, arguments, environment, working directory and standard
descriptors. So it has the same user, the same sandbox and the same control group, and what was installed meanwhile.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, NoReturn, Self

import trio

from realtimed.errors import RealtimeError
from realtimed.process.line import EndOfLineError, Kind, Line, pieces
from realtimed.process.portions import TAKE_OVER, HandOverError, TakenPortion

__all__ = ["PATIENCE", "Predecessor", "Successor"]

_OF_THIS_PROCESS: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID", TAKE_OVER)
"""Variables that were meant for this process alone."""

PATIENCE: Final = 1.0
"""Seconds that either process waits for the other in each step of the pause, in which nobody is served."""

_START_PATIENCE: Final = 30.0
"""Seconds that the successor may take to start, and to take what there is. Everybody is served meanwhile."""

_LAST_WORDS: Final = 0.2
"""Seconds that a successor gets to end by itself. Nobody is served meanwhile, if the pause has begun."""

_FAILED: Final = 70
"""The exit status of a successor that does not take over: EX_SOFTWARE of sysexits.h."""


class Successor:
    """A process that has been started to take over. Raises `HandOverError` where it fails."""

    # Invariant: until `go`, `end` can end it for certain. So what it may or may not have received does not matter.

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Start it. `environ` is the environment that this process was started with."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise HandOverError(f"the new process cannot be started: {error.strerror}") from error
        self._line = Line(ours, "the new process", PATIENCE)
        self._line.learn_credentials()
        with theirs:
            environment = {name: value for name, value in environ.items() if name not in _OF_THIS_PROCESS}
            environment[TAKE_OVER] = str(theirs.fileno())
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=[theirs.fileno()]
                )
            except OSError as error:
                self._line.close()
                raise HandOverError(f"the new process cannot be started: {error.strerror or error}") from error
        self.pid = self._process.pid

    async def hello(self) -> bytes:
        """Wait until it has started; return what it says."""
        await self._wait_readable()
        pid, uid = self._line.sender()
        if (pid, uid) != (self.pid, os.geteuid()):
            raise HandOverError(f"the new process is {pid} of user {uid}, not {self.pid} of user {os.geteuid()}")
        return self.expect(Kind.HELLO).data

    async def prepared(self) -> None:
        """Wait until it has taken all that was sent."""
        await self._wait_readable()
        self.expect(Kind.PREPARED)

    async def _wait_readable(self) -> None:
        with trio.move_on_after(_START_PATIENCE) as patience:
            await trio.lowlevel.wait_readable(self._line)
        if patience.cancelled_caught:
            raise HandOverError(f"the new process has said nothing for {_START_PATIENCE:g} s")

    async def send(self, kind: Kind, data: bytes = b"", files: Sequence[int] = ()) -> None:
        """Send a message while others have their turns."""
        for piece, descriptors in pieces(kind, data, files):
            sent = 0
            while sent < len(piece):
                with trio.move_on_after(_START_PATIENCE) as patience:
                    await trio.lowlevel.wait_writable(self._line)
                if patience.cancelled_caught:
                    raise HandOverError(f"the new process has read nothing for {_START_PATIENCE:g} s")
                sent += self._line.send_some((piece[sent:], () if sent else descriptors))

    def send_now(self, kind: Kind, data: bytes = b"", files: Sequence[int] = ()) -> None:
        """Send a message. Nothing else runs meanwhile, for `PATIENCE` at most."""
        self._line.send(kind, data, files)

    def expect(self, kind: Kind) -> TakenPortion:
        """Wait for a message of a kind. Nothing else runs meanwhile, for `PATIENCE` at most."""
        return self._line.expect(kind)

    def go(self, data: bytes) -> None:
        """Say that everything belongs to the successor now. It goes on, too, if this process ends before."""
        self._line.send(Kind.GO, data)

    def close(self) -> None:
        """Leave the successor to itself."""
        self._line.close()

    def end(self) -> str:
        """End it, unless it has ended by itself; return a clause that says how it has, or "".

        It may wait for `go`, and takes our end for that. So it is told, too.
        """
        status = self._process.returncode
        if status is not None:
            return f"; its exit status is {status}"
        with suppress(HandOverError):
            self._line.send(Kind.FAILED, b"the process before this one goes on")
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(_LAST_WORDS)  # its line may end a moment before it does
        if status is None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        self._line.close()
        return f"; its exit status is {status}" if status is not None else ""


class Predecessor:
    """The process that has started this one to take over from it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @staticmethod
    def of(environ: MutableMapping[str, str]) -> Predecessor | None:
        """Return the predecessor, if there is one. Takes its variable out of `environ`."""
        number = environ.pop(TAKE_OVER, "")
        if not (number.isascii() and number.isdigit()):
            return None
        try:
            sock = socket.socket(fileno=int(number))
        except OSError:
            return None
        sock.set_inheritable(False)
        return Predecessor(Line(sock, "the old process", _START_PATIENCE))

    def say(self, kind: Kind, data: bytes = b"") -> None:
        """Send a message. Raises `HandOverError`."""
        self._line.send(kind, data)

    def receive(self) -> tuple[Kind, TakenPortion]:
        """Wait for a message. Raises `HandOverError`."""
        return self._line.receive()

    def expect(self, kind: Kind) -> TakenPortion:
        """Wait for a message of a kind. Raises `HandOverError`."""
        return self._line.expect(kind)

    def wait_for_go(self) -> bytes | None:
        """Wait until everything is ours; return what the predecessor says then, or None if it has ended before.

        Raises `HandOverError` if it says that it goes on itself.
        """
        self._line.patience = None  # the predecessor may be slow to say so: only it can decide
        said = None
        with suppress(EndOfLineError):
            said = self._line.expect(Kind.GO).data
        self._line.close()
        return said

    def refuse(self, sentence: str) -> NoReturn:
        """Say why this process does not take over, and end at once.

        Nothing is cleaned up: sockets and their files belong to the predecessor.
        """
        with suppress(HandOverError):
            self._line.send(Kind.FAILED, sentence.encode())
        sys.stderr.flush()
        os._exit(_FAILED)

    def __enter__(self) -> Self:
        """Refuse if the block is left with an exception."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            if not isinstance(error, RealtimeError):
                traceback.print_exception(error)  # a bug
            self.refuse(str(error) or type(error).__name__)
