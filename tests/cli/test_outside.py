"""What comes from outside ends in a sentence: files, variables, command lines, and peers of `realtimectl`.

Never in a traceback, a hang, or in characters that steer a terminal.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from realtimed.cli.realtimectl import app
from realtimed.config.loading import load
from realtimed.config.settings import SETTINGS
from realtimed.errors import ConfigurationError
from realtimed.rpc.wire import encode_response
from realtimed.text import quoted
from tests.kit.fake_daemon import Behaviour, FakeDaemon, Peer
from tests.kit.patience import PATIENCE
from tests.kit.stack import ROOT

CONFIGURATION_BUDGET: Final = 2.0
"""Seconds of processor time for one configuration."""


def sentences(error: Exception) -> list[str]:
    """Return the lines of an error, after seeing that they may be shown."""
    lines = str(error).split("\n")
    assert all(line and line.isprintable() for line in lines), str(error)
    assert all(len(line) <= 1010 for line in lines), "no line is longer than a screen"
    assert len(lines) <= 51
    return lines


def refusal(load_it: Callable[[], object]) -> list[str]:
    """Return how a configuration is refused; a broken promise is raised as what it is."""
    began = time.process_time()
    with pytest.raises(ConfigurationError) as raised:
        load_it()
    assert time.process_time() - began < CONFIGURATION_BUDGET
    return sentences(raised.value)


# Values of settings.

TEXTS: Final = [
    "", " ", "\n", "a\0b", "\udcff", "\x1b[31m", "\u202e", "²", "١", "-1", "0x10", "1_0", "nan", "inf", "1e400",
    "9" * 30, "9" * 5000, "x" * 10_000, "unix:", "unix:a\0b", ":80", "[:80", "a\0b:80", "a b:80", "127.0.0.1:99999",
    "127.0.0.1:" + "9" * 5000, "unix:/a unix:/a", "root\0",
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_texts_as_settings(setting: object) -> None:
    """Each is taken or refused, from the command line and from the environment alike."""
    each = next(known for known in SETTINGS.values() if known is setting)
    refused = 0
    for text in TEXTS:
        option: object = [text] if isinstance(each.default, tuple) else text
        for options, environ in (({each.name: option}, {}), ({}, {each.variable: text})):
            try:
                load(options, environ)
            except ConfigurationError as error:
                [line, *_] = sentences(error)
                name = each.option if options else each.variable
                assert line.startswith(f"{name}: expected ") or each.name.replace("_", "-") in line
                refused += 1
    assert refused > 5


VALUES: Final = [
    '"a\\u0000b"', "[]", "[[]]", "[1, [2]]", "{}", "{a = 1}", "true", "nan", "-inf", "-0.0", "0x" + "f" * 5000,
    "9" * 5000, "1979-05-27T07:32:00Z", '"\\u001b[31m"', '"' + "x" * 100_000 + '"', '["a\\u0000:80"]', "[true]",
    "[999999999999999]", '["a\\nb:80"]', "[" * 2000 + "]" * 2000, "[" * 100_000, "{a = " * 2000 + "1" + "}" * 2000,
]  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_values_in_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    refused = 0
    for value in VALUES:
        file.write_text(f"{name} = {value}\n")
        try:
            load(file=file)
        except ConfigurationError as error:
            sentences(error)
            refused += 1
    assert refused >= len(VALUES) - 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xef\xbb\xbfsocket = '/a'", "is not valid TOML: Invalid statement"),
        (b"\xff\xfe\0", "is not valid TOML: 'utf-8' codec"),
        (b"\0" * 1000, "is not valid TOML: Invalid statement"),
        (b"socket = '/a\xff'", "is not valid TOML: 'utf-8' codec"),
        (b"\x1b[31m = 1", "is not valid TOML: Invalid statement"),
        (b"[" * 500_000, "is not valid TOML"),
        (b"a = " + b"[" * 100_000, "is nested too deeply"),
        (b"a" + b".a" * 1000 + b" = 1", "a in "),
        (b"#" * (2**20 + 1), "is larger than 1 MiB"),
        (b'"\\u001b[31m\\n" = 1', r"\x1b[31m\n in "),
        (b'"' + b"x" * 1_000_000 + b'" = 1', "x" * 1000 + "…"),
        (b"\n".join(b"sockett%d = 1" % number for number in range(20_000)), "sockett0 in "),
        (b"channels = 1", "expected a table [[channels]]"),
        (b"channels = 0x" + b"f" * 5000, "expected a table [[channels]]"),
        (b"[[channels]]\nmatch = 1", "expected a table [[channels]]"),
        (b"[[channels]]\nmatch = 'a'\nhistory_size = 0x" + b"f" * 5000, "history_size in "),
        (b"[[channels]]\nmatch = 'a'\n\"\\u001b\" = 1", r"\x1b in channels in "),
        (b"[[channels]]\nmatch = 'a\x7f'", "is not valid TOML"),
        (b"[[channels]]\nmatch = 'a'\n" + b"\n".join(b"k%d = 1" % number for number in range(20_000)), "k0 in "),
    ],
    ids=lambda each: repr(each[:30]),
)
def test_contents_of_a_file(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    assert sentence in refusal(lambda: load(file=file))[0]


def test_not_everything_that_is_wrong_is_said(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("\n".join(f"k{number} = 1" for number in range(1000)))
    assert refusal(lambda: load(file=file))[-1] == "and 950 more"


@pytest.mark.parametrize("variable", ["REALTIME_SOCKETT", "REALTIME_SOCKE\udcff", "REALTIME_SOCKET\x1b"], ids=ascii)
def test_names_of_variables(variable: str) -> None:
    [line] = refusal(lambda: load(environ={variable: "x"}))
    assert line.endswith(": there is no such variable; did you mean REALTIME_SOCKET?")


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [Path.mkdir, a_fifo, a_loop, a_socket, a_device, lambda _: None])
def test_what_is_no_configuration_file(make: Callable[[Path], object], runtime_dir: Path) -> None:
    """A FIFO without a writer would be waited for without end, and a device would fill the memory."""
    file = runtime_dir / "c\x1b[31m"
    make(file)
    [line] = refusal(lambda: load(file=file))
    assert line.startswith(f"--config: cannot read {runtime_dir}/c\\x1b[31m: ")


# What errors quote.


@pytest.mark.parametrize(
    "value",
    [
        None, True, -1, 1.5, float("nan"), "x", "\x1b[31m", b"\xff", [], [[]], {}, [1, [2, {"a": b"x"}], "y"], (1,),
        {"a": 1, 2: [3]}, 10**17, -(10**17), {"a": {"b": {}}},
    ],
)  # fmt: skip
def test_a_small_value_is_quoted_as_python_shows_it(value: object) -> None:
    assert quoted(value) == repr(value)


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        nested(100_000), [0] * 10**7, ["x" * 10**7] * 3, {number: [number] * 1000 for number in range(1000)},
        1 << 10**7, -(1 << 10**7), [1 << 10**7], "x" * 10**7, b"x" * 10**7,
    ],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_a_large_value_is_quoted_in_no_time(value: object) -> None:
    began = time.process_time()
    shown = quoted(value)
    assert time.process_time() - began < 0.05
    assert len(shown) < 70
    assert shown.endswith("…")


# The programs.

REALTIMED: Final = [sys.executable, "-m", "realtimed"]
REALTIMECTL: Final = [sys.executable, "-m", "realtimed.cli.realtimectl"]


@dataclass(frozen=True)
class Done:
    status: int
    out: bytes
    err: bytes


def run(
    command: Sequence[str | bytes | Path],
    environment: Mapping[str, str | bytes] | None = None,
    *,
    redirections: str = "",
    input: bytes = b"",
) -> Done:
    """Run a program that ends by itself; see that it hangs in nothing and shows neither a traceback nor an escape."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "LISTEN_"))}
    announcement = "LISTEN_PID=$$ " if "LISTEN_FDS" in (environment or {}) else ""
    shell = ["sh", "-c", f'{announcement}exec "$@" {redirections}', "sh"]
    done = subprocess.run(
        [*shell, *command],
        env={**own, **(environment or {})},
        cwd=ROOT,
        input=input,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    for said in (done.stdout, done.stderr):
        assert b"Traceback" not in said
        assert b"Exception" not in said
        assert b"\x1b" not in said
    assert len(done.stderr) < 3000 or b"No such command" in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def realtimed(directory: Path, *options: str | bytes, **environment: str | bytes) -> bytes:
    """Return the one line with which a daemon that does not start says why; before it may stand warnings of the log."""
    where: list[str | bytes | Path] = ["--socket", directory / "s", "--websocket", f"unix:{directory}/w"]
    done = run([*REALTIMED, *where, *options], environment)
    assert (done.status, done.out) == (2, b"")
    *warnings, line = done.err.removesuffix(b"\n").split(b"\n")
    assert all(b" WARNING service manager not notified " in each for each in warnings), done
    assert line.startswith(b"realtimed: ")
    return line.removeprefix(b"realtimed: ")


@pytest.mark.parametrize(
    ("socket_at", "sentence"),
    [
        (b"", b"--socket: expected PATH or unix:PATH; that is not the path of a socket, got ''"),
        (b"/nonexistent/s", b"cannot listen at unix:/nonexistent/s: No such file or directory"),
        (b"/nonexistent\xff/s", rb"cannot listen at unix:/nonexistent\udcff/s: No such file or directory"),
        (b"/nonexistent\x1b[31m\n/s", rb"cannot listen at unix:/nonexistent\x1b[31m\n/s: No such file or directory"),
        (b"/dev/null", b"cannot listen at unix:/dev/null: there is something that is not a socket; move it away"),
        (b"/" * 108, b"cannot listen at unix:/"),
        (b"/" + b"x" * 108, b"--socket: expected PATH or unix:PATH; the path of a socket has at most 107 bytes, got"),
        (b"127.0.0.1:9999", b"--socket: expected PATH or unix:PATH; a Unix socket has no port, but a file"),
    ],
)
def test_paths_of_sockets(socket_at: bytes, sentence: bytes, runtime_dir: Path) -> None:
    """The service manager is told as well, and is not there."""
    assert realtimed(runtime_dir, "--socket", socket_at, NOTIFY_SOCKET="/nonexistent").startswith(sentence)


@pytest.mark.parametrize(
    "host", [b"a" * 70, b"a..b", b"\xff", "\u202e".encode(), b"999.999.999.999", b"[::1%nope]", b"nonexistent.invalid"]
)
def test_names_of_hosts(host: bytes, runtime_dir: Path) -> None:
    line = realtimed(runtime_dir, "--websocket", host + b":0")
    assert line.startswith((b"--websocket: expected unix:PATH or HOST:PORT, got ", b"cannot listen at " + host + b":0"))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"LISTEN_FDS": "x"}, "LISTEN_FDS: expected a number, got 'x'"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS: expected a number, got '-1'"),
        ({"LISTEN_FDS": ""}, "LISTEN_FDS: expected a number, got ''"),
        ({"LISTEN_FDS": "²"}, "LISTEN_FDS: expected a number, got '²'"),
        ({"LISTEN_FDS": "9" * 18}, "LISTEN_FDS: no 999999999999999999 sockets can be open"),
        ({"LISTEN_FDS": "9" * 5000}, "LISTEN_FDS: expected a number, got '9999"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "\x1b[31m"}, r"LISTEN_FDNAMES: file descriptor 3, called '\x1b[31m',"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "x" * 10_000}, "LISTEN_FDNAMES: file descriptor 3, called 'xxx"),
        ({"LISTEN_FDS": "1"}, "LISTEN_FDNAMES: file descriptor 3, called 'unknown', is not a socket"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": ":" * 10_000}, "LISTEN_FDNAMES: 10001 names for 2 sockets"),
        ({"NOTIFY_SOCKET": "x\x1b"}, r"NOTIFY_SOCKET: expected a path or @NAME, got 'x\x1b'"),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "9" * 5000}, "WATCHDOG_USEC: expected a number, got '999"),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "-1"}, "WATCHDOG_USEC: expected a number, got '-1'"),
        ({"REALTIME_CONFIG_FILE": "x", "REALTIME_SOCKETT": "x"}, "REALTIME_SOCKETT: there is no such variable"),
    ],
    ids=ascii,
)
def test_variables(environment: dict[str, str], sentence: str, runtime_dir: Path) -> None:
    assert realtimed(runtime_dir, **environment).decode().startswith(sentence)


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "/" + "x" * 200},
        {"NOTIFY_SOCKET": "@"},
        {"NOTIFY_SOCKET": "/dev/null"},
        {"NOTIFY_SOCKET": b"/\xff\x1b[31m"},
        {"NOTIFY_SOCKET": "/nonexistent", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/nonexistent", "WATCHDOG_USEC": "9" * 18},
        {"COLUMNS": "x", "LINES": "-1", "TERM": "\x1b", "TZ": "nope", "LC_ALL": "nope", "JOURNAL_STREAM": "x"},
    ],
    ids=ascii,
)
def test_variables_that_hinder_nobody(environment: dict[str, str | bytes], runtime_dir: Path) -> None:
    """The daemon serves, and says what it could not tell."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "LISTEN_"))}
    where: list[str | bytes | Path] = ["--socket", runtime_dir / "s", "--websocket", f"unix:{runtime_dir}/w"]
    with subprocess.Popen(
        [*REALTIMED, *where], env={**own, **environment}, cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stderr is not None
            said = b""
            while b" INFO ready " not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.terminate()
            said += process.stderr.read()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert b"Traceback" not in said
    assert b"\x1b" not in said


LARGE: Final = "1e308"


@pytest.mark.parametrize("extreme", [LARGE, "1e-300"])
def test_seconds_beyond_all_clocks(extreme: str, runtime_dir: Path) -> None:
    """All settings of time at once: none makes a timer overflow."""
    timers = [each.option for each in SETTINGS.values() if each.metavar == "TIME"]
    options = [argument for option in timers for argument in (option, extreme)]
    silence = ["--heartbeat", "1e307" if extreme == LARGE else "1e-301", "--drain", "0"]
    where: list[str | bytes | Path] = ["--socket", runtime_dir / "s", "--websocket", f"unix:{runtime_dir}/w"]
    with subprocess.Popen([*REALTIMED, *where, *options, *silence], cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            said = b""
            while b" INFO ready " not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.terminate()
            said += process.stderr.read()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert b"Traceback" not in said


@pytest.mark.parametrize("arguments", [["--check"], ["--help"], ["--version"]])
@pytest.mark.parametrize("redirections", [">/dev/full", ">/dev/full 2>/dev/full", ">&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_output_of_realtimed_that_goes_nowhere(arguments: list[str], redirections: str) -> None:
    done = run([*REALTIMED, *arguments], redirections=redirections)
    full = redirections.startswith(">/dev/full")
    assert done.status == full
    assert done.err == (
        b"realtimed: standard output: No space left on device\n" if redirections == ">/dev/full" else b""
    )


@pytest.mark.parametrize("redirections", ["2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_errors_that_go_nowhere(redirections: str) -> None:
    for command in (
        [*REALTIMED, "--check", "--max-message", "x"],
        [*REALTIMED, "--nope"],
        [*REALTIMECTL, "--nope"],
        [*REALTIMECTL, "--socket", "/nonexistent", "ping"],
        [*REALTIMECTL, "--timeout", "x", "ping"],
    ):
        assert run(command, redirections=redirections).status in (1, 2, 3)


def test_a_start_without_open_files(runtime_dir: Path) -> None:
    where: list[str | bytes | Path] = ["--socket", runtime_dir / "s", "--websocket", f"unix:{runtime_dir}/w"]
    command = shlex.join(map(str, [*REALTIMED, *where]))
    done = run(["sh", "-c", f"ulimit -n 5; exec {command}"])
    assert done.status == 1
    assert done.err.endswith(b"\nrealtimed: cannot start: Too many open files\n")


HOSTILE: Final = [b"", b"-1\xff\x1b[31m\n", b"x" * 100_000, b"9" * 5000]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socket", ..., "ping"],
        ["--timeout", ..., "ping"],
        ["broadcast", ..., "x"],
        ["broadcast", "news", "x", "--key", ...],
        ["tail", ...],
        ["tail", "news", "--since", ...],
        ["history", "news", "--count", ...],
        ["disconnect", ...],
        ["disconnect", "c", "--code", ...],
        ["disconnect", "c", "--reason", ...],
        ["top", "--count", ...],
        ["top", "--interval", ...],
        ["channels", ...],
        ["doctor", "--url", ...],
        ["doctor", "--origin", ..., "--url", "http://127.0.0.1:1"],
        ["doctor", "--php-user", ..., "--url", "http://127.0.0.1:1"],
        ["doctor", "--caddy-user", ..., "--url", "http://127.0.0.1:1"],
        ["doctor", "--caddy", ..., "--url", "http://127.0.0.1:1"],
        [...],
    ],
    ids=lambda each: " ".join("…" if part is ... else part for part in each),
)
def test_arguments_of_realtimectl(arguments: list[Any], runtime_dir: Path) -> None:
    """Where no daemon is: what is right comes to nothing with status 3, or 1 from the doctor."""
    for hostile in HOSTILE:
        given: list[str | bytes | Path] = [hostile if each is ... else each for each in arguments]
        where: list[str | bytes | Path] = [] if "--socket" in given else ["--socket", runtime_dir / "s"]
        done = run([*REALTIMECTL, *where, *given])
        assert done.status in (1, 2, 3), (given, done)
        assert done.err or done.out


# What stands in the daemon's place.


def silent(peer: Peer) -> None:
    peer.wait_until_it_hangs_up()


def saying(data: bytes) -> Behaviour:
    def behaviour(peer: Peer) -> None:
        peer.request()
        peer.sock.sendall(data)
        peer.wait_until_it_hangs_up()

    return behaviour


def hanging_up(_: Peer) -> None:
    """Accept, and no more."""


def hanging_up_in_the_answer(peer: Peer) -> None:
    peer.request()
    peer.sock.sendall(b"\x94\x01\x00\xc0\xda\xff\xff")


def without_end(peer: Peer) -> None:
    peer.request()
    with suppress(OSError):
        peer.sock.sendall(b"\x94\x01\x00\xc0\xdb\xff\xff\xff\xff")
        while True:
            peer.sock.sendall(bytes(2**16))


def in_drops(peer: Peer) -> None:
    peer.request()
    with suppress(OSError):
        peer.sock.sendall(b"\x94\x01\x00\xc0\xda\xff\xff")
        while True:
            peer.sock.sendall(b"x")
            time.sleep(0.01)


def refusing(error: object) -> Behaviour:
    def behaviour(peer: Peer) -> None:
        request = peer.request()
        peer.sock.sendall(encode_response(request.id, error, None))
        peer.wait_until_it_hangs_up()

    return behaviour


@pytest.mark.parametrize(
    "behaviour",
    [
        silent,
        hanging_up,
        hanging_up_in_the_answer,
        without_end,
        in_drops,
        saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        saying(b"\x91" * 100_000),
        saying(b"\xdd\xff\xff\xff\xff"),
        saying(b"\x94\x00\x00\xa4ping\x90"),
        saying(b"\x94\x01\xcd\xff\xff\xc0\xc0"),
        refusing("\x1b[31m"),
        refusing({"code": "\x1b[31m\n", "message": "\x1b[31m\n"}),
        refusing({"code": 1, "message": None}),
    ],
)
@pytest.mark.parametrize("arguments", [["stats"], ["tail", "news"]])
def test_peers_of_realtimectl(behaviour: Behaviour, arguments: list[str], runtime_dir: Path) -> None:
    path = runtime_dir / "s"
    with FakeDaemon(path, behaviour):
        done = run([*REALTIMECTL, "--socket", path, "--timeout", "0.5", *arguments])
    assert done.status in (1, 3)
    assert done.out == b""
    assert done.err.startswith(b"realtimectl: ")
    assert done.err.count(b"\n") == 1


RESULTS: Final[list[object]] = [
    None, -1, 2**63, float("nan"), "\x1b[31m", b"\xff", [], {}, [[]], {1: 2}, {"\x1b[31m": "\x1b[31m"},
    {"started": 1e300}, {"started": float("nan")}, {"started": "\x1b"}, {"limits": {"\x1b": {}}},
    {"uptime": "x", "closed": 5},
    {"recipients": "x", "epoch": 1, "offset": None}, {"epoch": "\x1b", "offset": -1, "messages": [[2**63, "\x1b"]]},
    {"epoch": "e", "offset": 1, "messages": 5}, {"epoch": "e", "offset": 1, "messages": [[1]]},
    {"\x1b[31m": {"subscribers": 1, "epoch": "\x1b[31m", "offset": 1, "history": 1}},
    [{"id": "\x1b", "channels": 5}], [{"id": "c", "channels": [5], "address": 1, "connected": "x"}],
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [["stats"], ["info"], ["broadcast", "news", "x"], ["channels"], ["clients"], ["history", "news"],
     ["disconnect", "c-1"], ["top", "--count", "1", "--interval", "0.1"]],
    ids=" ".join,
)  # fmt: skip
def test_results_that_realtimectl_shows(arguments: list[str], runtime_dir: Path) -> None:
    """Whatever the result is: it is shown without an escape, or is not what the command can show."""

    def always(result: object) -> Behaviour:
        def behaviour(peer: Peer) -> None:
            for request in peer.requests():
                peer.answer(request, result)

        return behaviour

    for number, result in enumerate(RESULTS):
        path = runtime_dir / str(number)
        with FakeDaemon(path, always(result)):
            done = in_process(["--socket", str(path), "--timeout", "5", *arguments])
        assert done.status in (0, 1, 3), (result, done)
        assert done.status == 0 or done.err.startswith(b"realtimectl: "), (result, done)


def in_process(arguments: list[str]) -> Done:
    """Run `realtimectl` in this process, which takes no time to start; what it raises is raised here."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "\x1b" not in done.output
    return Done(done.exit_code, done.stdout.encode(), done.stderr.encode())
