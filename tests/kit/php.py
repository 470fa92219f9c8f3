"""PHP processes for tests: one with a client that carries out statements, or one that runs to its end."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.kit.fake_daemon import accepted
from tests.kit.patience import PATIENCE
from tests.kit.stack import APP, find_php

__all__ = [
    "BROADCAST",
    "CLIENT",
    "NOT_LOOKING",
    "Php",
    "PhpError",
    "denied",
    "literal",
    "open_sockets",
    "php_output",
    "running_php",
    "works_again",
]

CLIENT: Final = APP / "realtime.php"

BROADCAST: Final = 'return $client->broadcast("news", "hello")->offset;'
"""A statement for `Php.begin` and `Php.run`."""

NOT_LOOKING: Final = ["open_basedir={client}", "disable_functions=stat,clearstatcache"]
"""Settings under which PHP cannot look at a file; the first one names what it may look at."""

_NOBODY: Final = 65534

_SHOW_ALL_ERRORS: Final = ("-d", "display_errors=1", "-d", "error_reporting=-1")

# Carries out one line of PHP after the other, and says what became of each. A warning that leaves the client ends it,
# even behind an @.
_DRIVER: Final = r"""
set_error_handler(static function (int $level, string $text, string $file, int $line): never {
    throw new ErrorException($text, 0, $level, $file, $line);
});
[, $file, $socket, $timeout] = $argv;
require_once $file;
$client = new Realtime\Client($socket, (float) $timeout);
while (($line = fgets(STDIN)) !== false) {
    try {
        $outcome = ['result' => eval(base64_decode($line))];
    } catch (Realtime\RealtimeException $error) {
        $code = $error instanceof Realtime\RefusedException ? $error->getErrorCode() : null;
        $outcome = ['kind' => get_class($error), 'message' => $error->getMessage(), 'code' => $code];
    }
    echo json_encode($outcome, JSON_THROW_ON_ERROR), "\n";
}
"""


class PhpError(Exception):
    """A `Realtime\\RealtimeException`; `kind` is its class within that namespace."""

    def __init__(self, kind: str, message: str, code: str | None) -> None:
        super().__init__(message)
        self.kind = kind.removeprefix("Realtime\\")
        self.message = message
        self.code = code


class Php:
    """A PHP process in which `$client` is a client."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._process = process
        self._input = process.stdin
        self._output = process.stdout

    def begin(self, code: str) -> None:
        """Begin to carry out statements, the last of which is a ``return``."""
        self._input.write(base64.b64encode(code.encode()) + b"\n")
        self._input.flush()

    def result(self) -> Any:
        """Return what the statements returned. Raises `PhpError`."""
        give_up = threading.Timer(2 * PATIENCE, self._process.kill)
        give_up.start()
        try:
            line = self._output.readline()
            assert line.startswith(b"{"), (line + self._output.read()).decode()
        finally:
            give_up.cancel()
        outcome = json.loads(line)
        if "kind" in outcome:
            raise PhpError(**outcome)
        return outcome["result"]

    def run(self, code: str) -> Any:
        self.begin(code)
        return self.result()


@contextmanager
def running_php(
    path: Path | str,
    *options: str,
    timeout: float = PATIENCE,
    client: str | Path = CLIENT,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Iterator[Php]:
    """Run PHP with a client of the daemon at `path`; `options` are PHP's own."""
    as_user: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    arguments = [str(client), str(path), str(timeout)]
    process = subprocess.Popen(
        [find_php(), *options, *_SHOW_ALL_ERRORS, "-r", _DRIVER, "--", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        **as_user,
    )
    try:
        yield Php(process)
        last_output, _ = process.communicate()
        assert (process.returncode, last_output) == (0, b"")
    finally:
        process.kill()
        process.communicate()


def php_output(*arguments: str, **how: Any) -> str:
    """Run PHP to its end, and return all that it says."""
    ran: subprocess.CompletedProcess[str] = subprocess.run(
        [find_php(), *_SHOW_ALL_ERRORS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=True,
        **how,
    )
    return ran.stdout


def literal(text: str | bytes) -> str:
    """Return an expression of PHP for a string of any bytes."""
    return f'base64_decode("{base64.b64encode(text.encode() if isinstance(text, str) else text).decode()}")'


@contextmanager
def denied(path: Path) -> Iterator[int | None]:
    """Take away the permission to open a socket; give the user who does not have it, or None for this one."""
    if os.geteuid() != 0:
        path.chmod(0)
        yield None
    else:  # root may open everything
        path.parent.chmod(0o755)
        yield _NOBODY


def open_sockets(php: Php) -> int:
    descriptors = Path(f"/proc/{php.pid}/fd").iterdir()
    return sum(str(each.readlink()).startswith("socket:") for each in descriptors)


def works_again(client: Php, listener: socket.socket) -> bool:
    """Return whether the next call opens another connection and succeeds."""
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.receipt(peer.request(), offset=99)
        return bool(client.result() == 99)
