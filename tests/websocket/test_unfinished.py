"""A message that has come in part: the same to every reader once its fragments are put together, and bounded."""

from __future__ import annotations

import random

import pytest
from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, Message, TextMessage

from realtimed.websocket.meter import InboundMeter
from realtimed.websocket.unfinished import Unfinished, put_together
from tests.kit.budget import within_budget

LIMIT = 10**6


def frame(first: int, payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 2**16:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([first]) + length + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def random_message(source: random.Random) -> tuple[bytes, bytes]:
    """Return a message's frames, with control frames in between, and its payload."""
    opcode = source.choice([1, 2])
    parts = []
    for _ in range(source.randrange(1, 6)):
        size = source.choice([0, 0, 1, 5, 125, 126, 300, 70_000 if source.random() < 0.05 else 9])
        parts.append(("ü" * size).encode() if opcode == 1 else source.randbytes(size))
    if opcode == 1 and len(parts[0]) > 2:  # a character in two fragments
        parts[0:1] = [parts[0][:1], parts[0][1:]]
    frames = b""
    for at, part in enumerate(parts):
        while source.random() < 0.3:
            frames += frame(source.choice([0x89, 0x8A]), source.randbytes(source.randrange(126)), source.randbytes(4))
        final = 0x80 if at == len(parts) - 1 else 0
        frames += frame(final | (0 if at else opcode), part, source.randbytes(4))
    return frames, b"".join(parts)


def read(data: bytes) -> bytes:
    """Return the payload of the message that another reader finds."""
    server = Connection(ConnectionType.SERVER)
    assert server.state is ConnectionState.OPEN
    server.receive_data(data)
    found = b""
    for event in server.events():
        if isinstance(event, (TextMessage, BytesMessage)):
            assert isinstance(event, Message)
            found += event.data.encode() if isinstance(event.data, str) else bytes(event.data)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_another_reader_goes_on_with_it(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(25):
        data, payload = random_message(source)
        cut = source.randrange(1, len(data))
        walked = InboundMeter(LIMIT)
        walked.walk(data[:cut])
        if walked.between_messages:
            continue  # nothing but control frames: there is no unfinished message
        begun = put_together(data[max(walked.boundary, 0) : cut])
        assert read(begun + data[cut:]) == payload
        again = InboundMeter(LIMIT)
        again.walk(begun)
        assert (again.between_frames, again.between_messages) == (walked.between_frames, walked.between_messages)
        for meter in (again, walked):
            meter.walk(data[cut:])
            assert meter.between_messages
        assert put_together(begun) == begun


def test_many_small_pieces_cost_their_payload_and_little_time() -> None:
    unfinished = Unfinished()
    count = 50_000
    pieces = [frame(0x01, b"x", bytes(4)), *[frame(0x00, b"x", bytes(4))] * (count - 1)]

    def add() -> None:
        for piece in pieces:
            unfinished.add(piece)

    within_budget(add, 7 * count)
    assert put_together(unfinished.data()) == frame(0x01, b"x" * count, bytes(4))


def test_empty_fragments_and_pings_cost_nothing() -> None:
    unfinished = Unfinished()
    unfinished.add(frame(0x01, b"", bytes(4)))
    for _ in range(20_000):
        unfinished.add(frame(0x00, b"", bytes(4)) + frame(0x89, b"x" * 125, b"mask"))
    assert unfinished.data() == frame(0x01, b"", bytes(4))
    assert unfinished.held < 5_000


def test_a_frame_that_is_not_masked_stays_as_it_is() -> None:
    for data in (b"\x81\x05he", b"\x81", b"\x01\x7e\x00"):
        assert put_together(data) == data
