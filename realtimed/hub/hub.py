"""Who listens to what, and what is on its way to them. Pure and synchronous: it knows no socket, clock or task.

A publication goes through two steps.

1. `Hub.publish` appends it to the *log*. That costs the same for one subscriber as for ten thousand, and wakes
   whoever fans out.
2. `Hub.next_round` takes what the log holds by then and turns it into a `Round`: for subscribers that get the same
   publications, their frames joined once, and the roster of these subscribers as it is at that moment. The caller
   runs `Round.step` until it is through, letting other tasks run in between. Each subscriber gets one send a round,
   however many publications came together in it: the busier the daemon, the fewer sends a message.

Between two steps of a round the world may change. What keeps the order: before a subscriber's channels change, and
before it is told goodbye, `Hub.catch_up` hands it at once all that was published for it so far, and marks it so that
neither the round at hand nor the log's publications reach it again.
"""

from __future__ import annotations

import itertools
import secrets
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final, NamedTuple

from realtimed.errors import RefusedError
from realtimed.hub.channel import Channel, Subscriber
from realtimed.hub.history import Aged, History, Retention
from realtimed.hub.names import check_channel_name
from realtimed.hub.position import Position, Receipt
from realtimed.hub.publication import Publication, WireFormat, encode_message
from realtimed.hub.replays import Missed, Replays
from realtimed.hub.rounds import Batch, Entry, Round, send_each
from realtimed.hub.watch import Watchers

__all__ = ["Hub", "Joined", "SavedChannel"]

_ROUND_PUBLICATIONS: Final = 512
"""How many publications one round takes: so many channels are sorted out before other tasks get their turn."""

_ROUND_BYTES: Final = 256 * 1024
"""How many bytes one round sends a subscriber of all its channels, at most, unless one publication is larger: so that
clients may read one before the next fills their backlog."""

_LARGEST_GROWTH: Final = 6
"""How many times larger a message is in the most verbose of formats, beside its frame: JSON, where ``\\u0001`` stands
for one byte. Up to that, nobody need look at what each publication becomes."""

_ROUND_MEMBERS: Final = 50_000
"""How many subscriptions the channels of one round have together: sorting them out takes some milliseconds at most."""

_PUBLICATION_BYTES: Final = 288
"""What a publication takes on its way beside its message: itself, its place in the log, the objects of its bytes."""

_LIVES: Final = 2**18
"""Groups of channel names, by their hash, each of which counts how often one of its channels has been forgotten."""


_receipt: Final[Callable[[tuple[int, str, int, bool]], Receipt]] = partial(tuple.__new__, Receipt)
"""Makes a receipt. Each publication needs one, and this takes half the time of a named tuple's constructor."""


class SavedChannel(NamedTuple):
    """A channel's history without the hub: the last of the entries has `offset`.

    Each is (age in seconds, payload, is text, time of publication in milliseconds since 1970).
    """

    name: str
    epoch: str
    offset: int
    entries: list[tuple[float, bytes, bool, int]]


class Joined(NamedTuple):
    """What a subscriber learns: where the channel is, and what of it was missed.

    `recovered` is None if nothing was asked for; True if `missed` is all that was published since then, in order; False
    if it is not known any more, and then `missed` is empty. If the last publications were asked for, they are `missed`,
    and `last` is how many there are.
    """

    epoch: str
    offset: int
    recovered: bool | None
    missed: Missed
    last: int | None = None


class Hub:
    """All channels, their subscribers, and the publications on their way to them. Without `history` nothing is kept.

    `time_ns` is the wall clock: nanoseconds since 1970, as `time.time_ns`. Nothing is decided by it.
    """

    # Invariants:
    # - `channels` holds exactly the channels that have a subscriber or something in their history, or had a subscriber
    #   so recently that `history` remembers it; `subscribed_channels` is how many of them have a subscriber now, and
    #   `subscriptions` how many these have together. They are in the order of their numbers.
    # - `_log` is what has been published and is in no round yet, each with the channel it went to. The first entry is
    #   publication number `_log_start` of this hub; `log_bytes` is the memory that they take.
    # - `_sorted` has, by channel, the places in the log of its first `_sorted_to` entries, in their order. `_joined` is
    #   what was last handed to a subscriber out of it, behind the key of what that was.
    # - `_caught_up[s] = n` says that `s` has everything below number n already. Entries that no longer matter to
    #   the log are gone when the next round is taken.
    # - `_taken` is what is in the round that is under way or being made, which is `_round` once it is made.
    # - `_lives` says for each group of names how many of its channels have been forgotten that had a publication.

    def __init__(
        self,
        *,
        max_message: int,
        max_channels: int,
        max_subscriptions: int = 2**63,
        history: History | None = None,
        time_ns: Callable[[], int] = int,
    ) -> None:
        self.max_message = max_message
        self.max_channels = max_channels
        self.max_subscriptions = max_subscriptions
        self.history = history or History(limit=0, clock=float, default=Retention(0, 0))
        self.replays = Replays(self.history)
        self.history.emptied = self._forget_if_unused
        self.channels: dict[str, Channel] = {}
        self.subscribed_channels = 0
        self.watchers = Watchers(max_patterns=max_channels)
        self.wake: Callable[[], None] = lambda: None
        self.deliver: Callable[[Batch], None] = send_each
        self.log_bytes = 0
        self.publications = 0
        self.deliveries = 0
        self.sends = 0
        self.sent_bytes = 0
        self.rounds = 0
        self.subscriptions = 0
        self._time_ns = time_ns
        self._numbers = itertools.count(1)
        self._log: list[Entry] = []
        self._log_start = 0
        self._sorted: dict[Channel, list[int]] = {}
        self._sorted_to = 0
        self._joined: tuple[object, bytes] = None, b""
        self._caught_up: dict[Subscriber, int] = {}
        self._taken: list[Entry] = []
        self._round: Round | None = None
        self._lives = array("I", bytes(4 * _LIVES))
        self._life = secrets.token_hex(4)
        self._epochs_of_their_own = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way: the log is empty, no round is under way, and watchers have been shown all."""
        return not self._log and self._round is None and self.watchers.idle

    @property
    def unsent_bytes(self) -> int:
        """The memory that publications take which are in no round yet, or wait to be shown to watchers."""
        return self.log_bytes + self.watchers.queued_bytes

    def publish(self, name: object, message: object, payload: bytes | None = None) -> Receipt:
        """Put a message on its way to everyone on the channel `name`.

        `payload` is what `encode_message` has made of the message, if that was done: several channels share it then.

        Raises `RefusedError` for a bad channel name or message; see `encode_message`.
        """
        if payload is None:
            payload = encode_message(message, self.max_message)
        text = isinstance(message, str)
        channel = self.channels.get(name) if isinstance(name, str) else None
        if channel is None:  # `_find` by hand, as every publication passes here
            check_channel_name(name)
        self.publications += 1
        if channel is None:
            channel = self._make(str(name))
            if channel.ring is not None:
                self.channels[channel.name] = channel
            else:
                channel.epoch = self._epoch_of_its_own()
                if not self.watchers:
                    return _receipt((0, channel.epoch, 1, False))
        channel.offset += 1
        time = self._time_ns() // 1_000_000
        if channel.ring is not None:
            self.history.keep(channel.ring, channel.offset, payload if text else bytearray(payload), time)
        if not channel.count and not self.watchers:
            return _receipt((0, channel.epoch, channel.offset, False))
        publication = Publication(channel.name, payload, text, channel.offset, time)
        self._log.append((channel, publication))
        self.log_bytes += len(payload) + _PUBLICATION_BYTES
        self.deliveries += channel.count
        if len(self._log) == 1:
            self.wake()
        return _receipt((channel.count, channel.epoch, channel.offset, False))

    def subscribe(
        self, subscriber: Subscriber, name: object, since: Position | None = None, *, last: int | None = None
    ) -> Joined:
        """Let `subscriber` have all that is published on `name` from now on; a second time changes nothing.

        With `since`, the answer has what was published between then and now, or says that it cannot be known. Without
        it, the answer has the `last` publications that are kept, as many as there are. The caller writes it to the
        subscriber before anything else happens: then nothing is lost between it and what follows.

        Raises `RefusedError`, with the code ``invalid_channel``, ``too_many_channels`` or ``too_many_subscriptions``.
        """
        channel = self._find(name)
        if channel is None or channel not in subscriber.channels:
            channel = self._join(subscriber, channel, str(name))
        else:
            self.catch_up(subscriber)
        if since is None:
            kept = self._latest(channel, last or 0)
            return Joined(
                channel.epoch, channel.offset, None, _ending(channel, kept), kept if last is not None else None
            )
        missed = self._since(channel, since)
        return Joined(channel.epoch, channel.offset, missed is not None, _ending(channel, missed or 0))

    def _join(self, subscriber: Subscriber, channel: Channel | None, name: str) -> Channel:
        if len(subscriber.channels) >= self.max_channels:
            raise RefusedError(
                "too_many_channels", f"the limit, max-channels, is {self.max_channels} channels a client"
            )
        if self.subscriptions >= self.max_subscriptions:
            raise RefusedError(
                "too_many_subscriptions",
                f"the limit, max-subscriptions, is {self.max_subscriptions} subscriptions of all clients together",
            )
        before = len(subscriber.channels)
        self.catch_up(subscriber)
        if len(subscriber.channels) < before:  # that was more than it may have waiting, so it has left
            return channel or self._make(name)
        if channel is None:
            channel = self.channels[name] = self._make(name)
        if channel.ring is not None:
            self.history.joined(channel.ring)
        channel.subscribers.setdefault(subscriber.form, set()).add(subscriber)
        channel.members_changed(subscriber.form)
        self.subscribed_channels += not channel.count
        channel.count += 1
        subscriber.channels.add(channel)
        self.subscriptions += 1
        self._count_plural(subscriber, channel, 1)
        return channel

    def unsubscribe(self, subscriber: Subscriber, name: object) -> bool:
        """End a subscription after handing over what was published before. Returns whether there was one.

        Raises `RefusedError` if `name` cannot be a channel.
        """
        channel = self._find(name)
        if channel is None or channel not in subscriber.channels:
            return False
        self.catch_up(subscriber)
        if channel in subscriber.channels:  # if not, that was more than it may have waiting, and it has left
            self._remove(subscriber, channel)
        return True

    def change_form(self, subscriber: Subscriber, form: WireFormat) -> None:
        """Let publications look to `subscriber` like `form` from now on; what was published before is handed over."""
        if subscriber.form is form:
            return
        self.catch_up(subscriber)
        for channel in subscriber.channels:
            channel.change_form(subscriber, form)
        subscriber.form = form

    def leave(self, subscriber: Subscriber) -> None:
        """End all subscriptions of one who is gone. What was on its way to it is for the caller to consider."""
        for channel in list(subscriber.channels):
            self._remove(subscriber, channel)
        self._caught_up.pop(subscriber, None)

    def catch_up(self, subscriber: Subscriber) -> None:
        """Hand over, now, everything published so far on the subscriber's channels, and see that it comes once.

        It may take its leave over that: see `leave`.
        """
        if self._round is not None and subscriber.channels:
            self._round.serve_early(subscriber)
        if not self._log:
            return
        seen = max(self._caught_up.get(subscriber, 0) - self._log_start, 0)
        self._caught_up[subscriber] = self._log_start + len(self._log)
        data = self._waiting(subscriber, seen)
        if data:
            self.sends += 1
            self.sent_bytes += len(data)
            subscriber.write(data)

    def _waiting(self, subscriber: Subscriber, seen: int) -> bytes:
        """Return the frames of what is in the log, from the place `seen` on, on a subscriber's channels.

        The log is sorted out once for all who ask, so that it does not matter to each how long it is; and those who
        miss the same get the same bytes.
        """
        for place in range(self._sorted_to, len(self._log)):
            self._sorted.setdefault(self._log[place][0], []).append(place)
        self._sorted_to = len(self._log)
        channels = frozenset(subscriber.channels & self._sorted.keys())
        key = subscriber.form, seen, self._sorted_to, channels
        if self._joined[0] != key:
            places: list[int] = []
            for channel in channels:
                of_channel = self._sorted[channel]
                places += of_channel[bisect_left(of_channel, seen) :] if seen else of_channel
            places.sort()
            frames = b"".join([self._log[place][1].encoded(subscriber.form) for place in places])
            self._joined = key, frames
        return self._joined[1]

    def next_round(self) -> Round | None:
        """Take what has been published and return the round that delivers it, or None if there is nothing.

        The round before has to be through.
        """
        log = self._taken = self._take()
        if not log:
            return None
        if self.watchers:
            self.watchers.show(publication for _, publication in log)
        start, end = self._log_start - len(log), self._log_start
        late = {each: seen for each, seen in self._caught_up.items() if seen > start}
        self._caught_up = {each: seen for each, seen in late.items() if seen > end}
        self.rounds += 1
        self._round = Round(log, start, late, self.deliver, self._round_over)
        return self._round

    def recent(self, name: object, count: int) -> tuple[Position, Missed]:
        """Return where a channel is, and its last `count` publications that are kept, oldest first.

        Raises `RefusedError` if `name` cannot be a channel.
        """
        channel = self._find(name)
        if channel is None:
            return Position("", 0), Missed("", "", None, 0, 0)
        return Position(channel.epoch, channel.offset), _ending(channel, self._latest(channel, count))

    def saved(self) -> Iterator[SavedChannel]:
        """Yield every channel that has a history. Nothing may be published meanwhile."""
        for channel in list(self.channels.values()):
            if channel.ring is not None and (kept := self.history.aged(channel.ring)):
                entries = [(age, bytes(payload), isinstance(payload, bytes), time) for age, payload, time in kept]
                yield SavedChannel(channel.name, channel.epoch, channel.offset, entries)

    def restore(self, channels: Iterable[SavedChannel], later: float) -> None:
        """Take over what `saved` gave, `later` seconds after that, into a hub without channels.

        Epochs and offsets go on, so who comes back finds what was missed.
        """
        rings = []
        for saved in channels:
            channel = Channel(saved.name, saved.epoch, self.history.ring(saved.name), next(self._numbers))
            if channel.ring is not None:
                channel.offset = saved.offset
                self.channels[channel.name] = channel
                kept = [
                    Aged(age, payload if text else bytearray(payload), time)
                    for age, payload, text, time in saved.entries
                ]
                rings.append((channel.ring, saved.offset, kept))
        self.history.restore(rings, later)

    def abandon_round(self) -> list[Subscriber]:
        """Give up the round that is under way or could not be made; return everyone who may have missed some of it."""
        channels = {channel for channel, _ in self._taken}
        self._taken = []
        self._round = None
        return list({each for channel in channels for members in channel.subscribers.values() for each in members})

    def _round_over(self, sends: int, sent_bytes: int) -> None:
        """Account for the round at hand, which is through."""
        self.sends += sends
        self.sent_bytes += sent_bytes
        self._taken = []
        self._round = None

    def _find(self, name: object) -> Channel | None:
        """Return the channel if there is one. Raises `RefusedError` if `name` cannot be one."""
        channel = self.channels.get(name) if isinstance(name, str) else None
        if channel is None:
            check_channel_name(name)
        return channel

    def _since(self, channel: Channel, since: Position) -> int | None:
        """Return how much was published after `since`, or None if not all of that is known any more."""
        if since.epoch != channel.epoch or since.offset > channel.offset:
            return None
        if since.offset == channel.offset:
            return 0
        return self.history.after(channel.ring, since.offset) if channel.ring is not None else None

    def _latest(self, channel: Channel, count: int) -> int:
        """Return how many of the last `count` publications are kept."""
        return self.history.latest(channel.ring, count) if count and channel.ring is not None else 0

    def _make(self, name: str) -> Channel:
        return Channel(name, self._epoch(name), self.history.ring(name), next(self._numbers))

    def _epoch(self, name: str) -> str:
        """Return the epoch of a channel that begins at offset 0 now.

        No publication of another run of the daemon, or of an earlier life of this channel, has had it. As long as
        nothing is published on a channel, its epoch is the same each time, so that it can be forgotten without harm:
        otherwise clients that come and go could fill the memory with channels that nobody publishes on, or push those
        of other clients out of it.
        """
        return f"{self._life}{self._lives[hash(name) % _LIVES]:x}"

    def _epoch_of_its_own(self) -> str:
        """Return an epoch that no other publication has: for a channel that is forgotten with its only one."""
        self._epochs_of_their_own += 1
        return f"{self._life}x{self._epochs_of_their_own:x}"

    def _end_life(self, name: str) -> None:
        """See that a channel which has had a publication, and is forgotten, gets another epoch if it comes back."""
        self._lives[hash(name) % _LIVES] += 1

    def _forget(self, channel: Channel) -> None:
        del self.channels[channel.name]
        if channel.offset:
            self._end_life(channel.name)

    def _forget_if_unused(self, name: str) -> None:
        """Forget a channel of which the history keeps nothing any more, unless it has subscribers."""
        channel = self.channels[name]
        if not channel.count and (channel.ring is None or not channel.ring.count):
            self._forget(channel)

    def _take(self) -> list[Entry]:
        """Cut from the log what one round may hold: at least one publication, if there is one."""
        whole = self._log
        if self._sorted_to:
            self._sorted.clear()
            self._sorted_to = 0
            self._joined = None, b""
        if (
            len(whole) <= _ROUND_PUBLICATIONS
            and self.log_bytes - _PUBLICATION_BYTES * len(whole) <= _ROUND_BYTES // _LARGEST_GROWTH
            and self.subscriptions <= _ROUND_MEMBERS  # at least as many as the members of all channels in the log
        ):
            self._log = []
            self._log_start += len(whole)
            self.log_bytes = 0
            return whole
        count = size = members = 0
        dirty: set[Channel] = set()
        for channel, publication in whole[:_ROUND_PUBLICATIONS]:
            size += max([len(publication.encoded(form)) for form in channel.subscribers], default=0)
            if channel not in dirty:
                dirty.add(channel)
                members += channel.count
            if count and (size > _ROUND_BYTES or members > _ROUND_MEMBERS):
                break
            count += 1
        taken = whole[:count]
        del whole[:count]
        self._log_start += count
        self.log_bytes -= sum(len(publication.payload) + _PUBLICATION_BYTES for _, publication in taken)
        return taken

    def _remove(self, subscriber: Subscriber, channel: Channel) -> None:
        self._count_plural(subscriber, channel, -1)
        members = channel.subscribers[subscriber.form]
        members.remove(subscriber)
        channel.members_changed(subscriber.form)
        if not members:
            del channel.subscribers[subscriber.form]
        channel.count -= 1
        self.subscribed_channels -= not channel.count
        subscriber.channels.remove(channel)
        self.subscriptions -= 1
        if not channel.count:
            if channel.ring is None or not channel.offset:
                self._forget(channel)
            else:
                self.history.left(channel.ring)

    def _count_plural(self, subscriber: Subscriber, channel: Channel, change: int) -> None:
        """Keep `Channel.plural` right: `channel` was added to the subscriber's channels, or is about to be removed."""
        if len(subscriber.channels) == 2:
            for each in subscriber.channels:
                each.plural += change
        elif len(subscriber.channels) > 2:
            channel.plural += change


def _ending(channel: Channel, count: int) -> Missed:
    """Return the last publications of a channel."""
    return Missed(channel.name, channel.epoch, channel.ring, channel.offset - count + 1, count)
