"""Many clients send whatever recipes say, through a few engines: each hears what a parser of its own would say."""

from __future__ import annotations

import random
import struct
import sys

import trio

from realtimed.websocket.engines import Engine, Engines
from realtimed.websocket.frames import lone_close
from realtimed.websocket.meter import InboundMeter, is_lone_pong
from realtimed.websocket.stream import Inbound
from tests.fuzz.desync import Library
from tests.fuzz.recipes import random_recipe, sent_by
from tests.kit.patience import PATIENCE

SEED = 6455


class Client:
    """A borrower that sends what a recipe stands for, and may stop in the middle."""

    def __init__(self, recipe: bytes, stops_after: int) -> None:
        self.id = recipe.hex()
        self.engine: Engine | None = None
        self.queued = False
        self.heard: list[str | bytes] = []
        self.written = bytearray()
        self.code: int | None = None
        self._sent = sent_by(recipe)
        self._stops_after = stops_after
        self._meter: InboundMeter | None = None
        self._passed = b""
        self._changed = trio.Event()

    @property
    def between_messages(self) -> bool:
        return self._meter is None or self._meter.between_messages

    def received(self, message: str | bytes) -> None:
        self.heard.append(message)

    def library_wrote(self, data: bytes) -> None:
        self.written += data

    def library_closed(self, code: int, reason: str) -> None:
        self.code = code
        self._changed.set()

    def read_on(self) -> None:
        self._changed.set()

    def over(self) -> None:
        raise AssertionError("an engine has failed")

    async def run(self, engines: Engines) -> None:
        for piece in self._sent.pieces[: self._stops_after]:
            await self._until_read()
            if self.code is not None or not self._pass_on(piece, engines):
                break
        await self._until_read()
        engines.forget(self)
        own = Library(sys.maxsize)
        own.read(self._passed)
        assert (self.heard, self.written, self.code) == (own.heard, own.written, own.code), self.id

    def _pass_on(self, piece: bytes, engines: Engines) -> bool:
        """Do what a client's stream does. Return False if nothing may follow."""
        meter = self._meter
        if is_lone_pong(piece) if meter is None else meter.is_pong(piece):
            if meter is not None:
                meter.walk(piece)
            self._passed += piece
            return True
        if meter is None:
            meter = self._meter = InboundMeter(self._sent.limit)
        frames, messages = meter.frames, meter.messages
        passed = meter.walk(piece)
        if meter.too_big:
            return False
        if meter.between_messages:
            self._meter = None
        self._passed += piece
        frames, messages = meter.frames - frames, meter.messages - messages
        engines.feed(self, Inbound(piece[:passed], frames, messages, meter.between_frames))
        return not meter.closing

    async def _until_read(self) -> None:
        while self.code is None and (self.queued or (self.engine is not None and not self.engine.held)):
            self._changed = trio.Event()
            await self._changed.wait()


async def test_each_client_hears_what_a_parser_of_its_own_would_say() -> None:
    source = random.Random(SEED)
    engines = Engines(lambda: None)
    trio.lowlevel.add_instrument(engines.turns)
    async with trio.open_nursery() as engines.nursery:
        with trio.fail_after(PATIENCE):
            for number in (2, 10, 40, 200):
                async with trio.open_nursery() as clients:
                    for _ in range(number):
                        stops_after = source.randrange(40) if source.randrange(8) == 0 else sys.maxsize
                        clients.start_soon(Client(random_recipe(source), stops_after).run, engines)
        engines.nursery.cancel_scope.cancel()
    trio.lowlevel.remove_instrument(engines.turns)


def test_a_lone_close_is_read_as_the_library_reads_it() -> None:
    source, read = random.Random(SEED), 0
    for _ in range(3000):
        code = source.choice([source.randrange(5200), 1000, 1001, 2999, 3000, 4999, 5000])
        reason = source.choice([b"", source.randbytes(3), ("ä€x" * 21).encode()[: source.randrange(124)]])
        payload = (struct.pack("!H", code) + reason)[: source.choice([0, 1, 2, 125])]
        mask = source.randbytes(4)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        data = bytes([0x88, 0x80 | len(payload)]) + mask + masked
        closed = lone_close(data)
        if closed is not None:
            library = Library(sys.maxsize)
            library.read(data)
            assert library.closed is not None
            assert (closed.code, closed.reason) == (library.closed.code, library.closed.reason or "")
            assert closed.answer == library.written
            read += 1
        assert lone_close(data[:-1]) is None
        assert lone_close(data + b"\x88") is None
    assert read > 1000
