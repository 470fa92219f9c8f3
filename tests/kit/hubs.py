"""Hubs for tests, with and without history, and what tests do with them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.position import Position
from realtimed.hub.results import Joined
from tests.kit.subscribers import Listener

__all__ = [
    "AFTERWARDS",
    "AMPLE",
    "MODEL_RUNS",
    "Clock",
    "come_back",
    "fan_out",
    "hub_with_history",
    "make_hub",
    "missed",
    "publish",
    "sealed",
]

MODEL_RUNS = int(os.environ.get("MODEL_RUNS", "300"))
"""How many random histories each model is compared with, of about a hundred steps; more: MODEL_RUNS=50000 pytest …"""

AMPLE = 2**30
"""A limit in bytes that no test reaches."""


@dataclass
class Clock:
    """A clock that stands still until a test moves it. It may start above 0, as the monotonic clock does."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def make_hub(*, max_message: int = 1000, max_channels: int = 128, history: History | None = None) -> Hub:
    return Hub(max_message=max_message, max_channels=max_channels, history=history)


def hub_with_history(
    size: int = 100,
    age: float = 300,
    limit: int = AMPLE,
    clock: Callable[[], float] | None = None,
    time_ns: Callable[[], int] = int,
    **rules: tuple[int, float],
) -> Hub:
    """Return a hub that keeps `size` publications a channel, for `age` seconds.

    `rules` are size and age for patterns, in which "_" stands for "*".
    """
    history = History(
        limit=limit,
        clock=clock or Clock(),
        default=Retention(size, age),
        rules=[(pattern.replace("_", "*"), Retention(*retention)) for pattern, retention in rules.items()],
    )
    return Hub(max_message=100_000, max_channels=128, history=history, time_ns=time_ns)


def publish(hub: Hub, name: str, count: int) -> Position:
    """Publish "1", "2" and so on; return where the channel was before."""
    receipts = [hub.publish(name, str(number)) for number in range(1, count + 1)]
    return Position(receipts[0].epoch, receipts[0].offset - 1)


def fan_out(hub: Hub) -> None:
    """Make all sends that are due, in small steps, those to watchers last."""
    while (turn := hub.next_round()) is not None:
        while turn.step(2):
            pass
    while hub.watchers.step():
        pass


def come_back(hub: Hub, name: str, since: Position) -> Joined:
    return hub.subscribe(Listener(), name, since)


def missed(joined: Joined) -> list[str]:
    return [publication.payload.decode() for publication in joined.missed]


AFTERWARDS = struct.pack("!I", 0) + struct.pack("!d", 0.0)
"""What stands behind the last channel of a snapshot: no more of them, and when it was written."""


def sealed(*channels: object, end: bytes = AFTERWARDS, version: int = 2) -> bytes:
    """Return a snapshot of these channels, whatever they are, with a right checksum."""
    body = b"realtimed-history %d\n" % version
    for channel in channels:
        encoded = channel if isinstance(channel, bytes) else msgspec.msgpack.encode(channel)
        body += struct.pack("!I", len(encoded)) + encoded
    body += end
    return body + struct.pack("!I", zlib.crc32(body))
