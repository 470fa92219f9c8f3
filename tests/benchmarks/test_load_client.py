"""The load client of the benchmarks: what "in flight" means."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tools
from benchmarks.targets import REQUEST, length_prefixed
from tests.kit.patience import PATIENCE

SIZE = 64
HEADER = 4 + 8  # of a publication: its length, and a channel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("the load client needs a C compiler")
    return tools.compiled("load", tmp_path_factory.mktemp("load"))


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.bind(str(path))
    sock.listen()
    return sock


def accepted(listener: socket.socket) -> socket.socket:
    sock = listener.accept()[0]
    sock.settimeout(PATIENCE)
    return sock


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part
        data += part
    return data


class Server:
    """A server that delivers a message to a subscriber when the test says so."""

    def __init__(self, stack: ExitStack, program: Path, directory: Path, clients: int) -> None:
        request = REQUEST % (b"/", b"")
        command: list[str | Path] = [
            program, "--server", f"unix:{directory}/subscribers", "--publish", f"unix:{directory}/publisher",
            "--clients", str(clients), "--size", str(SIZE), "--request", request.hex(),
            "--prefix", length_prefixed(SIZE)[0].hex(),
        ]  # fmt: skip
        subscribing, publishing = (
            stack.enter_context(listening(directory / name)) for name in ("subscribers", "publisher")
        )
        process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None
        self._commands, self._answers = process.stdin, process.stdout
        self._publisher = stack.enter_context(accepted(publishing))
        self.subscribers = [stack.enter_context(accepted(subscribing)) for _ in range(clients)]
        for subscriber in self.subscribers:
            assert receive(subscriber, len(request)) == request
            subscriber.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        probe = self.published()
        for subscriber in self.subscribers:
            subscriber.sendall(frame(probe))
        assert self.answer()["event"] == "ready"

    def run(self, window: int, messages: int) -> None:
        self._commands.write(b"run %d 60 %d\n" % (window, messages))
        self._commands.flush()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._answers.readline())
        return answer

    def published(self) -> bytes:
        """Return the next message, which has to come."""
        return receive(self._publisher, HEADER + SIZE)[HEADER:]

    def has_published_nothing(self) -> bool:
        """Return whether the load client waits, after all that it was sent before has had its effect."""
        # A pong shows that what came before has been read. The second one shows that what came of it has been written.
        for _ in range(2):
            self.subscribers[0].sendall(b"\x89\x00")
            assert receive(self.subscribers[0], 6)[0] == 0x8A
        return not select.select([self._publisher], [], [], 0)[0]


def frame(message: bytes) -> bytes:
    return bytes([0x81, len(message)]) + message


@pytest.mark.parametrize("window", [1, 3])
def test_a_message_is_in_flight_until_the_last_subscriber_has_all_of_it(
    window: int, program: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = Server(stack, program, tmp_path, clients=3)
        server.run(window, messages=window + 1)
        messages = [server.published() for _ in range(window)]
        *others, last = server.subscribers
        for subscriber in others:
            for message in messages:
                subscriber.sendall(frame(message))
        assert server.has_published_nothing()
        last.sendall(frame(messages[0])[:-1])
        assert server.has_published_nothing()
        last.sendall(frame(messages[0])[-1:])
        messages.append(server.published())
        assert server.has_published_nothing()
        for message in messages[1:]:
            last.sendall(frame(message))
        for subscriber in others:
            subscriber.sendall(frame(messages[-1]))
        result = server.answer()
        assert (result["messages"], result["deliveries"]) == (window + 1, 3 * (window + 1))
        assert result["whole"]
