"""Changes inputs at random, and loves numbers at the edge of something. The same seed makes the same changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

from tests.kit.budget import LARGEST

__all__ = ["mutated", "mutations", "repeated"]

_REPEATED: Final = 30
"""One input in so many has a run of bytes repeated thousands of times."""

_EDGES: Final = (b"\x00", b"\x7f", b"\x80", b"\xff", b"\x7d", b"\x7e", b"\x00\x7e", b"\xff\xff", b"\x7f\xff\xff\xff")


def mutations(corpus: Sequence[bytes], seed: int, count: int) -> Iterator[bytes]:
    """Yield `count` inputs made from those of a corpus."""
    source = random.Random(seed)
    for _ in range(count):
        yield mutated(source.choice(corpus), corpus, source)


def mutated(data: bytes, corpus: Sequence[bytes], source: random.Random) -> bytes:
    """Return `data` with a few changes."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(changed) + 1)
        end = min(len(changed), at + source.randint(1, 1 + len(changed) // 4))
        match source.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << source.randrange(8)
            case 1 if at < len(changed):
                changed[at] = source.randrange(256)
            case 2:
                changed[at:at] = source.randbytes(source.randint(1, 8))
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = changed[at:end] * source.randint(1, 3)
            case 5:
                changed[at : at + source.randint(0, 4)] = source.choice(_EDGES)
            case _:
                other = source.choice(corpus)
                start = source.randrange(len(other) + 1)
                changed[at:end] = other[start : start + source.randint(1, 64)]
    return bytes(changed)[:LARGEST] if source.randrange(_REPEATED) else repeated(changed, source)


def repeated(data: bytes | bytearray, source: random.Random) -> bytes:
    """Return `data` with a run of its bytes, or of blanks, repeated until it is as large as an input may be."""
    at = source.randrange(len(data) + 1)
    run = bytes(data[at : at + source.randint(1, 16)]) if source.randrange(3) else b" "
    run = run or b"\0"
    times = max(LARGEST - len(data), 0) // len(run)
    return (bytes(data[:at]) + run * times + bytes(data[at:]))[:LARGEST]
