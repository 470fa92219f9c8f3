"""Stand-ins for the daemon that misbehave as told, on real Unix sockets."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from realtimed.rpc.wire import Decoder, Request, encode_notification, encode_response
from tests.kit.patience import PATIENCE


class Peer:
    """A connection as the stand-in sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = Decoder(2**24)
        self._requests: deque[Request] = deque()

    def request(self) -> Request:
        """Return the next request."""
        for request in self.requests():
            return request
        raise AssertionError("the client hung up")

    def requests(self) -> Iterator[Request]:
        """Yield the requests until the client hangs up."""
        while True:
            while self._requests:
                yield self._requests.popleft()
            data = self.sock.recv(4096)
            if not data:
                return
            self._requests += (message for message in self._decoder.feed(data) if isinstance(message, Request))

    def answer(self, request: Request, result: object) -> None:
        self.sock.sendall(encode_response(request.id, None, result))

    def receipt(self, request: Request, offset: int = 1) -> None:
        self.answer(request, receipt(offset))

    def refuse(self, request: Request, code: str = "invalid_channel") -> None:
        self.sock.sendall(encode_response(request.id, {"code": code, "message": "no"}, None))

    def notify(self, method: str, *params: object) -> None:
        self.sock.sendall(encode_notification(method, params))

    def wait_until_it_hangs_up(self) -> None:
        while self.sock.recv(4096):
            pass


def receipt(offset: int = 1) -> dict[str, object]:
    return {"recipients": 0, "epoch": "e", "offset": offset}


Behaviour = Callable[[Peer], None]


class FakeDaemon:
    """Accepts a connection at `path` for each behaviour, in their order, and runs the behaviour in a thread.

    A connection is closed when its behaviour returns. At the end of the `with` block all behaviours have returned; what
    one has raised, or that its connection never came, is raised there.
    """

    def __init__(self, path: Path, *behaviours: Behaviour) -> None:
        self.connections = 0
        self._behaviours = behaviours
        self._failures: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(PATIENCE)
        self._threads = [threading.Thread(target=self._accept)]

    def _accept(self) -> None:
        with self._listener, self._collecting_failures():
            for behaviour in self._behaviours:
                sock, _ = self._listener.accept()
                self.connections += 1
                sock.settimeout(PATIENCE)
                self._threads.append(threading.Thread(target=self._run, args=[behaviour, sock]))
                self._threads[-1].start()

    def _run(self, behaviour: Behaviour, sock: socket.socket) -> None:
        with sock, self._collecting_failures():
            behaviour(Peer(sock))

    @contextmanager
    def _collecting_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001  (it is raised where the test sees it)
            self._failures.append(error)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:  # the first one has added the others when it ends
            thread.join()
        if self._failures and error is None:
            raise self._failures[0]


@contextmanager
def listening(path: Path, backlog: int) -> Iterator[socket.socket]:
    """Listen at `path` and accept nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        yield listener


@contextmanager
def full_queue(path: Path) -> Iterator[None]:
    """Fill the queue of new connections at `path`, where somebody listens."""
    with ExitStack() as waiting:
        try:
            while True:
                sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(path))
        except BlockingIOError:
            yield


@contextmanager
def accepted(listener: socket.socket) -> Iterator[Peer]:
    """Accept the next connection, and close it at the end."""
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(PATIENCE)
        yield Peer(sock)


# Behaviours.


def healthy(peer: Peer) -> None:
    """Answer everything until the client hangs up."""
    for request in peer.requests():
        peer.receipt(request, 2)


def hangs_up(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_RDWR)
