"""History and recovery from the publishers' side: the Python clients, PHP, and realtimectl."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from realtimed import ChannelMessage, Client, History, NoDaemonError, Position, ProtocolError, RefusedError
from tests.blocking import FLAVOURS, Opener, daemon_in_thread, opener
from tests.fake_daemon import PATIENCE, FakeDaemon, Peer
from tests.stack import Daemon, runtime_directory
from tests.test_php_client import PhpError, running_php
from tests.test_realtimectl import OK, REFUSED, USAGE, WATCHING, ctl, line, tailing


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory, "--history-size", "5") as running:
        yield running


@pytest.fixture(params=FLAVOURS)
def connect(request: pytest.FixtureRequest) -> Iterator[Opener]:
    with opener(request.param) as opening:
        yield opening


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    """A channel that no other test uses."""
    return "".join(each if each.isalnum() else "-" for each in request.node.name)


def publish(daemon: Daemon, channel: str, *messages: str | bytes) -> str:
    """Publish, and return the channel's epoch."""
    with Client(daemon.control_socket) as client:
        return [client.broadcast(channel, message).epoch for message in messages][-1]


def test_history_is_the_newest_that_is_kept_oldest_first(daemon: Daemon, connect: Opener, channel: str) -> None:
    epoch = publish(daemon, channel, "1", "2", "3", b"\xff", "5", "6")
    client = connect(daemon.control_socket)
    messages: list[str | bytes] = ["2", "3", b"\xff", "5", "6"]
    kept = [ChannelMessage(channel, message, offset) for offset, message in enumerate(messages, 2)]

    assert client.history(channel) == History(Position(epoch, 6), kept)
    assert client.history(channel, 2) == History(Position(epoch, 6), kept[-2:])
    assert client.history(channel, 0) == History(Position(epoch, 6), [])
    assert client.history("nobody-was-here") == History(Position("", 0), [])
    with client.subscribe(channel):
        assert client.channels(channel)[channel].history == 5


def test_what_cannot_be_history_is_refused(daemon: Daemon, connect: Opener) -> None:
    client: Any = connect(daemon.control_socket)
    with pytest.raises(RefusedError, match="invalid_channel"):
        client.history("not a channel")
    for count in (-1, 2**32):
        with pytest.raises(ValueError, match="count must be from 0"):
            client.history("news", count)
    with pytest.raises(TypeError, match="count must be an int"):
        client.history("news", "5")


@pytest.mark.parametrize("message", [[1], ["1", "x"], "x", [1, 2], None])
def test_history_that_is_none_is_an_error(runtime_dir: Path, connect: Opener, message: object) -> None:
    def odd(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 1, "messages": [message]})

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, odd), pytest.raises(ProtocolError, match="a message that is none"):
        connect(path).history("news")


def test_a_subscription_goes_on_where_another_was(daemon: Daemon, connect: Opener, channel: str) -> None:
    client = connect(daemon.control_socket)
    other = channel + "-other"
    with client.subscribe(channel, other) as before:
        client.broadcast(channel, "1")
        client.broadcast(channel, "2")
        assert (next(before).message, before.recovered) == ("1", {})
        seen = before.seen
        assert seen == {channel: Position(before.positions[channel].epoch, 1), other: before.positions[other]}
    client.broadcast(channel, b"3")
    with client.subscribe(channel, other, since={channel: seen[channel]}) as after:
        client.broadcast(channel, "4")

        assert after.recovered == {channel: True}
        assert after.positions[channel].offset == 3
        assert after.seen[channel] == seen[channel], "nothing has been received yet"
        assert [next(after) for _ in range(3)] == [
            ChannelMessage(channel, "2", 2),
            ChannelMessage(channel, b"3", 3),
            ChannelMessage(channel, "4", 4),
        ]
        assert after.seen[channel].offset == 4


def test_what_cannot_be_recovered_is_said_and_not_a_part_of_it_comes(
    daemon: Daemon, connect: Opener, channel: str
) -> None:
    epoch = publish(daemon, channel, *map(str, range(1, 8)))
    client = connect(daemon.control_socket)
    for since, recovered in [((epoch, 1), False), (("another", 3), False), ((epoch, 8), False), ((epoch, 7), True)]:
        with client.subscribe(channel, since={channel: Position(*since)}) as subscription:
            assert subscription.recovered == {channel: recovered}
            assert subscription.seen == subscription.positions == {channel: Position(epoch, 7)}
    with client.subscribe(channel, since={channel: Position(epoch, 1)}) as subscription:
        client.broadcast(channel, "8")
        assert next(subscription) == ChannelMessage(channel, "8", 8)


def test_since_is_of_the_channels_that_are_subscribed_to(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with (
        pytest.raises(ValueError, match="since has 'b', which is none of the channels"),
        client.subscribe("a", since={"b": Position("e", 1)}),
    ):
        pass


def test_more_than_a_backlog_is_replayed(runtime_dir: Path, connect: Opener) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        client = connect(daemon.control_socket, timeout=30)
        sent = [client.broadcast("news", f"{number:065536}") for number in range(100)]
        with client.subscribe("news", since={"news": Position(sent[0].epoch, 0)}) as subscription:
            assert subscription.recovered == {"news": True}
            assert [int(each.message[-9:]) for each in islice(subscription, 100)] == list(range(100))
        assert len(client.history("news").messages) == 100


def test_a_watcher_misses_nothing_over_a_clean_restart(runtime_dir: Path, connect: Opener) -> None:
    state = ("--state-file", str(runtime_dir / "state"))
    with daemon_in_thread(runtime_dir, *state) as daemon:
        client = connect(daemon.control_socket)
        with client.subscribe("news") as subscription:
            client.broadcast("news", "1")
            client.broadcast("news", "2")
            assert next(subscription).message == "1"
            seen = subscription.seen
            daemon.process.terminate()
            with pytest.raises(NoDaemonError):
                list(subscription)
            daemon.process.wait(PATIENCE)  # a second signal would end it without its history
    with daemon_in_thread(runtime_dir, *state):
        client.broadcast("news", "3")
        with client.subscribe("news", since=seen) as subscription:
            assert subscription.recovered == {"news": True}
            assert [next(subscription).message for _ in range(2)] == ["2", "3"]


# PHP.


def test_history_in_php(daemon: Daemon, channel: str) -> None:
    epoch = publish(daemon, channel, "old", *["x"] * 3, b"\x00bytes", "Grüße")
    with running_php(daemon.control_socket) as php:
        assert php.run(f'return $client->history("{channel}", 2);') == {
            "epoch": epoch,
            "offset": 6,
            "messages": [
                {"offset": 5, "message": "\0bytes", "binary": True},
                {"offset": 6, "message": "Grüße", "binary": False},
            ],
        }
        assert php.run(f'return count($client->history("{channel}")->messages);') == 5
        assert php.run('return $client->history("nobody");') == {"epoch": "", "offset": 0, "messages": []}
        with pytest.raises(PhpError) as error:
            php.run('return $client->history("not a channel");')
        assert error.value.code == "invalid_channel"


@pytest.mark.parametrize("messages", [[[1]], ["x"], [["1", "x"]], None])
def test_history_that_is_none_is_an_error_in_php(runtime_dir: Path, messages: object) -> None:
    def odd(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 1, "messages": messages})

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, odd), running_php(path) as php:
        with pytest.raises(PhpError, match=r"a message that is none|no usable 'messages'") as error:
            php.run('return $client->history("news");')
        assert error.value.kind == "ProtocolException"


# realtimectl.


def test_broadcast_with_a_key(daemon: Daemon, channel: str) -> None:
    first = ctl(daemon, "broadcast", channel, "hello", "--key", "k", "--json").json
    assert ctl(daemon, "broadcast", channel, "hello", "--key", "k", "--json").json == {**first, "repeated": True}
    assert (first["recipients"], first["offset"], first["repeated"]) == (0, 1, False)
    shown = f"queued for 0 clients, offset 1, epoch {first['epoch']} (repeated: it was sent before)\n"
    assert ctl(daemon, "broadcast", channel, "hello", "--key", "k").out == shown
    long = ctl(daemon, "broadcast", channel, "hello", "--key", "x" * 201)
    assert (long.status, "1 to 200 characters" in long.err) == (REFUSED, True)


def test_history_in_the_shell(daemon: Daemon, channel: str) -> None:
    epoch = publish(daemon, channel, "1", "\x1b[31m", b"\xff")

    assert ctl(daemon, "history", channel).out == f"{channel} 1 1\n{channel} 2 \\x1b[31m\n{channel} 3 b'\\xff'\n"
    assert ctl(daemon, "history", channel, "-n", "1").out == f"{channel} 3 b'\\xff'\n"
    assert ctl(daemon, "history", channel, "-n", "2", "--json").json == {
        "channel": channel,
        "epoch": epoch,
        "offset": 3,
        "messages": [
            {"channel": channel, "offset": 2, "message": "\x1b[31m"},
            {"channel": channel, "offset": 3, "base64": "/w=="},
        ],
    }
    nothing = ctl(daemon, "history", "nobody")
    assert (nothing.status, nothing.out, nothing.err) == (OK, "", "realtimectl: nothing is kept of nobody\n")
    assert ctl(daemon, "history", "not a channel").status == REFUSED


@pytest.fixture(name="own")
def daemon_of_its_own(runtime_dir: Path) -> Iterator[Daemon]:
    with daemon_in_thread(runtime_dir, "--history-size", "5") as running:
        yield running


def lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    return [line(process.stdout).removesuffix("\n") for _ in range(count)]


@pytest.mark.parametrize(
    ("since", "shown"), [("2", [6, 7]), ("all", [3, 4, 5, 6, 7]), ("99", [3, 4, 5, 6, 7]), ("0", [])]
)
def test_tail_begins_with_the_last_messages(own: Daemon, since: str, shown: list[int]) -> None:
    publish(own, "tailed", *map(str, range(1, 8)))
    publish(own, "sport", "goal")
    with tailing(own, "tailed", "sport", "--since", since) as process:
        publish(own, "sport", "end")
        expected = [f"tailed {number} {number}" for number in shown] + (["sport 1 goal"] if shown else [])
        assert lines(process, len(expected) + 1) == [*expected, "sport 2 end"]


def test_tail_begins_at_a_position(own: Daemon) -> None:
    epoch = publish(own, "tailed", *map(str, range(1, 8)))
    with tailing(own, "tailed", "--since", f"{epoch}:5", "--json") as process:
        publish(own, "tailed", "8")
        assert [json.loads(each)["offset"] for each in lines(process, 3)] == [6, 7, 8]
        process.kill()
        assert process.communicate(timeout=PATIENCE)[1] == WATCHING


@pytest.mark.parametrize("since", ["{epoch}:1", "another:6"])
def test_tail_says_plainly_what_it_could_not_recover(own: Daemon, since: str) -> None:
    epoch = publish(own, "tailed", *map(str, range(1, 8)))
    since = since.format(epoch=epoch)
    with tailing(own, "tailed", "--since", since) as process:
        assert line(process.stderr) == (
            f"realtimectl: not recovered: not everything after {since} of tailed is kept, or the epoch is another."
            f" What follows begins after {epoch}:7\n"
        )
        publish(own, "tailed", "8")
        assert lines(process, 1) == ["tailed 8 8"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("tail", "news", "--since", "yesterday"),
        ("tail", "news", "--since", "-1"),
        ("tail", "news", "--since", "9" * 10),
        ("tail", "news", "sport", "--since", "e1:5"),
        ("history",),
        ("history", "news", "-n", "0"),
        ("history", "news", "-n", "9" * 30),
    ],
)
def test_wrong_usage(daemon: Daemon, arguments: tuple[str, ...]) -> None:
    done = ctl(daemon, *arguments)
    assert (done.status, done.out) == (USAGE, "")
    assert done.err
