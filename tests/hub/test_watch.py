"""Watching by pattern: what a watcher sees, and that it changes nothing for anybody else."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from wsproto.events import TextMessage

from realtimed import Client, RefusedError
from realtimed.errors import NoDaemonError
from realtimed.hub.publication import Publication
from realtimed.hub.watch import Watchers
from tests.kit.blocking import FLAVOURS, Opener, daemon_in_thread, opener
from tests.kit.clients import publisher, raw_client, subscribe
from tests.kit.hubs import fan_out, make_hub
from tests.kit.stack import Daemon, running_daemon, runtime_directory
from tests.kit.subscribers import Lines, Listener


class Marks(Lines):
    def encode(self, publication: Publication) -> bytes:
        return f"{publication.channel}#{publication.offset}={publication.payload.decode()} ".encode()


class Watching(Listener):
    """A listener that sees what it is sent as text."""

    def __init__(self) -> None:
        super().__init__(form=Marks())

    @property
    def seen(self) -> str:
        return self.received.decode()


def show(watchers: Watchers, *publications: Publication) -> None:
    watchers.show(publications)
    while watchers.step():
        pass


def test_matching_channels_are_seen_in_the_order_published_whoever_listens() -> None:
    hub, watcher = make_hub(max_channels=3), Watching()
    hub.watchers.add(watcher, "chat:*")
    for channel, message in (("chat:1", "a"), ("news", "b"), ("chat:2", "c"), ("chat:1", "d"), ("chat:", "e")):
        assert hub.publish(channel, message).recipients == 0
    fan_out(hub)
    assert watcher.seen == "chat:1#1=a chat:2#1=c chat:1#1=d chat:#1=e "
    assert (hub.publications, hub.deliveries, hub.sends, hub.sent_bytes) == (5, 0, 0, 0)
    assert not hub.channels, "nothing exists because it is watched"


def test_several_patterns_show_a_message_once_and_each_can_be_taken_back() -> None:
    hub, watcher = make_hub(max_channels=3), Watching()
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
    hub, watcher = make_hub(max_channels=3), Watching()
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


def test_the_order_is_kept_in_steps_of_any_size_and_each_sees_its_own() -> None:
    watchers = Watchers(max_patterns=3)
    everything, odd = Watching(), Watching()
    watchers.add(everything, "*")
    watchers.add(odd, "*:1")
    watchers.add(odd, "*:3")
    watchers.show(Publication(f"chat:{number % 4}", b"x", True, number) for number in range(1000))
    assert watchers.queued_bytes == 1000 * 257
    steps = 1
    while watchers.step(1 + steps % 100):
        steps += 1
    assert steps > 100
    assert everything.seen == "".join(f"chat:{number % 4}#{number}=x " for number in range(1000))
    assert odd.seen == "".join(f"chat:{number % 4}#{number}=x " for number in range(1000) if number % 2)
    assert watchers.idle
    assert watchers.queued_bytes == 0


def test_who_comes_and_goes_while_something_waits() -> None:
    watchers = Watchers(max_patterns=3)
    first, second = Watching(), Watching()
    watchers.add(first, "chat:*")
    watchers.show(Publication("chat:1", b"a", True, number) for number in range(1, 3))
    watchers.step(1)
    watchers.add(second, "*")
    watchers.add(first, "*:1")
    watchers.remove(first, "chat:*")
    show(watchers, Publication("news", b"c", True, 1))
    assert first.seen == "chat:1#1=a chat:1#2=a "
    assert second.seen == "news#1=c ", "what had been published before it began is none of its business"
    watchers.show([Publication("news", b"d", True, 2)])
    watchers.leave(second)
    watchers.leave(first)
    assert watchers.idle
    assert watchers.queued_bytes == 0
    watchers.add(second, "*")
    show(watchers, Publication("news", b"e", True, 3))
    assert second.seen == "news#1=c news#3=e "


def test_those_that_see_the_same_get_the_same_bytes() -> None:
    form = Marks()
    watchers, crowd = Watchers(max_patterns=3), [Watching() for _ in range(16)]
    for number, each in enumerate(crowd):
        each.form = form
        watchers.add(each, "*" if number % 2 else "n*s")
    show(watchers, Publication("news", b"x" * 1000, True, 1), Publication("nos", b"", True, 1))
    assert all(each.parts[0] is crowd[0].parts[0] and len(each.parts) == 1 for each in crowd)


def test_max_patterns_follows_the_configuration_for_those_who_watch_already() -> None:
    watchers, watcher = Watchers(max_patterns=1), Watching()
    watchers.add(watcher, "a")
    watchers.max_patterns = 2
    watchers.add(watcher, "b")
    watchers.max_patterns = 1
    with pytest.raises(RefusedError, match="max-channels, is 1 patterns"):
        watchers.add(watcher, "c")
    show(watchers, Publication("b", b"x", True, 1))
    assert watcher.seen == "b#1=x ", "what was allowed stays"


# 16 watchers with 128 patterns each, by what a name has to go through.
EXPENSIVE = {
    "stars": ("a" * 190, lambda watcher, number: "*a" * (30 + watcher) + f"*{number}b*"),
    "long pieces": ("a" * 190, lambda watcher, number: "*" + "a" * 99 + f"b{number}x{watcher}*"),
    "beginnings": ("a" * 190, lambda watcher, number: "a" * (watcher * 11 + number % 11 + 1) + f"*q{number}*"),
    "in the middle": ("user:", lambda watcher, number: f"*:{watcher}:{number}:*"),
    "everything": ("a" * 190, lambda _, number: f"*a{'*' * number}"),
}


@pytest.mark.parametrize(("name", "pattern"), EXPENSIVE.values(), ids=list(EXPENSIVE))
def test_no_step_is_long_whatever_is_watched(name: str, pattern: Callable[[int, int], str]) -> None:
    watchers = Watchers(max_patterns=128)
    for watcher in range(16):
        one = Watching()
        for number in range(128):
            watchers.add(one, pattern(watcher, number))
    watchers.show(Publication(f"{name}{number}", b"x", True, 1) for number in range(10))
    times = [time.process_time()]
    while watchers.step():
        times.append(time.process_time())
    steps = sorted(after - before for before, after in pairwise(times))
    assert not steps or steps[len(steps) * 9 // 10] < 0.003


def test_a_name_that_comes_again_is_matched_once() -> None:
    watchers = Watchers(max_patterns=128)
    for watcher in range(16):
        one = Watching()
        for number in range(128):
            watchers.add(one, f"*a*a*{watcher}*{number}*b")
    show(watchers, Publication("a" * 200, b"x", True, 1))

    began = time.process_time()
    show(watchers, *[Publication("a" * 200, b"x", True, 1)] * 1000)
    assert time.process_time() - began < 0.1, "2,048 patterns would take 1 ms and more for each"


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


async def test_a_reload_changes_the_limits_of_connections_that_are_open(runtime_dir: Path) -> None:
    file = runtime_dir / "realtimed.toml"
    file.write_text("max_channels = 1\nmax_message = 100\n")
    with trio.fail_after(30):
        async with (
            running_daemon(runtime_dir, "--config", str(file)) as daemon,
            publisher(daemon.control_socket) as asking,
        ):
            large = "x" * (100 + 3 * 2**19)  # of these a command may have 1 MiB beside its message
            assert await asking.call("watch", "a") == {"watched": True}
            assert (await asking.call("watch", "b"))["code"] == "too_many_channels"
            assert "1048676 bytes" in (await asking.call("ping", large))["message"]

            file.write_text("max_channels = 2\nmax_message = 1048576\n")
            daemon.process.send_signal(signal.SIGHUP)
            while "INFO reloaded applied='max-channels, max-message'" not in daemon.log:
                assert await asking.call("ping") == "pong"
            assert await asking.call("watch", "b") == {"watched": True}
            assert (await asking.call("ping", large))["code"] == "invalid_params"

            file.write_text("max_channels = 1\nmax_message = 200\n")
            daemon.process.send_signal(signal.SIGHUP)
            while daemon.log.count("INFO reloaded applied='max-channels, max-message'") < 2:
                assert await asking.call("ping") == "pong"
            assert (await asking.call("watch", "c"))["code"] == "too_many_channels"
            assert "1048776 bytes" in (await asking.call("ping", large))["message"]


def many_patterns(watchers: Watchers, number: int) -> Watching:
    watcher = Watching()
    for each in range(127):
        watchers.add(watcher, f"*a*a*a*{number}-{each}*")
    return watcher


def test_who_changes_patterns_all_the_time_keeps_no_search_from_its_end() -> None:
    watchers = Watchers(max_patterns=128)
    crowd = [many_patterns(watchers, number) for number in range(8)]
    everything, fickle = Watching(), Watching()
    watchers.add(everything, "*")
    name = "a" * 190
    watchers.show([Publication(name, b"x", True, offset) for offset in (1, 2)])
    for _ in range(1000):
        watchers.add(fickle, "*never*")
        more = watchers.step(100)
        watchers.remove(fickle, "*never*")
        if not more:
            break
    assert everything.seen == f"{name}#1=x {name}#2=x "
    assert [each.seen for each in crowd] == [""] * 8


def test_what_is_no_longer_watched_is_not_shown_though_it_is_being_searched_for() -> None:
    watchers = Watchers(max_patterns=128)
    for number in range(8):
        many_patterns(watchers, number)
    leaving, narrowing, staying, late = (Watching() for _ in range(4))
    for each in (leaving, narrowing, staying):
        watchers.add(each, "a*")
    watchers.add(narrowing, "b*")
    watchers.add(staying, "*a")
    name = "a" * 190
    watchers.show([Publication(name, b"x", True, 1)])
    assert watchers.step(10), "the search is under way"
    watchers.remove(leaving, "a*")
    watchers.remove(narrowing, "a*")
    watchers.remove(staying, "a*")
    watchers.add(late, "a*")
    while watchers.step(100):
        pass
    assert [each.seen for each in (leaving, narrowing, staying, late)] == ["", "", f"{name}#1=x ", ""]
    show(watchers, Publication("ab", b"y", True, 1))
    assert [each.seen for each in (leaving, narrowing, late)] == ["", "", "ab#1=y "]
