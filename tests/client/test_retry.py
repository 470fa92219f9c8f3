"""Idempotency keys from the publishers' side: a broadcast whose connection breaks is repeated, and delivered once."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import anyio
import anyio.to_thread
import pytest
from anyio.from_thread import start_blocking_portal
from trio_websocket import WebSocketConnection

from realtimed import AsyncClient, Client, NoDaemonError, ProtocolError, RefusedError, RequestTimeoutError
from realtimed.rpc.wire import encode_response
from tests.kit.blocking import Opener, daemon_in_thread
from tests.kit.breaking_proxy import Ask, Break, BreakingProxy, answer_is_lost, command_is_lost, half_the_answer_is_lost
from tests.kit.clients import subscribe, websocket
from tests.kit.fake_daemon import FakeDaemon, Peer, receipt
from tests.kit.patience import PATIENCE
from tests.kit.php import PhpError, running_php
from tests.kit.stack import Daemon, runtime_directory
from tests.load.publishers import PUBLISHERS, WITH_RETRY, publishing

SHORT = 0.4
"""Seconds of a timeout that is expected to pass."""

LAST = "the last message"

names = map("news:{}".format, count())


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory) as running:
        yield running


@pytest.fixture
def channel() -> str:
    """A channel that no other test uses."""
    return next(names)


class Browser:
    """A WebSocket client that watches channels."""

    def __init__(self, daemon: Daemon, event: Callable[[], dict[str, Any]]) -> None:
        self._daemon = daemon
        self._event = event
        self._waiting: dict[str, deque[str]] = {}

    def delivered(self, channel: str) -> list[str]:
        """Return all that has been delivered on a channel, in the order it came."""
        with Client(self._daemon.control_socket) as client:
            client.broadcast(channel, LAST)
        messages = []
        while (data := self.next(channel)) != LAST:
            messages.append(data)
        return messages

    def next(self, channel: str) -> str:
        """Wait for the next message on a channel."""
        waiting = self._waiting.setdefault(channel, deque())
        while not waiting:
            event = self._event()
            if event["event"] == "message":
                self._waiting.setdefault(event["channel"], deque()).append(event.get("data") or event["base64"])
        return waiting.popleft()


@contextmanager
def browsing(daemon: Daemon, *channels: str) -> Iterator[Browser]:
    async def event(connection: WebSocketConnection) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE):
            event: dict[str, Any] = json.loads(await connection.get_message())
            return event

    with (
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"])
        ) as connection,
    ):
        for channel in channels:
            portal.call(connection.send_message, subscribe(channel))
            while portal.call(event, connection)["event"] != "subscribed":
                pass
        yield Browser(daemon, lambda: portal.call(event, connection))


# The connection breaks, the daemon lives.


@pytest.mark.parametrize("broken", [command_is_lost, answer_is_lost, half_the_answer_is_lost])
@pytest.mark.parametrize("kind", PUBLISHERS)
def test_a_broadcast_with_a_key_is_repeated_and_delivered_once(
    daemon: Daemon, path: Path, channel: str, kind: str, broken: Break
) -> None:
    with browsing(daemon, channel) as browser, BreakingProxy(path, daemon.control_socket, broken) as proxy:
        with publishing(kind, path) as publish:
            sent = publish(channel, "hello", key="order-17")

        assert (sent.recipients, sent.offset, sent.repeated) == (1, 1, broken is not command_is_lost)
        assert [(each.method, each.params) for each in proxy.commands] == [
            ("broadcast", [channel, "hello", "order-17"])
        ] * 2
        assert browser.delivered(channel) == ["hello"]


@pytest.mark.parametrize("kind", WITH_RETRY)
def test_a_key_can_be_made_up_for_one_call(daemon: Daemon, path: Path, channel: str, kind: str) -> None:
    with (
        browsing(daemon, channel) as browser,
        BreakingProxy(path, daemon.control_socket, *[answer_is_lost] * 3) as proxy,
        publishing(kind, path) as publish,
    ):
        first, second = publish(channel, "hello", retry=True), publish(channel, "hello", retry=True)

        assert [first.repeated, second.repeated] == [True, False]
        keys = [str(each.params[2]) for each in proxy.commands]
        assert len(keys) == 5
        assert len(set(keys[:4])) == 1
        assert keys[4] != keys[0]
        assert all(re.fullmatch(r"[0-9a-f]{32}", key) for key in keys)
        assert browser.delivered(channel) == ["hello", "hello"]


@pytest.mark.parametrize("kind", WITH_RETRY)
def test_a_key_that_is_given_is_used_with_retry_too(daemon: Daemon, path: Path, channel: str, kind: str) -> None:
    with BreakingProxy(path, daemon.control_socket) as proxy, publishing(kind, path) as publish:
        assert not publish(channel, "hello", key="mine", retry=True).repeated
        assert [each.params for each in proxy.commands] == [[channel, "hello", "mine"]]


@pytest.mark.parametrize("kind", PUBLISHERS)
def test_without_a_key_nothing_is_sent_twice(daemon: Daemon, path: Path, channel: str, kind: str) -> None:
    with (
        browsing(daemon, channel) as browser,
        BreakingProxy(path, daemon.control_socket, answer_is_lost) as proxy,
        publishing(kind, path) as publish,
    ):
        with pytest.raises(Exception) as error:  # noqa: PT011  (each publisher has its own; what it says is looked at)
            publish(channel, "hello")

        said = getattr(error.value, "stderr", b"").decode() or str(error.value)
        assert "hung up before it answered; what was asked may have been carried out, or not" in said
        assert [each.params for each in proxy.commands] == [[channel, "hello"]]
        assert browser.delivered(channel) == ["hello"]


def test_broadcast_many_is_repeated_and_delivered_once(daemon: Daemon, path: Path, connect: Opener) -> None:
    channels = [next(names), next(names)]
    with browsing(daemon, *channels) as browser, BreakingProxy(path, daemon.control_socket, answer_is_lost):
        client = connect(path)
        receipts = client.broadcast_many(channels, "hello", retry=True)

        assert [(each.recipients, each.repeated) for each in receipts] == [(1, True), (1, True)]
        assert [browser.delivered(each) for each in channels] == [["hello"], ["hello"]]


def test_php_repeats_many_channels_and_bytes_too(daemon: Daemon, path: Path) -> None:
    channels = [next(names), next(names)]
    listed = json.dumps(channels)
    with (
        browsing(daemon, *channels) as browser,
        BreakingProxy(path, daemon.control_socket, answer_is_lost, None, answer_is_lost),
        running_php(path) as php,
    ):
        receipts = php.run(f'return $client->broadcastMany({listed}, "hello", retry: true);')
        binary = php.run(f'return $client->broadcastBinary("{channels[0]}", "\\xff", key: "binary");')

        assert [each["repeated"] for each in [*receipts, binary]] == [True, True, True]
        assert browser.delivered(channels[0]) == ["hello", "/w=="]
        assert browser.delivered(channels[1]) == ["hello"]


@pytest.mark.parametrize("kind", ["blocking", "php"])
def test_a_large_message_is_repeated_in_full(daemon: Daemon, path: Path, channel: str, kind: str) -> None:
    message = "0123456789abcdef" * 4096
    with (
        browsing(daemon, channel) as browser,
        BreakingProxy(path, daemon.control_socket, command_is_lost, answer_is_lost),
        publishing(kind, path) as publish,
    ):
        assert publish(channel, message, retry=True).repeated
        assert browser.delivered(channel) == [message]


def test_a_connection_that_was_kept_and_one_that_is_new_are_repeated_alike(
    daemon: Daemon, path: Path, channel: str, connect: Opener
) -> None:
    with BreakingProxy(path, daemon.control_socket, answer_is_lost, None, answer_is_lost, None) as proxy:
        client = connect(path)
        assert client.broadcast(channel, "one", key="1").repeated
        assert client.broadcast(channel, "two", key="2").repeated
        assert client.broadcast(channel, "three") == (0, ANY, 3, False)
        assert [each.params[1] for each in proxy.commands] == ["one", "one", "two", "two", "three"]
        client.close()


# The functions have the default timeout, 5 s.
@pytest.mark.parametrize("kind", [kind for kind in WITH_RETRY if "function" not in kind])
def test_repeating_ends_with_the_timeout(daemon: Daemon, path: Path, channel: str, kind: str) -> None:
    with (
        browsing(daemon, channel) as browser,
        BreakingProxy(path, daemon.control_socket, for_ever=answer_is_lost) as proxy,
        publishing(kind, path, timeout=SHORT) as publish,
    ):
        began = time.monotonic()
        with pytest.raises((ProtocolError, RequestTimeoutError, PhpError)) as error:
            publish(channel, "hello", retry=True)

        assert re.search(
            r"carried out, or not\. It could not be repeated within 0.4 s: the connection broke each time$"
            r"|may still be carried out$",  # if the time is up between a command and the end of its connection
            str(error.value),
        )
        assert SHORT - 0.1 <= time.monotonic() - began < SHORT + 2
        assert getattr(error.value, "kind", "") in ("", "ProtocolException", "TimeoutException")
        assert 2 <= len(proxy.commands) <= SHORT / 0.05 + 2, "it does not hammer"
        assert browser.delivered(channel) == ["hello"]


# Nothing is repeated that was answered, or may still be.


def test_a_timeout_is_not_repeated(path: Path, connect: Opener) -> None:
    def silent(peer: Peer) -> None:
        peer.request()
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, silent) as fake:
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"within 0.4 s; what was asked may still be carried out"):
            connect(path, timeout=SHORT).broadcast("news", "hello", key="k")
        assert SHORT <= time.monotonic() - began < SHORT + 2
        assert fake.connections == 1


def test_php_does_not_repeat_after_a_timeout(path: Path) -> None:
    def silent(peer: Peer) -> None:
        peer.request()
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, silent) as fake, running_php(path, timeout=SHORT) as php:
        with pytest.raises(PhpError, match="may still be carried out") as error:
            php.run('return $client->broadcast("news", "hello", key: "k");')
        assert error.value.kind == "TimeoutException"
        assert fake.connections == 1


ENDINGS = {
    "last words": encode_response(None, {"code": "timeout", "message": "too slow"}, None),
    "garbage": b"\xc1",
    "another's answer": encode_response(77, None, receipt()),
    "no receipt": encode_response(0, None, {"recipients": 1}),
    "an odd receipt": encode_response(0, None, {**receipt(), "repeated": "yes"}),
}


@pytest.mark.parametrize("answer", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("kind", WITH_RETRY)
def test_an_answer_that_is_none_is_not_repeated(path: Path, kind: str, answer: bytes) -> None:
    def odd(peer: Peer) -> None:
        peer.request()
        peer.sock.sendall(answer)

    with FakeDaemon(path, odd) as fake, publishing(kind, path) as publish:
        with pytest.raises((ProtocolError, PhpError)) as error:
            publish("news", "hello", key="k")
        assert not re.search("hung up|could not be repeated", str(error.value))
        assert getattr(error.value, "kind", "ProtocolException") == "ProtocolException"
        assert fake.connections == 1


@pytest.mark.parametrize("kind", WITH_RETRY)
def test_where_no_daemon_is_nothing_is_waited_for(path: Path, kind: str) -> None:
    began = time.monotonic()
    with publishing(kind, path) as publish, pytest.raises((NoDaemonError, PhpError), match="no such file"):
        publish("news", "hello", retry=True)
    assert time.monotonic() - began < 4


# The daemon ends.


class Vanishing:
    """A proxy that loses its first answer and then is there no more; `gone` is set then."""

    def __init__(self, path: Path, daemon: Daemon, before: Callable[[], object]) -> None:
        self.gone = threading.Event()
        self.proxy = BreakingProxy(path, daemon.control_socket, self._vanish)
        self._before = before

    def _vanish(self, ask: Ask, command: bytes) -> bytes:
        ask(command)
        self._before()
        self.proxy.close()
        self.gone.set()
        return b""


@pytest.mark.parametrize("kind", ["blocking", "trio", "asyncio", "php"])
def test_a_daemon_that_stays_away_leaves_it_uncertain(daemon: Daemon, path: Path, channel: str, kind: str) -> None:
    vanishing = Vanishing(path, daemon, lambda: None)
    with vanishing.proxy, publishing(kind, path, timeout=SHORT) as publish:
        began = time.monotonic()
        with pytest.raises((ProtocolError, PhpError)) as error:
            publish(channel, "hello", retry=True)

    assert SHORT - 0.01 <= time.monotonic() - began < SHORT + 2
    assert str(error.value) == (
        f"the daemon at {path} hung up before it answered; what was asked may have been carried out, or not."
        " It could not be repeated within 0.4 s: no connection could be made"
    )
    assert getattr(error.value, "kind", "ProtocolException") == "ProtocolException"


@pytest.mark.parametrize("kind", ["blocking", "trio", "asyncio", "php"])
def test_a_killed_daemon_forgets_the_key_and_the_next_one_sends_again(
    runtime_dir: Path, channel: str, kind: str
) -> None:
    """SIGKILL when the broadcast was carried out and not yet answered: the one case in which it comes twice."""
    homes = [runtime_dir / "first", runtime_dir / "second"]
    for home in homes:
        home.mkdir()
    path = homes[1] / "realtime.sock"  # where the second daemon will be
    delivered, receipts = [], []
    with daemon_in_thread(homes[0]) as first, browsing(first, channel) as browser:

        def kill() -> None:
            delivered.append(browser.next(channel))
            first.process.kill()
            first.process.wait()

        vanishing = Vanishing(path, first, kill)
        with vanishing.proxy, publishing(kind, path, timeout=2 * PATIENCE) as publish:
            publisher = threading.Thread(target=lambda: receipts.append(publish(channel, "hello", key="order-17")))
            publisher.start()
            assert vanishing.gone.wait(PATIENCE)
            with daemon_in_thread(homes[1]) as second, Client(second.control_socket) as client:
                publisher.join()
                kept = client.history(channel)
                once_more = publish(channel, "hello", key="order-17")

    [repeated] = receipts
    assert not repeated.repeated, "the second daemon knows nothing of the first one's keys"
    assert (kept.position, [each.message for each in kept.messages]) == ((repeated.epoch, 1), ["hello"])
    assert delivered == ["hello"], "who watched both daemons has it twice"
    assert once_more == repeated._replace(repeated=True), "from now on the key is known"


ENDLESSLY = r"""
$sent = 0;
while (!file_exists('%(stop)s')) {
    while (true) {
        try {
            $client->broadcast('news', "{$sent}", key: "message-{$sent}");
            break;
        } catch (Realtime\NoDaemonException $nothingWasSent) {
            usleep(10000);
        }
    }
    $sent++;
}
return $sent;
"""


@pytest.mark.parametrize("kind", ["blocking", "php"])
def test_restarts_lose_nothing_and_repeat_nothing(runtime_dir: Path, kind: str) -> None:
    """A publisher that never pauses, while the daemon is stopped and started again, cleanly, with its history."""
    stop, path = runtime_dir / "stop", runtime_dir / "realtime.sock"
    options = ("--history-size", "1000000", "--history-total", "1G", "--state-file", str(runtime_dir / "state"))
    sent = []

    def in_python() -> None:
        number = 0
        with Client(path, timeout=2 * PATIENCE) as client:
            while not stop.exists():
                try:
                    client.broadcast("news", str(number), key=f"message-{number}")
                except NoDaemonError:  # nothing was sent
                    time.sleep(0.01)  # the pace of asking again
                else:
                    number += 1
        sent.append(number)

    def in_php() -> None:
        with running_php(path, timeout=2 * PATIENCE) as php:
            sent.append(php.run(ENDLESSLY % {"stop": stop}))

    publisher = threading.Thread(target=in_python if kind == "blocking" else in_php)
    publisher.start()
    try:
        offset = 0
        for _ in range(3):
            with daemon_in_thread(runtime_dir, *options) as daemon, Client(daemon.control_socket) as client:
                give_up = time.monotonic() + PATIENCE
                while client.history("news", 0).position.offset < offset + 200:
                    assert time.monotonic() < give_up
                offset = client.history("news", 0).position.offset
        with daemon_in_thread(runtime_dir, *options) as daemon, Client(daemon.control_socket) as client:
            stop.touch()
            publisher.join()
            kept = client.history("news", 10**9)
    finally:
        stop.touch()
        publisher.join()

    assert sent[0] > 600
    assert [each.message for each in kept.messages] == list(map(str, range(sent[0])))


def test_a_call_that_is_cancelled_while_it_waits_for_a_daemon_leaves_the_client_usable(
    daemon: Daemon, path: Path, channel: str
) -> None:
    async def main() -> None:
        vanishing = Vanishing(path, daemon, lambda: None)
        with vanishing.proxy:
            async with AsyncClient(path, timeout=PATIENCE) as client:
                async with anyio.create_task_group() as group:
                    group.start_soon(partial(client.broadcast, channel, "one", retry=True))
                    assert await anyio.to_thread.run_sync(vanishing.gone.wait, PATIENCE)
                    group.cancel_scope.cancel()
                with BreakingProxy(path, daemon.control_socket):
                    assert (await client.broadcast(channel, "two", key="2")).offset == 2
                    await client.aclose()

    for backend in ("trio", "asyncio"):
        channel = next(names)
        anyio.run(main, backend=backend)


# What a key is.


@pytest.mark.parametrize("kind", PUBLISHERS)
def test_the_same_key_from_anywhere_is_answered_and_sends_nothing(daemon: Daemon, channel: str, kind: str) -> None:
    path = daemon.control_socket
    with browsing(daemon, channel) as browser, Client(path) as first, publishing(kind, path) as publish:
        sent = first.broadcast(channel, "hello", key="from anywhere")

        assert publish(channel, "hello", key="from anywhere") == sent._replace(repeated=True)
        assert publish(channel, "something else", key="from anywhere") == sent._replace(repeated=True)
        assert not publish(channel, "and now", key="another").repeated
        assert browser.delivered(channel) == ["hello", "and now"]


def test_a_key_is_for_its_channels_alone(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    a, b = next(names), next(names)
    with browsing(daemon, a, b) as browser:
        outcomes = [
            [client.broadcast(a, "1", key="k")],
            [client.broadcast(b, "2", key="k")],
            client.broadcast_many([a, b], "3", key="k"),
            client.broadcast_many([b, a], "4", key="k"),
            client.broadcast_many([a, b], "5", key="k"),
            [client.broadcast(a, "6", key="K")],
        ]

        assert [[each.repeated for each in receipts] for receipts in outcomes] == [
            [False],
            [False],
            [False, False],
            [False, False],
            [True, True],
            [False],
        ]
        assert browser.delivered(a) == ["1", "3", "4", "6"]
        with Client(daemon.control_socket) as observer:
            assert [each.message for each in observer.history(b).messages] == ["2", "3", "4"]


@pytest.mark.parametrize("key", ["x", "x" * 200, "ключ 🎉", " "])
@pytest.mark.parametrize("kind", ["blocking", "php"])
def test_a_key_is_any_text_of_up_to_200_characters(daemon: Daemon, channel: str, kind: str, key: str) -> None:
    with publishing(kind, daemon.control_socket) as publish:
        assert [publish(channel, "hello", key=key).repeated for _ in range(2)] == [False, True]


@pytest.mark.parametrize("key", ["", "x" * 201])
@pytest.mark.parametrize("kind", WITH_RETRY)
def test_a_key_that_is_too_long_or_empty_is_refused(daemon: Daemon, channel: str, kind: str, key: str) -> None:
    with publishing(kind, daemon.control_socket) as publish:
        with pytest.raises((RefusedError, PhpError), match="a str of 1 to 200 characters") as error:
            publish(channel, "hello", key=key)
        assert getattr(error.value, "code", "") == "invalid_params"
        assert publish(channel, "hello", key="good").offset == 1


def test_a_key_of_another_type_is_an_error_at_once(path: Path, connect: Opener) -> None:
    client: Any = connect(path)  # where nobody listens
    for key in (17, b"bytes", ["list"]):
        with pytest.raises(TypeError, match="key must be a str"):
            client.broadcast("news", "hello", key=key)
        with pytest.raises(TypeError, match="key must be a str"):
            client.broadcast_many(["news"], "hello", key=key, retry=True)


def test_a_key_is_forgotten_after_the_retry_window(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir, "--retry-window", "0.2") as daemon, Client(daemon.control_socket) as client:
        began = time.monotonic()
        assert not client.broadcast("news", "hello", key="k").repeated
        while client.broadcast("news", "hello", key="k").repeated:
            assert time.monotonic() - began < PATIENCE
        assert time.monotonic() - began >= 0.2
