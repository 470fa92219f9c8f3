"""What is wrong with a handshake's request, and that trio-websocket has nothing to say about one that passes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import Request

from realtimed.net.head import Head
from realtimed.websocket.handshake import (
    Refusal,
    forwarded_for,
    path,
    refusal,
    subprotocols,
    switching_protocols,
)
from tests.fuzz.mutations import mutations
from tests.kit.budget import within_budget
from tests.kit.clients import REQUEST
from tests.kit.heads import HEADS, KEY, answer_of_the_library, answer_of_trio_websocket, key_of, own_request, with_

ROOM = 15_700
"""Bytes that may be added to a handshake."""


def reason(request: bytes) -> Refusal:
    refused = refusal(Head(request))
    assert refused is not None
    return refused


def test_a_handshake_passes() -> None:
    assert refusal(Head(REQUEST)) is None


@pytest.mark.parametrize(
    "request_", [*HEADS, with_(b"X: a" + b" " * ROOM + b"b"), REQUEST.replace(b"/ws", b"http://localhost/ws")]
)
def test_what_a_handshake_may_have(request_: bytes) -> None:
    assert refusal(Head(request_)) is None


@pytest.mark.parametrize(
    ("request_", "header", "sentence"),
    [
        (with_(b"Foo : bar"), "Foo", "has a space before its colon"),
        (with_(b"X-Odd: \0"), "X-Odd", "has a control character"),
        (REQUEST.replace(b"GET", b"POST"), "", "is a GET request of HTTP/1.1."),
        (REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"), "", "is a GET request of HTTP/1.1."),
        (REQUEST.replace(b"/ws", b"*"), "", "begins with a slash"),
        (with_(b"Host: x"), "Host", "one Host header."),
        (REQUEST.replace(b"Host: localhost\r\n", b""), "Host", "one Host header."),
        (REQUEST.replace(b"localhost", b"local host"), "Host", "The value of Host is a name or an address"),
        (REQUEST.replace(b"localhost", b"local\xff"), "Host", "The header Host has a byte above 0x7f"),
        (with_(b"Content-Length: 0", b"Content-Length: 0"), "Content-Length", "one Content-Length, not 2"),
        (with_(b"Content-Length: 0, 0"), "Content-Length", "The value of Content-Length is one number"),
        (with_(b"Content-Length: +1"), "Content-Length", "The value of Content-Length is one number"),
        (with_(b"Content-Length:"), "Content-Length", "The value of Content-Length is one number"),
        (with_(b"Content-Length: 5"), "Content-Length", "has no body, and no Content-Length but 0."),
        (with_(b"Content-Length: " + b"9" * ROOM), "Content-Length", "has no body, and no Content-Length but 0."),
        (with_(b"Transfer-Encoding: chunked"), "Transfer-Encoding", "has no body, and no Transfer-Encoding."),
        (with_(b"Transfer-Encoding: x", b"Content-Length: 0"), "Transfer-Encoding", "not both"),
        (REQUEST.replace(b"websocket", b"h2c"), "Upgrade", "Connection: Upgrade and Upgrade: websocket."),
        (REQUEST.replace(b"websocket", b"web socket"), "Upgrade", "Connection: Upgrade and Upgrade: websocket."),
        (REQUEST.replace(b"websocket", b"websocket\xff"), "Upgrade", "The header Upgrade has a byte above 0x7f"),
        (REQUEST.replace(b": Upgrade", b": close"), "Connection", "Connection: Upgrade and Upgrade: websocket."),
        (with_(b"Sec-WebSocket-Version: 13"), "Sec-WebSocket-Version", "one Sec-WebSocket-Version, which is 13."),
        (with_(b"Sec-WebSocket-Key: " + KEY), "Sec-WebSocket-Key", "one Sec-WebSocket-Key, 16 bytes in base64."),
        (REQUEST.replace(KEY, b"short"), "Sec-WebSocket-Key", "one Sec-WebSocket-Key, 16 bytes in base64."),
        (REQUEST.replace(KEY, b"!" * 24), "Sec-WebSocket-Key", "one Sec-WebSocket-Key, 16 bytes in base64."),
        (REQUEST.replace(KEY, KEY[:-2] + b"AA"), "Sec-WebSocket-Key", "one Sec-WebSocket-Key, 16 bytes in base64."),
        (with_(b"Sec-WebSocket-Protocol: \xfc"), "Sec-WebSocket-Protocol", "has a byte above 0x7f in its value"),
        (with_(b"X-Forwarded-For: \xfc"), "X-Forwarded-For", "has a byte above 0x7f in its value"),
    ],
)
def test_a_bad_handshake_is_400_and_its_header_is_named(request_: bytes, header: str, sentence: str) -> None:
    refused = reason(request_)
    assert (refused.status, refused.header) == (400, header)
    assert sentence in refused.sentence
    assert refused.sentence.endswith((".", ".)"))


@pytest.mark.parametrize(
    ("request_", "header"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "Upgrade"),
        (b"POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\n", "Upgrade"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "Upgrade"),
        (REQUEST.replace(b"Version: 13", b"Version: 8"), "Sec-WebSocket-Version"),
    ],
)
def test_what_is_no_websocket_of_version_13_is_refused_with_426(request_: bytes, header: str) -> None:
    refused = reason(request_)
    assert (refused.status, refused.header) == (426, header)


def test_too_many_headers_are_refused_with_431() -> None:
    assert reason(with_(*[b"a:"] * 300)).status == 431


@pytest.mark.parametrize(
    ("lines", "hop"),
    [
        ([], ""),
        ([b"X-Forwarded-For: 1.2.3.4"], "1.2.3.4"),
        ([b"X-Forwarded-For: ::1, 1.2.3.4 ,\t::2"], "::2"),
        ([b"X-Forwarded-For: ::1", b"x-forwarded-for: ::2"], "::2"),
        ([b"X-Forwarded-For: ::1", b"x-forwarded-for:"], ""),
        ([b"X-Forwarded-For: ::1", b"Bad : header"], "::1"),
        ([b"X-Forwarded-For: fe80::1%" + b"x" * 15_000], ""),
    ],
)
def test_the_last_hop_is_whom_the_proxy_speaks_for(lines: list[bytes], hop: str) -> None:
    assert forwarded_for(Head(with_(*lines))) == hop


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/ws", "/ws"),
        (b"//WS?a=/b#c", "/ws"),
        (b"/ws#a?b", "/ws"),
        (b"/%77s/", "/ws/"),
        (b"/a//b", "/a/b"),
        (b"/", "/"),
        (b"///", "/"),
        (b"HTTP://host:80/ws?x", "/ws"),
        (b"https://host", "/"),
        (b"http://host?x", "/"),
        (b"/ws/http://host/x", "/ws/http:/host/x"),
        (b"/wshttp://host", "/wshttp:/host"),
        (b"/%ff", "/\ufffd"),
        (b"/" * 1022 + b"ws", "/ws"),
        (b"/" * 1022 + b"wsx", "/ws…"),
    ],
)
def test_the_path_is_what_caddy_sees(target: bytes, expected: str) -> None:
    assert path(Head(REQUEST.replace(b"/ws", target))) == expected


def test_subprotocols_are_in_their_order() -> None:
    read = Head(with_(b"Sec-WebSocket-Protocol: b,\ta ,,", b"sec-websocket-protocol: c"))
    assert list(subprotocols(read)) == ["b", "a", "c"]
    assert not list(subprotocols(Head(REQUEST)))


# The library.


def library_reads(request: bytes) -> Request:
    """Have wsproto read a request; it raises for what it would refuse."""
    library = WSConnection(ConnectionType.SERVER)
    library.receive_data(request)
    [event] = library.events()
    assert isinstance(event, Request)
    return event


def assert_the_library_accepts(request: bytes, subprotocol: str = "") -> None:
    read = Head(request)
    if refusal(read) is not None:
        return
    event = library_reads(own_request(key_of(read), subprotocol))
    assert event.subprotocols == [subprotocol] * bool(subprotocol)
    keys = [value for name, value in event.extra_headers if name == b"sec-websocket-key"]
    assert keys == read.fields[b"sec-websocket-key"]


def test_what_passes_here_is_accepted_by_the_library_whatever_was_changed_in_it() -> None:
    corpus = [REQUEST, with_(b"X: \xff", b"Content-Length: 0"), with_(b"Sec-WebSocket-Protocol: a, b", b"Host : y")]
    passed = 0
    for request in mutations(corpus, 9112, 4000):
        assert_the_library_accepts(request, "realtime.v1")
        passed += refusal(Head(request)) is None
    assert passed > 50


NAMES = st.sampled_from(
    [b"Host", b"Connection", b"Upgrade", b"Content-Length", b"Transfer-Encoding", b"Sec-WebSocket-Key", b"X", b"\xff",
     b"Sec-WebSocket-Version", b"Sec-WebSocket-Protocol", b"Sec-WebSocket-Extensions", b"Expect", b"X ", b""]
)  # fmt: skip
VALUES = st.sampled_from([b"", b"0", b"13", KEY, b"websocket", b"upgrade", b"x,y", b"100-continue"]) | st.binary()


@given(st.lists(st.tuples(NAMES, VALUES).map(b":".join), max_size=4), st.permutations(REQUEST.split(b"\r\n")[1:-2]))
@example([b"Connection:close"], [*REQUEST.split(b"\r\n")[1:-2]])
@example([b"Upgrade:x"], [*REQUEST.split(b"\r\n")[1:-2]])
@example([b"Expect:100-continue"], [*REQUEST.split(b"\r\n")[1:-2]])
def test_what_passes_here_is_accepted_by_the_library(more: list[bytes], lines: list[bytes]) -> None:
    assert_the_library_accepts(b"\r\n".join([b"GET /ws HTTP/1.1", *more, *lines, b"", b""]))
    assert_the_library_accepts(b"\r\n".join([b"GET /ws HTTP/1.1", *lines, *more, b"", b""]))


# The answer.


def test_the_answer_is_that_of_the_example_in_the_rfc() -> None:
    assert switching_protocols(Head(REQUEST), "") == (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )


@pytest.mark.parametrize("subprotocol", ["", "realtime.v1"])
@pytest.mark.parametrize("head", HEADS)
def test_the_answer_is_what_trio_websocket_would_write(head: bytes, subprotocol: str) -> None:
    read = Head(head)
    assert refusal(read) is None
    request = own_request(key_of(read), subprotocol)
    answer = switching_protocols(read, subprotocol)
    assert answer == answer_of_trio_websocket(request, subprotocol)
    assert answer == answer_of_the_library(request, subprotocol)


# Time.

LARGE = {
    "blanks in a value": with_(b"X: a" + b" " * ROOM + b"b"),
    "blanks before a control character": with_(b"X:" + b" " * ROOM + b"\0"),
    "blanks in Upgrade": REQUEST.replace(b"websocket", b"websocket, " + b" " * ROOM + b", x"),
    "commas in Upgrade": REQUEST.replace(b"websocket", b"," * ROOM + b"websocket"),
    "blanks and commas in Connection": REQUEST.replace(b": Upgrade", b": " + b" ," * (ROOM // 2) + b"Upgrade"),
    "subprotocols": with_(b"Sec-WebSocket-Protocol: " + b"a," * (ROOM // 2)),
    "hops": with_(b"X-Forwarded-For: " + b" ," * (ROOM // 2)),
    "digits": with_(b"Content-Length: " + b"9" * ROOM),
    "zeros": with_(b"Content-Length: " + b"0" * ROOM),
    "a key": REQUEST.replace(KEY, b"A" * ROOM),
    "slashes": REQUEST.replace(b"/ws", b"/" * ROOM),
    "percent signs": REQUEST.replace(b"/ws", b"/" + b"%" * ROOM),
    "escapes": REQUEST.replace(b"/ws", b"/%ff" * (ROOM // 4)),
    "a plain GET": b"GET / HTTP/1.1\r\nHost: x\r\nX: a" + b" " * ROOM + b"b\r\n\r\n",
    "many names": with_(*[b"Host: x"] * 250),
}


@pytest.mark.parametrize("request_", LARGE.values(), ids=LARGE.keys())
def test_bad_requests_are_judged_within_their_budget(request_: bytes) -> None:
    def judge() -> None:
        read = Head(request_)
        forwarded_for(read)
        if refusal(read) is None:
            path(read)
            for _ in subprotocols(read):
                pass
            switching_protocols(read, "realtime.v1")

    assert len(request_) <= 16 * 1024
    within_budget(judge, len(request_))
