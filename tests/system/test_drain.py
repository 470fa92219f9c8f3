"""How the daemon ends: at a pace, with a word to everyone; and how connections end that have grown old."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Final, cast

import pytest
import trio
from trio.testing import MockClock

from realtimed import AsyncClient, NoDaemonError
from realtimed.config.loading import load
from realtimed.config.settings import Config
from realtimed.errors import ConfigurationError
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Ending
from realtimed.websocket.drain import Drain
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions
from tests.kit.clients import closing, publisher, raw_client, subscribe, websocket
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import Daemon, running_daemon
from tests.load.herd import herd

CLIENTS: Final = 5000
DRAIN: Final = 10
LARGEST_SHARE: Final = 0.15
"""What may be closed, and may come back, in any one second of a drain of 10 s, of all clients."""


def busiest_second(times: Iterable[float]) -> int:
    """Return how many of the times lie within the second that has most of them."""
    ordered = sorted(times)
    return max(bisect_left(ordered, begin + 1) - number for number, begin in enumerate(ordered))


def logged(daemon: Daemon, pattern: str) -> dict[str, float]:
    """Return when each line was logged that has `pattern`, by the text of its first group, in seconds."""
    return {
        match[2]: datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S.%f").timestamp()
        for match in re.finditer(rf"^(\S+ \S+) [A-Z]+ .*{pattern}", daemon.log, re.MULTILINE)
    }


def advice(reason: str) -> int:
    match = re.fullmatch(r"restarting, come back in (\d+) ms", reason)
    assert match is not None, reason
    return int(match[1])


async def test_thousands_are_sent_away_evenly_and_lose_nothing(runtime_dir: Path) -> None:
    recipients = []
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, "--drain", str(DRAIN)) as daemon,
            AsyncClient(daemon.control_socket, timeout=LONG_PATIENCE) as sender,
        ):
            with herd(daemon.websocket_socket, "news", plain=CLIENTS // 2, enveloped=CLIENTS // 2) as members:
                while (await sender.stats())["subscriptions"] != CLIENTS:
                    pass
                with suppress(NoDaemonError):  # the end, at which nothing is taken without an answer
                    for number in count():
                        recipients.append((await sender.broadcast("news", str(number))).recipients)
                        if number == 1:
                            daemon.process.send_signal(signal.SIGTERM)
                        await trio.sleep(0.25)
                assert await daemon.wait() == 0
                ended = time.time()

    for member in members:
        member.read_frames()
        assert member.messages == [str(number) for number in range(len(member.messages))], "no gap, nothing twice"
        assert member.close is not None
        code, reason = member.close
        assert code == 4503
        if member.enveloped:
            assert member.goodbye == {"event": "goodbye", "reason": "restart", "retry_after_ms": advice(reason)}
    assert sum(recipients) == sum(len(member.messages) for member in members), "all that was accepted is delivered"
    assert recipients[0] == CLIENTS
    assert len({each for each in recipients if 0 < each < CLIENTS}) > 5, "those not yet closed still receive"

    closed = logged(daemon, r"client closed client=(\S+) code=4503")
    begun = logged(daemon, r"(stopping clients=5000 drain=10)\.0")["stopping clients=5000 drain=10"]
    assert len(closed) == CLIENTS
    assert busiest_second(closed.values()) <= CLIENTS * LARGEST_SHARE
    assert max(closed.values()) <= begun + DRAIN + 1
    assert ended <= begun + DRAIN + 5, "the deadline, and what a Close may take to be answered"
    returns = logged_returns(daemon)
    assert min(returns) >= begun + DRAIN, "nobody is told to come back while nobody is there"
    assert busiest_second(returns) <= CLIENTS * LARGEST_SHARE


def logged_returns(daemon: Daemon) -> list[float]:
    """Return when each client was told to come back."""
    told = logged(daemon, r"client closed client=(\S+ code=4503 reason='restarting, come back in \d+) ms")
    return [closed + int(text.rpartition(" ")[2]) / 1000 for text, closed in told.items()]


class Sheep:
    """A session as far as `Drain` knows it."""

    def __init__(self) -> None:
        self.closing = False
        self.closed_at = 0.0
        self.returns_at = 0.0

    def send_away(self, ending: Ending, retry_after: float) -> None:
        assert ending is Ending.RESTART
        assert not self.closing
        self.closing = True
        self.closed_at = trio.current_time()
        self.returns_at = self.closed_at + retry_after


def flock(number: int) -> tuple[Sessions, list[Sheep]]:
    sessions = Sessions(Config(), Hub(max_message=1000, max_channels=128), released=lambda: None)
    sheep = [Sheep() for _ in range(number)]
    sessions.members.update({f"c-{n}": cast(Session, each) for n, each in enumerate(sheep)})
    return sessions, sheep


@pytest.mark.parametrize(
    "stalls",
    [[], [(0.3, 0.6)], [(0.3, 2)], [(0.3, 0.6)] * 4, [(0.001, 0.29)] * 200, [(8.2, 1)], [(7.8, 1.5)]],
    ids=["none", "one", "long", "some", "always", "near the end", "long near the end"],
)
async def test_a_busy_processor_does_not_make_a_drain_uneven(
    autojump_clock: MockClock, stalls: list[tuple[float, float]]
) -> None:
    """For each stall: seconds after the one before, and how many seconds it lasts."""
    sessions, sheep = flock(CLIENTS)

    async def stall() -> None:
        for after, seconds in stalls:
            await trio.sleep(after)
            autojump_clock.jump(seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stall)
        drain = Drain(sessions, DRAIN)
        await drain.run()
        await drain.finish()
        nursery.cancel_scope.cancel()
    assert all(each.closing for each in sheep)
    assert busiest_second(each.closed_at for each in sheep) <= CLIENTS * LARGEST_SHARE
    assert min(each.returns_at for each in sheep) >= DRAIN + 1


async def test_few_are_sent_away_as_evenly_as_many_and_nobody_takes_no_time(autojump_clock: MockClock) -> None:
    sessions, sheep = flock(10)
    await Drain(sessions, DRAIN).run()
    ordered = sorted(each.closed_at for each in sheep)
    assert ordered == pytest.approx([0.9 * number for number in range(1, 11)], abs=0.06), "a tenth of the time is spare"
    began = autojump_clock.current_time()
    await Drain(sessions, DRAIN).run()
    assert autojump_clock.current_time() == began


async def test_who_joins_during_a_drain_is_part_of_it(autojump_clock: MockClock) -> None:
    sessions, sheep = flock(100)
    late = [Sheep() for _ in range(100)]

    async def join() -> None:
        await trio.sleep(DRAIN / 2)
        sessions.members.update({f"late-{n}": cast(Session, each) for n, each in enumerate(late)})
        sessions.connections += len(late)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(join)
        await Drain(sessions, DRAIN).run()
    assert all(each.closing for each in (*sheep, *late))
    assert autojump_clock.current_time() <= DRAIN + 0.1
    assert busiest_second(each.closed_at for each in (*sheep, *late)) <= 150 / (DRAIN / 2) * 1.4 + 1


async def test_who_joins_after_it_is_sent_away_at_once() -> None:
    sessions, sheep = flock(250)
    drain = Drain(sessions, 0)
    await drain.run()
    assert not any(each.closing for each in sheep), "with a drain of 0 all is left to the finish"
    await drain.finish()
    assert all(each.closing for each in sheep)
    assert sessions.send_away is not None
    late = Sheep()
    sessions.send_away(cast(Session, late))
    assert late.closing


async def test_publishers_are_served_until_the_end_and_newcomers_are_not(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, "--drain", "2") as daemon,
            websocket(daemon.websocket_socket) as client,
            publisher(daemon.control_socket) as old,
        ):
            await client.send_message(subscribe("news"))
            while not await old.call("channels"):
                pass
            daemon.process.terminate()
            while daemon.websocket_socket.exists():
                assert await old.call("ping") == "pong"
            with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
                async with raw_client(daemon.websocket_socket):
                    pass
            async with publisher(daemon.control_socket) as new:
                assert (await new.call("broadcast", "news", "while draining"))["recipients"] == 1
            assert await client.get_message() == "while draining"
            assert (await closing(client))[0] == 4503
            assert await daemon.wait() == 0
            with pytest.raises(NoDaemonError):
                async with AsyncClient(daemon.control_socket) as late:
                    await late.ping()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_a_drain_at_once(runtime_dir: Path, number: signal.Signals) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, "--drain", "3600") as daemon,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
            raw_client(daemon.websocket_socket),  # one that would let the daemon wait for its answer
            publisher(daemon.control_socket) as asking,
        ):
            await client.get_message()
            daemon.process.terminate()
            while daemon.websocket_socket.exists():
                assert await asking.call("ping") == "pong"
            daemon.process.send_signal(number)
            farewell = json.loads(await client.get_message())
            assert (farewell["event"], farewell["reason"]) == ("goodbye", "restart")
            assert (await closing(client))[0] == 4503
            assert await daemon.wait() == 0
            assert not daemon.control_socket.exists()


async def test_a_drain_without_clients_takes_no_time(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, "--drain", "3600") as daemon:
            daemon.process.terminate()
            assert await daemon.wait() == 0


async def test_a_publisher_that_never_sends_does_not_hold_up_the_end(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, "--close-timeout", "3600") as daemon,
            publisher(daemon.control_socket),
            publisher(daemon.control_socket) as asking,
        ):
            assert await asking.call("ping") == "pong"
            daemon.process.terminate()
            assert await daemon.wait() == 0


async def test_a_command_that_has_begun_is_carried_out_before_the_end(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            publisher(daemon.control_socket) as slow,
            publisher(daemon.control_socket) as asking,
        ):
            assert await slow.call("ping") == "pong"
            await slow.stream.send_all(b"\x94\x00\x07")
            while (await asking.call("stats"))["publishers"] != 2:
                pass
            daemon.process.terminate()
            while daemon.control_socket.exists():
                await trio.lowlevel.checkpoint()
            await slow.stream.send_all(b"\xa4ping\x90")
            answer = await slow.answer()
            assert (answer.id, answer.result) == (7, "pong")
            assert await daemon.wait() == 0


# The age of connections.


async def test_connections_end_at_an_age_of_their_own(runtime_dir: Path) -> None:
    options = ("--max-age", "2", "--heartbeat", "0.1")
    ages: list[float] = []

    async def grow_old(daemon: Daemon, *subprotocols: str) -> None:
        connected = trio.current_time()
        async with websocket(daemon.websocket_socket, subprotocols=subprotocols) as client:
            ready = trio.current_time()
            farewell: Any = None
            if subprotocols:
                await client.get_message()
                farewell = json.loads(await client.get_message())
            code, reason = await closing(client)
            assert code == 4503
            match = re.fullmatch(r"connected for max-age, come back in (\d+) ms", reason)
            assert match is not None, reason
            assert int(match[1]) <= 1000
            if farewell is not None:
                assert farewell == {"event": "goodbye", "reason": "max-age", "retry_after_ms": int(match[1])}
            assert trio.current_time() - connected >= 1
            ages.append(trio.current_time() - ready)

    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon, trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(grow_old, daemon)
                nursery.start_soon(grow_old, daemon, "realtime.v1")
    seconds = [float(text) for text in re.findall(r"closed client=\S+ code=4503 .* seconds=([\d.]+)", daemon.log)]
    assert len(seconds) == len(ages) == 20
    assert len(set(seconds)) > 3, "they do not end together"


def test_no_connection_is_too_old_unless_that_is_wanted() -> None:
    assert Config().max_age is None
    assert load({"max_age": "12"}).max_age == 12


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("0s", 0), ("0.0", 0), (0, 0), ("10", 10), ("2.5s", 2.5)])
def test_a_drain_may_take_no_time(text: object, seconds: float) -> None:
    assert load({"drain": text}).drain == seconds


@pytest.mark.parametrize("text", ["-1", "soon", "", True, False])
def test_a_drain_is_a_number_of_seconds(text: object) -> None:
    with pytest.raises(ConfigurationError, match=r"--drain: expected a number of seconds .*; or 0, got"):
        load({"drain": text})


# Open files.


def start_with_open_files(soft: int, hard: int, directory: Path, *options: str) -> tuple[str, str]:
    """Start a daemon under these limits, and return what it logs until it is ready, and its own limits then."""
    command = ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-m", "realtimed", *options]
    command += ["--socket", f"{directory}/rt.sock", "--websocket", f"unix:{directory}/ws.sock"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while " ready " not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
    assert process.returncode == 0
    return log, limits


def test_the_limit_of_open_files_is_raised_and_a_low_one_is_said(runtime_dir: Path) -> None:
    log, limits = start_with_open_files(100, 200, runtime_dir)
    assert re.search(r"^Max open files +200 +200 ", limits, re.MULTILINE)
    assert "WARNING few open files open_files=200 allowed=136 advice='raise LimitNOFILE or ulimit -n'" in log
    assert " max_connections=136\n" in log


def test_a_limit_of_open_files_that_is_enough_is_nothing_to_talk_about(runtime_dir: Path) -> None:
    log, _ = start_with_open_files(100, 200, runtime_dir, "--max-connections", "136")
    assert "WARNING" not in log
    log, _ = start_with_open_files(100, 8000, runtime_dir)
    assert "WARNING" not in log
    log, _ = start_with_open_files(100, 200, runtime_dir, "--max-connections", "137")
    assert "WARNING max-connections too high max_connections=137 open_files=200 allowed=136" in log
