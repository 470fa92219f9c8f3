"""Frames as an independent implementation reads them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage

from realtimed.hub.publication import Publication
from realtimed.websocket.frames import PING, binary_frame, close_frame, frame_boundary, text_frame

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
