"""Long replays (docs/protocol.md 4.4): as fast as their client reads, within a pace, and no trouble to others."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from itertools import chain
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from benchmarks.machine import resident_bytes
from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.position import Position
from realtimed.hub.publication import Frames, Publication, WireFormat
from realtimed.hub.replays import Replays
from realtimed.net.backlog import FAR_OVER, OVER_SECONDS
from realtimed.net.backlogs import ENTRY_BYTES, Backlogs
from realtimed.net.drains import Drains
from realtimed.net.gate import Gate
from realtimed.net.watcher import Watcher
from realtimed.websocket.frames import close_frame, text_frame
from realtimed.websocket.protocols.plain import Plain
from realtimed.websocket.protocols.v1 import RealtimeV1
from realtimed.websocket.stream import ClientStream, InboundLimits
from tests.fuzz.frames import messages_of
from tests.kit.clients import REQUEST, Publisher, publisher, subscribe
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import Daemon, running_daemon
from tests.kit.subscribers import Owner
from tests.kit.turns import Turns

LIMIT = 100_000
TIMEOUT = 10.0
FRAME = 50_000
ANSWER = text_frame(b"answer")
CLOSE = close_frame(1000, "enough")


def no_history() -> History:
    return History(limit=0, clock=float, default=Retention(0, 0))


def frames_of(replays: Replays, epoch: str, publications: Iterable[Publication], form: WireFormat) -> Iterator[Frames]:
    return (replays.frame(epoch, each, form) for each in publications)


class Setting:
    """A stream of the server, and the peer's end of the socket, which is read when a test says so."""

    def __init__(self, nursery: trio.Nursery, backlogs: Backlogs | None = None) -> None:
        ours, self.peer = socket.socketpair()
        for sock in (ours, self.peer):
            sock.setblocking(False)
        self.replays = Replays(no_history())
        self.backlogs = backlogs or Backlogs(limit=LIMIT, timeout=TIMEOUT, total_limit=2**30, replays=self.replays)
        self.owner = Owner()
        watcher, drains = Watcher(Gate()), Drains(self.backlogs)
        self.stream = ClientStream(ours, self.backlogs, InboundLimits(message=1000, rate=1, burst=1), watcher, drains)
        self.owner.stream = self.stream
        self.stream.attach(self.owner)
        watcher.add(self.stream.descriptor, self)
        nursery.start_soon(self._run, watcher, drains)

    async def _run(self, watcher: Watcher, drains: Drains) -> None:
        with closing(watcher):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watcher.run)
                nursery.start_soon(drains.run)

    def readable(self, *, hung_up: bool = False) -> None:
        """The peer sends nothing."""

    def writable(self) -> None:
        self.stream.send_more()

    def missed(self, count: int, size: int = FRAME) -> Iterator[Frames]:
        """Return the frames of a replay."""
        publications = [Publication("news", b"%d" % n * (size // len(b"%d" % n)), True, n) for n in range(count)]
        return frames_of(self.replays, "e", publications, Plain.form)

    def answer(self, count: int) -> Iterator[Frames]:
        """Return an answer and the frames of a replay behind it."""
        return chain([ANSWER], self.missed(count))

    async def read_all_of(self, data: bytes, clock: MockClock) -> None:
        """Write it and let the peer read it, in less time than more than the limit may wait."""
        self.stream.write(data[: len(data) // 2])
        self.stream.write(data[len(data) // 2 :])
        await wait_all_tasks_blocked()
        clock.jump(OVER_SECONDS - 0.01)
        assert await self.read(len(data)) == data
        clock.jump(OVER_SECONDS)
        await wait_all_tasks_blocked()

    async def read(self, count: int) -> bytes:
        """Let the peer read `count` bytes."""
        data = b""
        while len(data) < count:
            try:
                data += self.peer.recv(count - len(data))
            except BlockingIOError:
                await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        return data


@asynccontextmanager
async def setting() -> AsyncIterator[Setting]:
    async with trio.open_nursery() as nursery:
        made = Setting(nursery)
        try:
            yield made
        finally:
            nursery.cancel_scope.cancel()
            made.stream.shut()
            made.peer.close()
    assert made.backlogs.held == made.backlogs.total == made.backlogs.streams == 0


async def test_a_replay_is_whole_and_in_order_and_does_not_count_against_the_limit() -> None:
    async with setting() as here:
        whole = b"".join(here.missed(40))
        assert len(whole) > 10 * LIMIT
        here.stream.write_frames(here.answer(40))
        here.stream.write(b"live")
        await wait_all_tasks_blocked()
        assert 0 < here.stream.pending < 2 * FRAME, "one piece at a time"
        expected = ANSWER + whole + b"live"
        assert await here.read(len(expected)) == expected
        assert not here.backlogs.streams
        assert not here.owner.said
        assert not here.replays.bytes, "what nobody waits for takes no memory"


async def test_what_the_kernel_takes_half_of_is_part_of_the_replay() -> None:
    """However low the limit is: here it is less than what one send of a replay takes."""
    async with setting() as here:
        here.backlogs.limit = 1000
        here.stream.write_frames(here.answer(40))
        here.stream.write(bytes(1000))
        here.stream.write(bytes(1000 * (FAR_OVER - 1)))
        assert not here.owner.said
        here.stream.write(b"x")
        assert here.owner.said


async def test_what_comes_behind_a_replay_has_the_limit_that_it_always_has(mock_clock: MockClock) -> None:
    async with setting() as here:
        here.stream.write_frames(here.answer(40))
        await wait_all_tasks_blocked()
        here.stream.write(bytes(LIMIT // 2))
        mock_clock.jump(OVER_SECONDS + 0.01)
        await wait_all_tasks_blocked()
        assert not here.owner.said
        here.stream.write(bytes(LIMIT))
        assert not here.owner.said
        mock_clock.jump(OVER_SECONDS + 0.01)
        await wait_all_tasks_blocked()
        assert [said for said in here.owner.said if "max-backlog, is 100000" in said]


async def test_a_burst_is_too_much_only_for_a_client_that_does_not_read_it(mock_clock: MockClock) -> None:
    async with setting() as here:
        await here.read_all_of(bytes(3 * LIMIT), mock_clock)
        assert not here.owner.said
        here.stream.write(bytes(9 * LIMIT))  # however large it is, all before it has been read
        assert not here.owner.said
        here.stream.write(b"x")
        assert [said for said in here.owner.said if "max-backlog, is 100000" in said]


async def test_a_client_that_stays_too_far_behind_is_slow_however_fast_it_reads(mock_clock: MockClock) -> None:
    async with setting() as here:
        here.stream.write(bytes(3 * LIMIT + 2**18))
        for _ in range(4):
            await here.read(LIMIT // 10)
            mock_clock.jump(OVER_SECONDS / 5)
            await wait_all_tasks_blocked()
            here.stream.write(bytes(LIMIT // 10))
            assert not here.owner.said
        mock_clock.jump(OVER_SECONDS / 5 + 0.01)
        await wait_all_tasks_blocked()
        assert here.owner.said


async def test_who_does_not_read_a_replay_is_slow_when_its_first_frame_has_had_its_time(mock_clock: MockClock) -> None:
    async with setting() as here:
        here.stream.write_frames(here.answer(40))
        await wait_all_tasks_blocked()
        mock_clock.jump(TIMEOUT - 0.01)
        await wait_all_tasks_blocked()
        assert not here.owner.said
        mock_clock.jump(10 * FRAME / LIMIT * TIMEOUT)  # that of what the kernel has taken as well
        await wait_all_tasks_blocked()
        assert here.owner.said
        assert set(here.owner.said) == {"a message has waited for 10 s; the limit is backlog-timeout"}


@pytest.mark.parametrize(("share", "slow"), [(1.1, False), (0.5, True)])
async def test_the_pace_of_a_replay_is_the_limit_in_each_timeout(
    mock_clock: MockClock, share: float, slow: bool
) -> None:
    """Forty seconds' worth; what the kernel and the first timeout give in advance are far less than the rest."""
    async with setting() as here:
        here.stream.write_frames(here.answer(80))
        read = len(await here.read(2 * FRAME))
        while read < 79 * FRAME and not here.owner.said:
            read += len(await here.read(round(LIMIT / TIMEOUT * share)))
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
        assert bool(here.owner.said) == slow


async def test_what_waits_behind_a_replay_waits_for_the_replay_and_not_for_the_client(mock_clock: MockClock) -> None:
    """A live message may be older than backlog-timeout before it is its turn; that is no fault of the client."""
    async with setting() as here:
        here.stream.write_frames(here.answer(40))
        for _ in range(8):  # more than the kernel takes with the last of the replay
            here.stream.write(bytes(LIMIT // 10))
        # The client keeps to the pace, so this takes much longer than the timeout that a message has.
        waited = 0
        while here.backlogs.streams:
            await here.read(round(1.2 * LIMIT / TIMEOUT))
            mock_clock.jump(1)
            waited += 1
            await wait_all_tasks_blocked()
            assert not here.owner.said, f"after {waited} s, {here.stream.pending} bytes are waiting"
        assert waited > 2 * TIMEOUT


async def test_the_next_command_waits_for_the_replay_and_not_for_what_is_published_meanwhile() -> None:
    async with setting() as here:
        here.backlogs.limit = 10 * LIMIT
        here.stream.write_frames(here.answer(40))
        here.stream.write(bytes(5 * LIMIT))
        await wait_all_tasks_blocked()
        assert here.owner.replays_sent == 0
        while here.stream.replaying:
            assert not here.owner.replays_sent
            await here.read(1000)
        assert here.owner.replays_sent == 1
        assert here.stream.pending, "live messages are still waiting"


async def test_an_answer_without_frames_and_one_of_a_single_frame_hold_nobody_up() -> None:
    async with setting() as here:
        here.stream.write_frames(())
        assert not here.backlogs.streams
        while not here.stream.pending:
            here.stream.write(bytes(LIMIT // 4))
        before = here.stream.pending
        here.stream.write_frames(())
        here.stream.write_frames([ANSWER])
        assert here.stream.pending == before + len(ANSWER)
        assert not here.stream.replaying


async def test_a_replay_that_is_asked_for_during_another_one_follows_it() -> None:
    """As a publisher may, who watches several channels from where it left off."""
    async with setting() as here:
        here.stream.write_frames(here.answer(40))
        here.stream.write(b"live")
        here.stream.write_frames(here.answer(30))
        expected = b"".join([*here.answer(40), b"live", *here.answer(30)])
        assert await here.read(len(expected)) == expected
        assert not here.backlogs.streams
        assert not here.stream.replaying


async def test_many_share_the_frames_of_one_replay_and_each_counts_its_own() -> None:
    async with setting() as first, trio.open_nursery() as nursery:
        others = [Setting(nursery) for _ in range(9)]
        for other in others:
            other.replays = first.replays
            other.stream.write_frames(other.answer(40))
        first.stream.write_frames(first.answer(40))
        await wait_all_tasks_blocked()
        assert FRAME <= first.replays.bytes < 4 * FRAME, "what each of them waits for, and the next"
        assert all(each.stream.pending for each in (first, *others))
        assert first.backlogs.total <= 10 * 2 * ENTRY_BYTES
        nursery.cancel_scope.cancel()
        for other in others:
            other.stream.shut()
            other.peer.close()
        assert first.replays.bytes
        first.stream.finish(CLOSE, drop_unsent=True)
        assert not first.replays.bytes


async def test_frames_differ_by_format_and_epoch_and_small_ones_are_not_shared() -> None:
    replays = Replays(no_history())
    long = [Publication("news", bytes(FRAME), True, n) for n in (1, 2)]
    plain, enveloped = (list(frames_of(replays, "a", long, form)) for form in (Plain.form, RealtimeV1.form))
    again = list(frames_of(replays, "a", [Publication("news", bytes(FRAME), True, n) for n in (1, 2)], Plain.form))
    assert [a is b for a, b in zip(plain, again, strict=True)] == [True, True]
    assert bytes(plain[0]) != bytes(enveloped[0])
    changed = [Publication("news", b"x" * FRAME, True, n) for n in (1, 2)]
    assert bytes(next(frames_of(replays, "b", changed, Plain.form))).endswith(b"xx")
    del plain, enveloped, again
    assert replays.bytes == 0
    short = Publication("news", bytes(1000), True, 1)
    assert list(frames_of(replays, "a", [short], Plain.form)) == [short.encoded(Plain.form)]
    assert replays.bytes == 0


async def test_all_long_replays_take_turns() -> None:
    """Ten thousand messages each, ten clients: in no turn of the loop more frames are made than one piece has."""
    turns, made = Turns(), Counter[int]()

    def frames() -> Iterator[Frames]:
        for number in range(10_000):
            made[turns.count] += 1
            yield b"%08d" % number

    async with setting() as first, trio.open_nursery() as nursery:
        others = [Setting(nursery, first.backlogs) for _ in range(9)]
        trio.lowlevel.add_instrument(turns)
        for each in (first, *others):
            each.stream.write_frames(frames())
            await trio.lowlevel.checkpoint()
        whole = b"".join(b"%08d" % number for number in range(10_000))
        for each in (first, *others):
            assert await each.read(len(whole)) == whole
        trio.lowlevel.remove_instrument(turns)
        for other in others:
            other.stream.shut()
            other.peer.close()
        nursery.cancel_scope.cancel()
    assert sum(made.values()) == 100_000
    assert max(made.values()) <= 2 * 257, "one begins, and one goes on"


async def test_what_goes_from_the_history_during_a_replay_is_in_it_nevertheless() -> None:
    hub = Hub(max_message=100, max_channels=10, history=History(limit=2**30, clock=float, default=Retention(2000, 60)))
    start = hub.publish("news", "0")
    for number in range(1, 2001):
        hub.publish("news", str(number))
    async with setting() as here:
        here.stream.form = Plain.form
        joined = hub.subscribe(here.stream, "news", Position(start.epoch, start.offset))
        assert joined.recovered
        here.stream.write_frames(hub.replays.replay([], joined.missed, Plain.form))
        for number in range(2001, 5000):
            hub.publish("news", str(number))
        while (turn := hub.next_round()) is not None:
            while turn.step(1000):
                pass
        heard = await here.read(sum(len(text_frame(str(number).encode())) for number in range(1, 5000)))
        assert [payload for _, payload in messages_of(heard)] == [str(number).encode() for number in range(1, 5000)]
        hub.leave(here.stream)


@pytest.mark.parametrize("drop_unsent", [False, True])
async def test_a_replay_that_is_cut_short_ends_with_a_whole_frame(drop_unsent: bool) -> None:
    async with setting() as here:
        here.stream.write_frames(here.answer(40))
        await wait_all_tasks_blocked()
        here.stream.finish(CLOSE, drop_unsent=drop_unsent)
        heard = b""
        while here.backlogs.streams:
            heard += await here.read(1000)
        with suppress(BlockingIOError):
            while True:
                heard += here.peer.recv(2**20)
        whole = ANSWER + b"".join(here.missed(40))
        frame = len(next(here.missed(1)))
        sent = heard.removesuffix(CLOSE)
        assert sent != heard
        assert whole.startswith(sent)
        assert (len(sent) - len(ANSWER)) % frame == 0
        assert (sent == whole) == (not drop_unsent)


# With the daemon: everyone comes back at once to 6 MiB of history.

MESSAGES = 100
SIZE = 64 * 1024
LIVE = 20
PAYLOAD = MESSAGES * SIZE + LIVE * 10
PACE = 2**19  # bytes a second: 1 MiB in each 2 s
OFFSET = re.compile(rb'"offset":(\d+),"time":\d+,"data"')


class Returning:
    """One who comes back to a long replay and reads it at some rate (bytes a second), or not at all."""

    def __init__(self, stream: trio.SocketStream, rate: float) -> None:
        self.stream = stream
        self.rate = rate
        self.offsets: list[int] = []
        self.payload = 0
        self.over = False

    async def read(self) -> None:
        """Read until the last live message has come, or the end."""
        rest = b""
        began, size = trio.current_time(), 0
        while not self.over and (self.offsets[-1:] != [MESSAGES + LIVE] or self.payload < PAYLOAD):
            await trio.sleep_until(began + size / self.rate)
            data = await self.stream.receive_some(2**16)
            self.over = not data
            size += len(data)
            self.payload += data.count(b"_")
            rest += data
            for match in OFFSET.finditer(rest):
                self.offsets.append(int(match[1]))
            rest = rest[-40:] if not OFFSET.search(rest[-40:]) else b""


async def come_back(daemon: Daemon, epoch: str, rate: float) -> Returning:
    stream = await trio.open_unix_socket(daemon.websocket_socket)
    await stream.send_all(REQUEST.removesuffix(b"\r\n") + b"Sec-WebSocket-Protocol: realtime.v1\r\n\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += bytes(await stream.receive_some(1))
    text = subscribe("news", since={"epoch": epoch, "offset": 0}).encode()
    await stream.send_all(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)
    return Returning(stream, rate)


def ping(path: Path, over: threading.Event, waits: list[float]) -> None:
    """Ping as often as a client may, in a thread: what this process does itself matters less."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LONG_PATIENCE)
        sock.connect(str(path))
        sock.sendall(REQUEST)
        while not sock.recv(4096).endswith(b"\r\n\r\n"):
            pass
        while not over.wait(1 / 45):
            began = time.monotonic()
            sock.sendall(b"\x89\x81\x00\x00\x00\x00p")
            heard = b""
            while b"\x8a\x01p" not in heard:  # the daemon pings as well
                more = sock.recv(100)
                assert more, heard
                heard += more
            waits.append(time.monotonic() - began)


async def fill(sender: Publisher, first: int, count: int, size: int) -> str:
    epoch = ""
    for number in range(first, first + count):
        receipt = await sender.call("broadcast", "news", "_" * size)
        assert receipt["offset"] == number
        epoch = receipt["epoch"]
    return epoch


async def test_fifty_come_back_to_six_megabytes_at_once(runtime_dir: Path) -> None:
    """Thirty read as they can, fifteen read slowly but within the pace, five not at all."""
    options = ("--max-backlog", "1M", "--backlog-timeout", "2", "--close-timeout", "1", "--max-backlog-total", "64M")
    rates = [1e12] * 30 + [3 * PACE] * 15 + [0] * 5
    waits: list[float] = []
    over = threading.Event()
    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as sender:
            epoch = await fill(sender, 1, MESSAGES, SIZE)
            before = highest = resident_bytes(daemon.process.pid)
            returning: list[Returning] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, ping, daemon.websocket_socket, over, waits)
                try:
                    async with trio.open_nursery() as coming:

                        async def come(rate: float) -> None:
                            returning.append(await come_back(daemon, epoch, rate))

                        for rate in rates:
                            coming.start_soon(come, rate)
                    # The daemon keeps a hundred messages: who is not there before the next one cannot have all.
                    while (await sender.call("channels")).get("news", {}).get("subscribers") != len(rates):
                        pass
                    # A live message would push an old one out of the history of who has not been answered yet.
                    while (await sender.call("stats"))["subscriptions"] < len(rates):
                        pass
                    async with trio.open_nursery() as reading:
                        for client in returning:
                            if client.rate:
                                reading.start_soon(client.read)
                        await fill(sender, MESSAGES + 1, LIVE, 10)
                        while (stats := await sender.call("stats"))["closed"].get("4409", 0) < rates.count(0):
                            highest = max(highest, resident_bytes(daemon.process.pid))
                    while (stats := await sender.call("stats"))["backlog_bytes"]:
                        pass
                    assert stats["subscriptions"] == len(rates) - rates.count(0), "they stay, and cost nothing"
                finally:
                    over.set()
            for client in returning:
                with suppress(trio.BrokenResourceError):
                    await client.stream.aclose()
            while (left := await sender.call("stats"))["clients"]:
                pass
            after = resident_bytes(daemon.process.pid)
    waits.sort()
    print(f"{len(waits)} pings, p99 {waits[len(waits) * 99 // 100] * 1e3:.1f} ms, longest {waits[-1] * 1e3:.1f} ms")
    print(f"memory grew by {(highest - before) / 2**20:.0f} MiB, for good by {(after - before) / 2**20:.0f} MiB")
    assert stats["closed"]["4409"] == rates.count(0)
    assert "a message has waited for 2 s" in daemon.log
    assert "max-backlog-total" not in daemon.log, "what is shared counts once"
    for client in returning:
        if client.rate:
            assert client.offsets == list(range(1, MESSAGES + LIVE + 1)), client.rate
            assert client.payload == PAYLOAD
    assert left["backlog_bytes"] == left["backlogged"] == 0
    assert highest - before < 48 * 2**20, "fifty frames of their own would be 313 MiB"
    assert after - before < 24 * 2**20
    assert waits[-1] < 1, "the rest is the machine's; docs/performance.md has figures"


@asynccontextmanager
async def history_moves_on(backlogs: Backlogs, hub: Hub) -> AsyncIterator[Setting]:
    """A stream that has asked for everything, and history that has dropped most of it before it could be sent."""
    async with trio.open_nursery() as nursery:
        made = Setting(nursery, backlogs)
        made.stream.form = Plain.form
        epoch = hub.publish("news", "x").epoch
        for _ in range(20_000):
            hub.publish("news", "x" * 1000)
        joined = hub.subscribe(made.stream, "news", Position(epoch, 1))
        made.stream.write_frames(hub.replays.replay([ANSWER], joined.missed, Plain.form))
        hub.leave(made.stream)
        for _ in range(20_000):
            hub.publish("news", "y" * 1000)
        yield made
        nursery.cancel_scope.cancel()
    made.stream.shut()
    made.peer.close()


def long_history() -> Hub:
    history = History(limit=2**30, clock=float, default=Retention(20_000, 300))
    return Hub(max_message=LIMIT, max_channels=128, history=history)


async def test_history_that_waits_to_be_replayed_keeps_nobody_from_being_served() -> None:
    hub = long_history()
    backlogs = Backlogs(limit=2**20, timeout=TIMEOUT, total_limit=32 * 2**20, replays=hub.replays)
    async with history_moves_on(backlogs, hub) as made:
        assert hub.history.retained > backlogs.total_limit // 2
        with trio.fail_after(LONG_PATIENCE):
            await made.read(20_000 * 1000)
        assert made.owner.said == []
    assert backlogs.held == 0


async def test_who_waits_for_memory_goes_on_when_a_replay_of_others_has_ended() -> None:
    """A subscriber on the control socket has backlogs of its own, but history is retained for it as for clients."""
    hub = long_history()
    backlogs = Backlogs(limit=2**20, timeout=TIMEOUT, total_limit=16 * 2**20, replays=hub.replays)
    answers = Backlogs(limit=2**26, timeout=TIMEOUT, total_limit=2**27)
    async with trio.open_nursery() as nursery:
        async with history_moves_on(answers, hub):
            assert backlogs.held > backlogs.total_limit
            nursery.start_soon(backlogs.room)
            await wait_all_tasks_blocked()
        with trio.fail_after(LONG_PATIENCE):
            await backlogs.room()
        await wait_all_tasks_blocked()
        assert backlogs.held == 0
        assert not [task for task in nursery.child_tasks if "room" in task.name]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("lower", ["limit", "timeout"])
async def test_lower_limits_hold_for_what_waits_already(mock_clock: MockClock, lower: str) -> None:
    async with setting() as made:
        made.backlogs.limit = 2**30
        made.stream.write(b"x" * 2**20)  # more than the kernel takes
        await wait_all_tasks_blocked()
        if lower == "limit":
            made.backlogs.limit = 10_000
            wait = OVER_SECONDS
        else:
            made.backlogs.timeout = wait = 1.0
        made.stream.limits_changed()
        mock_clock.jump(wait - 0.01)
        await wait_all_tasks_blocked()
        assert made.owner.said == []
        mock_clock.jump(0.02)
        await wait_all_tasks_blocked()
        assert len(made.owner.said) == 1
