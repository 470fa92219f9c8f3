"""Watching by pattern: what a watcher sees, and that it changes nothing for anybody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from wsproto.events import TextMessage

from realtimed import Client, RefusedError
from realtimed.errors import NoDaemonError
from realtimed.frames import Publication
from realtimed.hub import Hub
from realtimed.watch import Watchers
from tests.blocking import FLAVOURS, Opener, daemon_in_thread, opener
from tests.clients import publisher, raw_client, subscribe
from tests.stack import Daemon, running_daemon, runtime_directory


class _Form:
    def encode(self, publication: Publication) -> bytes:
        return f"{publication.channel}#{publication.offset}={publication.payload.decode()} ".encode()


class Watching:
    form = _Form()

    def __init__(self) -> None:
        self.seen = ""

    def write(self, data: bytes) -> None:
        self.seen += data.decode()


def make_hub() -> Hub:
    return Hub(max_message=1000, max_channels=3)


def fan_out(hub: Hub) -> None:
    while (turn := hub.next_round()) is not None:
        while turn.step(10):
            pass


def test_matching_channels_are_seen_in_the_order_published_whoever_listens() -> None:
    hub, watcher = make_hub(), Watching()
    hub.watchers.add(watcher, "chat:*")
    for channel, message in (("chat:1", "a"), ("news", "b"), ("chat:2", "c"), ("chat:1", "d"), ("chat:", "e")):
        assert hub.publish(channel, message).recipients == 0
    fan_out(hub)
    assert watcher.seen == "chat:1#1=a chat:2#1=c chat:1#1=d chat:#1=e "
    assert (hub.publications, hub.deliveries, hub.sends, hub.sent_bytes) == (5, 0, 0, 0)
    assert not hub.channels, "nothing exists because it is watched"


def test_several_patterns_show_a_message_once_and_each_can_be_taken_back() -> None:
    hub, watcher = make_hub(), Watching()
    for pattern in ("chat:*", "*:1", "chat:*"):
        hub.watchers.add(watcher, pattern)
    hub.publish("chat:1", "a")
    fan_out(hub)
    assert watcher.seen == "chat:1#1=a "
    assert hub.watchers.remove(watcher, "chat:*")
    assert not hub.watchers.remove(watcher, "chat:*")
    hub.publish("chat:2", "b")
    hub.publish("x:1", "c")
    fan_out(hub)
    assert watcher.seen == "chat:1#1=a x:1#1=c "
    assert hub.watchers.remove(watcher, "*:1")
    assert len(hub.watchers) == 0


def test_when_nobody_watches_a_message_to_nobody_goes_nowhere() -> None:
    hub, watcher = make_hub(), Watching()
    hub.watchers.add(watcher, "*")
    hub.watchers.leave(watcher)
    hub.watchers.leave(watcher)
    hub.publish("news", "a")
    assert hub.idle


@pytest.mark.parametrize("pattern", ["", "a b", "chat:?", "[ab]", "x" * 201, "é*", 7, None, ["a"], "a\n"])
def test_what_is_no_pattern(pattern: object) -> None:
    for method in (Watchers(max_patterns=1).add, Watchers(max_patterns=1).remove):
        with pytest.raises(RefusedError) as refusal:
            method(Watching(), pattern)
        assert refusal.value.code == "invalid_channel"


def test_patterns_and_watchers_are_bounded() -> None:
    watchers, one = Watchers(max_patterns=2), Watching()
    watchers.add(one, "a")
    watchers.add(one, "b")
    watchers.add(one, "a")
    with pytest.raises(RefusedError, match="max-channels, is 2 patterns"):
        watchers.add(one, "c")
    for _ in range(15):
        watchers.add(Watching(), "*")
    with pytest.raises(RefusedError, match="16 connections that watch already"):
        watchers.add(Watching(), "*")
    watchers.leave(one)
    watchers.add(Watching(), "*")
    assert len(watchers) == 16


@given(st.lists(st.sampled_from(["", "a", "b", "ab", ":"]), min_size=2, max_size=6), st.text("ab:", max_size=12))
def test_a_star_stands_for_any_characters(parts: list[str], channel: str) -> None:
    def matches(parts: list[str], rest: str) -> bool:
        """Match by trying every length of every star."""
        if len(parts) == 1:
            return rest == parts[0]
        if not rest.startswith(parts[0]):
            return False
        tail = rest[len(parts[0]) :]
        return any(matches(parts[1:], tail[at:]) for at in range(len(tail) + 1))

    watchers, watcher = Watchers(max_patterns=1), Watching()
    watchers.add(watcher, "*".join(parts))
    watchers.show([Publication(channel, b"x", True, 1)])
    assert bool(watcher.seen) == matches(parts, channel)


def test_a_malicious_pattern_takes_no_time() -> None:
    watchers = Watchers(max_patterns=1)
    watchers.add(Watching(), "*a" * 99 + "*b")
    began = time.perf_counter()
    for _ in range(100):
        watchers.show([Publication("a" * 200, b"x", True, 1)])
    assert time.perf_counter() - began < 1, "backtracking would take longer than the universe exists"


# Against the daemon.


@pytest.fixture(scope="module", name="shared")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory) as running:
        yield running


@pytest.fixture(params=FLAVOURS)
def opening(request: pytest.FixtureRequest) -> Iterator[Opener]:
    with opener(request.param) as opened:
        yield opened


def test_both_clients_watch(shared: Daemon, opening: Opener) -> None:
    client = opening(shared.control_socket)
    with client.watch("chat:*", "news") as watched:
        assert client.broadcast("chat:1", "hello").recipients == 0
        client.broadcast("sport", "hello")
        client.broadcast("news", b"\xff")
        first, second = next(watched), next(watched)
    assert (first.channel, first.message) == ("chat:1", "hello")
    assert (second.channel, second.message) == ("news", b"\xff")


def test_a_bad_pattern_is_refused(shared: Daemon, opening: Opener) -> None:
    client = opening(shared.control_socket)
    with pytest.raises(RefusedError, match="is not a pattern"), client.watch("chat:*", "a b"):
        pass
    with pytest.raises(ValueError, match="at least one pattern"), client.watch():
        pass


def test_a_watcher_that_hangs_up_is_forgotten(shared: Daemon) -> None:
    with Client(shared.control_socket) as client:
        with client.watch("*"):
            assert client.stats()["watchers"] == 1
        while client.stats()["watchers"]:
            pass


async def test_it_sees_what_subscribers_get_and_they_get_the_same(daemon: Daemon) -> None:
    with trio.fail_after(30):
        async with (
            publisher(daemon.control_socket) as watcher,
            publisher(daemon.control_socket) as sender,
            raw_client(daemon.websocket_socket) as client,
        ):
            await client.send(TextMessage(data=subscribe("chat:1")))
            while "chat:1" not in await sender.call("channels"):
                pass
            assert await watcher.call("watch", "chat:*") == {"watched": True}
            for number in range(300):
                assert (await sender.call("broadcast", "chat:1", f"{number:03}"))["recipients"] == 1
            expected = b"".join(b"\x81\x03%03d" % number for number in range(300))
            received = b""
            while len(received) < len(expected):
                received += await client.stream.receive_some()
            assert received == expected
            stats = await sender.call("stats")
            assert (stats["deliveries"], stats["sent_bytes"]) == (300, len(expected))
            seen = b""
            while seen.count(b"\xa7message") < 300:
                seen += await watcher.stream.receive_some()
            assert await watcher.call("unwatch", "chat:*") == {"unwatched": True}
            assert await watcher.call("unwatch", "chat:*") == {"unwatched": False}
            assert (await watcher.call("unwatch", ["chat:*"]))["code"] == "invalid_channel"


async def test_a_watcher_that_does_not_read_is_cut_and_holds_nobody_up(runtime_dir: Path) -> None:
    with trio.fail_after(30):
        async with (
            running_daemon(runtime_dir, "--backlog-timeout", "0.3") as daemon,
            publisher(daemon.control_socket) as watcher,
            publisher(daemon.control_socket) as sender,
        ):
            await watcher.call("watch", "*")
            while (await sender.call("stats"))["watchers"]:
                assert (await sender.call("broadcast", "news", "x" * 10_000))["recipients"] == 0
            assert "publisher disconnected code=slow" in daemon.log


def test_the_end_of_the_daemon_is_an_error(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon, Client(daemon.control_socket) as client, client.watch("*") as watched:
        daemon.process.terminate()
        with pytest.raises(NoDaemonError):
            next(watched)
