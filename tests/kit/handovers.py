"""Hand-overs within one process, between two cores of daemons whose peers are the other ends of socket pairs."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import trio

from realtimed.config.loading import load
from realtimed.control.boundary import serve_publisher
from realtimed.core import Core
from realtimed.net.stream import QueuedStream
from realtimed.process.portions import Portion, TakenPortion

__all__ = ["Message", "at_rest", "connected", "hand_over", "publisher", "running_core", "said", "taken"]


class Message(NamedTuple):
    """A portion of a part, of the first ones or the last."""

    part: int
    last: bool
    portion: Portion


@asynccontextmanager
async def running_core(**settings: Any) -> AsyncIterator[Core]:
    """Serve peers, with these settings, until the end of the block."""
    core = Core(load({"io_uring": "off", **settings}))
    async with trio.open_nursery() as nursery:
        await nursery.start(core.sessions.run)
        nursery.start_soon(core.fan_out.run)
        core.publishers_nursery = nursery
        trio.lowlevel.add_instrument(core.service.turns)
        try:
            yield core
        finally:
            trio.lowlevel.remove_instrument(core.service.turns)
            nursery.cancel_scope.cancel()


def connected(core: Core, sent: bytes = b"") -> socket.socket:
    """Open a WebSocket's connection on which `sent` waits to be read; return the peer's end, which does not block."""
    ours, peer = _pair()
    peer.sendall(sent)
    core.client_files.taken += 1
    core.sessions.welcome(core.sessions.client_stream(ours))
    return peer


def publisher(core: Core, sent: bytes = b"") -> socket.socket:
    """Open a publisher's connection in the same way."""
    ours, peer = _pair()
    peer.sendall(sent)
    core.publishers_nursery.start_soon(serve_publisher, QueuedStream(ours, core.answers), core.service)
    return peer


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    return ours, peer


async def at_rest(core: Core) -> None:
    """Close the gates, and wait until the rest can be handed over."""
    core.gate.close()
    core.sessions.gate.close()
    await core.fan_out.settle()
    while any(part.unrest for part in core.parts):
        await trio.lowlevel.checkpoint()


def said(core: Core, *, last: bool) -> Iterator[Message]:
    """Yield what the parts of a core hand over, at first or at last. The files are copies, as in another process."""
    for number, part in enumerate(core.parts):
        for portion in [part.rest()] if last else part.first():
            yield Message(number, last, Portion(portion.data, [os.dup(fd) for fd in portion.descriptors]))


def taken(core: Core, messages: Sequence[Message]) -> None:
    """Have a core take portions."""
    for number, last, portion in messages:
        part = core.parts[number]
        (part.take_rest if last else part.take)(TakenPortion(portion.data, portion.descriptors))


async def hand_over(old: Core, new: Core, between: Callable[[], None] = lambda: None) -> None:
    """Hand everything over. In the middle, between the first portions and the last, call `between`."""
    # The next process does nothing else before it begins.
    new.gate.close()
    new.sessions.gate.close()
    taken(new, list(said(old, last=False)))
    between()
    for _ in range(20):  # some turns of the event loop, in which what was caused comes about
        await trio.lowlevel.checkpoint()
    await at_rest(old)
    taken(new, list(said(old, last=True)))
    for part in old.parts:
        part.gone()
    for part in new.parts:
        part.begin()
    new.publishers.report({})
    for gate in (new.gate, new.sessions.gate, old.sessions.gate):
        gate.open()
