"""The PHP client in processes that fork, clone it, serialize it, and get signals."""

from __future__ import annotations

import os
import signal
import socket

from tests.kit.fake_daemon import accepted
from tests.kit.php import BROADCAST, Php, works_again


def test_a_forked_child_has_a_connection_of_its_own(listener: socket.socket, client: Php) -> None:
    client.begin(BROADCAST)
    with accepted(listener) as of_parent:
        of_parent.receipt(of_parent.request(), offset=1)
        assert client.result() == 1
        client.begin(
            "$child = pcntl_fork();"
            'if ($child === 0) { exit($client->broadcast("news", "of the child")->offset); }'
            "pcntl_waitpid($child, $status);"
            'return [pcntl_wexitstatus($status), $client->broadcast("news", "of the parent")->offset];'
        )
        with accepted(listener) as of_child:
            request = of_child.request()
            assert request.params == ["news", "of the child"]
            of_child.receipt(request, offset=2)
        request = of_parent.request()
        assert request.params == ["news", "of the parent"]
        of_parent.receipt(request, offset=3)
        assert client.result() == [2, 3]


def test_a_clone_has_a_connection_of_its_own(listener: socket.socket, client: Php) -> None:
    client.begin("$client->ping(); $clone = clone $client; $clone->ping(); $clone->close(); return $client->ping();")
    with accepted(listener) as first:
        first.answer(first.request(), "pong")
        with accepted(listener) as second:
            second.answer(second.request(), "pong")
        first.answer(first.request(), "pong")
        client.result()


def test_a_client_that_was_serialized_has_a_connection_of_its_own(listener: socket.socket, client: Php) -> None:
    client.begin(
        "$client->ping(); $job = unserialize(serialize($client)); $job->ping(); $job->close(); $client->ping();"
        "return [$job->socket === $client->socket, $job->timeout === $client->timeout];"
    )
    with accepted(listener) as first:
        first.answer(first.request(), "pong")
        with accepted(listener) as second:
            second.answer(second.request(), "pong")
        first.answer(first.request(), "pong")
        assert client.result() == [True, True]


def test_signals_do_not_disturb_a_call(listener: socket.socket, client: Php) -> None:
    client.run(
        "pcntl_async_signals(true);"
        'pcntl_signal(SIGUSR1, static function (): void { echo \'{"result":"handled"}\', PHP_EOL; });'
        "return 0;"
    )
    client.begin(BROADCAST)
    with accepted(listener) as peer:
        request = peer.request()
        for _ in range(20):
            os.kill(client.pid, signal.SIGUSR1)
            assert client.result() == "handled"
        peer.receipt(request, offset=7)
        assert client.result() == 7


def test_a_signal_handler_may_make_calls_in_the_middle_of_one(listener: socket.socket, client: Php) -> None:
    client.run(
        "pcntl_async_signals(true);"
        "pcntl_signal(SIGUSR1, function () use ($client) {"
        '    $GLOBALS["handled"] = $client->broadcast("news", "of the handler")->offset;'
        "});"
        "return 0;"
    )
    client.begin('return [$client->broadcast("news", "hello")->offset, $handled];')
    with accepted(listener) as outer:
        request = outer.request()
        os.kill(client.pid, signal.SIGUSR1)
        with accepted(listener) as inner:
            inner.receipt(inner.request(), offset=1)
        outer.receipt(request, offset=2)
        assert client.result() == [2, 1]


def test_a_signal_handler_that_throws_leaves_no_answer_to_the_next_call(listener: socket.socket, client: Php) -> None:
    client.run(
        'pcntl_async_signals(true);pcntl_signal(SIGUSR1, fn () => throw new DomainException("enough"));return 0;'
    )
    client.begin('try { $client->broadcast("news", "hello"); } catch (DomainException $e) { return $e->getMessage(); }')
    with accepted(listener) as peer:
        request = peer.request()
        os.kill(client.pid, signal.SIGUSR1)
        assert client.result() == "enough"
        peer.wait_until_it_hangs_up()
        assert request.params == ["news", "hello"]
    assert works_again(client, listener)
