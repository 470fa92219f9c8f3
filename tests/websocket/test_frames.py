"""Frames as an independent implementation reads them, and the meter beside one that parses everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage

from realtimed.hub.publication import Publication
from realtimed.websocket.frames import PING, binary_frame, close_frame, frame_boundary, text_frame
from realtimed.websocket.meter import InboundMeter

SIZES = (0, 1, 125, 126, 127, 65535, 65536, 70000)


def as_client_reads(data: bytes) -> list[Event]:
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(data)
    return list(client.events())


@pytest.mark.parametrize("size", SIZES)
def test_messages_of_every_length_form_are_read_back(size: int) -> None:
    assert as_client_reads(text_frame(b"x" * size)) == [TextMessage(data="x" * size)]
    assert as_client_reads(binary_frame(b"\xff" * size)) == [BytesMessage(data=b"\xff" * size)]


def test_a_ping_is_a_ping() -> None:
    assert as_client_reads(PING) == [Ping(payload=b"")]


@pytest.mark.parametrize(
    ("reason", "read"), [("", ""), ("gone", "gone"), ("ä" * 100, "ä" * 61), ("x" * 200, "x" * 123), ("\udcff", "?")]
)
def test_a_close_carries_as_much_of_its_reason_as_fits(reason: str, read: str) -> None:
    assert as_client_reads(close_frame(4400, reason)) == [CloseConnection(code=4400, reason=read)]


@given(payloads=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4), offset=st.integers(0, 10**9))
def test_the_boundary_behind_an_offset_is_where_the_next_frame_begins(payloads: list[int], offset: int) -> None:
    frames = [text_frame(b"x" * size) for size in payloads]
    boundaries = list(itertools.accumulate(map(len, frames), initial=0))
    offset %= boundaries[-1] + 1
    assert frame_boundary(b"".join(frames), offset) == min(each for each in boundaries if each >= offset)


def test_a_publication_knows_its_message_as_it_was_published() -> None:
    assert Publication("news", "ä".encode(), True, 1).message == "ä"
    assert Publication("news", b"\xff", False, 1).message == b"\xff"


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
    assert not meter.is_pong(b"\x8a" + bytes([len(payload)]) + payload), "it is not masked"
    assert not meter.is_pong(b"\x8a\xfe" + bytes(126 + 4)), "it is too long"
    meter.walk(b"\x82\xff")
    assert not meter.is_pong(pong), "it belongs to the header before"
    meter.walk((200).to_bytes(8, "big") + b"mask")
    assert not meter.is_pong(pong), "it is a part of the message"
