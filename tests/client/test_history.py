"""History and recovery from the publishers' side: the Python clients, PHP, and realtimectl."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from realtimed import ChannelMessage, Client, History, NoDaemonError, Position, ProtocolError, RefusedError
from realtimed.cli.output import moment
from tests.kit.blocking import Opener, daemon_in_thread, untimed
from tests.kit.fake_daemon import FakeDaemon, Peer
from tests.kit.patience import PATIENCE
from tests.kit.php import PhpError, running_php
from tests.kit.realtimectl import OK, REALTIMECTL, REFUSED, USAGE, WATCHING, ctl, line, published, tailing
from tests.kit.stack import ROOT, Daemon, runtime_directory


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory, "--history-size", "5") as running:
        yield running


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

    for count, expected in ((100, kept), (2, kept[-2:]), (0, [])):
        position, found = client.history(channel, count)
        assert (position, [untimed(each) for each in found]) == (Position(epoch, 6), expected)
    assert client.history(channel).messages == client.history(channel, 100).messages
    assert client.history("nobody-was-here") == History(Position("", 0), [])
    with client.subscribe(channel):
        assert client.channels(channel)[channel].history == 5


def test_a_message_has_the_same_time_whenever_it_comes(daemon: Daemon, connect: Opener, channel: str) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe(channel) as subscription, client.watch(f"{channel}*") as watching:
        began = time.time()
        for message in ("text", b"bytes"):
            client.broadcast(channel, message)
        live = [next(subscription) for _ in range(2)]
        assert [next(watching) for _ in range(2)] == live
        start = subscription.positions[channel]
    assert all(each.time is not None and began - 0.001 <= each.time <= time.time() for each in live)
    assert client.history(channel).messages == live
    with client.subscribe(channel, since={channel: start}) as subscription:
        assert [next(subscription) for _ in range(2)] == live
    with client.subscribe(channel, last=2) as subscription:
        assert [next(subscription) for _ in range(2)] == live


def test_a_subscription_begins_with_the_last_messages(daemon: Daemon, connect: Opener, channel: str) -> None:
    epoch = publish(daemon, channel, *map(str, range(1, 8)))
    client = connect(daemon.control_socket)
    other = channel + "-other"
    publish(daemon, other, "other")
    for last, shown in ((3, 3), (100, 5), (0, 0), (None, 0)):
        new = f"{channel}-new-{last}"
        with client.subscribe(channel, other, new, last=last) as subscription:
            assert subscription.recovered == {}
            assert subscription.positions[channel] == Position(epoch, 7)
            assert subscription.seen[channel] == Position(epoch, 7 - shown), "these are still to be received"
            assert subscription.seen[new].offset == 0
            client.broadcast(new, "new")
            expected = [(channel, str(number)) for number in range(8 - shown, 8)] + [(other, "other")] * bool(shown)
            got = [next(subscription) for _ in range(len(expected) + 1)]
            assert [(each.channel, each.message) for each in got] == [*expected, (new, "new")]
            assert subscription.seen[channel] == Position(epoch, 7)


def test_last_is_for_channels_without_a_position(daemon: Daemon, connect: Opener, channel: str) -> None:
    epoch = publish(daemon, channel, "1", "2", "3", "4")
    client = connect(daemon.control_socket)
    other = channel + "-other"
    publish(daemon, other, "5", "6")
    with client.subscribe(channel, other, since={channel: Position(epoch, 3)}, last=1) as subscription:
        assert subscription.recovered == {channel: True}
        assert [next(subscription).message for _ in range(2)] == ["4", "6"]
    for last in (-1, 2**32):
        with pytest.raises(ValueError, match="last must be from 0"), client.subscribe(channel, last=last):
            pass
    with pytest.raises(TypeError, match="last must be an int"), client.subscribe(channel, last="5"):  # type: ignore[arg-type]
        pass


def test_an_older_daemon_is_asked_in_its_own_words_and_tells_no_times(runtime_dir: Path, connect: Opener) -> None:
    asked = []

    def older(peer: Peer) -> None:
        for request in peer.requests():
            asked.append([request.method, *request.params])
            match request.method, request.params:
                case "history", [_, 5]:
                    peer.answer(request, {"epoch": "e", "offset": 2, "messages": [[1, "a"], [2, b"b"]]})
                case "subscribe", [_]:
                    peer.answer(request, {"epoch": "e", "offset": 2})
                    peer.notify("message", request.params[0], "c", 3)
                case "subscribe", [_, {"epoch": _}]:
                    peer.answer(request, {"epoch": "e", "offset": 2, "recovered": True})
                case "watch", [_]:
                    peer.answer(request, {"watched": True})
                    peer.notify("message", "news", b"d", 4)
                case _:
                    peer.refuse(request, "invalid_params")

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, older, older, older, older):
        client = connect(path)
        kept = [ChannelMessage("news", "a", 1), ChannelMessage("news", b"b", 2)]
        assert client.history("news", 5) == History(Position("e", 2), kept)
        with client.subscribe("x", "y", since={"y": Position("e", 1)}) as subscription:
            assert next(subscription) == ChannelMessage("x", "c", 3)
            assert subscription.recovered == {"y": True}
        with client.watch("*") as watching:
            assert next(watching) == ChannelMessage("news", b"d", 4)
        with pytest.raises(RefusedError, match="invalid_params"), client.subscribe("x", last=5):
            pass
        client.close()
    assert asked == [
        ["history", "news", 5, {"time": True}],
        ["history", "news", 5],
        ["subscribe", "x", None, {"time": True}],
        ["subscribe", "y", {"epoch": "e", "offset": 1}, {"time": True}],
        ["subscribe", "x"],
        ["subscribe", "y", {"epoch": "e", "offset": 1}],
        ["watch", "*", {"time": True}],
        ["watch", "*"],
        ["subscribe", "x", None, {"time": True, "last": 5}],
    ]


def test_what_an_older_daemon_refuses_for_another_reason_is_not_asked_again(runtime_dir: Path, connect: Opener) -> None:
    def once(peer: Peer) -> None:
        peer.refuse(peer.request(), "not_allowed")
        assert list(peer.requests()) == []

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, once, once):
        client = connect(path)
        with pytest.raises(RefusedError, match="not_allowed"):
            client.history("news")
        client.close()
        with pytest.raises(RefusedError, match="not_allowed"), client.subscribe("news"):
            pass


@pytest.mark.parametrize("more", [{}, {"time": "now"}, {"time": True}, {"time": 1.5}, {"time": None}, [], "x", None])
def test_a_time_that_is_none_is_an_error(runtime_dir: Path, connect: Opener, more: object) -> None:
    def history(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 1, "messages": [[1, "x", more]]})

    def live(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 0})
        peer.notify("message", "news", "x", 1, more)

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, history, live):
        client = connect(path)
        with pytest.raises(ProtocolError, match="no usable 'time'"):
            client.history("news")
        with pytest.raises(ProtocolError, match="no usable 'time'"), client.subscribe("news") as subscription:
            next(subscription)


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
    with FakeDaemon(path, odd), pytest.raises(ProtocolError, match="an entry that is not a message"):
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
        assert [untimed(next(after)) for _ in range(3)] == [
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
        assert untimed(next(subscription)) == ChannelMessage(channel, "8", 8)


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
    with Client(daemon.control_socket) as client:
        times = [each.time for each in client.history(channel).messages]
    assert None not in times
    with running_php(daemon.control_socket) as php:
        assert php.run(f'return $client->history("{channel}", 2);') == {
            "epoch": epoch,
            "offset": 6,
            "messages": [
                {"offset": 5, "message": "\0bytes", "binary": True, "time": times[-2]},
                {"offset": 6, "message": "Grüße", "binary": False, "time": times[-1]},
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
        with pytest.raises(PhpError, match=r"an entry that is not a message|no usable 'messages'") as error:
            php.run('return $client->history("news");')
        assert error.value.kind == "ProtocolException"


def test_php_asks_an_older_daemon_in_its_own_words(runtime_dir: Path) -> None:
    def older(peer: Peer) -> None:
        peer.refuse(peer.request(), "invalid_params")
        request = peer.request()
        assert (request.method, request.params) == ("history", ["news", 5])
        peer.answer(request, {"epoch": "e", "offset": 1, "messages": [[1, "x"]]})
        assert peer.request().params == ["news", 5, {"time": True}]

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, older), running_php(path) as php:
        history = php.run('return $client->history("news", 5);')
        assert history["messages"] == [{"offset": 1, "message": "x", "binary": False, "time": None}]
        with pytest.raises(PhpError):
            php.run('return $client->history("news", 5);')


@pytest.mark.parametrize("more", [{}, {"time": "now"}, {"time": True}, {"time": 1.5}, "x"])
def test_a_time_that_is_none_is_an_error_in_php(runtime_dir: Path, more: object) -> None:
    def odd(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 1, "messages": [[1, "x", more]]})

    path = runtime_dir / "control.sock"
    with FakeDaemon(path, odd), running_php(path) as php:
        with pytest.raises(PhpError, match="no usable 'time'") as error:
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

    shown = [f"{channel} 1 1", f"{channel} 2 \\x1b[31m", f"{channel} 3 b'\\xff'"]
    assert [published(each) for each in ctl(daemon, "history", channel).out.splitlines()] == shown
    assert published(ctl(daemon, "history", channel, "-n", "1").out) == f"{channel} 3 b'\\xff'\n"
    with Client(daemon.control_socket) as client:
        times = [each.time for each in client.history(channel).messages]
    assert ctl(daemon, "history", channel, "-n", "2", "--json").json == {
        "channel": channel,
        "epoch": epoch,
        "offset": 3,
        "messages": [
            {"channel": channel, "offset": 2, "time": times[1], "message": "\x1b[31m"},
            {"channel": channel, "offset": 3, "time": times[2], "base64": "/w=="},
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
        assert [published(each) for each in lines(process, len(expected) + 1)] == [*expected, "sport 2 end"]


def test_tail_shows_when_old_messages_were_published(own: Daemon) -> None:
    publish(own, "tailed", "old", "older than this command")
    with Client(own.control_socket) as client:
        times = [each.time for each in client.history("tailed").messages]
    with tailing(own, "tailed", "--since", "all", "--json") as process:
        assert [json.loads(each)["time"] for each in lines(process, 2)] == times


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1767225600.123, "2026-01-01 01:00:00.123"),
        (1767225599.9996, "2026-01-01 01:00:00.000"),
        (-0.001, "1970-01-01 00:59:59.999"),
        (2.0**63, "9223372036854775808.000"),
    ],
)
def test_a_moment_is_local_time_with_milliseconds(seconds: float, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    try:
        assert moment(seconds) == shown
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_an_older_daemon_keeps_is_shown_without_times(runtime_dir: Path) -> None:
    def older(peer: Peer) -> None:
        peer.refuse(peer.request(), "invalid_params")
        peer.answer(peer.request(), {"epoch": "e", "offset": 1, "messages": [[1, "x"]]})

    path = runtime_dir / "realtime.sock"
    for options, printed in (([], "news 1 x\n"), (["--json"], '"offset": 1, "time": null, "message": "x"}]}\n')):
        with FakeDaemon(path, older):
            done = subprocess.run(
                [*REALTIMECTL, "--socket", path, "history", "news", *options],
                capture_output=True, text=True, check=True, cwd=ROOT,
            )  # fmt: skip
        path.unlink()
        assert done.stdout.endswith(printed)


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
        assert [published(each) for each in lines(process, 1)] == ["tailed 8 8"]


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
