"""The PHP client and a stand-in for the daemon that misbehaves, step by step."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from realtimed import Client
from realtimed.rpc.wire import encode_notification, encode_response
from tests.kit.blocking import daemon_in_thread
from tests.kit.fake_daemon import Peer, accepted, receipt
from tests.kit.patience import PATIENCE, SHORT
from tests.kit.php import BROADCAST, Php, PhpError, open_sockets, running_php, works_again
from tests.kit.stack import Daemon

# More open files than select(2) can number.

MANY_FILES: Final = "for ($i = 0; $i < 1100; $i++) { $files[] = fopen('/dev/null', 'r'); } return count($files);"


def test_a_process_with_many_open_files_can_broadcast(shared_daemon: Daemon, observer: Client) -> None:
    with running_php(shared_daemon.control_socket) as php, observer.subscribe("news") as subscription:
        assert php.run(MANY_FILES) == 1100
        for number in range(3):
            receipt = php.run(f'return $client->broadcast("news", str_repeat("{number}", 60000));')
            assert receipt["recipients"] == 1
            assert next(subscription).message == str(number) * 60000
        assert open_sockets(php) == 1
        with pytest.raises(PhpError, match="message_too_large"):
            php.run('return $client->broadcast("news", str_repeat("x", 10_000_000));')
        assert php.run("return count($client->channels());") == 1


@pytest.mark.parametrize("piece", [b"", b"\xa9", encode_notification("message", ["news", "hello", 1])])
def test_with_many_open_files_the_timeout_is_for_the_whole_answer(
    path: Path, listener: socket.socket, piece: bytes
) -> None:
    with running_php(path, timeout=SHORT) as client:
        client.run(MANY_FILES)
        client.begin(
            "$began = hrtime(true);"
            'try { $client->broadcast("news", "hello"); }'
            "catch (Realtime\\TimeoutException $error) { return (hrtime(true) - $began) / 1e9; }"
        )
        with accepted(listener) as peer:
            peer.request()
            if piece == b"\xa9":
                peer.sock.sendall(b"\x94\x01\x00\xc0\xdb\x01\x00\x00\x00")
            if piece:
                trickle(peer, piece)
            took = client.result()
    assert SHORT <= took < SHORT + 1


def test_with_many_open_files_a_daemon_that_does_not_read_is_a_timeout(path: Path, listener: socket.socket) -> None:
    with running_php(path, timeout=SHORT) as client:
        client.run(MANY_FILES)
        client.begin('return $client->broadcast("news", str_repeat("x", 10_000_000));')
        with accepted(listener), pytest.raises(PhpError) as error:
            client.result()
    assert error.value.kind == "TimeoutException"


def test_with_many_open_files_a_stale_connection_is_replaced(path: Path, listener: socket.socket) -> None:
    with running_php(path) as client:
        client.run(MANY_FILES)
        for _ in range(3):
            client.begin(BROADCAST)
            with accepted(listener) as peer:
                peer.receipt(peer.request(), offset=7)
                assert client.result() == 7
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            peer.request()
        with pytest.raises(PhpError, match="hung up before it answered"):
            client.result()


def test_with_many_open_files_signals_do_not_disturb_a_call(path: Path, listener: socket.socket) -> None:
    with running_php(path) as client:
        client.run(
            "pcntl_async_signals(true);"
            'pcntl_signal(SIGUSR1, static function (): void { echo \'{"result":"handled"}\', PHP_EOL; });' + MANY_FILES
        )
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            request = peer.request()
            for _ in range(20):
                os.kill(client.pid, signal.SIGUSR1)
                assert client.result() == "handled"
            peer.receipt(request, offset=7)
            assert client.result() == 7


# The test plays the daemon, step by step.


def nobody_knocks(listener: socket.socket) -> bool:
    """Return whether no connection waits to be accepted."""
    listener.setblocking(False)
    try:
        listener.accept()
    except BlockingIOError:
        return True
    finally:
        listener.settimeout(PATIENCE)
    return False


def heard(peer: Peer) -> bytes:
    """Return what has come from the client, which has hung up."""
    try:
        return peer.sock.recv(4096)
    except ConnectionResetError:  # it left with something unread
        return b""


def test_a_silent_daemon_is_a_timeout(path: Path, listener: socket.socket) -> None:
    with running_php(path, timeout=SHORT) as client:
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            peer.request()
            begun = time.monotonic()
            with pytest.raises(PhpError) as error:
                client.result()
            took = time.monotonic() - begun
            peer.wait_until_it_hangs_up()
        assert error.value.kind == "TimeoutException"
        assert error.value.message == (
            f"the daemon at {path} did not answer within {SHORT:g} s; what was asked may still be carried out"
        )
        assert took < SHORT + PATIENCE / 2
        assert works_again(client, listener)


@pytest.mark.parametrize("piece", [b"\xa9", encode_notification("message", ["news", "hello", 1])])
def test_the_timeout_is_for_the_whole_answer(path: Path, listener: socket.socket, piece: bytes) -> None:
    """Neither an answer that trickles nor notifications put it off."""
    with running_php(path, timeout=SHORT) as client:
        client.begin(BROADCAST)
        with accepted(listener) as peer:
            peer.request()
            if len(piece) == 1:
                peer.sock.sendall(b"\x94\x01\x00\xc0\xdb\x01\x00\x00\x00")
            trickle(peer, piece)
        with pytest.raises(PhpError) as error:
            client.result()
        assert error.value.kind == "TimeoutException"


def trickle(peer: Peer, piece: bytes) -> None:
    """Send one piece after the other until the client hangs up."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        try:
            peer.sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            return
        time.sleep(SHORT / 20)  # the slow pace is the point
    raise AssertionError("the client goes on reading")


def test_an_answer_may_come_byte_by_byte(listener: socket.socket, client: Php) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        for byte in encode_response(peer.request().id, None, receipt(7)):
            peer.sock.sendall(bytes([byte]))
        assert client.result() == 7


def test_notifications_are_passed_over(listener: socket.socket, client: Php) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        request = peer.request()
        peer.notify("message", "news", "hello", 1)
        peer.receipt(request, offset=7)
        assert client.result() == 7


WELL_DEEP: Final = b"\x91" * 1000  # small enough to be written before the client can hang up


ANSWERS: Final[dict[str, tuple[bytes, str]]] = {
    "nothing": (b"", "hung up before it answered; what was asked may have been carried out, or not"),
    "half an answer": (encode_response(0, None, receipt())[:-3], "hung up before it answered"),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "sent what is not its protocol: 72. Is this realtimed's --socket?"),
    "a wrong id": (encode_response(1, None, receipt()), "an answer to request 1, which awaits none"),
    "last words": (
        encode_response(None, {"code": "protocol_error", "message": "no"}, None),
        "ended the connection: no (protocol_error)",
    ),
    "strange last words": (encode_response(None, 7, None), "ended the connection: 7"),
    "a map": (b"\x81\x01\x02", "not its protocol"),
    "a request": (b"\x94\x00\x00\xa4ping\x90", "not its protocol"),
    "a short response": (b"\x93\x01\x00\xc0", "not its protocol"),
    "no id": (b"\x94\x01\xa1x\xc0\xc0", "an answer to request"),
    "an extension": (b"\x94\x01\x00\xc0\xd4\x01\x02", "an extension type"),
    "no MessagePack": (b"\x94\x01\x00\xc0\xc1", "the byte 0xc1"),
    "a large integer": (b"\x94\x01\x00\xc0\xcf" + b"\xff" * 8, "above PHP_INT_MAX"),
    "a length of 4 GB": (b"\x94\x01\x00\xc0\xdb\xff\xff\xff\xff", "too large"),
    "4 billion elements": (b"\x94\x01\x00\xc0\xdd\xff\xff\xff\xff", "too large"),
    "deep arrays": (b"\x94\x01\x00\xc0" + WELL_DEEP, "too deep"),
    "a key that is an array": (b"\x94\x01\x00\xc0\x81\x90\x01", "a key that PHP cannot have"),
    "no receipt": (encode_response(0, None, {"recipients": 1, "epoch": "e"}), "no usable 'offset'"),
    "a receipt of other types": (encode_response(0, None, {"recipients": "1"}), "no usable 'recipients'"),
    "no error": (encode_response(0, {"code": 7}, None), "no usable 'code'"),
}


@pytest.mark.parametrize(("answer", "text"), ANSWERS.values(), ids=ANSWERS.keys())
def test_what_is_no_answer_is_a_protocol_error(listener: socket.socket, client: Php, answer: bytes, text: str) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.request()
        peer.sock.sendall(answer)
        peer.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(PhpError) as error:
            client.result()
    assert error.value.kind == "ProtocolException"
    assert text in error.value.message
    assert nobody_knocks(listener)  # it was not tried again
    assert works_again(client, listener)


def test_as_many_receipts_must_come_as_channels_were_named(listener: socket.socket, client: Php) -> None:
    client.begin('return $client->broadcastMany(["a", "b"], "hello");')
    with accepted(listener) as peer:
        peer.answer(peer.request(), [receipt()])
        with pytest.raises(PhpError, match="not a receipt for each channel"):
            client.result()


# A request is never sent twice.


def gone(peer: Peer) -> None:
    peer.sock.close()


def deaf(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_RD)


def with_last_words(peer: Peer) -> None:
    peer.sock.sendall(encode_response(None, {"code": "timeout", "message": "no"}, None))


@pytest.mark.parametrize("become_stale", [gone, deaf, with_last_words])
def test_a_connection_that_went_stale_between_calls_is_replaced(
    listener: socket.socket, client: Php, become_stale: Callable[[Peer], None]
) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.receipt(peer.request())
        client.result()
        become_stale(peer)

        client.begin(BROADCAST)
        with accepted(listener) as second:
            second.receipt(second.request(), offset=2)
            assert client.result() == 2
            assert nobody_knocks(listener)
            assert become_stale is gone or heard(peer) == b""


def test_a_connection_that_breaks_after_the_request_was_taken_is_not_replaced(
    listener: socket.socket, client: Php
) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        peer.receipt(peer.request())
        client.result()
        client.begin(BROADCAST)
        peer.request()
    with pytest.raises(PhpError, match="may have been carried out, or not") as error:
        client.result()
    assert error.value.kind == "ProtocolException"
    assert nobody_knocks(listener)
    assert works_again(client, listener)


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_connection_that_breaks_in_the_middle_of_a_request_is_not_replaced(
    listener: socket.socket, client: Php, calls_before: int
) -> None:
    client.begin(f"for ($i = 0; $i < {calls_before}; $i++) $client->ping(); return 0;")
    with ExitStack() as stack:
        if calls_before:
            peer = stack.enter_context(accepted(listener))
            peer.answer(peer.request(), "pong")
        client.result()
        client.begin('return $client->broadcast("news", str_repeat("x", 10_000_000));')
        if not calls_before:
            peer = stack.enter_context(accepted(listener))
        assert peer.sock.recv(4096)
    with pytest.raises(PhpError, match="may have been carried out, or not"):
        client.result()
    assert nobody_knocks(listener)
    assert works_again(client, listener)


def test_a_request_may_be_refused_before_it_was_sent_in_full(listener: socket.socket, client: Php) -> None:
    client.begin('return $client->broadcast("news", str_repeat("x", 10_000_000));')
    with accepted(listener) as peer:
        assert peer.sock.recv(4096)
        peer.sock.sendall(encode_response(0, {"code": "message_too_large", "message": "no"}, None))
        with pytest.raises(PhpError) as error:
            client.result()
        assert error.value.code == "message_too_large"
        assert works_again(client, listener)  # and the half of a request is not gone on with


def test_a_restarted_daemon_is_found_again_and_gets_a_broadcast_once(runtime_dir: Path) -> None:
    with running_php(runtime_dir / "realtime.sock") as php:
        with daemon_in_thread(runtime_dir):
            assert php.run(BROADCAST) == 1
        with pytest.raises(PhpError) as error:
            php.run(BROADCAST)
        assert error.value.kind == "NoDaemonException"
        with daemon_in_thread(runtime_dir):
            php.run("return $client->ping();")
        with (
            daemon_in_thread(runtime_dir) as daemon,
            Client(daemon.control_socket) as observer,
            observer.subscribe("news") as subscription,
        ):
            assert php.run(BROADCAST) == 1
            assert next(subscription).message == "hello"
            assert php.run(BROADCAST) == 2
