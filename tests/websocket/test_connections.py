"""Sessions without tasks: what each client sends is its own, comes in order, and holds up nobody else."""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Event, TextMessage

from realtimed.hub.publication import Ending
from realtimed.websocket.arrival import Arrival
from realtimed.websocket.protocols.v1 import RealtimeV1
from realtimed.websocket.sessions import Sessions
from tests.kit.clients import REQUEST, subscribe
from tests.kit.frames import masked_frame as frame
from tests.kit.patience import PATIENCE
from tests.kit.sessions import connect, running_sessions

V1 = REQUEST.removesuffix(b"\r\n") + b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n"
PING = b'{"action":"ping"}'
CLOSE = b"\x88\x82\0\0\0\0\x03\xe8"
NO_LIMIT = {"inbound_rate": 1e6, "inbound_burst": 10**6}


def events(peer: socket.socket) -> list[Event]:
    """Return all that has come behind the answer to the handshake."""
    data = b""
    try:
        while more := peer.recv(2**16):
            data += more
    except BlockingIOError:
        pass
    parser = Connection(ConnectionType.CLIENT)
    parser.receive_data(data.partition(b"\r\n\r\n")[2])
    return list(parser.events())


def heard(peer: socket.socket) -> list[str]:
    """Return the text of all messages that have come, the welcome left out."""
    said = [event.data for event in events(peer) if isinstance(event, TextMessage)]
    return [each for each in said if '"welcome"' not in each]


async def readable(peer: socket.socket) -> bool:
    await trio.lowlevel.wait_readable(peer)
    return True


PONG = '{"event":"pong"}'


async def is_served(peer: socket.socket) -> None:
    """Check that a client, which has heard nothing else so far, gets an answer."""
    peer.sendall(frame(PING))
    await wait_all_tasks_blocked()
    assert heard(peer) == [PONG]


async def settled(sessions: Sessions, count: int) -> None:
    with trio.fail_after(PATIENCE):
        while len(sessions.members) != count:
            await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()


async def test_an_empty_first_fragment_keeps_the_engine_from_others() -> None:
    async with running_sessions() as sessions:
        first = connect(sessions, V1 + frame(b"", 0x01))
        await wait_all_tasks_blocked()
        second = connect(sessions, V1 + frame(PING))
        await wait_all_tasks_blocked()
        assert sessions.engines.count == 2
        first.sendall(frame(PING, 0x80))
        await wait_all_tasks_blocked()
        assert (heard(first), heard(second)) == ([PONG], [PONG])
        first.close()
        second.close()
        await settled(sessions, 0)


@pytest.mark.parametrize("clients", [1, 16, 500])
async def test_a_close_behind_messages_is_no_abnormal_end_however_many_wait_for_an_engine(clients: int) -> None:
    async with running_sessions(**NO_LIMIT) as sessions:
        peers = []
        for _ in range(clients):
            peers.append(connect(sessions, REQUEST + frame(subscribe("news").encode()) + CLOSE))
            peers[-1].shutdown(socket.SHUT_WR)
        await settled(sessions, 0)
        assert sessions.connections == clients
        assert sessions.closed == {1000: clients}
        assert sessions.ended[Ending.BY_CLIENT] == clients
        for peer in peers:
            peer.close()


async def test_who_closes_and_is_gone_at_once_has_closed() -> None:
    async with running_sessions() as sessions:
        peer = connect(sessions, REQUEST)
        await wait_all_tasks_blocked()
        peer.sendall(CLOSE)
        peer.close()
        await settled(sessions, 0)
        assert sessions.closed == {1000: 1}


async def test_sixteen_half_messages_stop_nobody() -> None:
    async with running_sessions() as sessions:
        halves = [connect(sessions, V1 + frame(PING)[:9]) for _ in range(40)]
        await wait_all_tasks_blocked()
        others = [connect(sessions, V1 + frame(PING)) for _ in range(40)]
        await wait_all_tasks_blocked()
        assert [heard(each) for each in others] == [[PONG]] * 40
        for each in halves:
            each.sendall(frame(PING)[9:])
        await wait_all_tasks_blocked()
        assert [heard(each) for each in halves] == [[PONG]] * 40
        assert sessions.engines.count <= 16, "the others have been given back, and ended"
        for each in [*halves, *others]:
            each.close()
        await settled(sessions, 0)


async def test_who_hangs_up_in_the_middle_gives_the_engine_back() -> None:
    async with running_sessions() as sessions:
        for sent in (frame(PING)[:9], frame(PING)[:1], frame(PING, 0x01), frame(b"", 0x01)):
            for _ in range(20):
                connect(sessions, REQUEST + sent).close()
            await settled(sessions, 0)
        assert sessions.engines.count <= 16
        peer = connect(sessions, V1 + frame(PING))
        await wait_all_tasks_blocked()
        assert heard(peer) == [PONG]
        peer.close()


async def test_one_that_sends_without_end_does_not_keep_others_waiting() -> None:
    """It gets its share of a turn, in which a few frames are read."""
    async with running_sessions(**NO_LIMIT) as sessions:
        endless, other = connect(sessions, V1), connect(sessions, V1)
        await wait_all_tasks_blocked()
        frames, sent = frame(b"", 0x89) * 1000, 0

        def send_more() -> None:
            nonlocal sent
            try:
                sent += endless.send(frames[sent % len(frames) :])
                while endless.recv(2**16):
                    pass
            except BlockingIOError:
                pass

        for _ in range(20):
            send_more()
            other.sendall(frame(PING))
            turns = 0
            while not select.select([other], [], [], 0)[0]:
                send_more()
                await trio.lowlevel.checkpoint()
                turns += 1
            assert turns <= 20
            events(other)
        assert sent > 20 * 1000, "it went on all the time"
        endless.close()
        other.close()


async def test_who_says_little_does_not_wait_behind_hundreds_that_say_all_they_may() -> None:
    async with running_sessions(**NO_LIMIT) as sessions:
        many, other = [connect(sessions, V1) for _ in range(300)], connect(sessions, V1)
        await wait_all_tasks_blocked()
        for each in many:
            each.sendall(frame(b"", 0x89) * 90)
        while sum(session.queued for session in sessions.members.values()) < 250:
            await trio.lowlevel.checkpoint()
        other.sendall(frame(PING))
        while not select.select([other], [], [], 0)[0]:
            await trio.lowlevel.checkpoint()
        assert sum(session.queued for session in sessions.members.values()) > 200, "they still wait"
        await wait_all_tasks_blocked()
        assert [len(events(each)) for each in many] == [91] * 300, "the welcome, and all pongs"
        for each in [*many, other]:
            each.close()


async def test_messages_that_come_during_a_replay_are_answered_behind_it() -> None:
    """Nothing else comes that would make the daemon look at the socket."""
    async with running_sessions() as sessions:
        epoch = sessions.hub.publish("news", "x" * 50_000).epoch
        for _ in range(30):
            sessions.hub.publish("news", "x" * 50_000)
        since = f'{{"action":"subscribe","channel":"news","since":{{"epoch":"{epoch}","offset":0}}}}'
        peer = connect(sessions, V1 + frame(since.encode()) + frame(PING))
        await wait_all_tasks_blocked()
        peer.sendall(frame(PING) * 30 + frame(b"late", 0x89))
        data = b""
        with trio.fail_after(PATIENCE):
            while data.count(b'"pong"') < 31 or b"\x8a\x04late" not in data:
                await trio.lowlevel.wait_readable(peer)
                data += peer.recv(2**16)
        assert data.rindex(b'"message"') < data.index(b'"pong"')
        peer.close()


async def test_who_says_that_it_sends_no_more_gets_the_rest_of_its_replay() -> None:
    async with running_sessions() as sessions:
        epoch = sessions.hub.publish("news", "x" * 50_000).epoch
        for _ in range(30):
            sessions.hub.publish("news", "x" * 50_000)
        peer = connect(sessions, V1)
        await wait_all_tasks_blocked()
        [session] = sessions.members.values()
        session.received(f'{{"action":"subscribe","channel":"news","since":{{"epoch":"{epoch}","offset":0}}}}')
        assert session.stream.replaying
        assert not session.stream.pending, "the kernel has taken the first piece, and the next one is not made yet"
        peer.shutdown(socket.SHUT_WR)
        session.readable(hung_up=True)
        data = b""
        with trio.fail_after(PATIENCE):
            while await readable(peer) and (more := peer.recv(2**16)):
                data += more
        assert data.count(b'"message"') == 31
        assert sessions.open == 0
        peer.close()


async def test_a_fault_in_a_protocol_ends_one_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: RealtimeV1, message: str | bytes) -> list[bytes]:
        raise ZeroDivisionError(message)

    async with running_sessions() as sessions:
        other = connect(sessions, V1)
        await wait_all_tasks_blocked()
        with monkeypatch.context() as patched:
            patched.setattr(RealtimeV1, "receive", fail)
            victim = connect(sessions, V1 + frame(PING))
            await settled(sessions, 1)
        assert "internal error" in caplog.text
        assert "ZeroDivisionError" in caplog.text
        assert sessions.closed == {1006: 1}
        await is_served(other)
        victim.close()
        other.close()


async def test_a_fault_while_a_backlog_is_sent_ends_one_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_sessions() as sessions:
        victim, other = connect(sessions, V1), connect(sessions, V1)
        await wait_all_tasks_blocked()
        session = next(iter(sessions.members.values()))
        session.stream.write(bytes(2**20))
        monkeypatch.setattr("realtimed.net.backlog.Backlog.took", lambda *_: 1 / 0)
        with trio.fail_after(PATIENCE):
            while await readable(victim) and victim.recv(2**16):
                pass
        await settled(sessions, 1)
        assert "ZeroDivisionError" in caplog.text
        await is_served(other)
        victim.close()
        other.close()
    assert not sessions.backlogs.streams


async def test_an_engine_that_fails_ends_one_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_sessions() as sessions:
        other = connect(sessions, V1)
        await wait_all_tasks_blocked()
        with monkeypatch.context() as patched:
            patched.setattr("wsproto.frame_protocol.FrameDecoder.process_buffer", lambda _: 1 / 0)
            victim = connect(sessions, V1 + frame(PING))
            await settled(sessions, 1)
        assert "ZeroDivisionError" in caplog.text
        assert sessions.engines.count == 0
        await is_served(other)
        victim.close()
        other.close()


async def test_engines_that_cannot_start_end_who_waits_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with running_sessions() as sessions:
        with monkeypatch.context() as patched:
            patched.setattr("realtimed.websocket.engines.wrap_server_stream", lambda *_, **__: 1 / 0)
            victims = [connect(sessions, V1 + frame(PING)) for _ in range(50)]
            await settled(sessions, 0)
        assert sessions.engines.count == 0
        peer = connect(sessions, V1 + frame(PING))
        await wait_all_tasks_blocked()
        assert heard(peer) == [PONG]
        for each in [*victims, peer]:
            each.close()


async def test_a_peer_that_is_gone_in_the_middle_of_a_round_is_shut_later() -> None:
    async with running_sessions() as sessions:
        peers = [connect(sessions, REQUEST + frame(subscribe("news").encode())) for _ in range(3)]
        while sessions.hub.subscriptions < 3:
            await trio.lowlevel.checkpoint()
        descriptors = [each.stream.descriptor for each in sessions.members.values()]
        peers[0].close()
        gone = next(iter(sessions.members.values()))
        gone.stream.write(b"x")
        assert gone.closing
        assert [each.stream.descriptor for each in sessions.members.values()] == descriptors, "nobody else gets its own"
        await settled(sessions, 2)
        assert gone.stream.descriptor == -1
        for each in peers[1:]:
            each.close()


async def test_a_head_that_has_arrived_is_in_time(mock_clock: MockClock) -> None:
    """Even if the process stood still, so that its deadline has passed when the daemon looks."""
    async with running_sessions(handshake_timeout=5.0) as sessions:
        early, late, never = (connect(sessions, REQUEST[:20]) for _ in range(3))
        await wait_all_tasks_blocked()
        early.sendall(REQUEST[20:])
        mock_clock.jump(5.1)
        await wait_all_tasks_blocked()
        assert early.recv(12) == b"HTTP/1.1 101"
        assert late.recv(12) == never.recv(12) == b"HTTP/1.1 408"
        assert len(sessions.members) == 1
        for each in (early, late, never):
            each.close()


async def test_a_fault_when_the_deadline_of_a_handshake_passes_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    monkeypatch.setattr(Arrival, "too_late", lambda _: 1 / 0)
    async with running_sessions(handshake_timeout=5.0) as sessions:
        peer = connect(sessions, REQUEST[:20])
        await wait_all_tasks_blocked()
        assert sessions.open == 1
        mock_clock.jump(5.1)
        await wait_all_tasks_blocked()
        assert sessions.open == 0
        peer.close()


async def test_a_close_that_nobody_answers_is_over_in_time(mock_clock: MockClock) -> None:
    async with running_sessions(close_timeout=3.0) as sessions:
        peer = connect(sessions, REQUEST)
        await wait_all_tasks_blocked()
        [session] = sessions.members.values()
        session.close(Ending.KICKED, "enough")
        mock_clock.jump(2.9)
        await wait_all_tasks_blocked()
        assert sessions.open == 1
        mock_clock.jump(0.2)
        await wait_all_tasks_blocked()
        assert sessions.open == 0
        assert [type(each) for each in events(peer)] == [CloseConnection]
        peer.close()


async def test_a_reset_between_and_within_frames_is_noticed() -> None:
    async with running_sessions() as sessions:
        for sent in (b"", frame(PING)[:5], frame(PING), frame(PING) * 300):
            peer = connect(sessions, REQUEST + sent, tcp=True)
            await settled(sessions, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            await settled(sessions, 0)
            assert sessions.open == 0


async def test_one_that_is_closing_can_still_be_ended_at_once() -> None:
    """As when too much waits for all: then what waits for this one is dropped, its Close included."""
    async with running_sessions() as sessions:
        peer = connect(sessions, V1)
        await wait_all_tasks_blocked()
        [session] = sessions.members.values()
        session.stream.write(bytes(2**20))
        session.close(Ending.KICKED, "enough")
        assert session.stream.pending
        session.end(Ending.GONE, "the peer takes nothing any more")
        await wait_all_tasks_blocked()
        assert sessions.open == 0
        peer.close()


async def test_a_close_that_came_while_its_client_waited_for_an_engine_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has reported it already, and does not do so again."""

    async def never_ready(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("realtimed.websocket.engines.wrap_server_stream", never_ready)
    async with running_sessions() as sessions:
        peer = connect(sessions, V1 + frame(PING))
        await wait_all_tasks_blocked()
        peer.sendall(CLOSE)
        await wait_all_tasks_blocked()
        [session] = sessions.members.values()
        assert session.queued
        session.close(Ending.KICKED, "enough")
        await wait_all_tasks_blocked()
        assert sessions.open == 0
        peer.close()


async def test_a_parser_that_never_gets_the_rest_of_its_frame_is_counted() -> None:
    """The rest has come, but with so many frames that none is passed on."""
    async with running_sessions(inbound_rate=1.0, inbound_burst=10) as sessions:
        peer = connect(sessions, V1 + frame(PING)[:9])
        await wait_all_tasks_blocked()
        peer.sendall(frame(PING)[9:] + frame(b"", 0x89) * 20)
        await wait_all_tasks_blocked()
        assert sessions.ended[Ending.TOO_MANY] == 1
        assert sessions.engines.count == 0
        assert sessions.abandoned_parsers == 1
        peer.close()


async def test_a_connection_that_cannot_be_watched_ends_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with running_sessions(max_connections=1) as sessions:
        with monkeypatch.context() as patched:
            patched.setattr(sessions.watcher, "add", full)
            victim = connect(sessions, V1 + frame(PING))
        assert "No space left on device" in caplog.text
        assert sessions.open == 0
        assert not sessions.handshakes
        other = connect(sessions, V1 + frame(PING))
        await wait_all_tasks_blocked()
        assert heard(other) == [PONG]
        victim.close()
        other.close()


@pytest.mark.parametrize("step", ["begin", "take"])
async def test_a_fault_while_a_session_begins_ends_it(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_sessions(max_connections=1) as sessions:
        with monkeypatch.context() as patched:
            faulty = "protocols.v1.RealtimeV1.greeting" if step == "begin" else "stream.ClientStream.inspect"
            patched.setattr(f"realtimed.websocket.{faulty}", lambda *_: 1 / 0)
            victim = connect(sessions, V1 + frame(PING))
        assert "ZeroDivisionError" in caplog.text
        assert (sessions.open, sessions.closed) == (0, {1006: 1})
        assert not sessions.members
        other = connect(sessions, V1 + frame(PING))
        await wait_all_tasks_blocked()
        assert heard(other) == [PONG], "the victim's place is free"
        victim.close()
        other.close()
