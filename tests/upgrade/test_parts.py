"""What passes from one daemon's parts to another's: each peer goes on as if nothing had been."""

from __future__ import annotations

import json
import random
import socket
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from realtimed.core import Core
from realtimed.process.portions import HandOverError, Portion, TakenPortion
from realtimed.rpc.wire import Decoder, Response, encode_notification, encode_request
from realtimed.upgrade import READS, VERSION
from tests.kit.clients import REQUEST, subscribe
from tests.kit.frames import masked_frame
from tests.kit.handovers import at_rest, connected, hand_over, publisher, running_core, said, taken
from tests.kit.patience import PATIENCE
from tests.upgrade.record import HALF, RECORDED, Recorded

V1 = REQUEST.removesuffix(b"\r\n") + b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"
PING = masked_frame(b'{"action":"ping","id":1}')


async def received(peer: socket.socket, *wanted: bytes) -> bytes:
    """Read until all that is `wanted` has come; return all that has."""
    data = b""
    with trio.fail_after(PATIENCE):
        while not all(each in data for each in wanted):
            await trio.lowlevel.wait_readable(peer)
            more = peer.recv(2**16)
            assert more, f"hung up after {data[-200:]!r}"
            data += more
    return data


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE):
        while not true():
            await trio.lowlevel.checkpoint()


def messages_in(data: bytes) -> list[dict[str, Any]]:
    """Return the events in a stream of frames."""
    events, at = [], 0
    while at < len(data):
        size, begin = data[at + 1], at + 2
        if size == 126:
            size, begin = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
        elif size == 127:
            size, begin = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
        if data[at] == 0x81:
            events.append(json.loads(data[begin : begin + size]))
        at = begin + size
    return events


async def v1_client(core: Core, *channels: str) -> socket.socket:
    peer = connected(core, V1 + b"".join(masked_frame(subscribe(channel).encode()) for channel in channels) + PING)
    await received(peer, b"pong")
    return peer


FRAGMENTS = (
    masked_frame(b'{"action":', 0x01)
    + masked_frame(b"between", 0x89)
    + masked_frame(b"", 0x00)
    + masked_frame(b'"ping","id":', 0x00)
    + masked_frame(b"1}", 0x80)
)


@pytest.mark.parametrize("sent", [PING, FRAGMENTS, masked_frame(b'{"action":"ping","id":1}' + b" " * 300)])
async def test_a_message_may_be_cut_anywhere(sent: bytes) -> None:
    for cut in range(1, len(sent)):
        async with running_core() as old, running_core() as new:
            peer = await v1_client(old)
            peer.sendall(sent[:cut])
            await wait_all_tasks_blocked()
            await hand_over(old, new)
            peer.sendall(sent[cut:])
            answer = await received(peer, b'"pong"')
            assert answer.count(b"between") == (sent is FRAGMENTS)
            assert answer.count(b"pong") == 1
            peer.close()


async def test_a_request_may_be_cut_anywhere() -> None:
    for cut in range(1, len(V1), 7):
        async with running_core() as old, running_core() as new:
            peer = connected(old, V1[:cut])
            await wait_all_tasks_blocked()
            await hand_over(old, new)
            peer.sendall(V1[cut:] + PING)
            assert (await received(peer, b"pong")).startswith(b"HTTP/1.1 101 ")
            assert len(new.sessions.members) == 1
            peer.close()


async def test_who_is_slow_gets_each_byte_once() -> None:
    async with running_core() as old, running_core() as new:
        peers = [await v1_client(old, "news") for _ in range(3)]
        for number in range(40):
            old.hub.publish("news", f"{number} " + "x" * 20_000)
        await old.fan_out.settle()
        assert old.backlogs.streams == 3
        peers[0].recv(1234)  # in the middle of a frame
        began = [peer.recv(5 + 100 * number) for number, peer in enumerate(peers)]
        await hand_over(old, new)
        new.hub.publish("news", "the end")
        for at, peer in enumerate(peers):
            data = began[at] + await received(peer, b"the end")
            if at:  # the first one has lost its beginning
                assert [event["offset"] for event in messages_in(data)] == list(range(1, 42))
        await until(lambda: not new.backlogs.streams)
        assert (new.backlogs.held, new.backlogs.total, old.backlogs.total) == (0, 0, 0)
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("evicted", [False, True])
async def test_a_replay_goes_on_where_it_was(evicted: bool) -> None:
    async with running_core(history_size=300) as old, running_core(history_size=300) as new:
        for number in range(300):
            receipt = old.hub.publish("kept", f"{number} " + "x" * 5_000)
        readers = []
        for offset in (3, 0, 250):
            since = {"epoch": receipt.epoch, "offset": offset}
            peer = await v1_client(old)
            peer.sendall(masked_frame(subscribe("kept", since=since).encode()) + PING)
            readers.append((offset, peer))
        await until(lambda: old.hub.history.retained or old.backlogs.streams == len(readers))
        await wait_all_tasks_blocked()
        newest = 300
        if evicted:  # the history drops what is still to be replayed
            for _ in range(200):
                newest = old.hub.publish("kept", "newer").offset
            await old.fan_out.settle()
        await hand_over(old, new)
        assert bool(new.hub.history.retained) is evicted
        for offset, peer in readers:
            data = await received(peer, b'"pong"')  # asked for behind the replay
            events = messages_in(data)
            assert events[0]["recovered"] is True
            offsets = [event["offset"] for event in events if event["event"] == "message"]
            assert offsets == list(range(offset + 1, newest + 1))[: len(offsets)]
            assert len(offsets) >= 300 - offset
            peer.close()
        await until(lambda: not new.sessions.open)
        assert (new.hub.history.retained, new.backlogs.held) == (0, 0)


async def test_who_goes_between_finds_the_end_at_once_and_who_comes_is_served() -> None:
    async with running_core() as old, running_core() as new:
        staying, leaving = await v1_client(old, "news"), await v1_client(old, "news")
        came: list[socket.socket] = []

        def between() -> None:
            leaving.sendall(masked_frame((1000).to_bytes(2, "big"), 0x88))
            staying.sendall(masked_frame(subscribe("other").encode()))
            came.append(connected(old, V1 + masked_frame(subscribe("news").encode())))

        await hand_over(old, new, between)
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(leaving)
            assert leaving.recv(100) == b"\x88\x02\x03\xe8"
            await trio.lowlevel.wait_readable(leaving)
            assert leaving.recv(100) == b""
        assert new.hub.publish("news", "for two").recipients == 2
        assert new.hub.publish("other", "for one").recipients == 1
        assert b"for two" in await received(staying, b"for one")
        assert b"welcome" in await received(came[0], b"for two")
        assert len({*old.sessions.members, *new.sessions.members}) == 2
        for peer in (staying, leaving, *came):
            peer.close()
        await until(lambda: not new.sessions.open)
        assert not old.sessions.open


async def test_who_is_ending_is_answered_by_the_old_process() -> None:
    async with running_core() as old, running_core() as new:
        peer = await v1_client(old, "news")
        [client] = old.sessions.members
        old.sessions.disconnect(client, 4000, "enough")
        await hand_over(old, new)
        assert (old.sessions.open, new.sessions.open) == (1, 0)
        assert b"enough" in await received(peer, b"enough")
        peer.sendall(masked_frame((4000).to_bytes(2, "big"), 0x88))
        with trio.fail_after(PATIENCE):
            await old.sessions.emptied()
        peer.close()


async def test_after_a_failure_everything_goes_on_here() -> None:
    async with running_core() as old, running_core() as new:
        peer = await v1_client(old, "news")
        half = masked_frame(b'{"action":"ping","id":2}')
        peer.sendall(half[:9])
        new.gate.close()
        new.sessions.gate.close()
        taken(new, list(said(old, last=False)))
        await wait_all_tasks_blocked()
        await at_rest(old)
        rest = list(said(old, last=True))
        for part in old.parts:
            part.stay()
        for message in rest:
            for fd in message.portion.descriptors:
                socket.close(fd)
        for session in list(new.sessions.members.values()):
            session.leave_to_another_process()
        old.gate.open()
        old.sessions.gate.open()
        peer.sendall(half[9:])
        old.hub.publish("news", "after")
        await until(lambda: not old.hub.log_bytes)
        events = messages_in(await received(peer, b'"id":2'))
        assert [event.get("data") for event in events if event["event"] == "message"] == ["after"]
        peer.close()
        await until(lambda: not old.sessions.open)


COMMANDS = (
    encode_request(1, "broadcast", ("calls", "a"))
    + encode_notification("broadcast", ("calls", "b"))
    + encode_request(2, "broadcast_many", (["calls", "others"], "c", "key"))
    + encode_request(3, "broadcast", ("calls", "x" * 200_000))  # more than may be
    + encode_request(4, "subscribe", ("calls",))
    + encode_request(5, "broadcast", ("calls", "d", "key"))
)


async def answers(peer: socket.socket, last: int) -> list[Any]:
    decoder, found = Decoder(2**20), list[Any]()
    with trio.fail_after(PATIENCE):
        while not any(isinstance(each, Response) and each.id == last for each in found):
            await trio.lowlevel.wait_readable(peer)
            found += decoder.feed(peer.recv(2**16))
    return found


@pytest.mark.parametrize("part", range(8))
async def test_commands_may_be_cut_anywhere(part: int) -> None:
    source = random.Random(part)
    edges = [at for at in range(1, 200) if at % 8 == part]
    inside = [source.randrange(200, len(COMMANDS)) for _ in range(5)]
    late = [len(COMMANDS) - 1 - at for at in range(60) if at % 8 == part]
    async with running_core(max_message=1000) as expected:
        peer = publisher(expected, COMMANDS)
        wanted = await answers(peer, 5)
        peer.close()
    for cut in edges + inside + late:
        async with running_core(max_message=1000) as old, running_core(max_message=1000) as new:
            peer = publisher(old, COMMANDS[:cut])
            await wait_all_tasks_blocked()
            await hand_over(old, new)
            peer.sendall(COMMANDS[cut:])
            found = await answers(peer, 5)
            assert without_epochs(found) == without_epochs(wanted), cut
            assert new.hub.publications == 5
            assert (new.service.commands, new.service.refused) == (6, {"message_too_large": 1})
            assert not new.keyed_receipts.known(("calls", "others"), "no key")
            assert new.keyed_receipts.known(("calls", "others"), "key")
            peer.close()


def without_epochs(messages: list[Any]) -> list[Any]:
    """Return messages with all epochs as one, since those of two daemons differ."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: "" if name == "epoch" else changed(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [changed(each) for each in value]
        return value

    return [changed(each) for each in messages]


async def test_watchers_keep_watching_and_see_each_message_once() -> None:
    async with running_core() as old, running_core() as new:
        peer = publisher(old, encode_request(1, "watch", ("news*", {"time": True})))
        await answers(peer, 1)
        old.hub.publish("news", "before")
        await old.fan_out.settle()
        await hand_over(old, new)
        new.hub.publish("news", "after")
        new.hub.publish("other", "never")
        peer.sendall(encode_request(2, "unwatch", ("news*",)))
        *shown, last = await answers(peer, 2)
        assert [each.params[1] for each in shown] == ["before", "after"]
        assert [each.params[2] for each in shown] == [1, 2]
        assert all("time" in each.params[3] for each in shown)
        assert last.result == {"unwatched": True}
        peer.close()


async def test_keys_and_channels_of_all_ages_pass() -> None:
    async with running_core() as old, running_core() as new:
        early = old.hub.publish("kept", "1")
        old.keyed_receipts.remember("kept", "early", [early])
        late = []

        def between() -> None:
            late.append(old.hub.publish("kept", "2"))
            late.append(old.hub.publish("new", "1"))
            old.keyed_receipts.remember("kept", "late", [late[0]])

        await hand_over(old, new, between)
        assert list(new.keyed_receipts.known("kept", "early") or ()) == [early]
        assert list(new.keyed_receipts.known("kept", "late") or ()) == [late[0]]
        assert new.hub.publish("kept", "3") == early._replace(offset=3)
        assert new.hub.publish("new", "2") == late[1]._replace(offset=2)
        _, kept = new.hub.recent("kept", 10)
        assert [each.payload for each in kept] == [b"1", b"2", b"3"]


async def test_fields_that_are_not_known_are_ignored_and_those_that_miss_have_defaults() -> None:
    """So two neighbouring versions understand each other, of which one has a field more."""
    async with running_core() as old, running_core() as new:
        old.hub.publish("news", "1")
        peer = await v1_client(old, "news")
        asking = publisher(old, encode_request(1, "ping", ()))
        await answers(asking, 1)
        more: list[Any] = []
        await at_rest(old)
        for last in (False, True):
            for message in said(old, last=last):
                data = with_a_field_more(msgspec.msgpack.decode(message.portion.data))
                portion = Portion(msgspec.msgpack.encode(data), message.portion.descriptors)
                more.append(message._replace(portion=portion))
        taken(new, more)
        for part in new.parts:
            part.begin()
        new.publishers.report({})
        for part in old.parts:
            part.gone()
        new.hub.publish("news", "2")
        assert [event["offset"] for event in messages_in(await received(peer, b'"2"'))] == [2]
        peer.close()
        asking.close()


def with_a_field_more(value: Any) -> Any:
    """Return a record with one field more, in itself and in all records that it has in lists."""
    if isinstance(value, dict) and "channels" in value:
        return {**{name: with_a_field_more(each) for name, each in value.items()}, "of another version": [1, 2]}
    if isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        return [[*each, "of another version"] if isinstance(each[0], str) else each for each in value]
    return value


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", b"\xc0", bytes(100)])
async def test_what_no_daemon_can_have_said_is_an_error_in_words(data: bytes) -> None:
    async with running_core() as core:
        for part in core.parts:
            with pytest.raises(HandOverError):
                part.take_rest(TakenPortion(data, []))


@pytest.mark.parametrize("version", range(READS[0], VERSION + 1))
async def test_recorded_states_are_still_read(version: int) -> None:
    """A state was recorded when its version began: whatever has changed since has to read it. See `record`."""
    recorded = msgspec.msgpack.decode(zlib.decompress((RECORDED / str(version)).read_bytes()), type=Recorded)
    async with running_core() as core:
        peers: list[socket.socket] = []
        for number, last, data, files in recorded:
            pairs = [socket.socketpair() for _ in range(files)]
            for ours, theirs in pairs:
                ours.setblocking(False)
                theirs.setblocking(False)
                peers.append(theirs)
            part, portion = core.parts[number], TakenPortion(data, [ours.detach() for ours, _ in pairs])
            (part.take_rest if last else part.take)(portion)
        for part in core.parts:
            part.begin()
        core.publishers.report({})
        v1, plain, arriving, publisher = peers
        v1.sendall(masked_frame(b'{"action":"ping"}')[HALF:])
        assert core.hub.publish("news", "next")[:1] + core.hub.publish("news", "end")[2:3] == (2, 5)
        assert b"x" * 1000 in await received(v1, b"next", b'"pong"')
        assert b"x" * 1000 in await received(plain, b"\x81\x03end")
        publisher.sendall(encode_request(2, "ping", ())[HALF:])
        assert b"next" in await received(publisher, b"pong")
        assert core.keyed_receipts.known("news", "key")
        assert len(core.sessions.handshakes) == 1
        for peer in (v1, plain, arriving, publisher):
            peer.close()
