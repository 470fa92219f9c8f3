"""The fuzzer of the meter beside the library: it is like trio-websocket, goes far enough, and finds what is wrong."""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, wrap_server_stream

from realtimed.websocket.meter import InboundMeter, is_lone_pong
from tests.fuzz import corpus, desync
from tests.fuzz.desync import TALLY, Library, check, generate
from tests.fuzz.mutations import mutations
from tests.fuzz.recipes import sent_by
from tests.kit.heads import KEY, own_request

SEED = 6455


async def heard_by_trio_websocket(pieces: list[bytes]) -> tuple[list[str | bytes], bytes, int | None]:
    """Return the messages that a real trio-websocket reads, what it writes, and the code of the end, if it ends."""
    heard: list[str | bytes] = []
    written = bytearray()
    peer, stream = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        await peer.send_all(own_request(KEY, ""))
        websocket = await (await wrap_server_stream(nursery, stream, max_message_size=sys.maxsize)).accept()
        await peer.receive_some()

        async def receive() -> None:
            try:
                while True:
                    heard.append(await websocket.get_message())
            except ConnectionClosed:
                pass

        async def listen() -> None:
            async for data in peer:
                written.extend(data)

        nursery.start_soon(receive)
        nursery.start_soon(listen)
        for piece in pieces:
            if websocket.closed is None:
                await peer.send_all(piece)
                await wait_all_tasks_blocked()
        code = websocket.closed.code if websocket.closed is not None else None
        nursery.cancel_scope.cancel()
    return heard, bytes(written), code


def test_the_library_is_driven_as_trio_websocket_drives_it() -> None:
    source = random.Random(SEED)
    codes = set()
    for recipe in [*corpus("desync"), *(generate(source) for _ in range(100))]:
        pieces = sent_by(recipe).pieces
        library = Library(sys.maxsize)
        for piece in pieces:
            if library.closed is None:
                library.read(piece)
        expected = trio.run(heard_by_trio_websocket, pieces)
        assert (library.heard, bytes(library.written), library.code) == expected
        codes.add(library.code)
    assert codes >= {None, 1000, 1002, 1005, 1007}


def test_recipes_made_at_random_go_everywhere() -> None:
    source, before = random.Random(SEED), TALLY.copy()
    for _ in range(1000):
        check(generate(source))
    counted = Counter(TALLY)
    counted.subtract(before)
    assert counted["clients"] == 1000
    assert counted["frames"] > 5 * counted["clients"], "most sequences are not broken at once"
    for name in ("boundaries", "sentinels", "compared", "pongs withheld", "protocol errors", "closed", "too big"):
        assert counted[name] > 50, name


def test_any_bytes_are_a_recipe() -> None:
    for recipe in mutations([b"", b"\xff", b"\x01" * 40], SEED, 300):
        sent = sent_by(recipe)
        assert all(sent.pieces)
        assert len(sent.pieces) < 300


def check_many(count: int) -> None:
    """Check the corpus, and recipes made at random."""
    source = random.Random(SEED)
    for recipe in [*corpus("desync"), *(generate(source) for _ in range(count))]:
        check(recipe)


# Meters that are wrong. The fuzzer has to find each.


class OnlyFramesCount(InboundMeter):
    __slots__ = ()

    @property
    def between_messages(self) -> bool:
        return self.between_frames


class EmptyFragmentsAreNone(InboundMeter):
    __slots__ = ()

    @property
    def between_messages(self) -> bool:
        return self.between_frames and self._fragments <= 0


class HeadersAreForgotten(InboundMeter):
    __slots__ = ()

    @property
    def between_messages(self) -> bool:
        return self._fragments < 0 and not self._payload


class NeverBetween(InboundMeter):
    __slots__ = ()

    @property
    def between_messages(self) -> bool:
        return False


class CountsAtHeaders(InboundMeter):
    __slots__ = ()

    def walk(self, data: bytes) -> int:
        passed = super().walk(data)
        self.messages += bool(self._payload)
        return passed


class PassesOnEverything(InboundMeter):
    __slots__ = ()

    def walk(self, data: bytes) -> int:
        super().walk(data)
        return len(data)


class MissesCloses(InboundMeter):
    __slots__ = ()

    def walk(self, data: bytes) -> int:
        passed = super().walk(data)
        self.closing = False
        return passed


class AllowsMore(InboundMeter):
    __slots__ = ()

    def __init__(self, limit: int) -> None:
        super().__init__(2 * limit)


class PongsAreEverywhere(InboundMeter):
    __slots__ = ()

    def is_pong(self, data: bytes) -> bool:
        return is_lone_pong(data)


@pytest.mark.parametrize(
    "wrong",
    [
        OnlyFramesCount, EmptyFragmentsAreNone, HeadersAreForgotten, NeverBetween, CountsAtHeaders, PassesOnEverything,
        MissesCloses, AllowsMore, PongsAreEverywhere,
    ],
)  # fmt: skip
def test_a_wrong_meter_is_found(monkeypatch: pytest.MonkeyPatch, wrong: type[InboundMeter]) -> None:
    monkeypatch.setattr(desync, "InboundMeter", wrong)
    with pytest.raises(AssertionError):
        check_many(5000)


def test_a_wrong_pong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desync, "is_lone_pong", lambda data: data[:1] in (b"\x89", b"\x8a"))
    with pytest.raises(AssertionError):
        check_many(1000)
