"""History that outlives a clean restart, and none that is not true any more."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from realtimed.hub.hub import Hub
from realtimed.hub.position import Position
from realtimed.hub.snapshot import SnapshotError, dump, read, restore
from tests.kit.clients import publisher, raw_client
from tests.kit.hubs import AFTERWARDS, Clock, come_back, hub_with_history, missed, publish, sealed
from tests.kit.stack import running_daemon


def load(hub: Hub, data: bytes, now: float) -> int:
    """Put a snapshot's channels into a hub; return how many there are in it."""
    saved = read(data, now)
    restore(hub, saved)
    return len(saved.channels)


def handed_over(hub: Hub, seconds: float = 0, **options: Any) -> Hub:
    """Return the hub of the next daemon, which starts `seconds` later."""
    after = hub_with_history(clock=Clock(5.0), **options)
    load(after, b"".join(dump(hub, 1_000_000)), 1_000_000 + seconds)
    return after


def test_who_comes_back_after_a_restart_has_what_was_missed() -> None:
    hub = hub_with_history()
    start = publish(hub, "news", 5)
    hub.publish("news", b"\x00\xff")
    after = handed_over(hub)
    joined = come_back(after, "news", start._replace(offset=3))
    assert (joined.epoch, joined.offset, joined.recovered) == (start.epoch, 6, True)
    assert [(each.offset, each.message) for each in joined.missed] == [(4, "4"), (5, "5"), (6, b"\x00\xff")]
    assert after.publish("news", "7").offset == 7
    assert after.history.bytes > hub.history.bytes


def test_ages_go_on_while_no_daemon_runs() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    start = publish(hub, "news", 1)
    clock.now += 30
    publish(hub, "news", 1)
    after = handed_over(hub, 29, age=60)
    assert missed(come_back(after, "news", start)) == ["1", "1"]
    after = handed_over(hub, 31, age=60)
    assert come_back(after, "news", start).recovered is False
    assert missed(come_back(after, "news", start._replace(offset=1))) == ["1"]
    assert not handed_over(hub, 61, age=60).channels, "a channel of which nothing is left is forgotten"
    assert handed_over(hub, -1000, age=60).channels, "a clock that was set back makes nothing older"


def test_the_bounds_of_the_new_daemon_hold() -> None:
    hub = hub_with_history()
    start = publish(hub, "news", 50)
    publish(hub, "sport", 1)
    after = handed_over(hub, size=10, none=(0, 60.0), sport=(0, 60.0))
    assert set(after.channels) == {"news"}
    assert len(come_back(after, "news", start._replace(offset=40)).missed) == 10
    assert come_back(after, "news", start._replace(offset=39)).recovered is False
    assert handed_over(hub, limit=5000).history.bytes <= 5000


def test_the_oldest_of_all_channels_expire_first_after_a_restart_as_well() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    for name in "abab":
        hub.publish(name, name)
        clock.now += 10
    later = Clock(5.0)
    after = hub_with_history(age=60, clock=later)
    load(after, b"".join(dump(hub, 0)), 0)
    later.now += 35
    after.history.expire(1000)
    assert {name: channel.ring.count for name, channel in after.channels.items() if channel.ring} == {
        "a": 1, "b": 1
    }  # fmt: skip


def whole() -> bytes:
    hub = hub_with_history()
    publish(hub, "news", 3)
    return b"".join(dump(hub, 0))


@given(cut=st.integers(0, len(whole()) - 1))
def test_what_is_incomplete_is_not_taken(cut: int) -> None:
    hub = hub_with_history()
    with pytest.raises(SnapshotError):
        load(hub, whole()[:cut], 0)
    assert not hub.channels


@given(place=st.integers(0, len(whole()) - 1), bit=st.integers(0, 7))
def test_what_is_damaged_is_not_taken(place: int, bit: int) -> None:
    data = bytearray(whole())
    data[place] ^= 1 << bit
    hub = hub_with_history()
    with pytest.raises(SnapshotError):
        load(hub, bytes(data), 0)
    assert not hub.channels


def test_what_is_whole_but_something_else_is_not_taken() -> None:
    body = b"realtimed-history 2\n" + struct.pack("!I", 3) + msgspec.msgpack.encode("ab") + bytes(12)
    with pytest.raises(SnapshotError, match="not what its first line says"):
        load(hub_with_history(), body + struct.pack("!I", zlib.crc32(body)), 0)


CHANNEL = ["news", "abc1", 3, [[2.0, b"a", True, 5000], [1.0, b"b", True, -1]]]
OLD = ["news", "abc1", 3, [[2.0, b"a", True], [1.0, b"b", True]]]


def test_what_is_whole_and_right_is_taken() -> None:
    hub = hub_with_history()
    assert load(hub, sealed(CHANNEL), 0) == 1
    assert hub.channels["news"].offset == 3
    assert told(hub, "news") == [(2, "a", 5000), (3, "b", -1)]


# A daemon of before times of publication has written this on 2026-01-01, at midnight UTC.
VERSION_1 = (
    b"realtimed-history 1\n"
    b"\0\0\0E\x94\xa4news\xa90a1b2c3d0\x03\x93"
    b"\x93\xcb@\x10\0\0\0\0\0\0\xc4\x05first\xc3"
    b"\x93\xcb?\xf8\0\0\0\0\0\0\xc4\x02\xff\0\xc2"
    b"\x93\xcb?\xd0\0\0\0\0\0\0\xc4\x05third\xc3"
    b"\0\0\0)\x94\xa8sport:42\xa90a1b2c3d0\x01\x91"
    b"\x93\xcb?\xf8\0\0\0\0\0\0\xc4\x06hell\xc3\xb6\xc3"
    b"\0\0\0\0A\xdaUn@\0\0\0\x05\x9a\xc1\x18"
)
MIDNIGHT = 1_767_225_600


def told(hub: Hub, name: str) -> list[tuple[int, str | bytes, int]]:
    return [(each.offset, each.message, each.time) for each in hub.recent(name, 100)[1]]


@pytest.mark.parametrize("later", [0, 100, -1000])
def test_a_state_of_the_version_before_is_taken_and_its_times_are_those_of_its_ages(later: float) -> None:
    hub = hub_with_history()
    assert load(hub, VERSION_1, MIDNIGHT + later) == 2
    assert told(hub, "news") == [
        (1, "first", MIDNIGHT * 1000 - 4000),
        (2, b"\xff\0", MIDNIGHT * 1000 - 1500),
        (3, "third", MIDNIGHT * 1000 - 250),
    ]
    assert told(hub, "sport:42") == [(1, "hellö", MIDNIGHT * 1000 - 1500)]
    assert hub.channels["news"].epoch == "0a1b2c3d0"
    assert hub.publish("news", "4").offset == 4
    assert b"".join(dump(hub, MIDNIGHT)).startswith(b"realtimed-history 2\n")


def test_ages_count_from_when_a_state_of_the_version_before_was_written() -> None:
    hub = hub_with_history(age=60)
    load(hub, VERSION_1, MIDNIGHT + 57)
    assert [offset for offset, _, _ in told(hub, "news")] == [2, 3]


@given(cut=st.integers(0, len(VERSION_1) - 1), bit=st.integers(0, 7))
def test_a_damaged_state_of_the_version_before_is_not_taken(cut: int, bit: int) -> None:
    damaged = bytearray(VERSION_1)
    damaged[cut] ^= 1 << bit
    for data in (VERSION_1[:cut], bytes(damaged)):
        hub = hub_with_history()
        with pytest.raises(SnapshotError):
            load(hub, data, 0)
        assert not hub.channels


def test_times_of_publication_outlive_restarts_whatever_the_clock_says() -> None:
    wall, clock = Clock(MIDNIGHT), Clock()
    hub = hub_with_history(size=3, clock=clock, time_ns=lambda: int(wall.now * 1000) * 1_000_000)
    for step in (0, 1.5, -7200, 10, -0.25):  # somebody sets the clock
        wall.now += step
        clock.now += 1
        hub.publish("news", str(step))
    before = told(hub, "news")
    assert [time for _, _, time in before] == [MIDNIGHT * 1000 + each for each in (-7_198_500, -7_188_500, -7_188_750)]
    for seconds in (0, 10, -10_000, 200):
        hub = handed_over(hub, seconds)
        assert told(hub, "news") == before


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (sealed(["n\0", *CHANNEL[1:]]), r"'n\\x00' is not a channel name"),
        (sealed(["x" * 201, *CHANNEL[1:]]), "is not a channel name"),
        (sealed(["", *CHANNEL[1:]]), "is not a channel name"),
        (sealed(CHANNEL, CHANNEL), "the channel 'news' is in it twice"),
        (sealed(["news", "a:1", *CHANNEL[2:]]), "has an epoch 'a:1'"),
        (sealed(["news", "", *CHANNEL[2:]]), "has an epoch ''"),
        (sealed(["news", "abc1", 1, CHANNEL[3]]), "has 2 publications up to offset 1"),
        (sealed(["news", "abc1", -1, CHANNEL[3]]), "has 2 publications up to offset -1"),
        (sealed(["news", "abc1", 2**63, CHANNEL[3]]), "has 2 publications up to offset 9223372036854775808"),
        (sealed(["news", "abc1", 0, []]), "has 0 publications up to offset 0"),
        (sealed(["news", "abc1", 3, [[float("nan"), b"", True, 0]]]), "publications that are nan seconds old"),
        (sealed(["news", "abc1", 3, [[float("inf"), b"", True, 0]]]), "publications that are inf seconds old"),
        (sealed(["news", "abc1", 3, [[-1.0, b"", True, 0]]]), "publications that are -1.0 seconds old"),
        (sealed(["news", "abc1", 3, CHANNEL[3][::-1]]), "2.0 seconds old behind others of 1.0 seconds"),  # type: ignore[index]
        (sealed(["news", "abc1", 3, [[1.0, b"\xff", True, 0]]]), "a text that is not UTF-8"),
        (sealed(["news", "abc1", 3, [[1.0, "text", True, 0]]]), "Expected `bytes`, got `str`"),
        (sealed(["news", "abc1", 3, [[1.0, b"", True, 2**53 + 1]]]), "9007199254740993 milliseconds since 1970"),
        (sealed(["news", "abc1", 3, [[1.0, b"", True, 2**63]]]), "9223372036854775808 milliseconds since 1970"),
        (sealed(["news", "abc1", 3, [[1.0, b"", True, -(2**63)]]]), "-9223372036854775808 milliseconds since 1970"),
        (sealed(["news", "abc1", 3, [[1.0, b"", True, 1.5]]]), "Expected `int`, got `float`"),
        (sealed(["news", "abc1", 3, [[1.0, b"", True]]]), "Expected `array` of length 4"),
        (sealed(["news", "abc1", 3, [[1.0, b"", True, 0]]], version=1), "Expected `array` of length 3"),
        (sealed(["news", "abc1", 3, [[float("nan"), b"", True]]], version=1), "publications that are nan seconds old"),
        (sealed(["news", "abc1", 3, [[float("inf"), b"", True]]], version=1), "publications that are inf seconds old"),
        (sealed(["news", "abc1", 3, [[-1e308, b"", True]]], version=1), r"publications that are -1e\+308 seconds old"),
        (sealed(OLD, end=struct.pack("!Id", 0, float("nan")), version=1), "nan is not a time"),
        (sealed(OLD, end=struct.pack("!Id", 0, float("inf")), version=1), "inf is not a time"),
        (sealed(CHANNEL, version=3), "does not begin as a history of this version"),
        (sealed([1, 2, 3, 4]), "Expected `str`, got `int`"),
        (sealed({}), "Expected `array`, got `object`"),
        (sealed(b"\x91" * 100_000), "Expected `array` of length 4"),
        (sealed(b"\x94\xa1a\xa1b\x01\xdd\xff\xff\xff\xff"), "truncated"),
        (sealed(b"\xc1"), "not what its first line says"),
        (sealed(b""), "not what its first line says"),
        (sealed(CHANNEL, end=b"\xff\xff\xff\xff"), "truncated"),
        (sealed(CHANNEL, end=b""), "not what its first line says"),
        (sealed(CHANNEL, end=AFTERWARDS[:-1]), "not what its first line says"),
        (sealed(CHANNEL, end=AFTERWARDS + b"more"), "not what its first line says"),
        (sealed(CHANNEL, end=struct.pack("!Id", 0, float("nan"))), "nan is not a time"),
        (sealed(CHANNEL, end=struct.pack("!Id", 0, float("-inf"))), "-inf is not a time"),
    ],
)
def test_what_has_a_right_checksum_and_wrong_content_is_not_taken(data: bytes, sentence: str) -> None:
    hub = hub_with_history()
    with pytest.raises(SnapshotError, match=sentence):
        load(hub, data, 0)
    assert not hub.channels


@given(
    channels=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner, max_size=5),
        )
        | st.tuples(
            st.sampled_from(["news", "x"]),
            st.text(max_size=2),
            st.integers(-3, 5),
            st.lists(
                st.tuples(st.floats(), st.binary(max_size=2), st.booleans())
                | st.tuples(st.floats(0, 9), st.just(b"x"), st.booleans(), st.integers(-(2**63), 2**64 - 1)),
                max_size=3,
            ),
        ),
        max_size=3,
    ),
    end=st.just(AFTERWARDS) | st.floats().map(lambda written: struct.pack("!Id", 0, written)) | st.binary(max_size=20),
    version=st.sampled_from([1, 2]),
)
def test_whatever_a_snapshot_says_is_taken_whole_or_refused(channels: list[object], end: bytes, version: int) -> None:
    hub = hub_with_history()
    try:
        load(hub, sealed(*channels, end=end, version=version), 0)
    except SnapshotError:
        assert not hub.channels
    else:
        b"".join(dump(hub, 0))


async def test_the_daemon_hands_its_history_to_the_next(runtime_dir: Path) -> None:
    state = runtime_dir / "state"
    with trio.fail_after(60):
        async with running_daemon(runtime_dir, "--state-file", str(state)) as daemon:
            async with publisher(daemon.control_socket) as sender:
                receipts = [await sender.call("broadcast", "news", "x" * 50_000) for _ in range(60)]
            assert await daemon.stop() == 0
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        async with running_daemon(runtime_dir, "--state-file", str(state)) as daemon:
            async with publisher(daemon.control_socket) as sender:
                kept = await sender.call("history", "news", 3)
                assert not state.exists(), "a state is used once"
                assert [offset for offset, _ in kept["messages"]] == [58, 59, 60]
                answer = await sender.call("subscribe", "news", {"epoch": receipts[0]["epoch"], "offset": 60})
                assert answer == {"epoch": receipts[0]["epoch"], "offset": 60, "recovered": True}
                assert await sender.call("unsubscribe", "news") == {"unsubscribed": True}
                assert (await sender.call("broadcast", "news", "x"))["offset"] == 61
            daemon.process.kill()
            await daemon.wait()
        async with (
            running_daemon(runtime_dir, "--state-file", str(state)) as daemon,
            publisher(daemon.control_socket) as sender,
        ):
            answer = await sender.call("subscribe", "news", Position(receipts[0]["epoch"], 61)._asdict())
            assert answer["recovered"] is False, "after a crash nobody knows what was published"
            assert (await sender.call("channels"))["news"]["offset"] == 0


@pytest.mark.parametrize("left", [b"", b"realtimed-history 3\n...", b"realtimed-history 1\n...", os.urandom(1000)])
async def test_a_state_that_cannot_be_used_is_said_and_the_daemon_serves(left: bytes, runtime_dir: Path) -> None:
    state = runtime_dir / "state"
    state.write_bytes(left)
    async with (
        running_daemon(runtime_dir, "--state-file", str(state)) as daemon,
        publisher(daemon.control_socket) as sender,
    ):
        assert (await sender.call("broadcast", "news", "x"))["offset"] == 1
    assert state.with_name("state.damaged").read_bytes() == left
    log = (runtime_dir / "realtimed.log").read_text()
    assert f"history begins anew state_file={state} reason='it " in log
    assert f" kept_as={state}.damaged\n" in log
    assert "history saved channels=1" in log


async def test_a_second_signal_loses_no_history(runtime_dir: Path) -> None:
    """A client that does not answer its Close would hold the stop up for a minute; the second signal does not wait."""
    state = runtime_dir / "state"
    with trio.fail_after(60):
        async with (
            running_daemon(runtime_dir, "--state-file", str(state), "--close-timeout", "60") as daemon,
            publisher(daemon.control_socket) as sender,
            raw_client(daemon.websocket_socket) as client,
        ):
            await sender.call("broadcast", "news", "x")
            daemon.process.terminate()
            while b"restarting" not in await client.stream.receive_some():
                pass
            assert await daemon.stop() == 0
        assert "history saved channels=1" in daemon.log
        assert state.exists()
