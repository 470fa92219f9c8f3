"""MessagePack in PHP: it reads and writes what Python does."""

from __future__ import annotations

import base64
import re
import struct
from typing import Final

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.php import Php, literal


def repacked(php: Php, packed: bytes, piece: int) -> bytes:
    """Have PHP read a value in pieces of `piece` bytes, and write it again."""
    return base64.b64decode(
        php.run(
            f"$pieces = str_split({literal(packed)}, {piece});"
            "$unpacker = new Realtime\\Unpacker(static function () use (&$pieces) { return array_shift($pieces); });"
            "$value = $unpacker->next();"
            "return base64_encode($pieces === [] && $unpacker->isEmpty() ? Realtime\\MessagePack::pack($value) : '');"
        )
    )


def pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


# PHP cannot tell an empty map from an empty list, nor the key "42" from 42: such maps come back changed.
keys: Final = st.text().filter(lambda key: not re.fullmatch(r"-?\d+", key, re.ASCII))


scalars: Final = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()


values: Final = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner, min_size=1), max_leaves=20
)


@given(value=values, piece=st.integers(1, 64))
@settings(deadline=None, max_examples=300)
def test_php_reads_and_writes_what_python_does(php: Php, value: object, piece: int) -> None:
    assert repacked(php, pack(value), piece) == pack(value)


BOUNDARIES: Final[list[object]] = [
    *(sign * 2**bits + near for bits in (0, 5, 7, 8, 15, 16, 31, 32, 62) for sign in (1, -1) for near in (-1, 0, 1)),
    *(2**63 - 1, -(2**63), -(2**63) + 1),
    *(length * kind for length in (0, 31, 32, 255, 256, 65535, 65536) for kind in ("x", b"x")),
    *(length * [None] for length in (0, 15, 16, 65535, 65536)),
    *({f"k{number}": number for number in range(length)} for length in (1, 15, 16, 65536)),
    *(0.0, -0.0, 1.5, float("inf"), float("-inf"), 5e-324),
    {-1: "an int", 2**40: "as a key"},
]


@pytest.mark.parametrize("value", BOUNDARIES, ids=lambda value: repr(value)[:24])
def test_every_size_of_a_value_is_read_and_written_as_python_does(php: Php, value: object) -> None:
    assert repacked(php, pack(value), 2**16) == pack(value)


@pytest.mark.parametrize(
    ("packed", "value"),
    [
        (b"\xca" + struct.pack(">f", 1.5), 1.5),
        (b"\xcc\x01", 1),
        (b"\xcd\x00\x01", 1),
        (b"\xce" + bytes(3) + b"\x01", 1),
        (b"\xcf" + bytes(7) + b"\x01", 1),
        (b"\xd0\xff", -1),
        (b"\xd1\xff\xff", -1),
        (b"\xd2" + b"\xff" * 4, -1),
        (b"\xd3" + b"\xff" * 8, -1),
        (b"\xd3" + bytes(7) + b"\x01", 1),
        (b"\xd9\x01x", "x"),
        (b"\xda\x00\x01x", "x"),
        (b"\xdb" + bytes(3) + b"\x01x", "x"),
        (b"\xc5\x00\x01x", b"x"),
        (b"\xc6" + bytes(3) + b"\x01x", b"x"),
        (b"\xdc\x00\x01\xc0", [None]),
        (b"\xdd" + bytes(3) + b"\x01\xc0", [None]),
        (b"\xde\x00\x01\xa1x\xc0", {"x": None}),
        (b"\xdf" + bytes(3) + b"\x01\xa1x\xc0", {"x": None}),
    ],
)
def test_a_value_may_be_written_longer_than_it_need_be(php: Php, packed: bytes, value: object) -> None:
    assert repacked(php, packed, 1) == pack(value)


def test_what_has_no_messagepack_is_a_type_error(php: Php) -> None:
    attempt = 'try { $client->call("broadcast", [$client]); } catch (TypeError $e) { return $e->getMessage(); }'
    assert php.run(attempt) == "no MessagePack is made of Realtime\\Client"
