"""History and recovery: everything that was missed, in order, once, or a plain no."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtimed.hub.history import ENTRY_BYTES, EVICTED_BYTES, RING_BYTES, History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.position import Position
from realtimed.hub.publication import Publication
from realtimed.hub.ring import ExpiryQueue, Ring
from realtimed.hub.rounds import Round
from realtimed.hub.snapshot import Saved, SavedChannel, dump, read, restore
from tests.kit.hubs import AMPLE, MODEL_RUNS, Clock, come_back, fan_out, hub_with_history, missed, publish
from tests.kit.subscribers import LINES, OTHER_LINES, Listener


def queues(hub: Hub) -> set[ExpiryQueue]:
    return {channel.ring.queue for channel in hub.channels.values() if channel.ring is not None}


# Never a part of it: just inside and just outside of each bound.


def test_cut_by_number() -> None:
    hub = hub_with_history(size=10)
    start = publish(hub, "news", 25)
    inside = come_back(hub, "news", start._replace(offset=15))
    assert (inside.recovered, missed(inside)) == (True, [str(number) for number in range(16, 26)])
    outside = come_back(hub, "news", start._replace(offset=14))
    assert (outside.recovered, missed(outside), outside.offset) == (False, [], 25)


def test_cut_by_age() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    start = publish(hub, "news", 1)
    clock.now += 30
    publish(hub, "news", 1)
    clock.now += 29.9
    assert come_back(hub, "news", start).recovered
    clock.now += 0.1
    assert come_back(hub, "news", start).recovered is False
    assert missed(come_back(hub, "news", start._replace(offset=1))) == ["1"]
    clock.now += 30
    assert come_back(hub, "news", start._replace(offset=1)).recovered is False
    assert come_back(hub, "news", start._replace(offset=2)).recovered, "nothing was missed, so nothing is needed"


def test_cut_by_bytes_oldest_of_all_channels_first() -> None:
    each = RING_BYTES + ENTRY_BYTES + 100
    hub = hub_with_history(limit=3 * each)
    starts = {}
    for name in "abcd":
        receipt = hub.publish(name, "x" * 100)
        starts[name] = Position(receipt.epoch, 0)
    assert hub.history.bytes == 3 * each
    assert set(hub.channels) == set("bcd")
    assert [come_back(hub, name, starts[name]).recovered for name in "abcd"] == [False, True, True, True]


def test_cut_by_a_restart() -> None:
    start = publish(hub_with_history(), "news", 3)
    after = hub_with_history()
    publish(after, "news", 3)
    assert come_back(after, "news", start).recovered is False


def test_a_position_ahead_of_the_channel_is_not_recovered() -> None:
    hub = hub_with_history()
    start = publish(hub, "news", 3)
    assert come_back(hub, "news", start._replace(offset=3)).recovered
    assert come_back(hub, "news", start._replace(offset=4)).recovered is False


def test_a_single_message_above_the_limit_is_delivered_and_not_kept() -> None:
    hub = hub_with_history(limit=2000)
    listener = Listener()
    hub.subscribe(listener, "news")
    receipt = hub.publish("news", "x" * 5000)
    fan_out(hub)
    assert (receipt.recipients, len(listener.messages), hub.history.bytes) == (1, 1, 0)
    assert come_back(hub, "news", Position(receipt.epoch, 0)).recovered is False


def test_what_is_kept_depends_on_the_channels_name() -> None:
    hub = hub_with_history(size=5, chat_=(2, 60.0), none=(0, 60.0))
    kept = {}
    for name in ("chat:1", "none", "nones", "other"):
        publish(hub, name, 10)
        kept[name] = len(hub.recent(name, 100)[1])
    assert kept == {"chat:1": 2, "none": 0, "nones": 5, "other": 5}


def test_patterns_match_whole_names_and_nothing_in_them_is_special_but_the_star() -> None:
    def size(pattern: str, name: str) -> int:
        return History(
            limit=AMPLE, clock=Clock(), default=Retention(1, 1), rules=[(pattern, Retention(2, 1))]
        ).retention(name).size  # fmt: skip

    assert [size("a.*=", name) for name in ("a.=", "a.b=", "axb=", "a.b=c", "xa.b=")] == [2, 2, 1, 1, 1]
    assert size("*", "anything") == 2


def test_a_channel_without_history_is_forgotten_with_its_last_subscriber() -> None:
    hub = hub_with_history(size=0)
    assert hub.publish("news", "x").recipients == 0
    listener = Listener()
    hub.subscribe(listener, "news")
    hub.publish("news", "x")
    hub.leave(listener)
    assert not hub.channels


def test_idle_channels_are_forgotten_when_their_last_publication_has_expired() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock, short_=(100, 10.0))
    for number in range(1000):
        hub.publish(f"short:{number}", "x")
        hub.publish(f"long:{number}", "x")
    watched = Listener()
    hub.subscribe(watched, "short:5")
    clock.now += 10
    passes = 1
    while hub.history.expire(300):
        passes += 1
    assert passes == 4, "a bounded amount of work at a time"
    assert sum(name.startswith("short") for name in hub.channels) == 1
    clock.now += 50
    hub.history.expire(10_000)
    assert set(hub.channels) == {"short:5"}
    assert (hub.history.bytes, hub.history.publications, hub.history.channels) == (0, 0, 0)
    hub.leave(watched)
    clock.now += 10
    hub.history.expire(10)
    assert not hub.channels


# A channel outlives its last subscriber, who may be coming back.


def watch_and_lose(hub: Hub, name: str) -> Position:
    """Subscribe, and lose the connection; return the position until which all is known."""
    client = Listener()
    joined = hub.subscribe(client, name)
    hub.leave(client)
    return Position(joined.epoch, joined.offset)


@pytest.mark.parametrize("published", [0, 1, 3])
@pytest.mark.parametrize("history", ["none yet", "expired"])
def test_the_only_client_of_a_quiet_channel_has_what_it_missed(history: str, published: int) -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    keeper = Listener()
    hub.subscribe(keeper, "mine")
    if history == "expired":
        hub.publish("mine", "long ago")
        clock.now += 60
        hub.history.expire(10)
    since = watch_and_lose(hub, "mine")
    hub.leave(keeper)
    clock.now += 59
    for number in range(published):
        hub.publish("mine", str(number))
    back = come_back(hub, "mine", since)
    assert (back.recovered, missed(back)) == (True, [str(number) for number in range(published)])


def test_a_channel_without_subscribers_is_forgotten_after_its_age() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    hub.publish("mine", "long ago")
    clock.now += 59
    since = watch_and_lose(hub, "mine")
    clock.now += 30
    assert watch_and_lose(hub, "mine") == since, "whoever comes and goes keeps it in being"
    clock.now += 59.9
    hub.history.expire(10)
    assert "mine" in hub.channels
    clock.now += 0.1
    hub.history.expire(10)
    assert not hub.channels
    assert hub.history.bytes == 0
    assert come_back(hub, "mine", since).recovered is False


def test_publications_keep_a_channel_that_everyone_has_left_until_they_expire() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    since = watch_and_lose(hub, "mine")
    clock.now += 59
    hub.publish("mine", "late")
    clock.now += 59
    hub.history.expire(10)
    assert missed(come_back(hub, "mine", since)) == ["late"]


def test_who_comes_and_goes_leaves_nothing_behind_and_takes_nothing_from_others() -> None:
    clock = Clock()
    hub = hub_with_history(limit=100 * RING_BYTES, age=60, clock=clock)
    start = publish(hub, "news", 5)
    hub.publish("quiet", "long ago")
    clock.now += 59
    quiet, never_used = watch_and_lose(hub, "quiet"), watch_and_lose(hub, "never-used")
    clock.now += 0.9
    for number in range(1000):
        watch_and_lose(hub, f"channel-{number}")
    assert hub.channels.keys() == {"news", "quiet"}
    assert missed(come_back(hub, "news", start)) == ["1", "2", "3", "4", "5"]
    clock.now += 1
    while hub.history.expire(10):
        pass
    assert come_back(hub, "quiet", quiet).recovered
    assert come_back(hub, "never-used", never_used).recovered
    hub.publish("never-used", "first")
    assert missed(come_back(hub, "never-used", never_used)) == ["first"]


def test_a_channel_that_was_forgotten_with_publications_has_another_epoch() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    since = watch_and_lose(hub, "mine")
    epochs = {since.epoch}
    for _ in range(10):
        hub.publish("mine", "1")
        clock.now += 60
        while hub.history.expire(10):
            pass
        assert not hub.channels
        client = Listener()
        joined = hub.subscribe(client, "mine", since)
        assert joined.recovered is False
        epochs.add(joined.epoch)
        hub.leave(client)
        assert not hub.channels
    assert len(epochs) == 11


def test_channels_of_published_names_are_bounded_when_everyone_has_left() -> None:
    clock = Clock()
    limit = 100 * RING_BYTES
    hub = hub_with_history(limit=limit, clock=clock)
    for number in range(1000):
        clock.now += 0.001
        hub.publish(f"channel-{number}", "x")
        watch_and_lose(hub, f"channel-{number}")
        assert hub.history.bytes <= limit
    assert "channel-999" in hub.channels
    assert "channel-0" not in hub.channels


def test_without_history_nothing_outlives_the_last_subscriber() -> None:
    hub = hub_with_history(size=0)
    watch_and_lose(hub, "mine")
    assert not hub.channels


def test_the_queue_stays_in_proportion_to_what_is_kept() -> None:
    hub = hub_with_history(size=3)
    publish(hub, "quiet", 1)
    publish(hub, "busy", 10_000)
    [queue] = queues(hub)
    assert queue.live == 4
    assert len(queue) < 100


def test_much_that_is_stale_is_expired_a_little_at_a_time() -> None:
    clock = Clock()
    hub = hub_with_history(size=3, age=60, clock=clock)
    publish(hub, "quiet", 1)  # the head of the queue, for as long as it is kept
    clock.now += 1
    for _ in range(2):
        for number in range(1000):
            publish(hub, f"busy:{number}", 3)
    [queue] = queues(hub)
    assert (queue.live, len(queue)) == (3001, 6001)
    clock.now += 59
    passes = 1
    while hub.history.expire(100):
        passes += 1
    assert (queue.live, len(queue)) == (3000, 3000)
    assert passes == 31, "the quiet one, and three thousand that were stale"


@pytest.mark.parametrize("seed", range(20))
def test_the_history_agrees_with_a_list_of_all_publications(seed: int) -> None:
    """Many channels of two ages, some of them busy: what goes is the oldest of its channel, of its age, or of all."""
    chance, clock = random.Random(seed), Clock()
    limit = chance.choice([AMPLE, 300 * (ENTRY_BYTES + 5)])
    history = History(
        limit=limit,
        clock=clock,
        default=Retention(chance.choice([1, 5, 20]), 60),
        rules=[("short:*", Retention(chance.choice([1, 5, 40]), 20))],
    )
    rings = [ring for name in range(30) if (ring := history.ring(f"{'short' if name % 3 else 'long'}:{name}"))]
    kept: list[tuple[float, Ring, int, bytes]] = []
    offsets = dict.fromkeys(rings, 0)

    def counted_bytes() -> int:
        return len({ring for _, ring, _, _ in kept}) * RING_BYTES + len(kept) * (ENTRY_BYTES + 5)

    for number in range(chance.choice([300, 5000])):
        clock.now += chance.choice([0.0001, 0.001, 0.01])
        ring = rings[min(int(chance.expovariate(0.2)), len(rings) - 1)]
        offsets[ring] += 1
        payload = b"%5d" % number
        history.keep(ring, offsets[ring], payload, published=number)
        kept.append((clock.now, ring, offsets[ring], payload))
        mine = [entry for entry in kept if entry[1] is ring]
        if len(mine) > ring.size:
            kept.remove(mine[0])
        while counted_bytes() > limit:
            kept.pop(0)
        if not chance.randrange(100):
            clock.now += chance.choice([0, 5, 30])
            while history.expire(chance.randint(1, 20)):
                pass
            kept = [entry for entry in kept if entry[0] > clock.now - entry[1].queue.age]
            for ring in rings:
                mine = [entry for entry in kept if entry[1] is ring]
                assert ring.payloads[ring.dropped :] == [payload for *_, payload in mine]
                assert list(ring.published[ring.dropped :]) == [int(payload) for *_, payload in mine]
                assert not mine or (ring.first, ring.oldest_time) == (mine[0][2], mine[0][0])
            assert (history.publications, history.bytes) == (len(kept), counted_bytes())
            for queue in {ring.queue for ring in rings}:
                assert queue.live == sum(entry[1].queue is queue for entry in kept)
                assert len(queue) <= 3 * queue.live + 100


def test_a_hundred_thousand_channels_stay_within_the_configured_bytes() -> None:
    limit = 32 * 2**20
    hub = hub_with_history(limit=limit)
    tracemalloc.start()
    for number in range(100_000):
        hub.publish(f"channel:{number}:with-a-name-of-usual-length", "x" * 100)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert hub.history.bytes <= limit
    assert limit / 2 < used <= limit, "what is counted is about what is used, and no less"


def test_what_is_dropped_takes_no_memory() -> None:
    hub = hub_with_history(size=20)
    tracemalloc.start()
    for number in range(35):
        hub.publish("news", f"{number}" + "x" * 50_000)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 20 * 50_000 < used < 21 * 50_000


# Atomic with the live stream.


def test_nothing_falls_between_replay_and_live_nor_comes_twice() -> None:
    hub = hub_with_history()
    start = publish(hub, "news", 3)  # in the history only: nobody is there
    other = Listener()
    hub.subscribe(other, "news")
    publish(hub, "news", 2)  # in the history and in the log
    back = Listener()
    joined = hub.subscribe(back, "news", start)
    assert [publication.offset for publication in joined.missed] == [1, 2, 3, 4, 5]
    publish(hub, "news", 2)
    fan_out(hub)
    assert back.received.decode() == "news/6/1;news/7/2;"
    assert other.received.decode() == "news/4/1;news/5/2;news/6/1;news/7/2;"


def test_recent_publications_can_be_looked_at_without_subscribing() -> None:
    hub = hub_with_history(size=5)
    start = publish(hub, "news", 9)
    position, publications = hub.recent("news", 2)
    assert position == (start.epoch, 9)
    assert [(each.offset, each.message) for each in publications] == [(8, "8"), (9, "9")]
    assert len(hub.recent("news", 1000)[1]) == 5
    assert not hub.recent("news", 0)[1]
    position, publications = hub.recent("nothing-here", 10)
    assert (position, list(publications)) == (("", 0), [])


def test_the_last_publications_come_with_a_subscription() -> None:
    hub = hub_with_history(size=5)
    publish(hub, "news", 9)
    for last, kept in ((2, ["8", "9"]), (5, ["5", "6", "7", "8", "9"]), (10**30, ["5", "6", "7", "8", "9"]), (0, [])):
        joined = hub.subscribe(Listener(), "news", last=last)
        assert (joined.recovered, joined.last, missed(joined), joined.offset) == (None, len(kept), kept, 9)
    assert hub.subscribe(Listener(), "news").last is None
    assert hub.subscribe(Listener(), "new", last=5).last == 0


def test_the_last_publications_are_no_older_than_may_be() -> None:
    clock = Clock()
    hub = hub_with_history(age=60, clock=clock)
    publish(hub, "news", 2)
    clock.now += 40
    publish(hub, "news", 1)
    clock.now += 20
    assert missed(hub.subscribe(Listener(), "news", last=10)) == ["1"]
    clock.now += 40
    assert missed(hub.subscribe(Listener(), "news", last=10)) == []


def test_no_publication_falls_between_the_last_ones_and_live() -> None:
    hub = hub_with_history()
    listener = Listener()
    hub.subscribe(listener, "news")
    publish(hub, "news", 3)
    joined = hub.subscribe(listener, "news", last=2)
    assert listener.received.decode() == "news/1/1;news/2/2;news/3/3;", "what was on its way comes before the answer"
    assert missed(joined) == ["2", "3"]
    publish(hub, "news", 1)
    fan_out(hub)
    assert listener.received.decode().endswith(";news/3/3;news/4/1;")


# The time of publication is told, and decides nothing.


@pytest.mark.parametrize("step", [-(10**15), -1_000_000, 0, 1_234_567, 10**15])
def test_the_time_of_publication_is_that_of_a_clock_that_may_be_set(step: int) -> None:
    """Milliseconds, rounded down; a year back or forth with every publication drops none and changes no order."""
    wall = Clock()
    hub = hub_with_history(size=4, time_ns=lambda: int(wall.now) * step)
    start = publish(hub, "news", 1)
    for wall.now in range(1, 7):
        publish(hub, "news", 1)
    joined = come_back(hub, "news", start._replace(offset=3))
    assert [(each.offset, each.time) for each in joined.missed] == [
        (offset, (offset - 1) * step // 1_000_000) for offset in (4, 5, 6, 7)
    ]
    _, publications = hub.recent("news", 2)
    assert list(publications.times()) == [5 * step // 1_000_000, 6 * step // 1_000_000]
    assert hub.recent("nothing-here", 2)[1].times() == ()


def test_a_publication_on_its_way_has_the_time_that_the_history_tells() -> None:
    class Times:
        def encode(self, publication: Publication) -> bytes:
            return f"{publication.offset}@{publication.time};".encode()

    ticks = count(0, 1_500_000)
    hub = hub_with_history(time_ns=lambda: next(ticks))
    subscriber, watcher = Listener(form=Times()), Listener(form=Times())
    hub.subscribe(subscriber, "news")
    hub.watchers.add(watcher, "*")
    publish(hub, "news", 4)
    fan_out(hub)
    while hub.watchers.step():
        pass
    assert subscriber.received == watcher.received == b"1@0;2@1;3@3;4@4;"
    assert list(hub.recent("news", 9)[1].times()) == [0, 1, 3, 4]


def test_a_replay_tells_the_times_of_what_was_dropped_meanwhile() -> None:
    class Times:
        def encode(self, publication: Publication) -> bytes:
            return f"{publication.offset}@{publication.time};".encode()

    ticks = count(0, 1_000_000)
    hub = hub_with_history(size=5, time_ns=lambda: next(ticks))
    publish(hub, "news", 5)
    replay = hub.replays.replay([], hub.subscribe(Listener(), "news", last=5).missed, Times())
    publish(hub, "news", 3)
    assert b"".join(map(bytes, replay)) == b"1@0;2@1;3@2;4@3;5@4;"


# The model: a list of all that was ever published, and no rounds.


@dataclass
class Reader:
    """A client that goes away and comes back, and knows where it was."""

    listener: Listener
    since: Position | None = None
    seen: list[str] = field(default_factory=list)
    connected: bool = False


class Model:
    """What a hub does that delivers at once and searches a list of everything that was published."""

    def __init__(self, clock: Clock, size: int, age: float) -> None:
        self.clock = clock
        self.size = size
        self.age = age
        self.published: list[tuple[float, str]] = []
        self.times: list[int] = []

    def recoverable(self, offset: int) -> bool:
        return offset >= self.gone()

    def gone(self) -> int:
        """Return the offset of the newest publication that is not kept."""
        gone = [
            number
            for number, (time, _) in enumerate(self.published, 1)
            if number <= len(self.published) - self.size or time <= self.clock.now - self.age
        ]
        return max(gone, default=0)

    def told(self) -> list[tuple[int, str]]:
        """Return time of publication and message of all that was ever published."""
        return [(time, message) for time, (_, message) in zip(self.times, self.published, strict=True)]

    def kept(self) -> list[tuple[int, str]]:
        """Return the same of what is kept."""
        return self.told()[self.gone() :]


def lines(listener: Listener) -> list[str]:
    return listener.received.decode().split(";")[:-1]


@settings(max_examples=MODEL_RUNS, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 300), size=st.integers(1, 8))
def test_recovery_agrees_with_the_model(seed: int, steps: int, size: int) -> None:
    """Readers come and go, in mid-round too; each has exactly what it should, or was told that it does not.

    Meanwhile somebody sets the wall clock, and other daemons take over what is kept.
    """
    chance, clock, wall = random.Random(seed), Clock(), Clock(0)
    hub = hub_with_history(size=size, age=20, clock=clock, time_ns=lambda: int(wall.now) * 1_000_000)
    model = Model(clock, size, 20)
    keeper = Listener()  # keeps the channel and its epoch in being
    hub.subscribe(keeper, "news")
    readers = [Reader(Listener(form=chance.choice([LINES, OTHER_LINES]))) for _ in range(5)]
    turn: Round | None = None
    for number in range(steps):
        reader = chance.choice(readers)
        match chance.choice([
            "come", "go", "publish", "publish", "publish", "elsewhere", "step", "step", "wait", "set clock",
            "hand over",
        ]):  # fmt: skip
            case "come" if not reader.connected:
                last = chance.choice([None, 0, 1, 2, 5, 100]) if reader.since is None else None
                joined = hub.subscribe(reader.listener, "news", reader.since, last=last)
                told = [(each.time, each.payload.decode()) for each in joined.missed]
                if reader.since is not None:
                    assert joined.recovered == model.recoverable(reader.since.offset)
                    expected = model.told()[reader.since.offset :] if joined.recovered else []
                else:
                    assert (joined.recovered, joined.last) == (None, None if last is None else len(told))
                    expected = model.kept()[-last:] if last else []
                assert told == expected
                assert joined.offset == len(model.published)
                reader.connected = True
                reader.since = Position(joined.epoch, joined.offset)
            case "go" if reader.connected and reader.since is not None:
                hub.catch_up(reader.listener)
                hub.leave(reader.listener)
                new = lines(reader.listener)
                assert new == [
                    f"news/{offset}/{message}"
                    for offset, (_, message) in enumerate(model.published, 1)
                    if offset > reader.since.offset
                ]
                reader.listener.parts.clear()
                reader.connected = False
                reader.since = Position(reader.since.epoch, chance.randint(reader.since.offset, len(model.published)))
            case "publish":
                hub.publish("news", str(number))
                model.published.append((clock.now, str(number)))
                model.times.append(int(wall.now))
            case "set clock":
                wall.now += chance.choice([-(10**9), -1, 1, 10**9])
            case "hand over":
                after = hub_with_history(size=size, age=20, clock=Clock(5.0))
                restore(after, read(b"".join(dump(hub, 0)), 0))
                _, publications = after.recent("news", 100)
                times, payloads = publications.times(), publications.payloads()
                assert [(time, payload.decode()) for time, payload in zip(times, payloads, strict=True)] == model.kept()
            case "elsewhere":
                hub.publish(f"other:{number % 3}", "x")
            case "wait":
                clock.now += chance.choice([0.5, 5, 20])
                hub.history.expire(chance.randint(1, 10))
            case "step":
                turn = turn or hub.next_round()
                if turn is not None and not turn.step(chance.randint(1, 3)):
                    turn = None
    while turn is not None and turn.step(100):
        pass
    fan_out(hub)
    assert lines(keeper) == [f"news/{offset}/{message}" for offset, (_, message) in enumerate(model.published, 1)]
    for reader in readers:
        hub.leave(reader.listener)
    hub.leave(keeper)
    clock.now += 20
    hub.history.expire(10_000)
    assert not hub.channels
    assert hub.history.bytes == 0


@pytest.mark.parametrize("again", [False, True])
def test_subscribing_twice_with_since_answers_each_time(again: bool) -> None:
    hub = hub_with_history()
    start = publish(hub, "news", 2)
    listener = Listener()
    hub.subscribe(listener, "news")
    if again:
        assert missed(hub.subscribe(listener, "news", start)) == ["1", "2"]
    assert hub.channels["news"].count == 1


def test_what_does_not_fit_any_more_is_left_out_of_what_is_restored() -> None:
    """The only old publication of a channel goes, to make room, before its new one comes."""
    clock = Clock()
    hub = hub_with_history(limit=6000, clock=clock)
    torn = SavedChannel("torn", "e", 2, [(200.0, b"old", True, 0), (1.0, b"new", True, 0)])
    gone = SavedChannel("gone", "e", 1, [(250.0, b"x" * 1000, True, 0)])
    others = [SavedChannel(f"other-{number}", "e", 1, [(100.0 - number, b"x" * 1000, True, 0)]) for number in range(6)]
    restore(hub, Saved([gone, torn, *others], 0))
    assert {"torn", "other-5"} <= hub.channels.keys()
    assert "gone" not in hub.channels
    assert missed(come_back(hub, "torn", Position("e", 1))) == ["new"]
    for _ in range(20):
        hub.publish("later", "y" * 1000)
    clock.now += 1000
    while hub.history.expire(10):
        pass
    assert (hub.history.channels, hub.history.publications) == (0, 0)


def test_a_reader_keeps_what_it_may_need_and_nothing_of_what_comes_later() -> None:
    hub = hub_with_history(size=10)
    hub.publish("news", "x")
    publish(hub, "news", 10)
    since = Position(hub.channels["news"].epoch, 1)
    ring = hub.channels["news"].ring
    assert ring is not None
    first, second = (iter(hub.replays.replay([], come_back(hub, "news", since).missed, LINES)) for _ in range(2))
    next(first)
    for number in range(100_000):
        hub.publish("news", str(number))
    assert len(ring.payloads) < 100
    assert len(ring.times) == len(ring.published) < 100
    assert len(ring.evicted) == 10
    kept = hub.history.retained
    assert kept == sum(ENTRY_BYTES + EVICTED_BYTES + len(each) for each, _ in ring.evicted.values())
    lines = [b"".join([bytes(frame) for frame in each]).decode().split(";")[:-1] for each in (first, second)]
    assert [line.rpartition("/")[2] for line in lines[1]] == [str(number) for number in range(1, 11)]
    assert lines[0] == lines[1][1:]
    assert hub.history.retained == 0
    assert not ring.evicted


def test_what_is_published_to_nobody_changes_no_quiet_channels_epoch() -> None:
    hub = hub_with_history(size=0)
    names = [f"quiet-{number}" for number in range(100)]
    positions = [watch_and_lose(hub, name) for name in names]
    receipts = {hub.publish(f"busy-{number}", "x").epoch for number in range(60_000)}
    receipts |= {hub.publish("busy", "x").epoch for _ in range(100)}
    assert len(receipts) == 60_100
    assert all(come_back(hub, name, position).recovered for name, position in zip(names, positions, strict=True))
