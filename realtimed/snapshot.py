r"""The history as bytes, to be handed from a daemon that stops to the one that takes its place.

    realtimed-history 1\n
    for each channel: 4 bytes of length (big-endian), and so many bytes of MessagePack:
        [name, epoch, offset, [[age in seconds, payload, is text], …]]      oldest first, the last one has `offset`
    4 bytes of zeros; 8 bytes: when this was written, seconds since 1970 as an IEEE 754 double, big-endian;
    4 bytes: CRC-32 of everything before

A snapshot is only true as long as nothing is published after it: whoever reads one removes it before serving, so that
after a crash there is none, and channels begin anew in other epochs.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

import msgspec

from realtimed.errors import RealtimeError
from realtimed.hub import Hub, SavedChannel

__all__ = ["SnapshotError", "dump", "load"]

_MAGIC: Final = b"realtimed-history 1\n"
_LENGTH: Final = struct.Struct("!I")
_TIME: Final = struct.Struct("!d")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SavedChannel).decode


class SnapshotError(RealtimeError):
    """These bytes are not a snapshot, or not one of this version, or not a whole one."""


def dump(hub: Hub, now: float) -> Iterator[bytes]:
    """Yield a snapshot of the hub's history, a channel at a time; `now` is in seconds since 1970."""
    checksum = 0
    for part in _parts(hub, now):
        checksum = zlib.crc32(part, checksum)
        yield part
    yield _LENGTH.pack(checksum)


def load(hub: Hub, data: bytes, now: float) -> int:
    """Put a snapshot's channels into a hub that has none yet; return how many.

    What has become too old since, or is more than the hub's history keeps, is left out. Raises `SnapshotError`, and
    leaves the hub as it was.
    """
    body, checksum = data[: -_LENGTH.size], data[-_LENGTH.size :]
    if not data.startswith(_MAGIC):
        raise SnapshotError("it does not begin as a history of this version does")
    if _LENGTH.pack(zlib.crc32(body)) != checksum:
        raise SnapshotError("it is incomplete or damaged: its checksum is wrong")
    channels, at = [], len(_MAGIC)
    try:
        while size := _LENGTH.unpack_from(body, at)[0]:
            at += _LENGTH.size
            channels.append(_decode(body[at : at + size]))
            at += size
        [written] = _TIME.unpack_from(body, at + _LENGTH.size)
    except (msgspec.DecodeError, struct.error) as error:
        raise SnapshotError(f"it is not what its first line says: {error}") from error
    hub.restore(channels, max(now - written, 0.0))
    return len(channels)


def _parts(hub: Hub, now: float) -> Iterator[bytes]:
    yield _MAGIC
    for channel in hub.saved():
        encoded = _encode(channel)
        yield _LENGTH.pack(len(encoded)) + encoded
    yield _LENGTH.pack(0) + _TIME.pack(now)
