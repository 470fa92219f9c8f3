"""The descriptors that a roster remembers are those its members have now, whatever happens to them meanwhile."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from realtimed.hub.channel import Roster
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Publication
from realtimed.hub.rounds import send_each
from realtimed.net.backlogs import Backlogs
from realtimed.net.stream import QueuedStream
from realtimed.net.uring import SendRing
from tests.kit.io_uring import needs_io_uring
from tests.kit.subscribers import Lines, Listener, Owner


class EndedLines(Lines):
    """Each payload, and a line's end behind it."""

    def encode(self, publication: Publication) -> bytes:
        return publication.payload + b"\n"


ENDED_LINES = EndedLines()


def test_a_roster_asks_each_member_once_and_again_when_one_has_changed() -> None:
    members = [Listener(fd=fd) for fd in range(100, 106)]
    roster = Roster(members, changes_reported=True)
    fds = [each.fd for each in members]
    assert roster.descriptors(0, 4).tolist() == fds[:4]
    members[1].fd = -1  # nobody has said so
    assert roster.descriptors(1, 3).tolist() == fds[1:3]
    assert roster.descriptors(2, 6).tolist() == fds[2:]
    roster.descriptor_changed()
    assert roster.descriptors(1, 3).tolist() == [-1, fds[2]], "from the middle of a round on, they are asked each time"
    members[2].fd = -1
    assert roster.descriptors(1, 3).tolist() == [-1, -1]
    assert roster.descriptors(0, 6).tolist() == [fds[0], -1, -1, *fds[3:]]
    roster.retire()
    members[0].fd = -1
    assert roster.descriptors(0, 1).tolist() == [-1], "who is not told of changes remembers nothing"
    assert Roster(members).descriptors(4, 6).tolist() == fds[4:]


@dataclass(eq=False)
class Reader:
    """A stream with its peer, which reads now and then, and all that was meant for it."""

    stream: QueuedStream
    peer: socket.socket
    channels: frozenset[str]
    expected: bytes = b""
    received: bytes = b""
    owner: Owner = field(default_factory=Owner)
    nursery: trio.Nursery | None = None

    async def live(self, hub: Hub, *, task_status: trio.TaskStatus[None]) -> None:
        """Be subscribed until the nursery is cancelled; then close at once, so that others may have the descriptor."""
        try:
            async with trio.open_nursery() as self.nursery:
                self.stream.attach(self.nursery, self.owner)
                for channel in self.channels:
                    hub.subscribe(self.stream, channel)
                task_status.started()
                await trio.sleep_forever()
        finally:
            hub.leave(self.stream)
            self.stream.shut()
            while self.read(2**20):
                pass
            self.peer.close()

    def read(self, limit: int) -> int:
        with suppress(BlockingIOError):
            data = self.peer.recv(limit)
            self.received += data
            return len(data)
        return 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("channels", [1, 60])
@pytest.mark.parametrize("way", [pytest.param("io_uring", marks=needs_io_uring), "loop"])
async def test_those_who_stall_leave_and_come_each_get_what_was_for_them_in_order(
    seed: int, channels: int, way: str
) -> None:
    """Real sockets, the descriptors of which are used again at once, and rounds that are interrupted at every step."""
    dice = random.Random(seed)
    hub = Hub(max_message=10_000, max_channels=10)
    backlogs = Backlogs(limit=10**9, timeout=60, total_limit=10**9)
    ring = SendRing() if way == "io_uring" else None
    hub.deliver = ring or send_each
    names = [f"c{number}" for number in range(channels)]
    readers: list[Reader] = []
    stalls = 0

    async def come() -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        peer.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        several = 2 if channels > 1 and dice.random() < 0.2 else 1
        reader = Reader(QueuedStream(ours, backlogs), peer, frozenset(dice.sample(names, several)))
        reader.stream.form = ENDED_LINES
        await everyone.start(reader.live, hub)
        readers.append(reader)

    async def leave(reader: Reader) -> None:
        assert reader.nursery is not None
        reader.nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert reader.expected.startswith(reader.received)
        assert not reader.owner.said

    def publish(number: int) -> None:
        message = b"%d %b" % (number, b"x" * dice.choice((0, 1, 2, 3, 4, 3000)))
        channel = dice.choice(names)
        hub.publish(channel, message)
        for each in readers:
            if channel in each.channels:
                each.expected += message + b"\n"

    async def disturb() -> None:
        """Do something between two steps of a round."""
        nonlocal stalls
        for each in readers:
            if dice.random() < 0.9:
                each.read(1500)
        if hub.publications % 3 == 0 and dice.random() < 0.5:  # rosters are to grow old as well
            await leave(readers.pop(dice.randrange(len(readers))))
            await come()
        if hub.publications % 3 == 1 and dice.random() < 0.5:
            each = dice.choice(readers)
            channel = dice.choice(sorted(each.channels))
            hub.unsubscribe(each.stream, channel)
            hub.subscribe(each.stream, channel)
        await trio.testing.wait_all_tasks_blocked()
        stalls += sum(each.stream.pending > 0 for each in readers)

    with trio.fail_after(60):
        async with trio.open_nursery() as everyone:
            for _ in range(400):
                await come()
            for number in range(40):
                for _ in range(dice.choice((1, 1, 3)) * channels):
                    publish(number)
                while (turn := hub.next_round()) is not None:
                    while turn.step(64):
                        await disturb()
            while not all(each.received == each.expected for each in readers):
                for each in readers:
                    each.read(2**20)
                    assert each.expected.startswith(each.received)
                await trio.testing.wait_all_tasks_blocked()
            for each in readers:
                await leave(each)
    assert stalls > 100
    assert not backlogs.total
    if ring is not None:
        ring.close()
