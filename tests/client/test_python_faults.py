"""The Python clients when something goes wrong: before a call, in the middle of it, among many at once."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from realtimed import (
    AsyncClient,
    ChannelMessage,
    Client,
    NoDaemonError,
    Position,
    ProtocolError,
    Receipt,
    RequestTimeoutError,
)
from realtimed.rpc.wire import encode_request, encode_response
from tests.kit.blocking import Opener, offsets
from tests.kit.fake_daemon import FakeDaemon, Peer, full_queue, hangs_up, healthy, listening, receipt
from tests.kit.patience import PATIENCE, SHORT

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


def test_a_daemon_that_accepts_no_connection(path: Path, connect: Opener) -> None:
    with listening(path, 0), full_queue(path):
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"did not accept the connection within 0.2 s; nothing was sent"):
            connect(path, timeout=SHORT).broadcast("news", "hello")
        assert SHORT <= time.monotonic() - began < SHORT + 2


# What goes wrong in the middle.


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
