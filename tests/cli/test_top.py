"""`realtimectl top` and `realtimectl tail` with patterns, as processes against the real daemon."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from realtimed import Client
from realtimed.cli.top import difference
from realtimed.errors import ProtocolError
from tests.kit.blocking import daemon_in_thread
from tests.kit.fake_daemon import FakeDaemon, Peer
from tests.kit.patience import PATIENCE
from tests.kit.realtimectl import REALTIMECTL, published
from tests.kit.stack import ROOT, Daemon, runtime_directory


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory) as running:
        yield running


def statistics(**changed: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(
        ["uptime", "clients", "connections", "handshakes_refused", "channels", "subscriptions", "publishers",
         "commands", "commands_refused", "publications", "deliveries", "sends", "sent_bytes", "backlogged",
         "backlog_bytes", "loop_lag"], 0,
    )  # fmt: skip
    return {**numbers, "closed": {}, **changed}


def test_rates_are_differences_by_the_time_between() -> None:
    before = statistics(uptime=10.0, publications=100, deliveries=1000, sends=500, closed={"1000": 5, "1006": 1})
    after = statistics(
        uptime=12.0, clients=7, publications=160, deliveries=1900, sends=800, sent_bytes=4096, connections=3,
        closed={"1000": 5, "1006": 4, "4409": 1}, loop_lag=0.001,
    )  # fmt: skip
    sample = difference(before, after)
    assert sample is not None
    assert (sample.seconds, sample.connections, sample.connects) == (2.0, 7, 1.5)
    assert (sample.publications, sample.deliveries, sample.sends) == (30.0, 450.0, 150.0)
    assert (sample.deliveries_per_send, sample.sent_bytes) == (3.0, 2048.0)
    assert (sample.closed, sample.disconnects) == ({"1006": 3, "4409": 1}, 2.0)
    assert sample.loop_lag == 0.001


def test_a_restart_is_no_sample_and_an_older_daemon_an_error() -> None:
    assert difference(statistics(uptime=100.0, publications=9), statistics(uptime=1.0)) is None
    lacking = statistics(uptime=2.0)
    del lacking["sent_bytes"]
    with pytest.raises(ProtocolError, match="does not count 'sent_bytes'"):
        difference(statistics(uptime=1.0), lacking)


@contextmanager
def running(*arguments: str | Path, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*REALTIMECTL, *arguments], stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def finished(process: subprocess.Popen[bytes]) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, b"")
    return out.decode()


def test_in_a_pipe_it_prints_lines(daemon: Daemon) -> None:
    with running("--socket", daemon.control_socket, "top", "--interval", "0.1", "--count", "22") as process:
        lines = finished(process).splitlines()
    head = lines[0].split()
    assert head == [
        "TIME", "CONNECTIONS", "CLOSED/S", "PUBLISHED/S", "DELIVERED/S", "SENDS/S", "BYTES/S", "BACKLOG", "LAG",
    ]  # fmt: skip
    assert [number for number, line in enumerate(lines) if line.split() == head] == [0, 21], "the head comes again"
    assert len(lines) == 24
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d +0 +0\.0 +0\.0 .* ms", line) for line in lines[1:21])


def test_what_is_published_is_what_the_samples_sum_up_to(daemon: Daemon) -> None:
    with (
        Client(daemon.control_socket) as client,
        client.subscribe("news"),
        running("--socket", daemon.control_socket, "top", "--json", "--interval", "0.1") as process,
    ):
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert (first["channels"], first["subscriptions"]) == (1, 1)
        for _ in range(100):
            client.broadcast("news", "hello")
        published = delivered = 0.0
        while round(published) < 100:
            sample = json.loads(process.stdout.readline())
            published += sample["publications"] * sample["seconds"]
            delivered += sample["deliveries"] * sample["seconds"]
        assert published == pytest.approx(100, abs=0.1)
        assert delivered == pytest.approx(100, abs=0.1)


def test_on_a_terminal_it_stays_in_place(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    with running(
        "--socket", daemon.control_socket, "top", "--interval", "0.1", "--count", "2", stdout=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], PATIENCE)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other side has closed it
                break
        assert process.wait(PATIENCE) == 0
    os.close(ours)
    text = shown.decode()
    for expected in ("realtimed ", "deliveries/s", "event loop late by", "Ctrl-C ends"):
        assert expected in text
    assert text.count("deliveries/s") >= 2
    assert "\x1b[1A" in text, "the second look is drawn over the first"


def test_what_a_daemon_says_cannot_steer_the_terminal(runtime_dir: Path) -> None:
    def hostile(peer: Peer) -> None:
        uptime = 0.0
        for request in peer.requests():
            uptime += 1
            if request.method == "info":
                peer.answer(request, {"version": "1\x1b]0;owned\x07[red]"})
            else:
                peer.answer(request, statistics(uptime=uptime, closed={"\x1b]0;owned\x07[/]": int(uptime)}))

    path = runtime_dir / "control.sock"
    ours, theirs = pty.openpty()
    with (
        FakeDaemon(path, hostile),
        running("--socket", path, "top", "--interval", "0.1", "--count", "2", stdout=theirs) as process,
    ):
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], PATIENCE)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
        assert process.wait(PATIENCE) == 0
    os.close(ours)
    assert b"\x1b]" not in shown
    assert b"\x07" not in shown
    assert rb"1\x1b]0;owned\x07[red]" in shown


def test_a_daemon_that_ends_is_said(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        with running("--socket", daemon.control_socket, "top", "--json", "--interval", "0.1") as process:
            assert process.stdout is not None
            process.stdout.readline()
            daemon.process.terminate()
            _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 3
        assert re.fullmatch(rb"realtimectl: .*\n", err)


def test_wrong_intervals_are_usage_errors(daemon: Daemon) -> None:
    for wrong in (("--interval", "0"), ("--interval", "nan"), ("--count", "0"), ("--interval", "soon")):
        with running("--socket", daemon.control_socket, "top", *wrong) as process:
            _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2, wrong
        assert b"Traceback" not in err


def test_tail_with_a_pattern_shows_what_matches_and_changes_nothing(daemon: Daemon) -> None:
    with (
        Client(daemon.control_socket) as client,
        running("--socket", daemon.control_socket, "tail", "chat:*", "weather") as process,
    ):
        while not client.stats()["watchers"]:
            assert process.poll() is None
        assert client.broadcast("chat:1", "\x1b[31mred").recipients == 0
        client.broadcast("sport", "goal")
        client.broadcast("weather", b"\xff")
        assert process.stdout is not None
        lines = [published(process.stdout.readline().decode()) for _ in range(2)]
        assert lines == ["chat:1 1 \\x1b[31mred\n", "weather 1 b'\\xff'\n"]
        assert client.channels() == {}


def test_rich_is_imported_for_top_alone() -> None:
    script = "import sys, realtimed.cli.realtimectl, realtimed.cli.realtimed; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    for module in ("rich", "ssl", "wsproto", "h11", "prometheus_client", "trio"):
        assert f"'{module}'" not in done.stdout, module
