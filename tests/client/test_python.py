"""The clients: what blocks and what awaits, through one suite; the real daemon, and stand-ins for its faults."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import pytest
from anyio.from_thread import start_blocking_portal

import realtimed
import realtimed.client.calls as calls
from realtimed import (
    AsyncClient,
    ChannelInfo,
    ChannelMessage,
    Client,
    NoDaemonError,
    Position,
    ProtocolError,
    Receipt,
    RefusedError,
    RequestTimeoutError,
)
from realtimed.client.batch import Batch, request_ids
from realtimed.client.line import KEPT
from realtimed.rpc.wire import Decoder, Request, Response, encode_request, encode_response
from tests.kit.blocking import FLAVOURS, Opener, daemon_in_thread, opener, untimed
from tests.kit.clients import closing, subscribe, websocket
from tests.kit.fake_daemon import PATIENCE, FakeDaemon, Peer, listening, receipt
from tests.kit.stack import ROOT, Daemon, runtime_directory

SHORT = 0.2
"""Seconds of a timeout that is expected to pass."""


@pytest.fixture(scope="module", name="daemon")
def shared_daemon() -> Iterator[Daemon]:
    with runtime_directory() as directory, daemon_in_thread(directory, "--history-size", "0") as running:
        yield running


@pytest.fixture(params=FLAVOURS)
def connect(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Open clients of each flavour, all of which are called as if they blocked."""
    with opener(request.param) as opening:
        yield opening


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    """A path for the socket of a stand-in."""
    return runtime_dir / "control.sock"


def offsets(outcomes: list[Receipt | RefusedError]) -> list[int | str]:
    return [outcome.code if isinstance(outcome, RefusedError) else outcome.offset for outcome in outcomes]


def descriptors() -> int:
    """Return how many open files this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def until(true: Callable[[], bool]) -> None:
    """Wait until `true` returns True; fail after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline


# What the daemon does for a client.


@pytest.mark.parametrize("message", ["", "hello", "Grüße, 世界 🎉", "\0", b"", b"\x00\xff", "x" * 65536, b"x" * 65536])
def test_a_broadcast_reaches_a_subscriber_as_it_was_sent(daemon: Daemon, connect: Opener, message: str | bytes) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("news") as subscription:
        sent = client.broadcast("news", message)

        assert sent == Receipt(recipients=1, epoch=subscription.positions["news"].epoch, offset=1)
        assert untimed(next(subscription)) == ChannelMessage("news", message, 1)


def test_a_broadcast_nobody_watches_has_no_recipients(daemon: Daemon, connect: Opener) -> None:
    assert connect(daemon.control_socket).broadcast("nobody", "hello").recipients == 0


def test_broadcast_many_gives_a_receipt_for_each_channel(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("a", "b") as subscription:
        receipts = client.broadcast_many(("b", "nobody", "a"), b"hello")

        assert [each.recipients for each in receipts] == [1, 0, 1]
        assert [untimed(next(subscription)) for _ in range(2)] == [
            ChannelMessage("b", b"hello", 1),
            ChannelMessage("a", b"hello", 1),
        ]


def test_broadcast_many_sends_to_all_channels_or_to_none(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("a") as subscription:
        with pytest.raises(RefusedError) as refused:
            client.broadcast_many(["a", "not a channel"], "hello")
        client.broadcast("a", "later")

        assert refused.value.code == "invalid_channel"
        assert next(subscription).message == "later"


def test_broadcast_each_says_of_every_message_what_became_of_it(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("a") as subscription:
        outcomes = client.broadcast_each(
            [("a", "one"), ("not a channel", "x"), ("a", "\ud800"), ("a", b"two"), ("a", "x" * 65537), ("a", "three")]
        )

        assert offsets(outcomes) == [1, "invalid_channel", "invalid_utf8", 2, "message_too_large", 3]
        assert [next(subscription).message for _ in range(3)] == ["one", b"two", "three"]


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 1), (20_000, 20), (100, 65536)])
def test_broadcast_each_sends_any_number_of_any_size(daemon: Daemon, connect: Opener, count: int, size: int) -> None:
    client = connect(daemon.control_socket, timeout=30)

    outcomes = client.broadcast_each(("bulk", "x" * size) for _ in range(count))

    assert len(outcomes) == count
    assert all(isinstance(outcome, Receipt) for outcome in outcomes)


def test_channels_are_those_with_subscribers(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("fruit:apple", "fruit:pear", "meat") as subscription:
        client.broadcast("fruit:pear", "hello")
        pear = ChannelInfo(1, subscription.positions["fruit:pear"].epoch, 1, history=0)

        assert set(client.channels()) == {"fruit:apple", "fruit:pear", "meat"}
        assert client.channels("fruit:p") == {"fruit:pear": pear}


def test_clients_are_listed_and_can_be_disconnected(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with (
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(websocket(daemon.websocket_socket)) as connection,
    ):
        portal.call(connection.send_message, subscribe("news"))
        until(lambda: "news" in client.channels())
        [found] = [each for each in client.clients() if each.channels]

        assert (found.protocol, found.channels, found.pending) == ("plain", ["news"], 0)
        assert abs(found.connected_since - time.time()) < 60
        assert client.disconnect(found.id, 4000, "enough")
        assert portal.call(closing, connection) == (4000, "enough")
    until(lambda: not client.disconnect(found.id))


def test_stats_info_and_ping(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    client.ping()

    assert client.info()["version"] == realtimed.__version__
    assert client.info()["limits"]["max_message"] == 65536
    before = client.stats()
    client.broadcast("news", "hello")
    assert client.stats()["publications"] == before["publications"] + 1


@pytest.mark.parametrize(
    ("channel", "message", "code"),
    [
        ("", "hello", "invalid_channel"),
        ("not a channel", "hello", "invalid_channel"),
        ("news", "x" * 65537, "message_too_large"),
        ("news", b"x" * 10_000_000, "message_too_large"),
        ("news", "half a surrogate pair: \ud83c", "invalid_utf8"),
        ("\udcff", "hello", "invalid_utf8"),
    ],
    ids=["no channel", "bad channel", "too large", "much too large", "bad text", "bad text as channel"],
)
def test_what_is_refused_raises_and_leaves_the_client_usable(
    daemon: Daemon, connect: Opener, channel: str, message: str | bytes, code: str
) -> None:
    client = connect(daemon.control_socket)
    with pytest.raises(RefusedError) as refused:
        client.broadcast(channel, message)

    assert refused.value.code == code
    assert code in str(refused.value)
    assert client.broadcast("news", "hello").offset == 1


def test_a_subscription_knows_where_it_began(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("news") as first:
        client.broadcast("news", "before")
        with client.subscribe("sport", "news", "sport") as second:
            client.broadcast_many(["news", "sport"], "after")

            assert list(second.positions) == ["sport", "news"]
            assert second.positions["news"] == Position(first.positions["news"].epoch, 1)
            assert second.positions["sport"].offset == 0
            assert [untimed(next(second)) for _ in range(2)] == [
                ChannelMessage("news", "after", 2),
                ChannelMessage("sport", "after", 1),
            ]


def test_a_subscription_to_a_bad_channel_is_refused(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with pytest.raises(RefusedError, match="invalid_channel"), client.subscribe("news", "not a channel"):
        pass
    with pytest.raises(ValueError, match="at least one channel"), client.subscribe():
        pass


def test_receive_returns_none_when_nothing_comes_in_time(daemon: Daemon) -> None:
    with Client(daemon.control_socket) as client, client.subscribe("news") as subscription:
        assert subscription.receive(0) is None
        assert subscription.receive(0.01) is None
        client.broadcast("news", "hello")
        assert untimed(subscription.receive(10)) == ChannelMessage("news", "hello", 1)


def test_one_client_serves_many_at_once(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket, timeout=30)
    taken: list[int] = []

    def publish(number: int) -> None:
        for _ in range(50):
            assert client.broadcast(f"of:{number}", "hello").recipients == number % 2
            taken.append(client.broadcast("all", "hello").offset)

    with client.subscribe("all", *(f"of:{number}" for number in range(1, 8, 2))):
        threads = [threading.Thread(target=publish, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(taken) == list(range(1, 401))


def test_a_client_outlives_its_daemon(runtime_dir: Path, connect: Opener) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        client = connect(daemon.control_socket)
        first = client.info()["pid"]
        with client.subscribe("news") as subscription:
            daemon.process.terminate()
            with pytest.raises(NoDaemonError, match="hung up"):
                next(subscription)
    with pytest.raises(NoDaemonError):
        client.broadcast("news", "hello")
    with daemon_in_thread(runtime_dir):
        second = client.info()["pid"]
    with daemon_in_thread(runtime_dir):
        assert len({first, second, client.info()["pid"]}) == 3


def test_a_closed_client_opens_again(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    client.ping()
    client.close()
    client.close()
    client.ping()


# What goes wrong before anything is sent.


def test_wrong_types_are_errors_at_once(path: Path, connect: Opener) -> None:
    client: Any = connect(path)  # where nobody listens
    for channel, message in [("news", {"a": 1}), ("news", None), (b"news", "hello"), ("news", bytearray(b"x"))]:
        with pytest.raises(TypeError, match="must be a str"):
            client.broadcast(channel, message)
    with pytest.raises(TypeError, match="use broadcast"):
        client.broadcast_many("news", "hello")


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(timeout: float) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="timeout must be above 0"):
            kind("/run/realtime.sock", timeout=timeout)


def test_no_such_file(path: Path, connect: Opener) -> None:
    with pytest.raises(NoDaemonError, match=f"no daemon at {path}: there is no such file"):
        connect(path).broadcast("news", "hello")
    with pytest.raises(NoDaemonError, match="no such file"), connect(path).subscribe("news"):
        pass


def test_a_socket_left_by_a_dead_daemon(path: Path, connect: Opener) -> None:
    with listening(path, 1):
        pass
    with pytest.raises(NoDaemonError, match="left from one that has ended"):
        connect(path).broadcast("news", "hello")


def test_a_file_that_is_no_socket(path: Path, connect: Opener) -> None:
    path.touch(0o400)
    with pytest.raises(NoDaemonError, match="not a socket"):
        connect(path).broadcast("news", "hello")
    path.parent.chmod(0o755)
    with unprivileged(), pytest.raises(NoDaemonError, match="not a socket"):
        connect(path).broadcast("news", "hello")


@pytest.mark.parametrize("bad", ["", "/tmp/\0", "/tmp/" + "x" * 103, "/tmp/" + "é" * 52])
def test_a_path_no_socket_can_have(connect: Opener, bad: str) -> None:
    with pytest.raises(NoDaemonError, match="no daemon can be at"):
        connect(bad).broadcast("news", "hello")


def test_a_directory_on_the_way_that_is_none(path: Path, connect: Opener) -> None:
    path.touch()
    with pytest.raises(NoDaemonError, match="Not a directory"):
        connect(path / "control.sock").broadcast("news", "hello")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be another user than root, to whom nothing is forbidden."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_socket_that_is_closed_to_this_user(path: Path, connect: Opener) -> None:
    with listening(path, 1):
        path.chmod(0o440)
        path.parent.chmod(0o755)
        with unprivileged(), pytest.raises(NoDaemonError, match=r"user \S+ may not write .* mode 0440, owner \S+ and "):
            connect(path).broadcast("news", "hello")
        path.parent.chmod(0o000)
        with unprivileged(), pytest.raises(NoDaemonError, match="may not enter a directory"):
            connect(path).broadcast("news", "hello")
        path.parent.chmod(0o700)


@contextmanager
def full_queue(path: Path) -> Iterator[None]:
    """Fill the queue of new connections at `path`."""
    with ExitStack() as waiting:
        try:
            while True:
                sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(path))
        except BlockingIOError:
            yield


def test_a_daemon_that_accepts_no_connection(path: Path, connect: Opener) -> None:
    with listening(path, 0), full_queue(path):
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"did not accept the connection within 0.2 s; nothing was sent"):
            connect(path, timeout=SHORT).broadcast("news", "hello")
        assert SHORT <= time.monotonic() - began < SHORT + 2


# What goes wrong in the middle.


def healthy(peer: Peer) -> None:
    """Answer everything until the client hangs up."""
    for request in peer.requests():
        peer.receipt(request, 2)


def test_a_silent_daemon_is_a_timeout_and_the_next_call_gets_its_own_answer(path: Path, connect: Opener) -> None:
    def silent(peer: Peer) -> None:
        peer.request()
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, silent, healthy):
        client = connect(path, timeout=SHORT)
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"did not answer within 0.2 s; .* may still be carried out"):
            client.broadcast("news", "one")
        assert SHORT <= time.monotonic() - began < SHORT + 2
        assert client.broadcast("news", "two").offset == 2
        client.close()


def test_the_timeout_is_for_the_whole_answer(path: Path, connect: Opener) -> None:
    def talking(peer: Peer) -> None:
        peer.request()
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                peer.notify("weather", "fine")  # something comes all the time, only not the answer

    with FakeDaemon(path, talking), pytest.raises(RequestTimeoutError):
        connect(path, timeout=SHORT).broadcast("news", "hello")


ANSWER = encode_response(1, None, receipt())


@pytest.mark.parametrize("part", [b"", ANSWER[:1], ANSWER[:-1]])
def test_a_connection_that_ends_before_the_answer_is_an_error_and_nothing_is_sent_again(
    path: Path, connect: Opener, part: bytes
) -> None:
    def hanging_up(peer: Peer) -> None:
        peer.receipt(peer.request())
        peer.request()
        peer.sock.sendall(part)

    with FakeDaemon(path, hanging_up, healthy) as fake:
        client = connect(path)
        client.broadcast("news", "one")
        with pytest.raises(ProtocolError, match=r"hung up before it answered; .* may have been carried out, or not"):
            client.broadcast("news", "two")
        assert fake.connections == 1
        assert client.broadcast("news", "three").offset == 2
        client.close()


def test_a_reset_connection_is_an_error_and_nothing_is_sent_again(path: Path, connect: Opener) -> None:
    def resetting(peer: Peer) -> None:
        peer.receipt(peer.request())
        peer.sock.recv(1)  # the rest of the request stays unread

    with FakeDaemon(path, resetting, healthy) as fake:
        client = connect(path)
        client.broadcast("news", "one")
        with pytest.raises(ProtocolError, match="may have been carried out, or not"):
            client.broadcast("news", "two")
        assert fake.connections == 1
        assert client.broadcast("news", "three").offset == 2
        client.close()


def hangs_up(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_RDWR)


def stops_reading(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_RD)  # which the client sees only when it sends


def says_goodbye(peer: Peer) -> None:
    peer.sock.sendall(encode_response(None, {"code": "idle", "message": "nothing heard from you"}, None))


def leaves_half_an_answer(peer: Peer) -> None:
    peer.sock.sendall(ANSWER[:5])


@pytest.mark.parametrize("between", [hangs_up, stops_reading, says_goodbye, leaves_half_an_answer])
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_connection_that_went_stale_between_calls_is_replaced(
    path: Path, connect: Opener, between: Callable[[Peer], None], size: int
) -> None:
    stale, over = threading.Event(), threading.Event()
    seen = []

    def going_stale(peer: Peer) -> None:
        peer.receipt(peer.request())
        between(peer)
        stale.set()
        assert over.wait(PATIENCE)

    def recording(peer: Peer) -> None:
        for request in peer.requests():
            seen.append(request.params)
            peer.receipt(request)

    with FakeDaemon(path, going_stale, recording) as fake:
        client = connect(path)
        client.broadcast("news", "one")
        assert stale.wait(PATIENCE)
        client.broadcast("news", "2" * size)
        client.broadcast("news", "three")
        over.set()
        client.close()
    assert fake.connections == 2
    assert seen == [["news", "2" * size], ["news", "three"]]


def test_a_connection_is_replaced_only_once(path: Path, connect: Opener) -> None:
    gone = threading.Event()

    def answering_once(peer: Peer) -> None:
        peer.receipt(peer.request())
        hangs_up(peer)
        gone.set()

    with FakeDaemon(path, answering_once, hangs_up, healthy) as fake:
        client = connect(path)
        client.broadcast("news", "one")
        assert gone.wait(PATIENCE)
        with pytest.raises(ProtocolError, match="hung up before it answered"):
            client.broadcast("news", "two")
        assert fake.connections == 2
        assert client.broadcast("news", "three").offset == 2
        client.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"\xc1", "not its protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not its protocol"),
        (encode_response(77, None, receipt()), "request 77, which awaits no answer"),
        (encode_request(0, "broadcast", ["news", "hello"]), "sent a request"),
        (
            encode_response(None, {"code": "timeout", "message": "too slow"}, None),
            r"ended the connection: too slow \(tim",
        ),
        (encode_response(None, "odd", None), "no usable 'code'"),
        (encode_response(0, "odd", None), "no usable 'code'"),
        (encode_response(0, {"code": 7, "message": "x"}, None), "no usable 'code'"),
        (encode_response(0, None, None), "no usable 'recipients'"),
        (encode_response(0, None, {"recipients": 1, "epoch": "e"}), "no usable 'offset'"),
        (encode_response(0, None, [1, "e", 1]), "no usable 'recipients'"),
    ],
)
def test_an_answer_that_is_none_is_an_error_and_the_connection_is_dropped(
    path: Path, connect: Opener, answer: bytes, said: str
) -> None:
    def odd(peer: Peer) -> None:
        peer.request()
        peer.sock.sendall(answer)
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, odd, healthy):
        client = connect(path)
        with pytest.raises(ProtocolError, match=said):
            client.broadcast("news", "hello")
        assert client.broadcast("news", "hello").offset == 2
        client.close()


def test_a_good_answer_counts_though_garbage_follows(path: Path, connect: Opener) -> None:
    def odd(peer: Peer) -> None:
        peer.sock.sendall(encode_response(peer.request().id, None, receipt(7)) + b"\xc1")
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, odd, healthy):
        client = connect(path)
        assert client.broadcast("news", "hello").offset == 7
        assert client.broadcast("news", "hello").offset == 2
        client.close()


def test_an_answer_may_come_in_pieces_and_among_notifications(path: Path, connect: Opener) -> None:
    def slow(peer: Peer) -> None:
        request = peer.request()
        peer.notify("weather", "fine")
        for byte in encode_response(request.id, None, receipt(7)):
            peer.sock.sendall(bytes([byte]))
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, slow):
        client = connect(path)
        assert client.broadcast("news", "hello").offset == 7
        client.close()


def test_a_daemon_that_dies_takes_the_subscription_along(path: Path, connect: Opener) -> None:
    def dying(peer: Peer) -> None:
        peer.notify("message", "news", "before the answer", 4)
        peer.answer(peer.request(), {"epoch": "e", "offset": 3})
        peer.notify("message", "news", b"last", 5)
        peer.sock.sendall(b"\x93\x02\xa7mess")

    with FakeDaemon(path, dying), connect(path).subscribe("news") as subscription:
        assert subscription.positions == {"news": Position("e", 3)}
        assert next(subscription) == ChannelMessage("news", "before the answer", 4)
        assert next(subscription) == ChannelMessage("news", b"last", 5)
        with pytest.raises(NoDaemonError, match="hung up"):
            next(subscription)


# Many broadcasts on their way at once.


def test_answers_find_their_broadcasts_in_any_order(path: Path, connect: Opener) -> None:
    def shuffling(peer: Peer) -> None:
        first, second, third = peer.request(), peer.request(), peer.request()
        peer.receipt(third, 3)
        peer.receipt(first, 1)
        peer.refuse(second)
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, shuffling):
        client = connect(path)
        assert offsets(client.broadcast_each([("a", "1"), ("b", "2"), ("c", "3")])) == [1, "invalid_channel", 3]
        client.close()


def test_answers_are_read_while_requests_are_written(path: Path, connect: Opener) -> None:
    def stubborn(peer: Peer) -> None:
        for request in peer.requests():
            peer.answer(request, {**receipt(), "padding": bytes(50_000)})  # waits until the client reads

    with FakeDaemon(path, stubborn):
        client = connect(path)
        outcomes = client.broadcast_each(("news", "x" * 50_000) for _ in range(100))
        assert outcomes == [Receipt(0, "e", 1)] * 100
        client.close()


def test_the_timeout_of_many_is_for_the_next_answer(path: Path, connect: Opener) -> None:
    def leisurely(peer: Peer) -> None:
        for request in islice(peer.requests(), 4):
            time.sleep(0.2)  # no condition to wait for: the daemon is slow
            peer.receipt(request)
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, leisurely):
        client = connect(path, timeout=0.6)
        assert len(client.broadcast_each([("news", "hello")] * 4)) == 4
        with pytest.raises(RequestTimeoutError):
            client.broadcast_each([("news", "hello")] * 4)


def test_an_error_among_many_says_how_many_were_answered(path: Path, connect: Opener) -> None:
    def dying(peer: Peer) -> None:
        requests = [peer.request() for _ in range(5)]
        peer.receipt(requests[0])
        peer.refuse(requests[1])

    with FakeDaemon(path, dying) as fake:
        client = connect(path)
        with pytest.raises(ProtocolError, match="hung up") as caught:
            client.broadcast_each([("news", "hello")] * 5)
        assert caught.value.__notes__ == ["2 broadcasts had been answered before."]
        assert fake.connections == 1


def test_an_error_of_the_callers_pairs_reaches_the_caller(path: Path, connect: Opener) -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        for number in range(2000):
            yield "news", str(number)
        raise LookupError("no more")

    def left_alone(peer: Peer) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            healthy(peer)

    with FakeDaemon(path, left_alone, healthy):
        client = connect(path)
        with pytest.raises(LookupError, match="no more"):
            client.broadcast_each(pairs())
        assert client.broadcast("news", "hello").offset == 2
        client.close()


def test_a_batch_has_a_bounded_number_in_flight_and_keeps_the_order() -> None:
    batch = Batch((calls.broadcast("news", str(number)) for number in range(100)), request_ids(), in_flight=10)
    decoder = Decoder(2**20)
    order = []
    waiting: list[Request] = []
    while not batch.done:
        for message in decoder.feed(batch.requests()):
            assert isinstance(message, Request)
            waiting.append(message)
            order.append(message.params[1])
        assert 1 <= len(waiting) == batch.unanswered <= 10
        request = waiting.pop(len(waiting) // 2)
        batch.answer(Response(request.id, None, receipt(request.id)))

    assert order == [str(number) for number in range(100)]
    assert offsets(batch.results()) == list(range(100))


# Only for the client that blocks.


def test_an_interrupted_call_cannot_leave_its_answer_to_the_next_one(path: Path) -> None:
    def late(peer: Peer) -> None:
        request = peer.request()
        os.kill(os.getpid(), signal.SIGALRM)
        peer.wait_until_it_hangs_up()
        with pytest.raises(BrokenPipeError):
            peer.receipt(request, 1)

    class Interrupted(BaseException):
        pass

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with FakeDaemon(path, late, healthy), Client(path) as client:
            with pytest.raises(Interrupted):
                client.broadcast("news", "one")
            assert client.broadcast("news", "two").offset == 2
    finally:
        signal.signal(signal.SIGALRM, before)


LONG = "x" * 70_000
"""A message that goes out before the next is asked for: then the call is under way, on a connection."""


def test_no_call_waits_for_another(daemon: Daemon) -> None:
    """Those of another thread go on meanwhile, and those that are made in the middle of a call of the same thread."""
    begun, over = threading.Event(), threading.Event()

    def pairs() -> Iterator[tuple[str, str]]:
        yield "news", LONG
        client.ping()
        begun.set()
        assert over.wait(PATIENCE)

    with Client(daemon.control_socket, timeout=PATIENCE) as client:
        other = threading.Thread(target=client.broadcast_each, args=[pairs()])
        other.start()
        assert begun.wait(PATIENCE)
        began = time.monotonic()
        client.ping()
        assert time.monotonic() - began < PATIENCE / 2
        over.set()
        other.join()


def test_a_bounded_number_of_connections_is_kept(path: Path) -> None:
    """A call that is within another, within another, and so on, has each time a connection of its own."""
    depth = 3 * KEPT

    def nested(client: Client, left: int) -> Iterator[tuple[str, str]]:
        yield "news", LONG
        if left:
            client.broadcast_each(nested(client, left - 1))

    with FakeDaemon(path, *[healthy] * depth) as fake, Client(path) as client:
        before = descriptors()
        client.broadcast_each(nested(client, depth - 1))
        assert fake.connections == depth
        until(lambda: descriptors() <= before + 2 * KEPT)  # the stand-in's side, too
        client.broadcast("news", "hello")
        assert fake.connections == depth


def test_close_leaves_a_call_that_is_under_way_its_connection(path: Path) -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        yield "news", LONG
        client.close()
        yield "news", "two"

    with FakeDaemon(path, healthy, healthy) as fake, Client(path) as client:
        assert len(client.broadcast_each(pairs())) == 2
        assert fake.connections == 1
        client.broadcast("news", "three")  # the first connection was closed when its call had ended
        assert fake.connections == 2


def run_python(script: str, *arguments: str, strict: bool = True, **environment: str) -> str:
    """Run a script, if `strict` with all warnings shown; return its output after checking that it was well."""
    options = ["-X", "dev", "-W", "error"] if strict else []
    done = subprocess.run(
        [sys.executable, *options, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


FORKING = """
import os, sys, threading, warnings
from realtimed import Client, broadcast

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: a process with threads forks
path = sys.argv[1]
client = Client(path)
publishers = client.stats()["publishers"]
broadcast("news", "parent", socket=path)

def hold():
    def pairs():
        begun.set()
        over.wait()
        yield "news", "from the thread"
    client.broadcast_each(pairs())

begun, over = threading.Event(), threading.Event()
thread = threading.Thread(target=hold)
thread.start()
begun.wait()
child = os.fork()  # while another thread has its turn
if child == 0:
    assert client.broadcast("news", "child").offset == 1
    assert broadcast("news", "child", socket=path).offset == 1
    assert client.stats()["publishers"] == publishers + 3, client.stats()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
over.set()
thread.join()
assert client.broadcast("news", "parent").offset == 1
assert client.stats()["publishers"] == publishers + 1, client.stats()
client.close()
print("done")
"""


def test_a_forked_child_opens_connections_of_its_own(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir, "--history-size", "0") as daemon:
        assert run_python(FORKING, str(daemon.control_socket)) == "done\n"


FORKED_IN_USE = """
import os, stat, sys, threading, warnings
from realtimed import Client, NoDaemonError

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: a process with threads forks

def sockets():
    descriptors = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(each) and stat.S_ISSOCK(os.stat(each).st_mode) for each in descriptors)

def pairs():
    yield "other", "x" * 70_000
    begun.set()
    over.wait()

client = Client(sys.argv[1])
client.ping()
begun, over = threading.Event(), threading.Event()
thread = threading.Thread(target=client.broadcast_each, args=[pairs()], daemon=True)
with client.subscribe("news") as subscription:
    thread.start()
    begun.wait()
    assert sockets() == 2
    child = os.fork()
    if child == 0:
        assert sockets() == 0, sockets()  # what a child kept open, the daemon would go on serving
        try:
            subscription.receive(0)
        except NoDaemonError as error:
            assert str(error).endswith("after a fork, subscribe again"), error
        else:
            raise AssertionError("the child takes the messages of the parent")
        client.broadcast("news", "of the child")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print(subscription.receive(10).message)
    over.set()
    thread.join()
client.close()
"""


def test_a_forked_child_has_none_of_the_connections_that_were_in_use(daemon: Daemon) -> None:
    assert run_python(FORKED_IN_USE, str(daemon.control_socket)) == "of the child\n"


def test_a_closed_connection_ends_though_another_process_has_a_copy_of_it(path: Path) -> None:
    """As a child has that was forked by no Python code, or that has not come to close it yet."""
    heard_of_the_end = threading.Event()

    def listening_to_the_end(peer: Peer) -> None:
        healthy(peer)
        heard_of_the_end.set()

    with FakeDaemon(path, listening_to_the_end), Client(path) as client:
        client.broadcast("news", "hello")
        child = subprocess.Popen(
            ["sleep", str(3 * PATIENCE)], pass_fds=[each for each in range(3, 100) if is_socket(each)]
        )
        try:
            client.close()
            assert heard_of_the_end.wait(PATIENCE / 2)
        finally:
            child.kill()
            child.wait()


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


SHARED = """
import sys
from threading import Thread
from realtimed import Client, broadcast

with Client() as client:
    publishers = client.stats()["publishers"]
    threads = [Thread(target=broadcast, args=("news", "hello")) for _ in range(20)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    while not 1 <= client.stats()["publishers"] - publishers <= 8:  # the daemon notices a little later
        pass
    print(broadcast("news", b"hello", socket=client.socket))
"""


def test_broadcast_keeps_some_connections_and_closes_them_at_the_end(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        output = run_python(SHARED, REALTIME_SOCKET=str(daemon.control_socket))

    assert output.startswith("Receipt(recipients=0, epoch=")


WITHOUT_POLL = """
import select, sys
del select.poll
from realtimed import Client
with Client(sys.argv[1], timeout=30) as client, client.subscribe("news") as subscription:
    print(client.broadcast("news", "x" * 60_000).recipients)
    print(len(subscription.receive(10).message), subscription.receive(0))
"""

UNDER_EVENTLET = """
import warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
import sys
from realtimed import Client

def count():
    while True:
        turns.append(1)
        eventlet.sleep(0)

turns = []
counting = eventlet.spawn(count)
with Client(sys.argv[1]) as client, client.subscribe("news") as subscription:
    recipients = eventlet.GreenPool().imap(lambda number: client.broadcast("news", str(number)).recipients, range(100))
    print(sum(recipients), len({subscription.receive(10).message for _ in range(100)}))
    turns.clear()
    print(subscription.receive(0.1), len(turns) > 1)
"""


def test_a_client_does_without_poll(daemon: Daemon) -> None:
    assert run_python(WITHOUT_POLL, str(daemon.control_socket)) == "1\n60000 None\n"


def test_calls_under_eventlet_let_its_other_threads_go_on(daemon: Daemon) -> None:
    assert run_python(UNDER_EVENTLET, str(daemon.control_socket), strict=False) == "100 100\nNone True\n"


# Only for the client that awaits.


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run an async function in an event loop of its own, which a test's function that is not async may do."""
    return partial(anyio.run, backend=request.param)


def test_a_cancelled_call_cannot_leave_its_answer_to_the_next_one(path: Path, run: Callable[..., Any]) -> None:
    asked, cancelled = threading.Event(), threading.Event()

    def late(peer: Peer) -> None:
        request = peer.request()
        asked.set()
        assert cancelled.wait(PATIENCE)
        with pytest.raises(BrokenPipeError):
            peer.receipt(request, 1)

    async def main() -> None:
        async with AsyncClient(path) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.broadcast, "news", "one")
                await anyio.to_thread.run_sync(asked.wait)
                group.cancel_scope.cancel()
            cancelled.set()
            assert (await client.broadcast("news", "two")).offset == 2

    with FakeDaemon(path, late, healthy):
        run(main)


def test_cancelling_those_who_wait_does_not_disturb_whose_turn_it_is(path: Path, run: Callable[..., Any]) -> None:
    asked, answer = threading.Event(), threading.Event()

    def patient(peer: Peer) -> None:
        request = peer.request()
        asked.set()
        assert answer.wait(PATIENCE)
        peer.receipt(request, 7)
        healthy(peer)

    async def main() -> None:
        received = []

        async def first() -> None:
            received.append(await client.broadcast("news", "one"))

        async with AsyncClient(path) as client, anyio.create_task_group() as group:
            group.start_soon(first)
            await anyio.to_thread.run_sync(asked.wait)
            async with anyio.create_task_group() as waiting:
                for _ in range(3):
                    waiting.start_soon(client.broadcast, "news", "never sent")
                await anyio.wait_all_tasks_blocked()
                waiting.cancel_scope.cancel()
            assert not received
            answer.set()
        assert [each.offset for each in received] == [7]

    with FakeDaemon(path, patient) as fake:
        run(main)
        assert fake.connections == 1


def test_a_task_does_not_wait_for_its_turn_for_ever(path: Path, run: Callable[..., Any]) -> None:
    over = threading.Event()

    def leisurely(peer: Peer) -> None:
        for request in peer.requests():
            over.wait(SHORT / 4)
            peer.receipt(request)

    async def main() -> None:
        async with AsyncClient(path, timeout=SHORT) as client, anyio.create_task_group() as group:
            group.start_soon(client.broadcast_each, [("news", "hello")] * 100)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RequestTimeoutError, match=r"kept the connection busy for 0.2 s; nothing was sent"):
                await client.broadcast("news", "hello")
            over.set()

    with FakeDaemon(path, leisurely):
        run(main)


def test_a_cancelled_receive_loses_no_message(daemon: Daemon, run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with AsyncClient(daemon.control_socket) as client, client.subscribe("news") as subscription:
            for number in range(50):
                with anyio.move_on_after(0):
                    await subscription.receive()
                async with anyio.create_task_group() as group:
                    group.start_soon(subscription.receive)
                    await anyio.wait_all_tasks_blocked()
                    group.cancel_scope.cancel()
                await client.broadcast("news", str(number))
                assert (await subscription.receive()).message == str(number)

    run(main)


def test_a_client_may_go_from_one_event_loop_to_the_next(daemon: Daemon, run: Callable[..., Any]) -> None:
    client = AsyncClient(daemon.control_socket)

    async def main(last: bool) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(client.ping)
        if last:
            await client.aclose()

    run(main, False)
    run(main, True)


# What the package promises.


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        public = {name: each for name, each in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
        return {
            name: signature.replace(return_annotation=None)
            for name, each in public.items()
            if name not in ("close", "aclose", "after_fork")
            for signature in [inspect.signature(each)]
        }

    assert methods(Client) == methods(AsyncClient)


IMPORTS = """
import sys

import realtimed
from realtimed import {name}

allowed = set({allowed})
unwanted = {{"anyio", "trio", "trio_websocket", "typer", "asyncio", "msgspec", "realtimed.daemon", "realtimed.cli",
    "realtimed.config", "realtimed.control", "realtimed.hub.hub", "realtimed.net", "realtimed.websocket"}}
print(sorted(unwanted & sys.modules.keys() - allowed))
"""


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("Client", []),
        ("broadcast", []),
        ("RefusedError", []),
        ("__version__", []),
        ("AsyncClient", ["anyio", "asyncio"]),
    ],
)
def test_a_client_imports_no_more_than_it_needs(name: str, allowed: list[str]) -> None:
    assert run_python(IMPORTS.format(name=name, allowed=allowed)) == "[]\n"


def test_the_package_exports_what_it_says() -> None:
    for name in realtimed.__all__:
        assert getattr(realtimed, name) is not None
    assert dir(realtimed) == sorted(realtimed.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        getattr(realtimed, "Cleint")  # noqa: B009
    assert realtimed.__version__ == version("realtimed")


def test_lists_come_page_by_page_and_each_is_asked_for_once(path: Path, connect: Opener) -> None:
    asked: list[object] = []

    def pages(peer: Peer) -> None:
        info = {"subscribers": 1, "epoch": "e", "offset": 0, "history": 0}
        for names, following in ((["a", "b"], 7), ([], 9), (["c"], None)):
            request = peer.request()
            asked.append(request.params)
            peer.answer(request, {"next": following, "channels": dict.fromkeys(names, info)})
        peer.answer(peer.request(), {"next": 3, "channels": {"a": info}})
        peer.answer(peer.request(), {"next": 3, "channels": {"b": info}})

    with FakeDaemon(path, pages):
        client = connect(path)
        assert list(client.channels("x")) == ["a", "b", "c"]
        first = {"prefix": "x", "limit": 1000}
        assert asked == [[first], [{**first, "after": 7}], [{**first, "after": 9}]]
        with pytest.raises(ProtocolError, match="pages do not go on: behind 3 comes 3"):
            client.channels()
        client.close()


def test_a_limit_of_a_list_is_kept_to(path: Path, connect: Opener) -> None:
    def pages(peer: Peer) -> None:
        for _ in range(2):
            request = peer.request()
            count = min(request.params[0]["limit"], 1000)  # type: ignore[index]
            info = {"subscribers": 1, "epoch": "e", "offset": 0, "history": 0}
            peer.answer(
                request, {"next": request.id + 1, "channels": {f"{request.id}-{at}": info for at in range(count)}}
            )

    with FakeDaemon(path, pages):
        client = connect(path)
        assert len(client.channels(limit=1200)) == 1200
        for limit in (0, -1, 2**32):
            with pytest.raises(ValueError, match="limit must be from 1"):
                client.channels(limit=limit)
        client.close()
