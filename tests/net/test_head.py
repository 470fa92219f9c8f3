"""The reader of HTTP heads: what is read, what is wrong in words, and that h11 agrees with it."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtimed.net.head import FIELD_LIMIT, Head, HeadBuffer
from tests.kit.budget import LARGEST, within_budget

LINE = b"GET /ws HTTP/1.1"


def head(*lines: bytes, first: bytes = LINE) -> Head:
    return Head(b"\r\n".join([first, *lines, b"", b""]))


def test_a_head_is_taken_apart() -> None:
    read = head(b"Host: x", b"accept:\t a, b \t", b"ACCEPT:c", b"Empty:", b"Odd!#$%&'*+-.^_`|~9: \xfc\t:")
    assert read.fault is None
    assert (read.method, read.target, read.version) == (b"GET", b"/ws", b"HTTP/1.1")
    assert read.fields == {
        b"host": [b"x"],
        b"accept": [b"a, b", b"c"],
        b"empty": [b""],
        b"odd!#$%&'*+-.^_`|~9": [b"\xfc\t:"],
    }


def test_a_head_without_headers_and_one_without_its_empty_line() -> None:
    assert head().fields == Head(LINE).fields == {}
    assert Head(LINE + b"\r\nA: b").fields == {b"a": [b"b"]}


def test_lists_are_read_over_all_headers_of_a_name() -> None:
    read = head(b"Connection: keep-alive ,", b"connection:  ,UPGRADE\t")
    assert read.has_word(b"connection", "upgrade")
    assert read.has_word(b"connection", "keep-alive")
    assert not read.has_word(b"connection", "up")
    assert not read.has_word(b"upgrade", "upgrade")
    assert read.text(b"connection") == "keep-alive ,,,UPGRADE"
    assert head(b"A: \xff").text(b"a") == "\ufffd"


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (b"", "This is no HTTP request."),
        (b"GET", "This is no HTTP request."),
        (b"GET /", "This is no HTTP request."),
        (b"GET  HTTP/1.1", "This is no HTTP request."),
        (b" / HTTP/1.1", "This is no HTTP request."),
        (b"G(T / HTTP/1.1", "This is no HTTP request."),
        (b"G\xcbT / HTTP/1.1", "This is no HTTP request."),
        (b"GET / http/1.1", "This is no HTTP request."),
        (b"\x16\x03\x01\n\r", "This is no HTTP request."),
        (b"GET /\xff HTTP/1.1", "The target of a request is visible ASCII"),
        (b"GET /\0 HTTP/1.1", "The target of a request is visible ASCII"),
        (b"GET /\t HTTP/1.1", "The target of a request is visible ASCII"),
        (b"GET / HTTP/1.1 ", "HTTP/1.1 is the version"),
        (b"GET / b HTTP/1.1", "This is no HTTP request."),
        (b"GET / HTTP/2.0", "HTTP/1.1 is the version"),
        (b"GET / HTTP/1.1\nHost: x", "The request line has a CR or LF in it: CR and LF stand only together"),
        (b"GET /\r HTTP/1.1", "The request line has a CR or LF in it: CR and LF stand only together"),
    ],
)
def test_a_bad_request_line_is_explained_and_headers_are_read_all_the_same(first: bytes, sentence: str) -> None:
    read = head(b"A: b", first=first)
    assert read.fault is not None
    assert read.fault.sentence.startswith(sentence)
    assert (read.fault.header, read.fault.status) == ("", 400)
    assert (read.method, read.target, read.version) == (b"", b"", b"")
    assert read.fields == {b"a": [b"b"]}


@pytest.mark.parametrize(
    ("line", "header", "sentence"),
    [
        (b"Foo : bar", "Foo", "The header 'Foo' has a space before its colon (RFC 9112 section 5.1)."),
        (b"Foo\t: bar", "Foo", "The header 'Foo' has a space before its colon (RFC 9112 section 5.1)."),
        (b"Foo", "Foo", "The header 'Foo' has no colon after its name (RFC 9112 section 5)."),
        (b"", "", "The header '' has no colon after its name (RFC 9112 section 5)."),
        (b": bar", "", "A header has no name before its colon (RFC 9112 section 5)."),
        (b"F o: bar", "F o", "The header 'F o' has a byte in its name that no name may have, 0x20"),
        (b"F(: bar", "F(", "The header 'F(' has a byte in its name that no name may have, 0x28"),
        (b"F\xfc: bar", "F\\xfc", "The header 'F\\xfc' has a byte in its name that no name may have, 0xfc"),
        (b"F\x1b[31m: bar", "F\x1b[31m", "The header 'F\\x1b[31m' has a byte in its name that no name may have, 0x1b"),
        (b"Foo: b\0r", "Foo", "The header 'Foo' has a control character in its value, 0x00 (RFC 9110 section 5.5)."),
        (b"Foo: b\x7fr", "Foo", "The header 'Foo' has a control character in its value, 0x7f"),
        (b"Foo: \x0bbar", "Foo", "The header 'Foo' has a control character in its value, 0x0b"),
        (b"Foo: b\rar", "Foo", "The header 'Foo' has a CR or LF in it: CR and LF stand only together"),
        (b"Foo: b\nar", "Foo", "The header 'Foo' has a CR or LF in it: CR and LF stand only together"),
        (b"Foo: b\r", "Foo", "The header 'Foo' has a CR or LF in it: CR and LF stand only together"),
        (b"F\no: bar", "F\no", "The header 'F\\no' has a CR or LF in it: CR and LF stand only together"),
        (b" folded", "First", "The header 'First' is folded: the line after it begins with a space"),
        (b"\tfolded: x", "First", "The header 'First' is folded: the line after it begins with a space"),
        (b"x" * 100 + b" : y", "x" * 40, f"The header '{'x' * 40}'… has a space before its colon"),
    ],
)
def test_a_bad_header_is_named_and_the_others_are_read(line: bytes, header: str, sentence: str) -> None:
    read = head(b"First: 1", line, b"Last: 2")
    assert read.fault is not None
    assert read.fault.sentence.startswith(sentence)
    assert (read.fault.header, read.fault.status) == (header, 400)
    assert read.fields == {b"first": [b"1"], b"last": [b"2"]}
    assert read.target == b"/ws"


def test_the_first_of_several_mistakes_is_named() -> None:
    assert "'A'" in str(head(b"A : x", b"B : y").fault)
    assert "no HTTP" in str(head(b"A : x", first=b"x").fault)


def test_nothing_can_be_folded_behind_the_request_line() -> None:
    assert str(head(b" x: y").fault).startswith("Fault(sentence='The line after the request line begins with a space")


def test_there_is_a_limit_on_headers() -> None:
    assert head(*[b"a:"] * FIELD_LIMIT).fault is None
    read = head(*[b"a:"] * FIELD_LIMIT, b"b:")
    assert read.fault is not None
    assert (read.fault.status, read.fault.sentence) == (431, "A request's head may have 256 headers.")
    assert read.fields == {}, "whoever reads the last X-Forwarded-For must not get another one"


# Heads that arrive in pieces.


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_a_head_ends_at_the_empty_line_however_it_is_cut(size: int) -> None:
    whole, rest = LINE + b"\r\nA: \r\n\r\n", b"\r\n\r\nmore"
    data, buffer, at = whole + rest, HeadBuffer(100), 0
    while not buffer.feed(data[at : at + size]):
        at += size
    assert buffer.head == whole
    assert buffer.rest + data[at + size :] == rest


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\n", b"\n\r\n"])
def test_an_end_with_lf_alone_is_an_end_and_refused(end: bytes, size: int) -> None:
    data, buffer, at = LINE + b"\nA: b" + end, HeadBuffer(100), 0
    while not buffer.feed(data[at : at + size]):
        at += size
    assert buffer.head == data
    assert "CR or LF" in str(Head(buffer.head).fault)


def test_a_head_has_a_limit_in_bytes() -> None:
    assert HeadBuffer(8).feed(b"1234\r\n\r\nrest")
    for first, last in ((b"", b"12345\r\n\r\n"), (b"1234\r", b"5\n\r\n"), (b"12345678", b"9")):
        buffer = HeadBuffer(8)
        assert not buffer.feed(first)
        with pytest.raises(OverflowError):
            buffer.feed(last)
    assert not HeadBuffer(8).feed(b"12345678")


# Time.

QUADRATIC = {
    "blanks in a value": b"X: a" + b" " * 16_000 + b"b",
    "blanks before a control character": b"X:" + b" " * 16_000 + b"\0",
    "blanks and tabs before a colon": b"X" + b" \t" * 8_000 + b": b",
    "blanks only": b"X:" + b" " * 16_000,
    "a long name": b"x" * 16_000,
    "colons": b"X" + b":" * 16_000,
    "CRs": b"X: " + b"\r" * 16_000,
    "LFs": b"X: a" + b"\n " * 8_000,
    "folded": b"\r\n".join([b"X: a"] + [b" "] * 5_000),
    "headers": b"\r\n".join([b"a:"] * 4_000),
    "headers within the limit": b"\r\n".join([b"a: " + b"b " * 25] * FIELD_LIMIT),
    "bad headers": b"\r\n".join([b"a" * 50 + b" : b"] * FIELD_LIMIT),
    "commas": b"Connection: " + b" ," * 8_000,
}


@pytest.mark.parametrize("line", QUADRATIC.values(), ids=QUADRATIC.keys())
def test_bad_heads_are_read_within_their_budget(line: bytes) -> None:
    data = LINE + b"\r\n" + line + b"\r\n\r\n"
    read = within_budget(lambda: Head(data), len(data))
    within_budget(lambda: read.has_word(b"connection", "upgrade"), len(data))


def test_a_head_that_comes_byte_by_byte_is_collected_within_its_budget() -> None:
    def long_head() -> None:
        buffer = HeadBuffer(LARGEST * 16)
        for _ in range(LARGEST * 16):
            assert not buffer.feed(b"x")

    within_budget(long_head, LARGEST * 16)


# h11 reads the same, with its own patterns.

TOKENS = st.text("aB9-_!x", min_size=1, max_size=6).map(str.encode)
VALUES = st.binary(max_size=12) | st.text('ab ,\t="ü', max_size=12).map(lambda text: text.encode("latin-1"))
LINES = st.one_of(
    st.tuples(TOKENS, st.sampled_from([b":", b": ", b":\t", b" :", b"", b"::"]), VALUES).map(b"".join),
    st.sampled_from([b"Content-Length: 0", b"Host: x", b"Host: y", b" folded", b":", b"a\rb: c", b"a: b\nc: d"]),
    st.binary(max_size=12),
)
FIRST = st.sampled_from([LINE, b"POST http://x/ HTTP/1.0", b"GET / HTTP/1.2", b"x", b"GET /\xff HTTP/1.1"])


@given(FIRST | st.binary(max_size=20), st.lists(LINES, max_size=6))
@example(LINE, [b"Host: x", b"A: \x1c"])
def test_what_is_accepted_here_is_the_same_to_h11(first: bytes, lines: list[bytes]) -> None:
    data = b"\r\n".join([first, *lines, b"", b""])
    read = Head(data[: data.find(b"\r\n\r\n") + 4])
    if read.fault is not None:
        return
    if len(read.fields.get(b"host", ())) != 1 or len(read.fields.get(b"content-length", ())) > 1:
        return  # those are rules for requests, not for reading them
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(data)
    request = reader.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target, b"HTTP/" + request.http_version) == (
        read.method, read.target, read.version,
    )  # fmt: skip
    fields: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        fields.setdefault(name, []).append(value)
    assert fields == read.fields
