"""What a broadcast costs, in counts that no noisy machine can change: function calls, sends, encodings, allocations.

They guard the architecture: work that is added to the way of a message shows here first.
"""

from __future__ import annotations

import gc
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import trio
from wsproto.events import TextMessage

from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.publication import Publication
from realtimed.hub.rounds import Round
from realtimed.net.uring import SendRing
from realtimed.rpc.wire import encode_notification, encode_request
from realtimed.websocket.protocols.v1 import RealtimeV1
from tests.kit.clients import publisher, raw_client, subscribe
from tests.kit.io_uring import needs_io_uring
from tests.kit.peers import InMemory
from tests.kit.stack import Daemon
from tests.kit.subscribers import Bare, Looked, Sink

SUBSCRIBERS = 1000
PER_ROUND = 100
"""Calls that a publication and its round may cost besides those a subscriber."""


class Calls:
    """The number of function calls, those of C functions included."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        self.count += event in ("call", "c_call")


@contextmanager
def counted() -> Iterator[Calls]:
    """Count the calls of the `with` block, but not those that collect other tests' garbage."""
    calls = Calls()
    gc.disable()
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        gc.enable()


def run(turn: Round | None) -> None:
    while turn is not None and turn.step(250):
        pass


def make_hub(channels: int = 1, subscribers: int = SUBSCRIBERS) -> tuple[Hub, Bare]:
    hub, form = Hub(max_message=65536, max_channels=128), Bare()
    for number in range(subscribers):
        hub.subscribe(Sink(form), f"c{number % channels}")
    return hub, form


def test_a_delivery_costs_one_call() -> None:
    hub, form = make_hub()
    with counted() as calls:
        hub.publish("c0", "hello")
        run(hub.next_round())
    assert SUBSCRIBERS <= calls.count <= SUBSCRIBERS + PER_ROUND
    assert (hub.sends, form.encoded) == (SUBSCRIBERS, 1)


@pytest.mark.parametrize("together", [8, 64])
def test_publications_that_come_together_share_their_sends(together: int) -> None:
    hub, form = make_hub()
    with counted() as calls:
        for _ in range(together):
            hub.publish("c0", "hello")
        run(hub.next_round())
    assert hub.deliveries == together * SUBSCRIBERS
    assert (hub.sends, form.encoded) == (SUBSCRIBERS, together)
    assert calls.count <= SUBSCRIBERS + PER_ROUND + 20 * together


@pytest.mark.parametrize(("payload", "text"), [("hellö".encode(), True), (b"\xff", False)])
def test_an_envelope_costs_few_calls(payload: bytes, text: bool) -> None:
    publication = Publication("news", payload, text, 41, 1767225600000)
    with counted() as calls:
        RealtimeV1.form.encode(publication)
    assert calls.count <= 12


def test_the_time_of_a_publication_costs_one_look_at_the_clock() -> None:
    looks: list[None] = []

    def clock() -> int:
        looks.append(None)
        return 0

    history = History(limit=2**26, clock=time.monotonic, default=Retention(100, 300))
    hub = Hub(max_message=65536, max_channels=128, history=history, time_ns=clock)
    for _ in range(3):
        hub.subscribe(Sink(Bare()), "news")
    for _ in range(10):
        hub.publish("news", "hello")
        run(hub.next_round())
    assert len(looks) == 10


def test_publishing_costs_the_same_for_one_subscriber_as_for_a_thousand() -> None:
    costs = set()
    for subscribers in (1, SUBSCRIBERS):
        hub, _ = make_hub(subscribers=subscribers)
        hub.publish("c0", "the first wakes the fan-out")
        with counted() as calls:
            hub.publish("c0", "hello")
        costs.add(calls.count)
    assert len(costs) == 1
    assert costs.pop() <= 20


def test_a_channel_that_nobody_listens_to_is_nearly_free() -> None:
    hub, form = make_hub()
    with counted() as calls:
        hub.publish("nobody", "hello")
    assert calls.count <= 25
    assert hub.idle
    assert form.encoded == 0


def test_many_channels_cost_little_more_a_delivery_than_one() -> None:
    hub, form = make_hub(channels=500)
    with counted() as calls:
        for number in range(500):
            hub.publish(f"c{number}", "hello")
        run(hub.next_round())
    assert (hub.sends, form.encoded, hub.rounds) == (SUBSCRIBERS, 500, 1)
    assert calls.count <= SUBSCRIBERS + 500 * 27


def test_who_comes_in_the_middle_of_it_does_not_make_a_round_look_at_everybody() -> None:
    hub, form = make_hub(subscribers=0)
    for _ in range(SUBSCRIBERS):
        hub.subscribe(Looked(form), "news")
    hub.publish("news", "rosters are made the first time")
    run(hub.next_round())
    hub.publish("news", "hello")
    hub.subscribe(Sink(form), "other")
    hub.publish("other", "hello")
    Looked.count = 0
    run(hub.next_round())
    assert Looked.count == 0


@needs_io_uring
def test_many_channels_share_system_calls_and_nobody_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, _ = make_hub(channels=500)
    ring = SendRing()
    hub.deliver = ring
    system_calls: list[int] = []

    def take_all(descriptors: array[int], *_: array[int]) -> None:
        system_calls.append(len(descriptors))

    monkeypatch.setattr(ring.queues, "exchange", take_all)
    for _ in range(2):  # the first time, each is asked for its descriptor
        system_calls.clear()
        for number in range(500):
            hub.publish(f"c{number}", "hello")
        with counted() as calls:
            run(hub.next_round())
    ring.close()
    assert sum(system_calls) == SUBSCRIBERS
    assert len(system_calls) <= SUBSCRIBERS / 250
    assert calls.count <= 500 * 17


def test_history_adds_little_to_a_broadcast() -> None:
    counts = {}
    for size in (0, 100):
        history = History(limit=2**26, clock=time.monotonic, default=Retention(size, 300))
        hub = Hub(max_message=65536, max_channels=128, history=history)
        hub.subscribe(Sink(Bare()), "news")
        for _ in range(1000):
            hub.publish("news", "hello")
        with counted() as calls:
            for _ in range(100):
                hub.publish("news", "hello")
        counts[size] = calls.count / 100
    assert counts[100] - counts[0] <= 15


@pytest.mark.parametrize("limit", [2**30, 2**20])
def test_a_full_history_gives_the_garbage_collector_nothing_to_look_at(limit: int) -> None:
    """Where each new object takes the place of an old one, it looks at none for long, and then at all at once."""
    history = History(limit=limit, clock=time.monotonic, default=Retention(20, 300))
    hub = Hub(max_message=65536, max_channels=128, history=history)
    for number in range(0, 500, 2):
        hub.subscribe(Sink(Bare()), f"c{number}")

    def publish_on_all() -> None:
        for number in range(500):
            hub.publish(f"c{number}", b"hello" if number % 3 else "hello")
            run(hub.next_round())

    for _ in range(30):
        publish_on_all()
    gc.collect()
    gc.disable()
    try:
        publish_on_all()
        young = len(gc.get_objects(generation=0))
    finally:
        gc.enable()
    assert history.publications == min(500 * 20, hub.publications) or history.bytes > limit - 1024
    assert young < 50


def test_no_publication_pays_for_a_long_queue_alone() -> None:
    history = History(limit=2**30, clock=time.monotonic, default=Retention(5, 300))
    hub = Hub(max_message=65536, max_channels=128, history=history)
    hub.publish("quiet", "hello")
    costs = set()
    for _ in range(30):
        for number in range(200):
            with counted() as calls:
                hub.publish(f"c{number}", "hello")
            costs.add(calls.count)
    assert max(costs) <= 50


def test_a_round_leaves_nothing_allocated() -> None:
    hub, _ = make_hub()

    def broadcast() -> None:
        hub.publish("c0", "hello")
        run(hub.next_round())

    for _ in range(3):
        broadcast()
    before = sys.getallocatedblocks()
    for _ in range(100):
        broadcast()
    assert sys.getallocatedblocks() - before < 100, "less than one a broadcast"


async def test_what_arrives_in_one_write_shares_a_round_in_the_daemon(daemon: Daemon) -> None:
    with trio.fail_after(30):
        async with publisher(daemon.control_socket) as sender, raw_client(daemon.websocket_socket) as client:
            await client.send(TextMessage(data=subscribe("news")))
            while "news" not in await sender.call("channels"):
                pass
            together = [encode_notification("broadcast", ["news", "hello"])] * 100
            await sender.stream.send_all(b"".join(together) + encode_request(1, "ping", []))
            assert (await sender.answer()).result == "pong"
            received = 0
            while received < 100 * len(b"..hello"):
                received += len(await client.stream.receive_some())
            stats = await sender.call("stats")
    assert (stats["deliveries"], stats["sends"], stats["rounds"]) == (100, 1, 1)


class Turns(trio.abc.Instrument):
    """How often each task has run, by its name."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count[task.name] += 1


async def test_a_publisher_that_is_alone_does_not_wake_the_fan_out_for_nothing() -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({}, nursery, fan_out=False)
        nursery.start_soon(peers.core.fan_out.run, name="fan-out")
        sender, browser = await peers.publisher(), await peers.enveloped()
        await browser.ask("subscribe", "news")
        turns = Turns()
        trio.lowlevel.add_instrument(turns)
        for number in range(5):
            await sender.call("broadcast", "news", str(number))
            assert (await browser.event())["data"] == str(number)
        assert turns.count["fan-out"] == 0
        await peers.publisher()
        await sender.call("broadcast", "news", "last")
        assert (await browser.event())["data"] == "last"
        assert turns.count["fan-out"] > 0
        trio.lowlevel.remove_instrument(turns)
        nursery.cancel_scope.cancel()


async def test_a_publisher_that_is_alone_waits_for_no_turn_of_the_event_loop() -> None:
    async with trio.open_nursery() as nursery:
        peers = InMemory({}, nursery, fan_out=False)
        sender, browser = await peers.publisher(), await peers.enveloped()
        await browser.ask("subscribe", "news")
        assert (await sender.call("broadcast", "news", "1"))["recipients"] == 1
        assert (await browser.event())["data"] == "1", "without the task that fans out"
        assert peers.core.hub.rounds == 1

        other = await peers.publisher()
        await other.call("broadcast", "news", "2")
        await sender.call("broadcast", "news", "3")
        assert peers.core.hub.rounds == 1, "what others say in the same turn is to share a round"
        nursery.start_soon(peers.core.fan_out.run)
        assert [(await browser.event())["data"] for _ in range(2)] == ["2", "3"]
        assert peers.core.hub.rounds == 2
        nursery.cancel_scope.cancel()
