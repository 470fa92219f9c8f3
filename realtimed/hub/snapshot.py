r"""The history as bytes, to be handed from a daemon that stops to the one that takes its place.

    realtimed-history 2\n
    for each channel: 4 bytes of length (big-endian), then this number of bytes of MessagePack:
        [name, epoch, offset, [[age in seconds, payload, is text, published], …]]
    4 bytes of zeros; 8 bytes: when this was written, seconds since 1970 as an IEEE 754 double, big-endian;
    4 bytes: CRC-32 of everything before

The entries are the oldest first, and the last one has `offset`. `published` is in milliseconds since 1970. It does not
follow from the age: ages are by a clock that nobody sets. Version 1 has no `published`, and can be read as well; there
the best guess is the time of the snapshot minus the age.

A snapshot is true only as long as nothing is published after it. So a daemon removes it before it serves: after a
crash there is none, and channels begin in other epochs.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from realtimed.errors import RealtimeError, RefusedError
from realtimed.hub.history import Aged
from realtimed.hub.hub import Hub
from realtimed.hub.names import check_channel_name
from realtimed.text import quoted

__all__ = ["MAGIC_BYTES", "Saved", "SavedChannel", "SnapshotError", "check_magic", "dump", "read", "restore"]

_MAGIC: Final = b"realtimed-history 2\n"
_MAGIC_1: Final = b"realtimed-history 1\n"
MAGIC_BYTES: Final = len(_MAGIC)
"""Bytes at the beginning of a snapshot that show that it is one."""

_EPOCH: Final = re.compile(r"[0-9A-Za-z]{1,64}")

_LAST_OFFSET: Final = 2**53
"""JavaScript counts no further."""

_LAST_TIME: Final = 2**53
"""Milliseconds that a time may be from 1970: JavaScript cannot tell greater ones apart."""

_NOT_WHAT: Final = "it is not what its first line says"

_LENGTH: Final = struct.Struct("!I")
_TIME: Final = struct.Struct("!d")


class SavedChannel(NamedTuple):
    """A channel and its history, as in the snapshot.

    Each entry is (age in seconds, payload, is text, time of publication in milliseconds since 1970). The last one has
    `offset`.
    """

    name: str
    epoch: str
    offset: int
    entries: list[tuple[float, bytes, bool, int]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SavedChannel).decode


class _Channel1(NamedTuple):
    """A channel in version 1."""

    name: str
    epoch: str
    offset: int
    entries: list[tuple[float, bytes, bool]]


_decode_1 = msgspec.msgpack.Decoder(_Channel1).decode


class SnapshotError(RealtimeError):
    """These bytes are not a snapshot, or not one of this version, or not a whole one."""


def dump(hub: Hub, now: float) -> Iterator[bytes]:
    """Yield a snapshot of the hub's history, a channel at a time; `now` is in seconds since 1970."""
    checksum = 0
    for part in _parts(hub, now):
        checksum = zlib.crc32(part, checksum)
        yield part
    yield _LENGTH.pack(checksum)


class Saved(NamedTuple):
    """The channels of a snapshot, and how many seconds `later` it is now."""

    channels: list[SavedChannel]
    later: float


def read(data: bytes, now: float) -> Saved:
    """Return the content of a snapshot. Raises `SnapshotError` for anything that no hub can have saved."""
    check_magic(data)
    body, checksum = data[: -_LENGTH.size], data[-_LENGTH.size :]
    if _LENGTH.pack(zlib.crc32(body)) != checksum:
        raise SnapshotError("it is incomplete or damaged: its checksum is wrong")
    former = body.startswith(_MAGIC_1)
    channels: dict[str, SavedChannel] = {}
    at = len(_MAGIC)
    try:
        [written] = _TIME.unpack(body[-_TIME.size :])
        while size := _LENGTH.unpack_from(body, at)[0]:
            at += _LENGTH.size
            encoded = body[at : at + size]
            channel = _with_times(_decode_1(encoded), written) if former else _decode(encoded)
            _check(channel)
            if channel.name in channels:
                raise SnapshotError(f"{_NOT_WHAT}: the channel {quoted(channel.name)} is in it twice")
            channels[channel.name] = channel
            at += size
        [written] = _TIME.unpack(body[at + _LENGTH.size :])  # nothing but the time may follow
    except (msgspec.DecodeError, struct.error) as error:
        raise SnapshotError(f"{_NOT_WHAT}: {error}") from error
    if not math.isfinite(written):
        raise SnapshotError(f"{_NOT_WHAT}: {written} is not a time")
    return Saved(list(channels.values()), max(now - written, 0.0))


def _with_times(channel: _Channel1, written: float) -> SavedChannel:
    """Return a channel of version 1 with times of publication: when it was `written`, minus the ages."""
    entries = [(age, payload, is_text, _milliseconds(written - age)) for age, payload, is_text in channel.entries]
    return SavedChannel(channel.name, channel.epoch, channel.offset, entries)


def _milliseconds(seconds: float) -> int:
    """Return seconds as whole milliseconds; 0 for what is beyond all calendars, or not a number."""
    return round(seconds * 1000) if abs(seconds) <= _LAST_TIME / 1000 else 0


def restore(hub: Hub, saved: Saved) -> None:
    """Put the channels of a snapshot into a hub without channels.

    Epochs and offsets go on, so clients that come back get what they have missed. What is too old by now, or is more
    than the hub's history keeps, is left out.
    """
    rings = []
    for each in saved.channels:
        channel = hub.new_channel(each.name, each.epoch, each.offset)
        if channel.ring is not None:
            kept = [
                Aged(age, payload if text else bytearray(payload), time) for age, payload, text, time in each.entries
            ]
            rings.append((channel.ring, each.offset, kept))
    hub.history.restore(rings, saved.later)


def check_magic(data: bytes) -> None:
    """Raise `SnapshotError` if a file that begins with `data`, `MAGIC_BYTES` or more, is not a snapshot."""
    if not data.startswith((_MAGIC, _MAGIC_1)):
        raise SnapshotError("it does not begin as a history of this version does")


def _check(channel: SavedChannel) -> None:
    """Raise `SnapshotError` unless a hub can have saved this channel: its invariants would not hold in another hub."""
    try:
        check_channel_name(channel.name)
    except RefusedError as error:
        raise SnapshotError(f"{_NOT_WHAT}: {error.message}") from None
    wrong = None
    if _EPOCH.fullmatch(channel.epoch) is None:
        wrong = f"an epoch {quoted(channel.epoch)}"
    elif not 0 < len(channel.entries) <= channel.offset <= _LAST_OFFSET:
        wrong = f"{len(channel.entries)} publications up to offset {channel.offset}"
    else:
        youngest = math.inf
        for age, payload, is_text, published in channel.entries:
            if not 0 <= age <= youngest or age == math.inf:
                wrong = f"publications that are {age} seconds old behind others of {youngest} seconds"
                break
            if abs(published) > _LAST_TIME:
                wrong = f"a publication of {published} milliseconds since 1970"
                break
            if is_text and not _is_utf8(payload):
                wrong = "a text that is not UTF-8"
                break
            youngest = age
    if wrong is not None:
        raise SnapshotError(f"{_NOT_WHAT}: the channel {quoted(channel.name)} has {wrong}")


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parts(hub: Hub, now: float) -> Iterator[bytes]:
    yield _MAGIC
    for channel in _saved(hub):
        encoded = _encode(channel)
        yield _LENGTH.pack(len(encoded)) + encoded
    yield _LENGTH.pack(0) + _TIME.pack(now)


def _saved(hub: Hub) -> Iterator[SavedChannel]:
    """Yield every channel that has a history. Nothing may be published meanwhile."""
    for channel in list(hub.channels.values()):
        if channel.ring is not None and (kept := hub.history.aged(channel.ring)):
            entries = [(age, bytes(payload), isinstance(payload, bytes), time) for age, payload, time in kept]
            yield SavedChannel(channel.name, channel.epoch, channel.offset, entries)
