"""A proxy before the daemon's control socket whose connections break on command."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from realtimed.rpc.wire import Decoder, Request
from tests.kit.patience import PATIENCE

Ask: TypeAlias = Callable[[bytes], bytes]
"""Hands a command to the daemon, and returns the whole answer."""

Break: TypeAlias = Callable[[Ask, bytes], bytes]
"""Handles a command in any way, and returns what the client gets before its connection is closed."""


def command_is_lost(_ask: Ask, _command: bytes) -> bytes:
    return b""


def answer_is_lost(ask: Ask, command: bytes) -> bytes:
    ask(command)
    return b""


def half_the_answer_is_lost(ask: Ask, command: bytes) -> bytes:
    answer = ask(command)
    return answer[: len(answer) // 2]


class BreakingProxy:
    """Listens at `path` and hands each command to the daemon at `daemon`, and its answer back.

    The first commands, of all connections together, meet `breaks` instead, one each, of which None is no break; and all
    others `for_ever`, if it is given. `commands` is what has arrived. What goes wrong in the proxy itself is raised at
    the end of the `with` block.
    """

    def __init__(self, path: Path, daemon: Path, *breaks: Break | None, for_ever: Break | None = None) -> None:
        self.commands: list[Request] = []
        self.closed = False
        self._closing = threading.Lock()
        self._path = path
        self._daemon = daemon
        self._breaks = deque(breaks)
        self._for_ever = for_ever
        self._failures: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def close(self) -> None:
        """Take no more connections, and remove the socket. Calling it again does nothing: another may be there."""
        with self._closing:
            if not self.closed:
                self._path.unlink()
                self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
                self.closed = True

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # the listener was shut down
                    return
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=[connection]))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            try:
                self._carry(connection)
            finally:
                with self._closing:
                    connection.close()
        except (ConnectionRefusedError, FileNotFoundError, ConnectionResetError, BrokenPipeError):
            pass  # the daemon or the client is gone: this connection has ended
        except BaseException as error:  # noqa: BLE001  (it is raised where the test sees it)
            self._failures.append(error)

    def _carry(self, connection: socket.socket) -> None:
        while command := _message(connection):
            [request] = Decoder(2**24).feed(command)
            assert isinstance(request, Request)
            self.commands.append(request)
            fault = self._breaks.popleft() if self._breaks else self._for_ever
            if fault is not None:
                connection.sendall(fault(self._ask, command))
                return
            connection.sendall(self._ask(command))

    def _ask(self, command: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.settimeout(PATIENCE)
            upstream.connect(str(self._daemon))
            upstream.sendall(command)
            answer = _message(upstream)
        if not answer:
            raise ConnectionResetError("the daemon hung up")
        return answer

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self._threads[0].join()  # now there are no more
        with self._closing:  # so that none is closed by its own thread between the question and the deed
            for connection in self._connections:
                if connection.fileno() >= 0:
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        if self._failures and error is None:
            raise self._failures[0]


def _message(sock: socket.socket) -> bytes:
    """Return the bytes of one message, or none if the other side hangs up."""
    decoder, message = Decoder(2**24), b""
    while data := sock.recv(2**16):
        message += data
        if decoder.feed(data):
            return message
    return b""
