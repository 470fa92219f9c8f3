"""The command `realtimectl`, as a process: what it prints, and its exit status."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from realtimed import Client, __version__
from tests.kit.blocking import daemon_in_thread
from tests.kit.clients import closing, subscribe, websocket
from tests.kit.fake_daemon import FakeDaemon, Peer
from tests.kit.patience import PATIENCE, until
from tests.kit.realtimectl import (
    INTERRUPTED,
    NO_DAEMON,
    OK,
    PIPE_CLOSED,
    REALTIMECTL,
    REFUSED,
    USAGE,
    WATCHING,
    ctl,
    environment,
    line,
    published,
    run,
    tailing,
)
from tests.kit.stack import ROOT, Daemon, runtime_directory


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory, "--history-size", "0") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.control_socket) as opened:
        yield opened


# broadcast


@pytest.mark.parametrize("message", ["hello", "", "Grüße, 世界 🎉", "two\nlines"])
def test_broadcast(daemon: Daemon, client: Client, message: str) -> None:
    with client.subscribe("news") as subscription:
        done = ctl(daemon, "broadcast", "news", message)

        epoch = subscription.positions["news"].epoch
        assert (done.status, done.out, done.err) == (OK, f"queued for 1 client, offset 1, epoch {epoch}\n", "")
        assert next(subscription).message == message


def test_broadcast_to_nobody(daemon: Daemon) -> None:
    done = ctl(daemon, "broadcast", "nobody", "hello")
    assert re.fullmatch(r"queued for 0 clients, offset 1, epoch \w+\n", done.out)


def test_broadcast_json(daemon: Daemon, client: Client) -> None:
    with client.subscribe("news") as subscription:
        epoch = subscription.positions["news"].epoch
        for arguments in [("broadcast", "--json", "news", "hello"), ("--json", "broadcast", "news", "hello")]:
            assert ctl(daemon, *arguments).json == {
                "recipients": 1,
                "epoch": epoch,
                "offset": next(subscription).offset,
                "repeated": False,
            }


def test_broadcast_reads_standard_input(daemon: Daemon, client: Client) -> None:
    with client.subscribe("news") as subscription:
        assert ctl(daemon, "broadcast", "news", "-", stdin="Grüße\n".encode()).status == OK
        assert ctl(daemon, "broadcast", "news", "-").status == OK
        assert [next(subscription).message, next(subscription).message] == ["Grüße\n", ""]


def test_a_message_that_begins_with_a_dash(daemon: Daemon, client: Client) -> None:
    with client.subscribe("news") as subscription:
        assert ctl(daemon, "broadcast", "news", "--", "-5").status == OK
        assert ctl(daemon, "broadcast", "--", "news", "--help").status == OK
        assert [next(subscription).message, next(subscription).message] == ["-5", "--help"]


def test_binary_messages_are_sent_as_they_are(daemon: Daemon, client: Client) -> None:
    with client.subscribe("news") as subscription:
        assert ctl(daemon, "broadcast", "news", "--binary", "-", stdin=b"\x00\xff\n").status == OK
        assert ctl(daemon, "broadcast", "news", "--binary", b"\xff\xfe").status == OK
        assert ctl(daemon, "broadcast", "news", "--binary", "text").status == OK
        assert [next(subscription).message for _ in range(3)] == [b"\x00\xff\n", b"\xff\xfe", b"text"]


@pytest.mark.parametrize(("argument", "stdin"), [("-", b"caf\xe9"), (b"caf\xe9", b"")])
def test_bytes_that_are_not_text_are_refused(daemon: Daemon, argument: str | bytes, stdin: bytes) -> None:
    done = ctl(daemon, "broadcast", "news", argument, stdin=stdin)

    assert done.status == REFUSED
    assert done.err == "realtimectl: the message is not UTF-8 text; --binary sends it as it is (invalid_utf8)\n"


def test_what_the_daemon_refuses_is_said_in_one_line(daemon: Daemon) -> None:
    bad = ctl(daemon, "broadcast", "not a\x1b[31mchannel", "hello")
    large = ctl(daemon, "broadcast", "news", "-", stdin=b"x" * 65537)

    assert (bad.status, large.status) == (REFUSED, REFUSED)
    assert re.fullmatch(
        r"realtimectl: 'not a\\x1b\[31mchannel' is not a channel name: .*\(invalid_channel\)\n", bad.err
    )
    assert re.fullmatch(r"realtimectl: .*65537 bytes.*65536.*\(message_too_large\)\n", large.err)


def test_closed_standard_input(daemon: Daemon) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *REALTIMECTL, "--socket", daemon.control_socket, "broadcast", "news", "-"],
        capture_output=True,
        env=environment(),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == REFUSED
    assert b"standard input, which is closed" in done.stderr


# Who is there.


def test_channels(daemon: Daemon, client: Client) -> None:
    with client.subscribe("fruit:apple", "fruit:pear", "meat") as subscription, client.subscribe("fruit:pear"):
        client.broadcast("fruit:pear", "hello")
        epochs = {name: each.epoch for name, each in subscription.positions.items()}

        assert ctl(daemon, "channels", "fruit:").out.splitlines() == [
            "CHANNEL      SUBSCRIBERS  HISTORY  OFFSET  EPOCH",
            f"fruit:apple            1        0       0  {epochs['fruit:apple']}",
            f"fruit:pear             2        0       1  {epochs['fruit:pear']}",
        ]
        assert ctl(daemon, "channels", "--json").json == {
            "fruit:apple": {"subscribers": 1, "epoch": epochs["fruit:apple"], "offset": 0, "history": 0},
            "fruit:pear": {"subscribers": 2, "epoch": epochs["fruit:pear"], "offset": 1, "history": 0},
            "meat": {"subscribers": 1, "epoch": epochs["meat"], "offset": 0, "history": 0},
        }
    until(lambda: not client.channels())
    assert ctl(daemon, "channels").out == "CHANNEL  SUBSCRIBERS  HISTORY  OFFSET  EPOCH\n"
    assert ctl(daemon, "channels", "--json").json == {}


def test_clients_and_disconnect(daemon: Daemon, client: Client) -> None:
    headers = [("X-Forwarded-For", "10.1.2.3")]
    with (
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(websocket(daemon.websocket_socket, headers=headers)) as connection,
    ):
        for channel in ("a", "b", "c", "d", "e"):
            portal.call(connection.send_message, subscribe(channel))
        until(lambda: len(client.channels()) == 5)
        [found] = client.clients()

        head, row = ctl(daemon, "clients").out.splitlines()
        assert head.split() == ["CLIENT", "PROTOCOL", "ADDRESS", "CONNECTED", "PENDING", "CHANNELS"]
        assert re.fullmatch(rf"{found.id} +plain +10\.1\.2\.3 +\d{{4}}-\d\d-\d\d [\d:]{{8}} +0  a b c and 2 more", row)
        assert ctl(daemon, "clients", "--json").json == [
            {
                "id": found.id,
                "protocol": "plain",
                "channels": ["a", "b", "c", "d", "e"],
                "address": "10.1.2.3",
                "connected_since": found.connected_since,
                "pending": 0,
            }
        ]

        done = ctl(daemon, "--json", "disconnect", found.id, "--code", "4000", "--reason", "enough")
        assert (done.status, done.json) == (OK, {"disconnected": 1})
        assert portal.call(closing, connection) == (4000, "enough")


def test_disconnect_says_when_there_is_nobody_to_disconnect(daemon: Daemon) -> None:
    nobody = ctl(daemon, "disconnect", "c-99\x1b[2J")
    bad = ctl(daemon, "disconnect", "c-99", "--code", "1006")
    long = ctl(daemon, "disconnect", "c-99", "--reason", "ü" * 62)

    assert (nobody.status, nobody.out) == (REFUSED, "")
    assert "realtimectl: no client 'c-99\\x1b[2J' is connected" in nobody.err
    assert (bad.status, "a close code is 1000, 1001 or 3000 to 4999" in bad.err) == (USAGE, True)
    assert (long.status, "the reason has 124 bytes; a Close has room for 123" in long.err) == (USAGE, True)


def test_ping_stats_and_info(daemon: Daemon, client: Client) -> None:
    assert re.fullmatch(r"the daemon at \S+/realtime\.sock answered after [\d.]+ ms\n", ctl(daemon, "ping").out)
    assert 0 < ctl(daemon, "ping", "--json").json["milliseconds"] < 5000
    assert re.search(r"^publications +\d+$", ctl(daemon, "stats").out, re.MULTILINE)
    assert ctl(daemon, "stats", "--json").json.keys() == client.stats().keys()
    assert re.search(r"^limits max_message +65536$", ctl(daemon, "info").out, re.MULTILINE)
    assert re.search(r"^started +\d{4}-\d\d-\d\d ", ctl(daemon, "info").out, re.MULTILINE)
    assert ctl(daemon, "info", "--json").json == client.info()


MESSAGES: list[tuple[str | bytes, str]] = [
    ("hello", "hello"),
    ("Grüße, 世界 🎉", "Grüße, 世界 🎉"),
    ("two\nlines\r\n", r"two\nlines\r\n"),
    ("\x1b]0;owned\x07\x1b[31mred \x9b2J \x7f", r"\x1b]0;owned\x07\x1b[31mred \x9b2J \x7f"),
    ("turned \u202earound, \u2028 cut", r"turned \u202earound, \u2028 cut"),
    (b"\x00\xff\x1b[31m", r"b'\x00\xff\x1b[31m'"),
]


def test_tail_prints_messages_as_they_come_and_nothing_that_steers_a_terminal(daemon: Daemon, client: Client) -> None:
    with tailing(daemon, "tailed", "sport") as process:
        for number, (message, shown) in enumerate(MESSAGES, 1):
            client.broadcast("tailed", message)
            assert published(line(process.stdout)) == f"tailed {number} {shown}\n"
        client.broadcast("sport", "goal")
        assert published(line(process.stdout)) == "sport 1 goal\n"


def test_tail_json_is_an_object_per_line(daemon: Daemon, client: Client) -> None:
    with tailing(daemon, "tailed", "--json") as process:
        for number, (message, _) in enumerate(MESSAGES, 1):
            client.broadcast("tailed", message)
            printed = line(process.stdout)
            when = json.loads(printed)["time"]
            assert abs(when - time.time()) < PATIENCE
            expected: dict[str, Any] = {"channel": "tailed", "offset": number, "time": when}
            if isinstance(message, bytes):
                expected["base64"] = base64.b64encode(message).decode()
            else:
                expected["message"] = message
            assert json.loads(printed) == expected
            assert printed.isascii()
            assert printed[:-1].isprintable()


def test_tail_on_a_terminal(daemon: Daemon, client: Client) -> None:
    ours, theirs = pty.openpty()
    with tailing(daemon, "tailed", stdout=theirs), open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123
        os.close(theirs)
        client.broadcast("tailed", "\x1b[31mred")
        assert published(terminal.read(100).decode()) == "tailed 1 \\x1b[31mred\r\n"


def test_ctrl_c_ends_tail_quietly(daemon: Daemon) -> None:
    with tailing(daemon, "tailed") as process:
        assert process.stderr is not None
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(process.stderr.fileno(), 1)  # and nothing into Python's own buffer
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, out, said, err) == (INTERRUPTED, b"", WATCHING, b"")


def test_tail_says_what_it_watches_and_nothing_that_steers_a_terminal(daemon: Daemon) -> None:
    with tailing(daemon, "a", "b", "tailed", "c", "d") as process:
        assert line(process.stderr) == "realtimectl: watching a b tailed and 2 more; Ctrl-C ends it\n"
    with tailing(daemon, "*", "tailed*") as process, Client(daemon.control_socket) as client:
        assert line(process.stderr) == "realtimectl: watching * tailed*; Ctrl-C ends it\n"
        client.broadcast("tailed", "x")
        assert published(line(process.stdout)) == "tailed 1 x\n"


def test_a_reader_who_has_seen_enough_ends_tail_quietly(daemon: Daemon, client: Client) -> None:
    with tailing(daemon, "tailed") as process:
        client.broadcast("tailed", "one")
        assert published(line(process.stdout)) == "tailed 1 one\n"
        assert process.stdout is not None
        process.stdout.close()
        client.broadcast("tailed", "two")
        assert process.wait(PATIENCE) == PIPE_CLOSED
        assert process.stderr is not None
        assert process.stderr.read() == WATCHING


def test_tail_says_when_the_daemon_goes_away(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        process = subprocess.Popen(
            [*REALTIMECTL, "tail", "news"],
            stderr=subprocess.PIPE,
            env=environment(REALTIME_SOCKET=str(daemon.control_socket)),
            cwd=ROOT,
        )
        with Client(daemon.control_socket) as client:
            until(lambda: bool(client.channels("news")))
    _, err = process.communicate(timeout=PATIENCE)

    assert process.returncode == NO_DAEMON
    assert re.fullmatch(
        rb"realtimectl: watching news; Ctrl-C ends it\nrealtimectl: the daemon at \S+ hung up: it has stopped, or .*\n",
        err,
    )


def test_tail_of_a_bad_channel_is_refused(daemon: Daemon) -> None:
    done = ctl(daemon, "tail", "news", "not a channel")

    assert (done.status, done.out, "invalid_channel" in done.err) == (REFUSED, "", True)


# Completion in bash.


COMPLETE = """
set -eu
{program} --install-completion >/dev/null
. ~/.bashrc
complete -p {program} >/dev/null
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _{program}_completion {program}
    echo "${COMPREPLY[*]-}"
}
"""


@pytest.mark.parametrize(
    ("program", "words", "completed"),
    [
        ("realtimectl", "realtimectl cl", "clients"),
        ("realtimectl", "realtimectl dis", "disconnect"),
        ("realtimectl", "realtimectl --soc", "--socket"),
        ("realtimectl", "realtimectl tail --si", "--since"),
        ("realtimectl", "realtimectl doctor --php", "--php-user"),
        ("realtimed", "realtimed --max-m", "--max-message"),
    ],
)
def test_bash_completes_commands_and_options(program: str, words: str, completed: str, tmp_path: Path) -> None:
    script = COMPLETE.replace("{program}", program) + f"complete_words {words}\n"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = environment(HOME=str(tmp_path), PATH=path, SHELL="/bin/bash")
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        env=variables,
        cwd=tmp_path,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert completed in done.stdout.decode().split()
    assert len(done.stdout.split()) <= 2


# Where the daemon is, and when it is not.


def test_the_socket_is_found_by_option_or_variable(daemon: Daemon) -> None:
    there, elsewhere = str(daemon.control_socket), str(daemon.control_socket) + ".not"

    assert run("ping", REALTIME_SOCKET=there).status == OK
    assert run("ping", "--socket", there, REALTIME_SOCKET=elsewhere).status == OK
    assert run("--socket", there, "ping", REALTIME_SOCKET=elsewhere).status == OK
    assert run("--socket", elsewhere, "ping", "--socket", there, "--timeout", "1e300").status == OK
    assert elsewhere in run("--socket", elsewhere, "ping", REALTIME_SOCKET=there).err
    assert "/run/realtime.sock" in run("--help").out


@pytest.mark.parametrize(
    "command", [("broadcast", "news", "x"), ("channels",), ("clients",), ("tail", "news"), ("stats",)]
)
def test_no_daemon(runtime_dir: Path, command: tuple[str, ...]) -> None:
    path = runtime_dir / "no\x1b[2J.sock"
    done = run("--socket", path, *command)

    assert (done.status, done.out) == (NO_DAEMON, "")
    shown = re.escape(str(runtime_dir / r"no\x1b[2J.sock"))
    assert re.fullmatch(
        rf"realtimectl: no daemon at {shown}: there is no such file\. Is realtimed running.*\n", done.err
    )


def test_a_daemon_that_is_silent_or_dies(runtime_dir: Path) -> None:
    path = runtime_dir / "control.sock"

    def silent(peer: Peer) -> None:
        peer.request()
        peer.wait_until_it_hangs_up()

    def dying(peer: Peer) -> None:
        peer.request()

    def babbling(peer: Peer) -> None:
        peer.sock.sendall(b"\xc1\xc1")
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, silent, dying, babbling):
        timed_out = run("--socket", path, "--timeout", "0.2", "ping")
        broke_off = run("--socket", path, "ping")
        no_protocol = run("--socket", path, "ping")

    assert (timed_out.status, "within 0.2 s" in timed_out.err) == (NO_DAEMON, True)
    assert (broke_off.status, "hung up" in broke_off.err) == (NO_DAEMON, True)
    assert (no_protocol.status, "not its protocol" in no_protocol.err) == (NO_DAEMON, True)


@pytest.mark.parametrize("arguments", [["stats"], ["channels"], ["--version"], ["--help"], ["tail", "--help"]])
def test_a_full_disk_is_an_error_and_no_traceback(daemon: Daemon, arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            [*REALTIMECTL, "--socket", daemon.control_socket, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
            check=False,
        )
    assert done.returncode == REFUSED
    assert done.stderr == b"realtimectl: standard input or output: No space left on device\n"


def test_a_terminal_that_lacks_a_character(daemon: Daemon) -> None:
    known = ctl(daemon, "disconnect", "größe")
    lacking = ctl(daemon, "disconnect", "中", PYTHONIOENCODING="latin-1")

    assert (known.status, lacking.status) == (REFUSED, REFUSED)
    assert "no client 'größe' is connected" in known.err
    assert "no client '\\u4e2d' is connected" in lacking.err


# Usage.


@pytest.mark.parametrize(
    "arguments",
    [
        ("pong",),
        ("broadcast", "news"),
        ("broadcast", "news", "two", "messages"),
        ("tail",),
        ("disconnect",),
        ("channels", "--nope"),
        ("--timeout", "soon", "ping"),
        ("--timeout", "0", "ping"),
        ("--timeout", "nan", "ping"),
        ("disconnect", "c-1", "--code", "x"),
        ("disconnect", "c-1", "--code", "99999999999999999999"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = run("--socket", "/tmp/there-is-no-daemon", *arguments)

    assert (done.status, done.out) == (USAGE, "")
    assert done.err


def test_help_teaches() -> None:
    for arguments in [("--help",), ("-h",)]:
        shown = run(*arguments)
        assert shown.status == OK
        for expected in ("realtimectl broadcast news hello", "Exit status:", "  3    no daemon there", "disconnect"):
            assert expected in shown.out
    assert "realtimectl broadcast news -- -5" in run("broadcast", "--help").out
    assert "realtimectl broadcast news hello" in run().out + run().err


def test_version() -> None:
    assert run("--version").out == f"realtimectl {__version__}\n"


def test_it_starts_without_the_daemon_and_trio() -> None:
    script = "import sys, realtimed.cli.realtimectl; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)

    for module in (
        "trio",
        "trio_websocket",
        "anyio",
        "asyncio",
        "msgspec",
        "realtimed.daemon",
        "realtimed.hub.hub",
    ):
        assert f"'{module}'" not in done.stdout


# Lists of many


def test_lists_are_filtered_limited_and_counted(daemon: Daemon, client: Client) -> None:
    names = [f"listed:{number:04}" for number in range(100)]
    with client.subscribe(*names):
        assert ctl(daemon, "channels", "listed:", "--count").out == "100\n"
        assert ctl(daemon, "channels", "listed:", "--count", "--json").json == {"count": 100}
        assert list(ctl(daemon, "channels", "listed:", "--limit", "3", "--json").json) == names[:3]
        assert ctl(daemon, "channels", "listed:", "-n", "0").status == USAGE
    with start_blocking_portal("trio") as portal:
        opened = (
            websocket(daemon.websocket_socket, headers=[("X-Forwarded-For", f"192.0.2.{at}")]) for at in (1, 2, 2)
        )
        with ExitStack() as stack:
            for each in opened:
                connected = stack.enter_context(portal.wrap_async_context_manager(each))
                portal.call(connected.send_message, subscribe("listed:ws"))
            until(lambda: ctl(daemon, "clients", "--channel", "listed:ws", "--count").out == "3\n")
            assert ctl(daemon, "clients", "--address", "192.0.2.2", "--count").out == "2\n"
            shown = ctl(daemon, "clients", "--channel", "listed:ws", "--limit", "1", "--json").json
            assert [each["address"] for each in shown] == ["192.0.2.1"]
    assert "--address ADDRESS" in ctl(daemon, "clients", "--help").out
