"""The upgrade: everything that the daemon holds passes to a new process, and nobody notices.

The running daemon starts its successor as its child, and hands over in two phases (see `process.portions`). It reads
and accepts nothing during the second, which takes some hundredths of a second: peers wait in the kernel. Until it says
"go" it can change its mind: it ends the successor, opens the gate, and goes on.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import trio

from realtimed import __version__
from realtimed.config.settings import Config
from realtimed.net.gate import Gate
from realtimed.net.listeners import Listeners
from realtimed.process.line import EndOfLineError, Kind
from realtimed.process.portions import HandOverError, Part, TakenPortion, decoded
from realtimed.process.successor import PATIENCE, Predecessor, Successor

__all__ = ["READS", "VERSION", "HandOver", "Inherited", "Report", "TakeOver"]

VERSION: Final = 1
"""The version of the state. A field with a default may be added without another version."""

READS: Final = (1, VERSION)
"""The oldest and the newest version that can be taken over: that of the release before, and this one."""


class _Hello(msgspec.Struct):
    """What the successor says first."""

    reads: tuple[int, int]
    program: str


class _Socket(msgspec.Struct, array_like=True):
    """A listening socket: `websocket`, `control` or `http`, and its file if that is the daemon's own."""

    role: str
    path: str | None = None


class _Beginning(msgspec.Struct):
    """What the predecessor says first: which version follows, and where it listens."""

    version: int
    program: str
    pid: int
    sockets: list[_Socket]
    addresses: list[str] | None
    """The configured addresses; None if a service manager has opened the sockets."""


class _Go(msgspec.Struct):
    """When the pause began, in seconds of the machine's monotonic clock; which parts have been handed over."""

    paused_at: float
    began_at: float


class Inherited(NamedTuple):
    """The listening sockets that a predecessor has left to this process, each with its path if its file is ours."""

    websocket: Sequence[tuple[socket.socket, Path | None]]
    control: tuple[socket.socket, Path | None]
    http: tuple[socket.socket, Path | None] | None


class Report(NamedTuple):
    """What has happened in an upgrade. Times are in seconds, None if the predecessor has ended without a word.

    `pause` is for how long nobody was served, and `seconds` how long all of it took.
    """

    former_pid: int
    former_version: str
    pause: float | None = None
    seconds: float | None = None


class HandOver:
    """The old process's side."""

    # Invariant: until `given`, the successor can be ended, and this process goes on.

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        config: Config,
        listeners: Listeners,
        parts: Sequence[Part],
        gates: Sequence[Gate],
        settle: Callable[[], Awaitable[None]],
        announce: Callable[[int], None],
        adopted: bool,
    ) -> None:
        """Prepare to hand over `parts` and `listeners`.

        `environ` is the environment that this process was started with. `announce` says which process is the main one.
        `adopted` says that a service manager has opened the sockets.
        """
        self._environ = environ
        self._config = config
        self._listeners = listeners
        self._parts = parts
        self._gates = gates
        self._settle = settle
        self._announce = announce
        self._adopted = adopted
        self.given = False
        """Whether everything belongs to the successor."""

    async def run(self) -> int:
        """Hand over; return the successor's pid. Raises `HandOverError`, and goes on here, if that fails."""
        began_at = time.monotonic()
        successor = Successor(self._environ)
        try:
            await self._prepare(successor)
            for gate in self._gates:
                gate.close()
            paused_at = time.monotonic()
            await self._come_to_rest()
            self._give(successor, msgspec.msgpack.encode(_Go(paused_at, began_at)))
        except EndOfLineError as error:
            raise HandOverError(f"{error}{successor.end()}") from error
        finally:
            if not self.given:
                successor.end()
                self._stay()
        successor.close()
        return successor.pid

    async def _prepare(self, successor: Successor) -> None:
        """Hand over what can be while everybody is served."""
        hello = decoded(await successor.hello(), _Hello)
        oldest, newest = hello.reads
        if not oldest <= VERSION <= newest:
            raise HandOverError(
                f"realtimed {hello.program} takes over from versions {oldest} to {newest} of the state, and this is"
                f" version {VERSION} (realtimed {__version__}); a restart is needed"
            )
        beginning, files = self._beginning()
        await successor.send(Kind.SOCKETS, msgspec.msgpack.encode(beginning), files)
        for number, part in enumerate(self._parts):
            for portion in part.first():
                # Copies: while this waits, a connection may end, and its descriptor be that of another one.
                with _copies(portion.descriptors) as copies:
                    await successor.send(Kind.FIRST, bytes([number]) + portion.data, copies)
                await trio.lowlevel.checkpoint()
        await successor.send(Kind.PREPARE)
        await successor.prepared()

    def _beginning(self) -> tuple[_Beginning, list[int]]:
        sockets, files = [], []
        for role, listener in self._listeners.by_role():
            sockets.append(_Socket(role, str(listener.path) if listener.path is not None else None))
            files.append(listener.descriptor)
        addresses = None if self._adopted else _addresses(self._config)
        return _Beginning(VERSION, __version__, os.getpid(), sockets, addresses), files

    async def _come_to_rest(self) -> None:
        """Wait until nothing is under way. What follows must not wait."""
        unrest = "publications are on their way"
        with trio.move_on_after(PATIENCE):
            await self._settle()
            while unrest := next((why for part in self._parts if (why := part.unrest)), ""):
                await trio.lowlevel.checkpoint()
        if unrest:
            raise HandOverError(f"the daemon has not come to rest within {PATIENCE:g} s: {unrest}")

    def _give(self, successor: Successor, go: bytes) -> None:
        """Hand over the rest. Nothing else runs meanwhile."""
        for number, part in enumerate(self._parts):
            portion = part.rest()
            successor.send_now(Kind.REST, bytes([number]) + portion.data, portion.descriptors)
        successor.expect(Kind.READY)
        self._announce(successor.pid)  # before it says that it serves: a service manager listens to the main process
        try:
            successor.go(go)
        except HandOverError:
            self._announce(os.getpid())
            raise
        self.given = True
        for _, listener in self._listeners.by_role():
            listener.disown()
        for part in self._parts:
            part.gone()

    def _stay(self) -> None:
        for part in self._parts:
            part.stay()
        for gate in self._gates:
            gate.open()


@contextmanager
def _copies(files: Sequence[int]) -> Iterator[Sequence[int]]:
    """Keep copies of open files for a while."""
    copies: list[int] = []
    try:
        copies += map(os.dup, files)
        yield copies
    except OSError as error:
        raise HandOverError(f"there are too few open files for an upgrade: {error.strerror}") from error
    finally:
        for each in copies:
            os.close(each)


class TakeOver:
    """The new process's side. It may be used once `receive_sockets` has returned.

    Whatever is wrong before the predecessor says "go" ends this process; see `Predecessor`.
    """

    def __init__(self, predecessor: Predecessor) -> None:
        self._predecessor = predecessor
        self._beginning: _Beginning

    def receive_sockets(self, config: Config) -> Inherited:
        """Introduce this process; return the listening sockets. Ends this process if `config` names other addresses."""
        with self._predecessor as line:
            line.say(Kind.HELLO, msgspec.msgpack.encode(_Hello(READS, __version__)))
            portion = line.expect(Kind.SOCKETS)
            beginning = self._beginning = decoded(portion.data, _Beginning)
            if not READS[0] <= beginning.version <= READS[1]:
                raise HandOverError(f"version {beginning.version} of the state is unknown here")
            wanted = _addresses(config)
            if beginning.addresses not in (None, wanted):
                raise HandOverError(
                    f"the configuration names other addresses now, {', '.join(wanted)}, in place of"
                    f" {', '.join(beginning.addresses or ())}; only a restart opens other sockets"
                )
            return _inherited(beginning.sockets, portion.descriptors)

    def run(self, parts: Sequence[Part]) -> Report:
        """Take everything over, and begin to serve; return what has happened.

        Nothing else runs in this process meanwhile.
        """
        with self._predecessor as line:
            self._take(line, parts, Kind.FIRST, Kind.PREPARE)
            line.say(Kind.PREPARED)
            for number, part in enumerate(parts):
                at, portion = _numbered(line.expect(Kind.REST), parts)
                if at != number:
                    raise HandOverError(f"the rest of part {at} has come in place of part {number}")
                part.take_rest(portion)
            line.say(Kind.READY)
            go = line.wait_for_go()
        for part in parts:
            part.begin()
        now = time.monotonic()
        report = Report(self._beginning.pid, self._beginning.program)
        if go is None:
            return report
        times = decoded(go, _Go)
        return report._replace(pause=round(now - times.paused_at, 6), seconds=round(now - times.began_at, 6))

    def _take(self, line: Predecessor, parts: Sequence[Part], kind: Kind, last: Kind) -> None:
        """Take portions of a kind, until a message of another kind says that there are no more."""
        while True:
            found, portion = line.receive()
            if found is last:
                return
            if found is not kind:
                raise HandOverError(f"the old process has said {found.name} in place of {kind.name}")
            number, portion = _numbered(portion, parts)
            parts[number].take(portion)


def _numbered(portion: TakenPortion, parts: Sequence[Part]) -> tuple[int, TakenPortion]:
    if not portion.data or portion.data[0] >= len(parts):
        raise HandOverError("a portion belongs to no part that is known here")
    return portion.data[0], TakenPortion(portion.data[1:], portion.descriptors)


def _inherited(sockets: Sequence[_Socket], files: Sequence[int]) -> Inherited:
    found: dict[str, list[tuple[socket.socket, Path | None]]] = {"websocket": [], "control": [], "http": []}
    if len(sockets) != len(files) or any(each.role not in found for each in sockets):
        raise HandOverError("the listening sockets are not those that are known here")
    for each, fd in zip(sockets, files, strict=True):
        found[each.role].append((socket.socket(fileno=fd), Path(each.path) if each.path is not None else None))
    if len(found["control"]) != 1 or len(found["http"]) > 1:
        raise HandOverError("there is not one control socket, or more than one for HTTP")
    return Inherited(found["websocket"], found["control"][0], next(iter(found["http"]), None))


def _addresses(config: Config) -> list[str]:
    http = [f"http {config.http}"] if config.http is not None else []
    return [str(config.socket), *map(str, config.websocket), *http]
