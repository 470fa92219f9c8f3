"""The PHP client in the real PHP: against the real daemon, and against stand-ins that misbehave as told."""

from __future__ import annotations

import base64
import errno
import json
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from realtimed import ChannelMessage, Client
from realtimed.rpc.wire import encode_notification, encode_response
from tests.kit.blocking import daemon_in_thread, untimed
from tests.kit.clients import subscribe, websocket
from tests.kit.fake_daemon import PATIENCE, Peer, listening, receipt
from tests.kit.handshakes import get
from tests.kit.stack import (
    APP,
    ROOT,
    Daemon,
    PhpFpm,
    find_php,
    running_caddy,
    running_php_fpm,
    runtime_directory,
)

CLIENT: Final = APP / "realtime.php"

SHORT: Final = 0.2
"""Seconds of a timeout that is expected to pass."""

NOBODY: Final = 65534

SHOW_ALL_ERRORS: Final = ("-d", "display_errors=1", "-d", "error_reporting=-1")

# Carries out one line of PHP after the other, and says of each what became of it. Any warning that gets out of the
# client, an @ notwithstanding, ends it.
DRIVER: Final = r"""
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
        """Let it carry out statements, of which the last one is a ``return``."""
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
        [find_php(), *options, *SHOW_ALL_ERRORS, "-r", DRIVER, "--", *arguments],
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
        [find_php(), *SHOW_ALL_ERRORS, *arguments],
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


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory, "--history-size", "0") as running:
        yield running


@pytest.fixture(scope="module")
def php(shared_daemon: Daemon) -> Iterator[Php]:
    with running_php(shared_daemon.control_socket) as running:
        yield running


@pytest.fixture
def observer(shared_daemon: Daemon) -> Iterator[Client]:
    with Client(shared_daemon.control_socket) as client:
        yield client


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "control.sock"


def test_the_file_is_valid_php_and_prints_nothing() -> None:
    assert php_output("-l", str(CLIENT)).startswith("No syntax errors")
    assert php_output(str(CLIENT)) == ""


# What the daemon does for a client.


@pytest.mark.parametrize("message", ["", "hello", "Grüße, 世界 🎉", "\0", "42", "x" * 65536])
def test_a_text_reaches_a_subscriber_as_it_was_sent(php: Php, observer: Client, message: str) -> None:
    with observer.subscribe("news") as subscription:
        sent = php.run(f'return $client->broadcast("news", {literal(message)});')

        epoch = subscription.positions["news"].epoch
        assert sent == {"recipients": 1, "epoch": epoch, "offset": 1, "repeated": False}
        assert untimed(next(subscription)) == ChannelMessage("news", message, 1)


@pytest.mark.parametrize("message", [b"", b"text", b"\x00\xff\xfe", bytes(range(256)) * 256])
def test_bytes_reach_a_subscriber_as_they_were_sent(php: Php, observer: Client, message: bytes) -> None:
    with observer.subscribe("news") as subscription:
        sent = php.run(f'return $client->broadcastBinary("news", {literal(message)});')

        assert sent["recipients"] == 1
        assert untimed(next(subscription)) == ChannelMessage("news", message, 1)


def test_broadcast_many_gives_a_receipt_for_each_channel(php: Php, observer: Client) -> None:
    with observer.subscribe("a", "42") as subscription:
        receipts = php.run('return $client->broadcastMany([7 => "42", 9 => "nobody", 11 => "a"], "hello");')

        assert [each["recipients"] for each in receipts] == [1, 0, 1]
        assert [untimed(next(subscription)) for _ in range(2)] == [
            ChannelMessage("42", "hello", 1),
            ChannelMessage("a", "hello", 1),
        ]


def test_broadcast_many_sends_to_all_channels_or_to_none(php: Php, observer: Client) -> None:
    with observer.subscribe("a") as subscription:
        with pytest.raises(PhpError) as refused:
            php.run('return $client->broadcastMany(["a", "not a channel"], "hello");')
        php.run('return $client->broadcast("a", "later");')

        assert refused.value.code == "invalid_channel"
        assert next(subscription).message == "later"


def test_channels_are_those_with_subscribers_and_their_names_can_be_broadcast_to(php: Php, observer: Client) -> None:
    with observer.subscribe("room:1", "room:2", "42") as subscription:
        found = php.run('return $client->channels("room:");')

        assert list(found) == ["room:1", "room:2"]
        assert found["room:1"] == {
            "channel": "room:1",
            "subscribers": 1,
            "epoch": subscription.positions["room:1"].epoch,
            "offset": 0,
            "history": 0,
        }
        assert set(php.run("return $client->channels();")) == {"room:1", "room:2", "42"}
        receipts = php.run('return $client->broadcastMany(array_keys($client->channels()), "hello");')
        assert [each["recipients"] for each in receipts] == [1, 1, 1]


def test_the_daemon_tells_about_itself(php: Php) -> None:
    assert php.run("return $client->ping();") is None
    assert php.run("return $client->info();")["limits"]["max_message"] == 65536
    assert isinstance(php.run("return $client->stats();"), dict)


def test_any_method_can_be_called(php: Php) -> None:
    assert php.run('return $client->call("ping");') == "pong"
    assert php.run('return $client->call("disconnect", ["nobody"]);') == {"disconnected": 0}
    assert php.run('return $client->call("broadcast", [1 => "x", 3 => new Realtime\\Bytes("y")]);')["offset"] == 1
    with pytest.raises(PhpError) as refused:
        php.run('return $client->call("fly");')
    assert (refused.value.kind, refused.value.code) == ("RefusedException", "unknown_method")


@pytest.mark.parametrize(
    ("channel", "message", "code"),
    [
        ("not a channel", "hello", "invalid_channel"),
        ("", "hello", "invalid_channel"),
        ("x" * 201, "hello", "invalid_channel"),
        (b"\xff", "hello", "invalid_channel"),
        ("news", b"\xff", "invalid_utf8"),
        ("news", b"\xed\xa0\x80", "invalid_utf8"),
        ("news", "x" * 65537, "message_too_large"),
        ("news", "x" * 2**23, "message_too_large"),
    ],
)
def test_a_refusal_is_the_daemon_s_own_and_harms_no_later_call(
    php: Php, channel: str | bytes, message: str | bytes, code: str
) -> None:
    with pytest.raises(PhpError) as refused:
        php.run(f"return $client->broadcast({literal(channel)}, {literal(message)});")

    assert (refused.value.kind, refused.value.code) == ("RefusedException", code)
    assert refused.value.message.endswith(f" ({code})")
    assert php.run("return $client->ping();") is None


def test_calls_share_one_connection(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon, running_php(daemon.control_socket) as php:
        broadcasts = "for ($i = 0; $i < 100; $i++) { $receipt = $client->broadcast('news', (string) $i); }"
        php.run(broadcasts + "return $receipt->offset;")
        assert open_sockets(php) == 1
        php.run("return $client->close();")
        assert open_sockets(php) == 0
        assert php.run("return $client->ping();") is None


def open_sockets(php: Php) -> int:
    descriptors = Path(f"/proc/{php.pid}/fd").iterdir()
    return sum(str(each.readlink()).startswith("socket:") for each in descriptors)


def test_a_large_message_and_a_large_answer_take_many_reads_and_writes(runtime_dir: Path) -> None:
    size, count = 5 * 2**20, 20_000
    limits = ("--max-message", str(size), "--max-backlog", str(4 * size), "--max-channels", str(count))
    with (
        daemon_in_thread(runtime_dir, *limits) as daemon,
        Client(daemon.control_socket) as observer,
        running_php(daemon.control_socket) as php,
    ):
        with observer.subscribe("news") as subscription:
            php.run(f'return $client->broadcast("news", str_repeat("0123456789abcdef", {size // 16}));')
            assert next(subscription).message == "0123456789abcdef" * (size // 16)
        with observer.subscribe(*map("channel-{}".format, range(count))):
            assert php.run("return count($client->channels());") == count


@pytest.mark.parametrize("where", ["putenv('REALTIME_SOCKET=%s')", "$_SERVER['REALTIME_SOCKET'] = '%s'"])
@pytest.mark.parametrize("function", ["broadcast", "\\Realtime\\broadcast"])
def test_the_functions_find_the_daemon_through_realtime_socket(
    shared_daemon: Daemon, observer: Client, where: str, function: str
) -> None:
    with running_php("/nowhere") as php, observer.subscribe("news") as subscription:
        php.run(f"{where % shared_daemon.control_socket}; return 0;")
        result = php.run(f'return {function}("news", "hello");')

        assert next(subscription).message == "hello"
        assert (result is None) == (function == "broadcast")


def test_realtime_socket_may_come_from_the_environment_or_a_dotenv_file() -> None:
    default = "return Realtime\\Client::defaultSocket();"
    with running_php("/nowhere", environment={"REALTIME_SOCKET": "/of/the/environment"}) as php:
        assert php.run("$_ENV['REALTIME_SOCKET'] = '/of/dotenv'; " + default) == "/of/the/environment"
        assert php.run("return (new Realtime\\Client())->socket;") == "/of/the/environment"
        assert php.run("putenv('REALTIME_SOCKET'); unset($_SERVER['REALTIME_SOCKET']); " + default) == "/of/dotenv"
        assert php.run("unset($_ENV['REALTIME_SOCKET']); " + default) == "/run/realtime.sock"


def test_a_global_broadcast_of_somebody_else_is_left_alone() -> None:
    code = f"function broadcast() {{ return 'theirs'; }} require '{CLIENT}'; echo broadcast();"
    assert php_output("-r", code) == "theirs"


def test_no_extension_is_needed(shared_daemon: Daemon, runtime_dir: Path) -> None:
    with running_php(shared_daemon.control_socket, "-n") as php:
        assert php.run('return $client->broadcast("nobody", "hello")->recipients;') == 0
    with daemon_in_thread(runtime_dir) as daemon, denied(daemon.control_socket) as user:
        copy = shutil.copy(CLIENT, runtime_dir)
        with running_php(daemon.control_socket, "-n", client=copy, user=user) as php, pytest.raises(PhpError) as error:
            php.run("return $client->ping();")
        assert "may not write to this socket" in error.value.message


@pytest.mark.parametrize("timeout", ["0.0", "-1.0", "NAN"])
def test_a_timeout_is_a_number_above_0(php: Php, timeout: str) -> None:
    attempt = f"try {{ new Realtime\\Client(null, {timeout}); }} catch (ValueError $e) {{ return $e->getMessage(); }}"
    assert "timeout must be above 0 seconds" in php.run(attempt)


def test_a_timeout_may_be_infinite(shared_daemon: Daemon) -> None:
    with running_php(shared_daemon.control_socket) as php:
        assert php.run(f'return (new Realtime\\Client("{shared_daemon.control_socket}", INF))->ping();') is None


# PHP-FPM.


async def test_a_page_broadcasts_through_php_fpm(runtime_dir: Path, daemon: Daemon, php_fpm: PhpFpm) -> None:
    app = runtime_dir / "app"
    app.mkdir()
    (app / "index.php").write_text(
        f"<?php require_once '{CLIENT}';\n"
        "broadcast('news', $_GET['message']);\n"
        "$client = new Realtime\\Client();\n"
        "try { $client->broadcast('news', \"\\xff\"); }\n"
        "catch (Realtime\\RefusedException $error) { echo $error->getErrorCode(); }\n"
    )
    async with (
        running_caddy(
            runtime_dir, websocket_socket=daemon.websocket_socket, php_socket=php_fpm.socket, app=app
        ) as caddy,
        websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as browser,
    ):
        with trio.fail_after(PATIENCE):
            await browser.send_message(subscribe("news"))
            events = [json.loads(await browser.get_message()) for _ in range(2)]
            assert [event["event"] for event in events] == ["welcome", "subscribed"]
            for message in ("one", "two"):
                answer = await get(caddy.port, f"/?message={message}")
                assert (answer.status, answer.body) == (200, "invalid_utf8")
                assert json.loads(await browser.get_message())["data"] == message


NOT_LOOKING: Final = ["open_basedir={client}", "disable_functions=stat,clearstatcache"]
"""Settings under which PHP cannot look at a file; the first one names what it may look at."""

PAGE_UNDER_SETTINGS: Final = """<?php
require_once '{client}';
header('Content-Type: application/json');
for ($i = 0; $i < 1100; $i++) {{ $files[] = fopen('php://temp/maxmemory:0', 'r+'); fwrite(end($files), 'x'); }}
$said = [];
foreach (['{daemon}', '{left}', '{file}', '{missing}'] as $socket) {{
    $client = new Realtime\\Client($socket);
    try {{ $said[] = [$client->broadcast('news', 'hello')->recipients, $client->broadcast('news', 'x')->recipients]; }}
    catch (Realtime\\RealtimeException $error) {{ $said[] = $error->getMessage(); }}
}}
echo json_encode($said);
"""


@pytest.mark.parametrize("setting", NOT_LOOKING)
async def test_under_php_fpm_with_such_settings_and_many_open_files(
    runtime_dir: Path, daemon: Daemon, setting: str
) -> None:
    app = runtime_dir / "app"
    app.mkdir()
    left, file, missing = (runtime_dir / name for name in ("left.sock", "file.sock", "missing.sock"))
    with listening(left, backlog=1):
        pass
    file.touch()
    client = shutil.copy(CLIENT, app)
    (app / "index.php").write_text(
        PAGE_UNDER_SETTINGS.format(client=client, daemon=daemon.control_socket, left=left, file=file, missing=missing)
    )
    where = f"{app}:/tmp/php"  # the prefix of PHP's temporary files
    pool = [f"php_admin_value[{name}] = {value.format(client=where)}" for name, _, value in [setting.partition("=")]]
    async with (
        running_php_fpm(runtime_dir, pool_settings=[*pool, "rlimit_files = 4096"]) as fpm,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, php_socket=fpm.socket, app=app) as caddy,
    ):
        with trio.fail_after(PATIENCE):
            answer = await get(caddy.port, "/")
    assert answer.status == 200
    said = json.loads(answer.body)
    nobody = "nothing listens there. The socket is left from a daemon that has ended, or the file is not a socket"
    assert said[:3] == [[0, 0], f"no daemon at {left}: {nobody}", f"no daemon at {file}: {nobody}"]
    assert said[3].startswith(f"no daemon at {missing}: there is no such file")


# Nothing answers at the socket.


@contextmanager
def denied(path: Path) -> Iterator[int | None]:
    """Take away the permission to open a socket; give the user who does not have it, or None for ourselves."""
    if os.geteuid() != 0:
        path.chmod(0)
        yield None
    else:  # root may open everything
        path.parent.chmod(0o755)
        yield NOBODY


def failure(path: Path | str, *options: str, **how: Any) -> PhpError:
    """Return what is thrown when a fresh client, of a PHP with these options, asks whether the daemon answers."""
    with running_php(path, *options, **how) as php, pytest.raises(PhpError) as error:
        php.run("return $client->ping();")
    return error.value


def test_a_missing_file_is_said_to_be_missing(path: Path) -> None:
    error = failure(path)
    assert error.kind == "NoDaemonException"
    assert error.message.startswith(f"no daemon at {path}: there is no such file. Is realtimed running")


def test_a_stale_socket_is_said_to_be_stale(path: Path) -> None:
    with listening(path, backlog=1):
        pass
    error = failure(path)
    assert error.kind == "NoDaemonException"
    assert error.message == (
        f"no daemon at {path}: the socket is left from one that has ended. Start realtimed, which replaces it"
    )


def test_a_file_that_is_no_socket_is_said_to_be_none(path: Path) -> None:
    path.touch()
    error = failure(path)
    assert (error.kind, error.message) == ("NoDaemonException", f"no daemon at {path}: this file is not a socket")


def test_who_may_not_open_the_socket_learns_who_may(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon, denied(daemon.control_socket) as user:
        path = daemon.control_socket
        error = failure(path, client=shutil.copy(CLIENT, runtime_dir), user=user)

        assert error.kind == "NoDaemonException"
        name = pwd.getpwuid(os.geteuid() if user is None else user).pw_name
        assert error.message.startswith(
            f"cannot open {path}: the user {name} may not write to this socket,"
            f" which has mode {path.stat().st_mode & 0o7777:04o}, owner {path.owner()} and group {path.group()}."
        )
        assert "--socket-group" in error.message


def test_who_may_not_enter_a_directory_learns_so(runtime_dir: Path) -> None:
    closed = runtime_dir / "closed"
    closed.mkdir(mode=0o000)
    with denied(runtime_dir / "closed") as user:
        error = failure(closed / "x.sock", client=shutil.copy(CLIENT, runtime_dir), user=user)
    closed.chmod(0o700)
    assert error.kind == "NoDaemonException"
    assert "may not enter a directory on the way" in error.message


@pytest.mark.parametrize("path", ["", "/tmp/" + "x" * 200])
def test_what_cannot_be_the_path_of_a_socket_is_said_to_be_none(path: str) -> None:
    error = failure(path)
    assert error.kind == "NoDaemonException"
    assert "the path of a socket" in error.message


def test_a_file_that_is_no_socket_is_said_to_be_none_to_whoever_may_not_write_to_it(path: Path) -> None:
    path.touch(0o400)
    with denied(path) as user:
        error = failure(path, client=shutil.copy(CLIENT, path.parent), user=user)
    assert error.message == f"no daemon at {path}: this file is not a socket"


# What PHP's settings keep it from looking at. The client then says less, and nothing that it does not know.


@pytest.mark.parametrize("setting", NOT_LOOKING)
@pytest.mark.parametrize("socket_is_left", [True, False])
def test_where_php_may_not_look_nobody_listening_is_all_that_is_said(
    path: Path, setting: str, socket_is_left: bool
) -> None:
    if socket_is_left:
        with listening(path, backlog=1):
            pass
    else:
        path.touch()
    error = failure(path, "-d", setting.format(client=CLIENT))
    assert error.kind == "NoDaemonException"
    nobody = "nothing listens there. The socket is left from a daemon that has ended, or the file is not a socket"
    assert error.message == f"no daemon at {path}: {nobody}"


@pytest.mark.parametrize("setting", NOT_LOOKING)
def test_where_php_may_not_look_no_permission_is_all_that_is_said(path: Path, setting: str) -> None:
    with listening(path, backlog=1), denied(path) as user:
        path.chmod(0o640)
        copy = shutil.copy(CLIENT, path.parent)
        error = failure(path, "-d", setting.format(client=copy), client=copy, user=user)
    assert error.kind == "NoDaemonException"
    assert error.message.endswith("may not write to this socket, or may not enter a directory on the way")


@pytest.mark.parametrize("setting", NOT_LOOKING)
def test_where_php_may_not_look_a_missing_file_is_missing_all_the_same(path: Path, setting: str) -> None:
    error = failure(path, "-d", setting.format(client=CLIENT))
    assert error.message.startswith(f"no daemon at {path}: there is no such file.")


@pytest.mark.parametrize(
    "settings",
    [
        "open_basedir=" + str(CLIENT),
        "disable_functions=stream_select,stat,clearstatcache,getenv,getmypid,posix_geteuid,posix_getpwuid,posix_getgrgid",
        "disable_functions=getmypid,posix_getpid",
    ],
)
def test_a_broadcast_needs_little_of_what_an_administrator_may_take_away(shared_daemon: Daemon, settings: str) -> None:
    with running_php(shared_daemon.control_socket, "-d", settings) as php:
        for _ in range(3):
            assert php.run('return $client->broadcast("nobody", str_repeat("x", 60000))->recipients;') == 0
        assert open_sockets(php) == 1


def test_a_function_that_was_taken_away_and_is_needed_is_named(path: Path) -> None:
    error = failure(path, "-d", "disable_functions=stream_socket_client")
    assert (error.kind, error.message) == (
        "NoDaemonException",
        f"cannot connect to {path}: PHP's disable_functions takes away stream_socket_client(), which is needed",
    )


def test_too_many_open_files_are_named_as_what_may_be_the_reason(path: Path) -> None:
    exhaust = "while ($file = @fopen('/dev/null', 'r')) { $files[] = $file; }"
    with listening(path, backlog=1), running_php(path) as php:
        php.run("set_error_handler(null); posix_setrlimit(POSIX_RLIMIT_NOFILE, 64, 64); return 0;")
        with pytest.raises(PhpError) as error:
            php.run(exhaust + "return $client->ping();")
    assert error.value.kind == "NoDaemonException"
    assert "too many files are open" in error.value.message


# More open files than select(2) can number.

MANY_FILES: Final = "for ($i = 0; $i < 1100; $i++) { $files[] = fopen('/dev/null', 'r'); } return count($files);"


def test_a_process_with_many_open_files_can_broadcast(shared_daemon: Daemon, observer: Client) -> None:
    with running_php(shared_daemon.control_socket) as php, observer.subscribe("news") as subscription:
        assert php.run(MANY_FILES) == 1100
        for number in range(3):
            receipt = php.run(f'return $client->broadcast("news", str_repeat("{number}", 60000));')
            assert receipt["recipients"] == 1
            assert next(subscription).message == str(number) * 60000
        assert open_sockets(php) == 1
        with pytest.raises(PhpError, match="message_too_large"):
            php.run('return $client->broadcast("news", str_repeat("x", 10_000_000));')
        assert php.run("return count($client->channels());") == 1


@pytest.mark.parametrize("piece", [b"", b"\xa9", encode_notification("message", ["news", "hello", 1])])
def test_with_many_open_files_the_timeout_is_for_the_whole_answer(
    path: Path, listener: socket.socket, piece: bytes
) -> None:
    with running_php(path, timeout=SHORT) as client:
        client.run(MANY_FILES)
        client.begin(
            "$began = hrtime(true);"
            'try { $client->broadcast("news", "hello"); }'
            "catch (Realtime\\TimeoutException $error) { return (hrtime(true) - $began) / 1e9; }"
        )
        with accepted(listener) as peer:
            peer.request()
            if piece == b"\xa9":
                peer.sock.sendall(b"\x94\x01\x00\xc0\xdb\x01\x00\x00\x00")
            if piece:
                trickle(peer, piece)
            took = client.result()
    assert SHORT <= took < SHORT + 1


def test_with_many_open_files_a_daemon_that_does_not_read_is_a_timeout(path: Path, listener: socket.socket) -> None:
    with running_php(path, timeout=SHORT) as client:
        client.run(MANY_FILES)
        client.begin('return $client->broadcast("news", str_repeat("x", 10_000_000));')
        with accepted(listener), pytest.raises(PhpError) as error:
            client.result()
    assert error.value.kind == "TimeoutException"


def test_with_many_open_files_a_stale_connection_is_replaced(path: Path, listener: socket.socket) -> None:
    with running_php(path) as client:
        client.run(MANY_FILES)
        for _ in range(3):
            client.begin(BROADCAST)
            with accepted(listener) as peer:
                peer.receipt(peer.request(), offset=7)
                assert client.result() == 7
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            peer.request()
        with pytest.raises(PhpError, match="hung up before it answered"):
            client.result()


def test_with_many_open_files_signals_do_not_disturb_a_call(path: Path, listener: socket.socket) -> None:
    with running_php(path) as client:
        client.run(
            "pcntl_async_signals(true);"
            'pcntl_signal(SIGUSR1, static function (): void { echo \'{"result":"handled"}\', PHP_EOL; });' + MANY_FILES
        )
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            request = peer.request()
            for _ in range(20):
                os.kill(client.pid, signal.SIGUSR1)
                assert client.result() == "handled"
            peer.receipt(request, offset=7)
            assert client.result() == 7


def test_a_daemon_whose_queue_of_connections_stays_full_is_a_timeout(path: Path) -> None:
    with listening(path, backlog=0), ExitStack() as fillers:
        while True:
            filler = fillers.enter_context(socket.socket(socket.AF_UNIX))
            filler.setblocking(False)
            try:
                filler.connect(str(path))
            except BlockingIOError:
                break
        error = failure(path, timeout=SHORT)
    assert error.kind == "TimeoutException"
    assert error.message == (f"the daemon at {path} did not accept the connection within {SHORT:g} s; nothing was sent")


# What a stand-in does to a client. The test plays the daemon, step by step.


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    with listening(path, backlog=8) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@pytest.fixture
def client(path: Path) -> Iterator[Php]:
    with running_php(path) as running:
        yield running


@contextmanager
def accepted(listener: socket.socket) -> Iterator[Peer]:
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(PATIENCE)
        yield Peer(sock)


def nobody_knocks(listener: socket.socket) -> bool:
    """Whether no connection waits to be accepted."""
    listener.setblocking(False)
    try:
        listener.accept()
    except BlockingIOError:
        return True
    finally:
        listener.settimeout(PATIENCE)
    return False


def heard(peer: Peer) -> bytes:
    """Return what has come from the client, which has hung up."""
    try:
        return peer.sock.recv(4096)
    except ConnectionResetError:  # it left with something unread
        return b""


BROADCAST: Final = 'return $client->broadcast("news", "hello")->offset;'


def works_again(client: Php, listener: socket.socket) -> bool:
    """Whether the next call opens another connection and succeeds."""
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.receipt(peer.request(), offset=99)
        return bool(client.result() == 99)


def test_a_silent_daemon_is_a_timeout(path: Path, listener: socket.socket) -> None:
    with running_php(path, timeout=SHORT) as client:
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            peer.request()
            begun = time.monotonic()
            with pytest.raises(PhpError) as error:
                client.result()
            took = time.monotonic() - begun
            peer.wait_until_it_hangs_up()
        assert error.value.kind == "TimeoutException"
        assert error.value.message == (
            f"the daemon at {path} did not answer within {SHORT:g} s; what was asked may still be carried out"
        )
        assert took < SHORT + PATIENCE / 2
        assert works_again(client, listener)


@pytest.mark.parametrize("piece", [b"\xa9", encode_notification("message", ["news", "hello", 1])])
def test_the_timeout_is_for_the_whole_answer(path: Path, listener: socket.socket, piece: bytes) -> None:
    """Neither an answer that trickles nor notifications put it off."""
    with running_php(path, timeout=SHORT) as client:
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            peer.request()
            if len(piece) == 1:
                peer.sock.sendall(b"\x94\x01\x00\xc0\xdb\x01\x00\x00\x00")
            trickle(peer, piece)
        with pytest.raises(PhpError) as error:
            client.result()
        assert error.value.kind == "TimeoutException"


def trickle(peer: Peer, piece: bytes) -> None:
    """Send one piece after the other until the client hangs up."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        try:
            peer.sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            return
        time.sleep(SHORT / 20)  # the slow pace is the point
    raise AssertionError("the client goes on reading")


def test_an_answer_may_come_byte_by_byte(listener: socket.socket, client: Php) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        for byte in encode_response(peer.request().id, None, receipt(7)):
            peer.sock.sendall(bytes([byte]))
        assert client.result() == 7


def test_notifications_are_passed_over(listener: socket.socket, client: Php) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        request = peer.request()
        peer.notify("message", "news", "hello", 1)
        peer.receipt(request, offset=7)
        assert client.result() == 7


WELL_DEEP: Final = b"\x91" * 1000  # small enough to be written before the client can hang up
ANSWERS: Final[dict[str, tuple[bytes, str]]] = {
    "nothing": (b"", "hung up before it answered; what was asked may have been carried out, or not"),
    "half an answer": (encode_response(0, None, receipt())[:-3], "hung up before it answered"),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "sent what is not its protocol: 72. Is this realtimed's --socket?"),
    "a wrong id": (encode_response(1, None, receipt()), "an answer to request 1, which awaits none"),
    "last words": (
        encode_response(None, {"code": "protocol_error", "message": "no"}, None),
        "ended the connection: no (protocol_error)",
    ),
    "strange last words": (encode_response(None, 7, None), "ended the connection: 7"),
    "a map": (b"\x81\x01\x02", "not its protocol"),
    "a request": (b"\x94\x00\x00\xa4ping\x90", "not its protocol"),
    "a short response": (b"\x93\x01\x00\xc0", "not its protocol"),
    "no id": (b"\x94\x01\xa1x\xc0\xc0", "an answer to request"),
    "an extension": (b"\x94\x01\x00\xc0\xd4\x01\x02", "an extension type"),
    "no MessagePack": (b"\x94\x01\x00\xc0\xc1", "the byte 0xc1"),
    "a large integer": (b"\x94\x01\x00\xc0\xcf" + b"\xff" * 8, "above PHP_INT_MAX"),
    "a length of 4 GB": (b"\x94\x01\x00\xc0\xdb\xff\xff\xff\xff", "too large"),
    "4 billion elements": (b"\x94\x01\x00\xc0\xdd\xff\xff\xff\xff", "too large"),
    "deep arrays": (b"\x94\x01\x00\xc0" + WELL_DEEP, "too deep"),
    "a key that is an array": (b"\x94\x01\x00\xc0\x81\x90\x01", "a key that PHP cannot have"),
    "no receipt": (encode_response(0, None, {"recipients": 1, "epoch": "e"}), "no usable 'offset'"),
    "a receipt of other types": (encode_response(0, None, {"recipients": "1"}), "no usable 'recipients'"),
    "no error": (encode_response(0, {"code": 7}, None), "no usable 'code'"),
}


@pytest.mark.parametrize(("answer", "text"), ANSWERS.values(), ids=ANSWERS.keys())
def test_what_is_no_answer_is_a_protocol_error(listener: socket.socket, client: Php, answer: bytes, text: str) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.request()
        peer.sock.sendall(answer)
        peer.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(PhpError) as error:
            client.result()
    assert error.value.kind == "ProtocolException"
    assert text in error.value.message
    assert nobody_knocks(listener)  # it was not tried again
    assert works_again(client, listener)


def test_as_many_receipts_must_come_as_channels_were_named(listener: socket.socket, client: Php) -> None:
    client.begin('return $client->broadcastMany(["a", "b"], "hello");')
    with accepted(listener) as peer:
        peer.answer(peer.request(), [receipt()])
        with pytest.raises(PhpError, match="not a receipt for each channel"):
            client.result()


# A request is never sent twice.


def gone(peer: Peer) -> None:
    peer.sock.close()


def deaf(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_RD)


def with_last_words(peer: Peer) -> None:
    peer.sock.sendall(encode_response(None, {"code": "timeout", "message": "no"}, None))


@pytest.mark.parametrize("become_stale", [gone, deaf, with_last_words])
def test_a_connection_that_went_stale_between_calls_is_replaced(
    listener: socket.socket, client: Php, become_stale: Callable[[Peer], None]
) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.receipt(peer.request())
        client.result()
        become_stale(peer)

        client.begin(BROADCAST)
        with accepted(listener) as second:
            second.receipt(second.request(), offset=2)
            assert client.result() == 2
            assert nobody_knocks(listener)
            assert become_stale is gone or heard(peer) == b""


def test_a_connection_that_breaks_after_the_request_was_taken_is_not_replaced(
    listener: socket.socket, client: Php
) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.receipt(peer.request())
        client.result()
        client.begin(BROADCAST)
        peer.request()
    with pytest.raises(PhpError, match="may have been carried out, or not") as error:
        client.result()
    assert error.value.kind == "ProtocolException"
    assert nobody_knocks(listener)
    assert works_again(client, listener)


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_connection_that_breaks_in_the_middle_of_a_request_is_not_replaced(
    listener: socket.socket, client: Php, calls_before: int
) -> None:
    client.begin(f"for ($i = 0; $i < {calls_before}; $i++) $client->ping(); return 0;")
    with ExitStack() as stack:
        if calls_before:
            peer = stack.enter_context(accepted(listener))
            peer.answer(peer.request(), "pong")
        client.result()
        client.begin('return $client->broadcast("news", str_repeat("x", 10_000_000));')
        if not calls_before:
            peer = stack.enter_context(accepted(listener))
        assert peer.sock.recv(4096)
    with pytest.raises(PhpError, match="may have been carried out, or not"):
        client.result()
    assert nobody_knocks(listener)
    assert works_again(client, listener)


def test_a_request_may_be_refused_before_it_was_sent_in_full(listener: socket.socket, client: Php) -> None:
    client.begin('return $client->broadcast("news", str_repeat("x", 10_000_000));')
    with accepted(listener) as peer:
        assert peer.sock.recv(4096)
        peer.sock.sendall(encode_response(0, {"code": "message_too_large", "message": "no"}, None))
        with pytest.raises(PhpError) as error:
            client.result()
        assert error.value.code == "message_too_large"
        assert works_again(client, listener)  # and the half of a request is not gone on with


def test_a_restarted_daemon_is_found_again_and_gets_a_broadcast_once(runtime_dir: Path) -> None:
    with running_php(runtime_dir / "realtime.sock") as php:
        with daemon_in_thread(runtime_dir):
            assert php.run(BROADCAST) == 1
        with pytest.raises(PhpError) as error:
            php.run(BROADCAST)
        assert error.value.kind == "NoDaemonException"
        with daemon_in_thread(runtime_dir):
            php.run("return $client->ping();")
        with (
            daemon_in_thread(runtime_dir) as daemon,
            Client(daemon.control_socket) as observer,
            observer.subscribe("news") as subscription,
        ):
            assert php.run(BROADCAST) == 1
            assert next(subscription).message == "hello"
            assert php.run(BROADCAST) == 2


# Forks, clones and signals.


def test_a_forked_child_has_a_connection_of_its_own(listener: socket.socket, client: Php) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as of_parent:
        of_parent.receipt(of_parent.request(), offset=1)
        assert client.result() == 1
        client.begin(
            "$child = pcntl_fork();"
            'if ($child === 0) { exit($client->broadcast("news", "of the child")->offset); }'
            "pcntl_waitpid($child, $status);"
            'return [pcntl_wexitstatus($status), $client->broadcast("news", "of the parent")->offset];'
        )
        with accepted(listener) as of_child:
            request = of_child.request()
            assert request.params == ["news", "of the child"]
            of_child.receipt(request, offset=2)
        request = of_parent.request()
        assert request.params == ["news", "of the parent"]
        of_parent.receipt(request, offset=3)
        assert client.result() == [2, 3]


def test_a_clone_has_a_connection_of_its_own(listener: socket.socket, client: Php) -> None:
    client.begin("$client->ping(); $clone = clone $client; $clone->ping(); $clone->close(); return $client->ping();")
    with accepted(listener) as first:
        first.answer(first.request(), "pong")
        with accepted(listener) as second:
            second.answer(second.request(), "pong")
        first.answer(first.request(), "pong")
        client.result()


def test_a_client_that_was_serialized_has_a_connection_of_its_own(listener: socket.socket, client: Php) -> None:
    client.begin(
        "$client->ping(); $job = unserialize(serialize($client)); $job->ping(); $job->close(); $client->ping();"
        "return [$job->socket === $client->socket, $job->timeout === $client->timeout];"
    )
    with accepted(listener) as first:
        first.answer(first.request(), "pong")
        with accepted(listener) as second:
            second.answer(second.request(), "pong")
        first.answer(first.request(), "pong")
        assert client.result() == [True, True]


def test_signals_do_not_disturb_a_call(listener: socket.socket, client: Php) -> None:
    client.run(
        "pcntl_async_signals(true);"
        'pcntl_signal(SIGUSR1, static function (): void { echo \'{"result":"handled"}\', PHP_EOL; });'
        "return 0;"
    )
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        request = peer.request()
        for _ in range(20):
            os.kill(client.pid, signal.SIGUSR1)
            assert client.result() == "handled"
        peer.receipt(request, offset=7)
        assert client.result() == 7


def test_a_signal_handler_may_make_calls_in_the_middle_of_one(listener: socket.socket, client: Php) -> None:
    client.run(
        "pcntl_async_signals(true);"
        "pcntl_signal(SIGUSR1, function () use ($client) {"
        '    $GLOBALS["handled"] = $client->broadcast("news", "of the handler")->offset;'
        "});"
        "return 0;"
    )
    client.begin('return [$client->broadcast("news", "hello")->offset, $handled];')
    with accepted(listener) as outer:
        request = outer.request()
        os.kill(client.pid, signal.SIGUSR1)
        with accepted(listener) as inner:
            inner.receipt(inner.request(), offset=1)
        outer.receipt(request, offset=2)
        assert client.result() == [2, 1]


def test_a_signal_handler_that_throws_leaves_no_answer_to_the_next_call(listener: socket.socket, client: Php) -> None:
    client.run(
        'pcntl_async_signals(true);pcntl_signal(SIGUSR1, fn () => throw new DomainException("enough"));return 0;'
    )
    client.begin('try { $client->broadcast("news", "hello"); } catch (DomainException $e) { return $e->getMessage(); }')
    with accepted(listener) as peer:
        request = peer.request()
        os.kill(client.pid, signal.SIGUSR1)
        assert client.result() == "enough"
        peer.wait_until_it_hangs_up()
        assert request.params == ["news", "hello"]
    assert works_again(client, listener)


# MessagePack.


def repacked(php: Php, packed: bytes, piece: int) -> bytes:
    """Let PHP read a value in pieces of `piece` bytes, and write it again."""
    return base64.b64decode(
        php.run(
            f"$pieces = str_split({literal(packed)}, {piece});"
            "$unpacker = new Realtime\\Unpacker(static function () use (&$pieces) { return array_shift($pieces); });"
            "$value = $unpacker->next();"
            "return base64_encode($pieces === [] && $unpacker->isEmpty() ? Realtime\\MessagePack::pack($value) : '');"
        )
    )


def pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


# PHP cannot tell an empty map from an empty list, nor the key "42" from 42, so such maps do not come back as they were.
keys: Final = st.text().filter(lambda key: not re.fullmatch(r"-?\d+", key, re.ASCII))
scalars: Final = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
values: Final = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner, min_size=1), max_leaves=20
)


@given(value=values, piece=st.integers(1, 64))
@settings(deadline=None, max_examples=300)
def test_php_reads_and_writes_what_python_does(php: Php, value: object, piece: int) -> None:
    assert repacked(php, pack(value), piece) == pack(value)


BOUNDARIES: Final[list[object]] = [
    *(sign * 2**bits + near for bits in (0, 5, 7, 8, 15, 16, 31, 32, 62) for sign in (1, -1) for near in (-1, 0, 1)),
    *(2**63 - 1, -(2**63), -(2**63) + 1),
    *(length * kind for length in (0, 31, 32, 255, 256, 65535, 65536) for kind in ("x", b"x")),
    *(length * [None] for length in (0, 15, 16, 65535, 65536)),
    *({f"k{number}": number for number in range(length)} for length in (1, 15, 16, 65536)),
    *(0.0, -0.0, 1.5, float("inf"), float("-inf"), 5e-324),
    {-1: "an int", 2**40: "as a key"},
]


@pytest.mark.parametrize("value", BOUNDARIES, ids=lambda value: repr(value)[:24])
def test_every_size_of_a_value_is_read_and_written_as_python_does(php: Php, value: object) -> None:
    assert repacked(php, pack(value), 2**16) == pack(value)


@pytest.mark.parametrize(
    ("packed", "value"),
    [
        (b"\xca" + struct.pack(">f", 1.5), 1.5),
        (b"\xcc\x01", 1),
        (b"\xcd\x00\x01", 1),
        (b"\xce" + bytes(3) + b"\x01", 1),
        (b"\xcf" + bytes(7) + b"\x01", 1),
        (b"\xd0\xff", -1),
        (b"\xd1\xff\xff", -1),
        (b"\xd2" + b"\xff" * 4, -1),
        (b"\xd3" + b"\xff" * 8, -1),
        (b"\xd3" + bytes(7) + b"\x01", 1),
        (b"\xd9\x01x", "x"),
        (b"\xda\x00\x01x", "x"),
        (b"\xdb" + bytes(3) + b"\x01x", "x"),
        (b"\xc5\x00\x01x", b"x"),
        (b"\xc6" + bytes(3) + b"\x01x", b"x"),
        (b"\xdc\x00\x01\xc0", [None]),
        (b"\xdd" + bytes(3) + b"\x01\xc0", [None]),
        (b"\xde\x00\x01\xa1x\xc0", {"x": None}),
        (b"\xdf" + bytes(3) + b"\x01\xa1x\xc0", {"x": None}),
    ],
)
def test_a_value_may_be_written_longer_than_it_need_be(php: Php, packed: bytes, value: object) -> None:
    assert repacked(php, packed, 1) == pack(value)


def test_what_has_no_messagepack_is_a_type_error(php: Php) -> None:
    attempt = 'try { $client->call("broadcast", [$client]); } catch (TypeError $e) { return $e->getMessage(); }'
    assert php.run(attempt) == "no MessagePack is made of Realtime\\Client"


# The function in the README, for those who want no file.


def readme_function() -> str:
    section = (ROOT / "README.md").read_text("utf-8").partition("### Without any file\n")[2]
    found = re.search(r"```php\n(.*?)```", section, re.DOTALL)
    assert found, "the README has no PHP in a section 'Without any file'"
    return found[1]


def run_readme_function(path: Path, channel: str | bytes, message: str | bytes, timeout: float = 5) -> str:
    """Call it in a fresh PHP; return the text of what it throws, or nothing. Any other output fails the test."""
    function = readme_function().replace(", 5)", f", {timeout:g})")
    code = (
        f"try {{ broadcast({literal(channel)}, {literal(message)}); }}"
        "catch (RuntimeException $error) { echo $error->getMessage(); }"
    )
    return php_output(
        input=f"<?php declare(strict_types=1);\n{function}\n{code}",
        env={**os.environ, "REALTIME_SOCKET": str(path)},
    )


@pytest.mark.parametrize("channel", ["news", "x" * 200])
@pytest.mark.parametrize("message", ["", "Grüße, 世界 🎉", "x" * 255, "x" * 65536])
def test_the_readme_s_function_broadcasts(shared_daemon: Daemon, observer: Client, channel: str, message: str) -> None:
    with observer.subscribe(channel) as subscription:
        assert run_readme_function(shared_daemon.control_socket, channel, message) == ""
        assert untimed(next(subscription)) == ChannelMessage(channel, message, 1)


@pytest.mark.parametrize(
    ("channel", "message", "text"),
    [
        ("not a channel", "hello", "invalid_channel message 'not a channel' is not a channel name"),
        ("x" * 70_000, "hello", "invalid_channel"),
        ("news", b"\xff", "invalid_utf8"),
        ("news", "x" * 65537, "the limit, max-message, is 65536"),
    ],
)
def test_the_readme_s_function_throws_what_the_daemon_says(
    shared_daemon: Daemon, channel: str, message: str | bytes, text: str
) -> None:
    assert text in run_readme_function(shared_daemon.control_socket, channel, message)


def test_the_readme_s_function_throws_if_there_is_no_daemon(path: Path) -> None:
    assert os.strerror(errno.ENOENT) in run_readme_function(path, "news", "hello")


def test_the_readme_s_function_waits_no_longer_than_its_timeout(path: Path) -> None:
    with listening(path, backlog=1):
        assert "no answer" in run_readme_function(path, "news", "hello", timeout=1)
