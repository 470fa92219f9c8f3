"""The walk over a client's frame headers, beside a library that parses everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage

from realtimed.websocket.meter import InboundMeter, is_lone_pong
from tests.kit.frames import masked_frame


def masked(*events: Event) -> bytes:
    client = Connection(ConnectionType.CLIENT)
    return b"".join(client.send(event) for event in events)


def walk_in_pieces(meter: InboundMeter, data: bytes, cuts: list[int]) -> int:
    """Feed `data` cut at `cuts`; return how much was passed on."""
    passed = 0
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        passed += meter.walk(data[start:end])
        if meter.closing:
            break
    return passed


PIECES = st.lists(st.integers(0, 10**6), max_size=30)
INBOUND = st.lists(
    st.one_of(
        st.builds(lambda size: TextMessage(data="x" * size), st.sampled_from([0, 1, 125, 126, 500, 66000])),
        st.builds(lambda size: BytesMessage(data=b"x" * size), st.sampled_from([0, 3, 300])),
        st.builds(lambda size: Ping(payload=b"x" * size), st.integers(0, 125)),
        st.builds(lambda size: Pong(payload=b"x" * size), st.integers(0, 125)),
    ),
    max_size=8,
)


@given(events=INBOUND, cuts=PIECES)
def test_the_meter_counts_frames_however_they_are_cut(events: list[Event], cuts: list[int]) -> None:
    meter = InboundMeter(100_000)
    data = masked(*events)
    assert walk_in_pieces(meter, data, cuts) == len(data)
    assert (meter.frames, meter.too_big, meter.closing) == (len(events), False, False)


@given(events=INBOUND, cuts=PIECES)
def test_nothing_behind_a_close_is_passed_on(events: list[Event], cuts: list[int]) -> None:
    meter = InboundMeter(100_000)
    data = masked(*events, CloseConnection(code=1000, reason="bye"))
    assert walk_in_pieces(meter, data + masked(Ping()) * 3, cuts) == len(data)
    assert meter.closing


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=10), cuts=PIECES)
def test_a_message_is_too_big_by_the_sum_of_its_fragments(sizes: list[int], cuts: list[int]) -> None:
    meter = InboundMeter(100)
    fragments = [BytesMessage(data=b"x" * size, message_finished=False) for size in sizes[:-1]]
    walk_in_pieces(meter, masked(*fragments, BytesMessage(data=b"x" * sizes[-1])), cuts)
    assert meter.too_big == (sum(sizes) > 100)
    assert meter.frames == len(sizes)


def test_the_header_alone_tells_that_a_message_is_too_big() -> None:
    for header in (b"\x81\xff" + (2**40).to_bytes(8, "big"), b"\x81\xfe" + (101).to_bytes(2, "big")):
        meter = InboundMeter(100)
        meter.walk(header + b"mask")
        assert meter.too_big


def test_bytes_and_not_characters_are_measured() -> None:
    meter = InboundMeter(100)
    meter.walk(masked(TextMessage(data="ä" * 51)))
    assert meter.too_big


@given(payload=st.binary(max_size=125), before=INBOUND)
def test_a_pong_by_itself_is_known(payload: bytes, before: list[Event]) -> None:
    meter = InboundMeter(100_000)
    meter.walk(masked(*before))
    pong = masked(Pong(payload=payload))
    assert meter.is_pong(pong)
    assert is_lone_pong(pong)
    for other in (
        pong[:-1],
        pong + b"\x8a",
        pong * 2,
        pong[:1],
        b"",
        masked(Ping(payload=payload)),
        b"\xca" + pong[1:],
    ):
        assert not meter.is_pong(other)
        assert not is_lone_pong(other)
    assert not meter.is_pong(b"\x8a" + bytes([len(payload)]) + payload), "it is not masked"
    assert not meter.is_pong(b"\x8a\xfe" + bytes(126 + 4)), "it is too long"
    meter.walk(b"\x82\xff")
    assert not meter.is_pong(pong), "it belongs to the header before"
    meter.walk((200).to_bytes(8, "big") + b"mask")
    assert not meter.is_pong(pong), "it is a part of the message"


# Where messages end.


def frame(first: int, payload: bytes = b"") -> bytes:
    return masked_frame(payload, first)


TEXT, BEGIN, MORE, LAST, CLOSE, PING, PONG = 0x81, 0x01, 0x00, 0x80, 0x88, 0x89, 0x8A


@pytest.mark.parametrize("size", [0, 1, 125, 126, 400])
def test_a_message_counts_when_it_has_ended_and_not_at_its_header(size: int) -> None:
    meter = InboundMeter(1000)
    message = frame(TEXT, b"x" * size)
    for byte in message[:-1]:
        meter.walk(bytes([byte]))
        assert (meter.messages, meter.between_messages, meter.boundary) == (0, False, -1)
    meter.walk(message[-1:])
    assert (meter.messages, meter.between_messages, meter.boundary) == (1, True, 1)


@pytest.mark.parametrize("first", [b"", b"ab"])
@pytest.mark.parametrize("last", [b"", b"cd"])
def test_a_fragmented_message_ends_with_its_last_frame(first: bytes, last: bytes) -> None:
    meter = InboundMeter(1000)
    for part in (frame(BEGIN, first), frame(PING, b"p"), frame(MORE), frame(PONG)):
        meter.walk(part)
        assert meter.between_frames
        assert (meter.messages, meter.between_messages, meter.boundary) == (0, False, -1)
    end = frame(LAST, last)
    meter.walk(end)
    assert (meter.messages, meter.between_messages, meter.boundary) == (1, True, len(end))


@pytest.mark.parametrize("control", [frame(PING), frame(PONG, b"x")])
def test_a_control_frame_between_two_messages_is_no_message(control: bytes) -> None:
    meter = InboundMeter(1000)
    meter.walk(control[:-1])
    assert not meter.between_messages
    meter.walk(control[-1:])
    assert (meter.frames, meter.messages, meter.between_messages) == (1, 0, True)


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8"])
def test_nothing_is_between_messages_from_a_close_on(payload: bytes) -> None:
    meter = InboundMeter(1000)
    close = frame(CLOSE, payload)
    for byte in close:
        assert not meter.closing
        meter.walk(bytes([byte]))
        assert not meter.between_messages
        assert meter.boundary == -1
    assert meter.closing
    assert meter.walk(frame(TEXT, b"x")) == 0, "a message behind a Close is not passed on"
    assert (meter.frames, meter.messages) == (1, 0)


MESSAGE = frame(TEXT, b"hello")


@pytest.mark.parametrize(
    ("data", "boundary"),
    [
        (MESSAGE, len(MESSAGE)),
        (MESSAGE + frame(PING), len(MESSAGE) + 6),
        (MESSAGE + MESSAGE[:1], len(MESSAGE)),
        (MESSAGE + MESSAGE[:7], len(MESSAGE)),
        (MESSAGE + frame(BEGIN) + frame(PING), len(MESSAGE)),
        (MESSAGE + frame(BEGIN) + frame(PING) + frame(LAST, b"x") + frame(MORE)[:3], len(MESSAGE) + 19),
        (MESSAGE + frame(CLOSE), len(MESSAGE)),
        (MESSAGE[:3], -1),
        (frame(BEGIN, b"x"), -1),
        (b"", -1),
    ],
)
def test_behind_the_boundary_lies_what_is_unfinished(data: bytes, boundary: int) -> None:
    meter = InboundMeter(1000)
    meter.walk(data)
    assert meter.boundary == boundary


@given(events=INBOUND, cuts=PIECES)
def test_what_is_kept_from_the_last_boundary_is_the_unfinished_message(events: list[Event], cuts: list[int]) -> None:
    data = masked(*events)
    meter, kept = InboundMeter(100_000), b""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        piece = data[start:end]
        meter.walk(piece)
        kept = kept + piece if meter.boundary < 0 else piece[meter.boundary :]
        assert meter.between_messages == (not kept)
        other = InboundMeter(100_000)
        other.walk(kept)
        assert (other.messages, other.between_frames) == (0, meter.between_frames)
    messages = sum(isinstance(event, (TextMessage, BytesMessage)) for event in events)
    assert (kept, meter.messages) == (b"", messages)


def test_a_message_in_one_read_is_measured_as_any_other() -> None:
    for limit, too_big in ((5, False), (4, True)):
        meter = InboundMeter(limit)
        assert meter.walk(MESSAGE) == len(MESSAGE)
        assert (meter.too_big, meter.frames, meter.messages) == (too_big, 1, 1)


@pytest.mark.parametrize("before", [MESSAGE[:1], MESSAGE[:6], frame(BEGIN), frame(BEGIN, b"x")])
def test_what_looks_like_a_whole_message_may_be_a_part_of_one(before: bytes) -> None:
    whole, cut = InboundMeter(1000), InboundMeter(1000)
    whole.walk(before + MESSAGE)
    cut.walk(before)
    cut.walk(MESSAGE)
    for name in ("frames", "messages", "between_frames", "between_messages", "too_big"):
        assert getattr(whole, name) == getattr(cut, name)
