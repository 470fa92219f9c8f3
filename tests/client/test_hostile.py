"""Daemons that are broken or hostile: nothing that they say is taken on trust, by any of the clients."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import repeat
from operator import methodcaller
from pathlib import Path
from typing import Final

import msgpack
import pytest

from realtimed import Client, ProtocolError, RefusedError, RequestTimeoutError
from realtimed.client.connection import Connection, Deadline, State
from realtimed.rpc.wire import encode_notification
from tests.kit.blocking import FLAVOURS, Opener
from tests.kit.fake_daemon import Behaviour, FakeDaemon, Peer, receipt
from tests.kit.patience import PATIENCE, SHORT
from tests.kit.php import PhpError, php_output, running_php
from tests.kit.stack import ROOT

MIB: Final = 2**20


def answering(error: object, result: object) -> Behaviour:
    """Answer one request, with strings that may be no UTF-8 where they have lone surrogates."""

    def answer(peer: Peer) -> None:
        id = peer.request().id
        peer.sock.sendall(msgpack.packb([1, id, error, result], unicode_errors="surrogateescape"))
        peer.wait_until_it_hangs_up()

    return answer


def flooding(*pieces: bytes, before: bytes = b"") -> Behaviour:
    """Take a request, and then send `before` and the same pieces again and again until the client hangs up."""

    def flood(peer: Peer) -> None:
        peer.request()
        with suppress(BrokenPipeError, ConnectionResetError):
            peer.sock.sendall(before)
            for piece in repeat(b"".join(pieces)):
                peer.sock.sendall(piece)

    return flood


# Wrong types, and what cannot be.

NOT_UTF_8: Final = "\udcff"
INFO: Final = {"subscribers": 1, "epoch": "e", "offset": 0, "history": 0}
CLIENT_INFO: Final = {
    "id": "a",
    "protocol": "v1",
    "channels": ["news"],
    "address": "",
    "connected_since": 1.5,
    "pending": 0,
}


def page(name: str, members: object, next: object = None) -> dict[str, object]:
    return {name: members, "next": next}


Ask = Callable[[Client], object]
ONE: Final[Ask] = methodcaller("broadcast", "news", "hello")
MANY: Final[Ask] = methodcaller("broadcast_many", ["a", "b"], "hello")
HISTORY: Final[Ask] = methodcaller("history", "news", 2)
CHANNELS: Final[Ask] = methodcaller("channels")
CLIENTS: Final[Ask] = methodcaller("clients")


def values(*each: object) -> tuple[object, ...]:
    return each


WRONG: Final[list[tuple[Ask, object, str]]] = [
    *((ONE, {**receipt(), "recipients": value}, "recipients") for value in values(True, -1, 1.0, "1", None, [1])),
    *((ONE, {**receipt(), "offset": value}, "offset") for value in values(True, -1, 1.5, "1")),
    *((ONE, {**receipt(), "epoch": value}, "epoch") for value in values(7, b"e", None, NOT_UTF_8)),
    *((ONE, {**receipt(), "repeated": value}, "repeated") for value in values(1, 0, None, "yes")),
    *((ONE, value, "recipients") for value in values(True, [], "ok", {1: 2})),
    (MANY, {"a": receipt(), "b": receipt()}, "not an array"),
    (MANY, [receipt()], "1 receipts for 2 channels"),
    (MANY, [receipt(), {**receipt(), "recipients": False}], "recipients"),
    *(
        (HISTORY, {"epoch": "e", "offset": 1, "messages": value}, "an entry that is not a message|not an array")
        for value in values({}, None, [[True, "x"]], [[1, 7]], [[1, NOT_UTF_8]], [[-1, "x"]], [["x", 1]], [7], [[1]])
    ),
    (HISTORY, {"epoch": "e", "offset": 3, "messages": [[1, "a"], [2, "b"], [3, "c"]]}, "3 messages where 2 were"),
    (HISTORY, {"epoch": "e", "offset": True, "messages": []}, "offset"),
    *((CHANNELS, page("channels", value), "not a map") for value in values([], None, {7: INFO}, {NOT_UTF_8: INFO})),
    *((CHANNELS, page("channels", {"a": {**INFO, name: True}}), name) for name in INFO),
    *((CHANNELS, page("channels", {"a": INFO}, next), "next") for next in values(True, -1, "1", 1.0)),
    (CHANNELS, page("channels", dict.fromkeys(map(str, range(1001)), INFO)), "1001 where 1000 were asked for"),
    *((CLIENTS, page("clients", value), "not an array") for value in values({}, None)),
    *((CLIENTS, page("clients", [{**CLIENT_INFO, name: True}]), name) for name in CLIENT_INFO),
    *((CLIENTS, page("clients", [{**CLIENT_INFO, "channels": [value]}]), "channels") for value in values(7, NOT_UTF_8)),
    *(
        (CLIENTS, page("clients", [{**CLIENT_INFO, "connected_since": value}]), "connected_since")
        for value in values(math.nan, math.inf, -1, "1")
    ),
    *((methodcaller("count_clients"), {"count": value}, "count") for value in values(True, -1, "1")),
    *((methodcaller("count_channels"), {"count": value}, "count") for value in values(True, None)),
    *((methodcaller("disconnect", "a"), {"disconnected": value}, "disconnected") for value in values(True, "1")),
    *((methodcaller("stats"), value, "not a map") for value in values([], None, {1: 2}, {NOT_UTF_8: 1})),
    *((methodcaller("info"), value, "not a map") for value in values([], True)),
    *((methodcaller("ping"), value, "not pong") for value in values(True, None, "PONG", ["pong"])),
]


@pytest.mark.parametrize(("ask", "result", "text"), WRONG)
def test_no_result_is_taken_on_trust(path: Path, connect: Opener, ask: Ask, result: object, text: str) -> None:
    with FakeDaemon(path, answering(None, result)), pytest.raises(ProtocolError, match=text) as error:
        ask(connect(path))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "error",
    [
        True,
        "no",
        {"code": "x"},
        {"code": True, "message": "no"},
        {"code": "no_way", "message": 7},
        {"code": "no_way", "message": NOT_UTF_8},
        {"code": "two words", "message": "no"},
        {"code": "\x1b[2J", "message": "no"},
        {"code": "", "message": "no"},
        {"code": "x" * 65, "message": "no"},
    ],
)
def test_no_refusal_is_taken_on_trust(path: Path, connect: Opener, error: object) -> None:
    with FakeDaemon(path, answering(error, None)), pytest.raises(ProtocolError, match=r"no usable '(code|message)'"):
        connect(path).broadcast("news", "hello")
    path.unlink()
    with FakeDaemon(path, answering(error, None)), running_php(path) as php:
        with pytest.raises(PhpError, match=r"no usable '(code|message)'") as raised:
            php.run('return $client->broadcast("news", "hello");')
        assert raised.value.kind == "ProtocolException"
        php.run("return $client->close();")


IN_PHP: Final[dict[str, list[object]]] = {
    'broadcast("news", "hello")': [
        *({**receipt(), "recipients": value} for value in (True, -1, 1.0, "1", None, [1])),
        *({**receipt(), "offset": value} for value in (True, -1, 1.5, "1")),
        *({**receipt(), "epoch": value} for value in (7, b"e", None, NOT_UTF_8)),
        *({**receipt(), "repeated": value} for value in (1, 0, "yes")),
        *(True, [], "ok", {1: 2}),
    ],
    'broadcastMany(["a", "b"], "hello")': [
        {"a": receipt(), "b": receipt()},
        [receipt()],
        [receipt(), {**receipt(), "recipients": False}],
    ],
    'history("news", 2)': [
        *(
            {"epoch": "e", "offset": 1, "messages": value}
            for value in (7, None, {"a": 1}, [[True, "x"]], [[1, 7]], [[1, NOT_UTF_8]], [[-1, "x"]], [7], [[1]])
        ),
        {"epoch": "e", "offset": 3, "messages": [[1, "a"], [2, "b"], [3, "c"]]},
        {"epoch": "e", "offset": True, "messages": []},
    ],
    "channels()": [
        *(page("channels", value) for value in ([INFO], None, "x")),
        *(page("channels", {"a": {**INFO, name: True}}) for name in INFO),
        *(page("channels", {"a": INFO}, next) for next in (True, -1, "1", 1.0)),
        page("channels", dict.fromkeys(map(str, range(1001)), INFO)),
    ],
    "stats()": [[1], None, True, "x"],
    "ping()": [True, None, "PONG", ["pong"]],
}


@pytest.mark.parametrize("ask", IN_PHP)
def test_php_takes_no_result_on_trust(path: Path, ask: str) -> None:
    results = IN_PHP[ask]
    with FakeDaemon(path, *(answering(None, result) for result in results)), running_php(path) as php:
        for result in results:
            with pytest.raises(PhpError) as error:
                php.run(f"$client->close(); return $client->{ask};")
            assert error.value.kind == "ProtocolException", result
            assert error.value.message.isprintable()
        php.run("return $client->close();")


def test_empty_pages_have_an_end(path: Path, connect: Opener) -> None:
    def pages(peer: Peer) -> None:
        for number, request in enumerate(peer.requests()):
            peer.answer(request, page("channels", {}, number))

    with FakeDaemon(path, pages, pages):
        client = connect(path, timeout=PATIENCE)
        with pytest.raises(ProtocolError, match="more than 268435456 bytes of memory, the limit"):
            client.channels()
        client.close()
        with running_php(path, timeout=PATIENCE) as php:
            with pytest.raises(PhpError, match="more than 67108864 bytes of memory, the limit"):
                php.run("return $client->channels();")
            php.run("return $client->close();")


def test_pages_go_on(path: Path, connect: Opener) -> None:
    def pages(peer: Peer) -> None:
        for number, request in enumerate(peer.requests()):
            peer.answer(request, page("clients", [CLIENT_INFO], 7 if number else 8))

    with FakeDaemon(path, pages):
        client = connect(path)
        with pytest.raises(ProtocolError, match="do not go on: behind 8 comes 7"):
            client.clients()
        client.close()


@pytest.mark.parametrize("message", [["news", True, 1], ["news", "x", True], [7, "x", 1], ["news", NOT_UTF_8, 1], []])
def test_no_message_is_taken_on_trust_and_those_before_it_are_received(
    path: Path, connect: Opener, message: list[object]
) -> None:
    subscribed = threading.Event()

    def publishing(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 0})
        assert subscribed.wait(PATIENCE)
        wrong = msgpack.packb([2, "message", message], unicode_errors="surrogateescape")
        peer.sock.sendall(encode_notification("message", ["news", "good", 1]) + wrong)
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, publishing), connect(path).subscribe("news") as subscription:
        subscribed.set()
        assert next(subscription).message == "good"
        for _ in range(2):
            with pytest.raises(ProtocolError, match="an entry that is not a message"):
                next(subscription)


def test_a_message_of_a_channel_that_was_not_subscribed_to(path: Path, connect: Opener) -> None:
    subscribed = threading.Event()

    def publishing(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 0})
        assert subscribed.wait(PATIENCE)
        peer.notify("message", "sport", "hello", 1)
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, publishing), connect(path).subscribe("news") as subscription:
        subscribed.set()
        with pytest.raises(ProtocolError, match="'sport', which was not subscribed to"):
            next(subscription)


# What the daemon says in words.

EVIL: Final = "\x1b[2J\r\n\u202e\x7f\u2028" + "€" * 10_000


@pytest.mark.parametrize("id", [0, None])
def test_the_daemon_s_words_have_no_power_over_a_terminal_and_an_end(
    path: Path, connect: Opener, id: int | None
) -> None:
    def saying(peer: Peer) -> None:
        peer.request()
        peer.sock.sendall(msgpack.packb([1, id, {"code": "no_way", "message": EVIL}, None]))
        peer.wait_until_it_hangs_up()

    with FakeDaemon(path, saying):
        client = connect(path)
        with pytest.raises((RefusedError, ProtocolError)) as error:
            client.broadcast("news", "hello")
        client.close()
    assert isinstance(error.value, ProtocolError if id is None else RefusedError)
    assert str(error.value).isprintable()
    assert "no_way" in str(error.value)
    assert len(str(error.value)) < 1200

    path.unlink()
    with FakeDaemon(path, saying), running_php(path) as php:
        with pytest.raises(PhpError) as raised:
            php.run('return $client->broadcast("news", "hello");')
        php.run("return $client->close();")
    assert raised.value.kind == ("ProtocolException" if id is None else "RefusedException")
    assert raised.value.message.isprintable()
    assert "no_way" in raised.value.message
    assert len(raised.value.message) < 1200


# Floods. They are bounded by the deadline, and by memory.

SMALL: Final = encode_notification("", []) * 1000
LARGE: Final = encode_notification("weather", ["fine" * 100_000])
MESSAGES: Final = encode_notification("message", ["news", "x" * 60_000, 1])


@pytest.mark.parametrize("piece", [SMALL, LARGE])
def test_a_flood_of_notifications_does_not_put_off_the_deadline_of_a_call(
    path: Path, connect: Opener, piece: bytes
) -> None:
    with FakeDaemon(path, flooding(piece)):
        client = connect(path, timeout=SHORT)
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError):
            client.broadcast("news", "hello")
        assert SHORT <= time.monotonic() - began < SHORT + 2


def test_a_flood_of_what_is_no_message_does_not_put_off_the_deadline_of_a_receive(path: Path) -> None:
    def publishing(peer: Peer) -> None:
        peer.answer(peer.request(), {"epoch": "e", "offset": 0})
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in repeat(SMALL):
                peer.sock.sendall(piece)

    with FakeDaemon(path, publishing), Client(path) as client, client.subscribe("news") as subscription:
        began = time.monotonic()
        assert subscription.receive(SHORT) is None
        assert SHORT <= time.monotonic() - began < SHORT + 2


def test_messages_are_taken_a_few_at_a_time_out_of_what_was_received() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(encode_notification("x", []) * 2000 + encode_notification("last", []))
        connection, deadline = Connection(ours), Deadline(PATIENCE)
        assert connection.wait(deadline).sock is ours
        taken = connection.receive()
        assert 0 < len(taken) <= 512
        connection.rest()
        assert connection.state is State.BUSY, "more has been received"
        assert connection.wait(deadline) == (None, False, 0)
        while len(taken) < 2001:
            more = connection.receive()
            assert 0 < len(more) <= 512
            taken += more
        assert connection.receive() == []


# In a process of its own, that may not take much more memory. Says what was raised, and how much memory it took.
BOUNDED: Final = """
import resource, sys
import anyio
from realtimed import AsyncClient, Client, RealtimeError

path, flavour, ask, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))

def ask_blocking():
    client = Client(path, timeout=30)
    if ask == "subscribe":
        with client.subscribe("news", "sport"):
            pass
    elif ask == "clients":
        client.clients()
    else:
        client.history("news")

async def ask_awaiting():
    client = AsyncClient(path, timeout=30)
    if ask == "subscribe":
        async with client.subscribe("news", "sport"):
            pass
    elif ask == "clients":
        await client.clients()
    else:
        await client.history("news")

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    ask_blocking() if flavour == "blocking" else anyio.run(ask_awaiting, backend=flavour)
except RealtimeError as error:
    print(type(error).__name__, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def huge_pages(peer: Peer) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        for number, request in enumerate(peer.requests()):
            peer.answer(request, page("clients", [{**CLIENT_INFO, "address": "x" * 8 * MIB}] * 2, number))


HEAD: Final = b"\x94\x01\x00\xc0"
ANSWERS: Final[dict[str, tuple[str, Behaviour, str]]] = {
    "a string of 1 GiB": (
        "history",
        flooding(bytes(MIB), before=HEAD + b"\xdb\x40\0\0\0"),
        "a response of more than 67108864 bytes, the limit",
    ),
    "an array of 4 Mi values": (
        "history",
        flooding(b"\x90" * MIB, before=HEAD + b"\xdd\0\x40\0\0"),
        "a response of more than 2097152 values, the limit",
    ),
    "a map in a map": ("history", flooding(b"\x81\xc0" * MIB, before=HEAD), "nested"),
    "messages before the last answer": (
        "subscribe",
        flooding(MESSAGES * 16),
        "messages of more than 268435456 bytes, the limit, came before all channels had been subscribed to",
    ),
    "pages without an end": ("clients", huge_pages, "more than 268435456 bytes of memory, the limit; ask for a part"),
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("ask", "behaviour", "text"), ANSWERS.values(), ids=ANSWERS)
def test_memory_is_bounded_whatever_the_daemon_sends(
    path: Path, ask: str, behaviour: Behaviour, text: str, flavour: str
) -> None:
    with FakeDaemon(path, behaviour):
        done = subprocess.run(
            [sys.executable, "-c", BOUNDED, path, flavour, ask, str(2**30)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            timeout=60,
            check=False,
        )
    assert done.stderr == ""
    said, taken = done.stdout.splitlines()
    assert said.startswith("ProtocolError ")
    assert text in said
    assert int(taken) < 450  # MiB


PHP_ANSWERS: Final[dict[str, Behaviour]] = {
    "a string of 1 GiB": flooding(bytes(MIB), before=HEAD + b"\xdb\x40\0\0\0"),
    "a string of 45 MiB": flooding(bytes(MIB), before=HEAD + b"\x92\xdb\x02\xd0\0\0"),
    "strings of 23 MiB": flooding(b"\xdb\x01\x70\0\0" + bytes(23 * MIB), before=HEAD + b"\x94"),
    "an array of 1 GiB": flooding(b"\x90" * MIB, before=HEAD + b"\xdd\x40\0\0\0"),
    "arrays of one": flooding(b"\x91\xc0" * MIB, before=HEAD + b"\xdd\0\x10\0\0"),
    "maps of one": flooding(b"\x81\xa0\xc0" * MIB, before=HEAD + b"\xdd\0\x10\0\0"),
    "short strings": flooding(b"\xa1x" * MIB, before=HEAD + b"\xdd\0\x20\0\0"),
}


@pytest.mark.parametrize("behaviour", PHP_ANSWERS.values(), ids=PHP_ANSWERS)
def test_php_s_memory_is_bounded_whatever_the_daemon_sends(path: Path, behaviour: Behaviour) -> None:
    """It stays within PHP's usual limit; what exceeds that cannot be caught."""
    with FakeDaemon(path, behaviour), running_php(path, "-d", "memory_limit=128M", timeout=30) as php:
        with pytest.raises(
            PhpError, match=r"too large: it takes more than 50331648 bytes of memory, the limit"
        ) as error:
            php.run('return $client->call("x");')
        assert error.value.kind == "ProtocolException"
        assert php.run("return memory_get_peak_usage() < 120 * 2 ** 20;")


def test_php_s_memory_is_bounded_by_pages_without_an_end(path: Path) -> None:
    def pages(peer: Peer) -> None:
        for number, request in enumerate(peer.requests()):
            names = (f"{number}-{each}" + "x" * 10_000 for each in range(1000))
            peer.answer(request, page("channels", dict.fromkeys(names, INFO), number))

    with FakeDaemon(path, pages), running_php(path, "-d", "memory_limit=128M", timeout=30) as php:
        with pytest.raises(PhpError, match="more than 67108864 bytes of memory, the limit"):
            php.run("return count($client->channels());")
        php.run("return $client->close();")


def test_php_shows_little_of_what_is_large(path: Path) -> None:
    """A value that stands in an error is cut before it is written out, which takes six times its size."""
    large = {"recipients": "\u20ac" * 7 * MIB, "x": [["\u20ac" * 50] * 10_000]}
    with FakeDaemon(path, answering(None, large)), running_php(path, "-d", "memory_limit=128M", timeout=30) as php:
        with pytest.raises(PhpError, match="no usable 'recipients'") as error:
            php.run('return $client->broadcast("news", "hello");')
        php.run("return $client->close();")
    assert len(error.value.message) < 200


@pytest.mark.parametrize("piece", [SMALL, LARGE, MESSAGES])
def test_a_flood_of_notifications_does_not_put_off_the_deadline_of_php(path: Path, piece: bytes) -> None:
    with FakeDaemon(path, flooding(piece)), running_php(path, timeout=SHORT) as php:
        began = time.monotonic()
        with pytest.raises(PhpError) as error:
            php.run('return $client->broadcast("news", "hello");')
        assert error.value.kind == "TimeoutException"
        assert SHORT <= time.monotonic() - began < SHORT + 2


def test_php_shows_values_in_printable_ascii() -> None:
    script = (
        f"require '{ROOT}/app/realtime.php'; echo Realtime\\quoted([\"a\\x7f\\x1b\", 'ü', \"\\xff\", [1 => true]]);"
    )
    assert php_output("-r", script) == r'["a\u007f\u001b","\u00fc","\ufffd",{"1":true}]'
