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

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

from realtimed.errors import RefusedError, quoted
from realtimed.frames import Publication, WireFormat
from realtimed.history import History, Kept, Retention, Ring
from realtimed.replays import Replays
from realtimed.watch import Watchers

__all__ = [
    "Batch",
    "Channel",
    "Hub",
    "Joined",
    "Position",
    "Receipt",
    "Round",
    "SavedChannel",
    "Subscriber",
    "check_channel_name",
    "encode_message",
    "send_each",
]

_ROUND_PUBLICATIONS: Final = 512
"""How many publications one round takes: so many channels are sorted out before other tasks get their turn."""

_ROUND_BYTES: Final = 256 * 1024
"""How many bytes of messages one round takes, so that clients may read one before the next fills their backlog."""

_ROUND_MEMBERS: Final = 50_000
"""How many subscriptions the channels of one round have together: sorting them out takes some milliseconds at most."""

_SMALL_SEND: Final = 4096
"""Bytes up to which the length of a send hardly matters; a larger one counts as several, so that no step is long."""

_MIXES_KEPT: Final = 2**20
"""Bytes of mixes that a round keeps for other subscribers of the same channels."""

_CHANNEL_NAME: Final = re.compile(r"[A-Za-z0-9_\-=@,.;:/]{1,200}")


class Subscriber(Protocol):
    """What the hub knows of a subscriber."""

    @property
    def form(self) -> WireFormat:
        """How publications look to this subscriber. Never changes."""

    @property
    def channels(self) -> set[Channel]:
        """What it is subscribed to. Only the hub writes it."""

    @property
    def fd(self) -> int:
        """The descriptor that bytes may be sent to at once instead of by `transmit`; -1 while they may not."""

    @property
    def transmit(self) -> Callable[[bytes], int]:
        """Takes as many of the bytes as it can at once and returns how many; raises OSError if it can take none."""

    def hold(self, data: bytes, sent: int) -> None:
        """Keep `data`, of which `transmit` took the first `sent` bytes, until it can be sent."""

    def transmit_failed(self, data: bytes, error: OSError) -> None:
        """Deal with an error of `transmit`, which has taken nothing of `data`."""

    def write(self, data: bytes) -> None:
        """Send or keep `data`: `transmit` and what may have to follow it, in one."""


Batch: TypeAlias = Sequence[tuple[bytes, Sequence[Subscriber]]]
"""Bytes, and who gets them; nobody is in it twice."""


class Receipt(NamedTuple):
    """What a publisher learns: how many clients the message was queued for, and its place in the channel."""

    recipients: int
    epoch: str
    offset: int


class Position(NamedTuple):
    """A place in a channel's sequence of publications: behind the one with this offset."""

    epoch: str
    offset: int


class Channel:
    """A channel that somebody is subscribed to, or that has a history.

    `offset` is that of the newest publication, 0 before the first; `epoch` is different for every time that offsets
    began at 1.
    """

    __slots__ = ("count", "epoch", "name", "offset", "plural", "ring", "rosters", "subscribers")

    # Invariants: `count` is the number of members of all sets in `subscribers`; none of these sets is empty. The
    # channel is in a subscriber's `channels` exactly if the subscriber is in the set of its form. A list in `rosters`
    # has the members of the set of that form; it is never changed, only thrown away. `plural` is how many of the
    # subscribers have other channels as well. `ring` is None if no history is kept of this channel; otherwise its
    # newest entry, if it has any, is the publication with `offset`.

    def __init__(self, name: str, epoch: str, ring: Ring | None) -> None:
        self.name = name
        self.epoch = epoch
        self.ring = ring
        self.offset = 0
        self.count = 0
        self.plural = 0
        self.subscribers: dict[WireFormat, set[Subscriber]] = {}
        self.rosters: dict[WireFormat, list[Subscriber]] = {}

    def roster(self, form: WireFormat) -> list[Subscriber]:
        """Return who gets `form`, as a list that stays as it is whoever comes or goes."""
        roster = self.rosters[form] = list(self.subscribers[form])
        return roster


class SavedChannel(NamedTuple):
    """A channel's history without the hub: `entries` are (age in seconds, payload, is text), the last has `offset`."""

    name: str
    epoch: str
    offset: int
    entries: list[tuple[float, bytes, bool]]


class Joined(NamedTuple):
    """What a subscriber learns: where the channel is, and what of it was missed.

    `recovered` is None if nothing was asked for; True if `missed` is all that was published since then, in order; False
    if it is not known any more, and then `missed` is empty.
    """

    epoch: str
    offset: int
    recovered: bool | None
    missed: list[Publication]


def encode_message(message: object, limit: int) -> bytes:
    """Return a message's bytes. Raises `RefusedError` for anything but valid text or bytes of at most `limit` bytes."""
    if isinstance(message, str):
        try:
            payload = message.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                "invalid_utf8",
                f"the message is not valid UTF-8 at character {error.start}: what is not text can be sent as binary",
            ) from None
    elif isinstance(message, bytes):
        payload = message
    else:
        raise RefusedError("invalid_params", f"a message is str or bin, not {type(message).__name__}")
    if len(payload) > limit:
        raise RefusedError(
            "message_too_large", f"the message has {len(payload)} bytes; the limit, max-message, is {limit}"
        )
    return payload


class Hub:
    """All channels, their subscribers, and the publications on their way to them. Without `history` nothing is kept."""

    # Invariants:
    # - `channels` holds exactly the channels that have a subscriber or something in their history, or had a subscriber
    #   so recently that `history` remembers it; `subscribed_channels` is how many of them have a subscriber now.
    # - `_log` is what has been published and is in no round yet, each with the channel it went to. The first entry is
    #   publication number `_log_start` of this hub; `log_bytes` is the sum of the payloads.
    # - `_caught_up[s] = n` says that `s` has everything below number n already. Entries that no longer matter to
    #   the log are gone when the next round is taken.
    # - `_round`, while set, is the one round that is under way.

    def __init__(self, *, max_message: int, max_channels: int, history: History | None = None) -> None:
        self.max_message = max_message
        self.max_channels = max_channels
        self.history = history or History(limit=0, clock=float, default=Retention(0, 0))
        self.replays = Replays()
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
        self._log: list[tuple[Channel, Publication]] = []
        self._log_start = 0
        self._caught_up: dict[Subscriber, int] = {}
        self._round: Round | None = None
        self._epochs = 0
        self._life = secrets.token_hex(4)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way: the log is empty and no round is under way."""
        return not self._log and self._round is None

    def publish(self, name: object, message: object) -> Receipt:
        """Put a message on its way to everyone on the channel `name`.

        Raises `RefusedError` for a bad channel name or message; see `encode_message`.
        """
        payload = encode_message(message, self.max_message)
        channel = self._find(name)
        self.publications += 1
        if channel is None:
            channel = self._make(str(name))
            if channel.ring is not None:
                self.channels[channel.name] = channel
            elif not self.watchers:
                return Receipt(0, channel.epoch, 1)
        channel.offset += 1
        if channel.ring is not None:
            self.history.keep(channel.ring, channel.offset, payload, isinstance(message, str))
        if not channel.count and not self.watchers:
            return Receipt(0, channel.epoch, channel.offset)
        publication = Publication(channel.name, payload, isinstance(message, str), channel.offset)
        self._log.append((channel, publication))
        self.log_bytes += len(payload)
        self.deliveries += channel.count
        if len(self._log) == 1:
            self.wake()
        return Receipt(channel.count, channel.epoch, channel.offset)

    def subscribe(self, subscriber: Subscriber, name: object, since: Position | None = None) -> Joined:
        """Let `subscriber` have all that is published on `name` from now on; a second time changes nothing.

        With `since`, the answer has what was published between then and now, or says that it cannot be known. The
        caller writes it to the subscriber before anything else happens: then nothing is lost between it and what
        follows.

        Raises `RefusedError`, with the code ``invalid_channel`` or ``too_many_channels``.
        """
        channel = self._find(name)
        if channel is None or channel not in subscriber.channels:
            channel = self._join(subscriber, channel, str(name))
        else:
            self.catch_up(subscriber)
        missed = self._since(channel, since) if since is not None else None
        recovered = None if since is None else missed is not None
        return Joined(channel.epoch, channel.offset, recovered, missed or [])

    def _join(self, subscriber: Subscriber, channel: Channel | None, name: str) -> Channel:
        if len(subscriber.channels) >= self.max_channels:
            raise RefusedError(
                "too_many_channels", f"the limit, max-channels, is {self.max_channels} channels a client"
            )
        self.catch_up(subscriber)
        if channel is None:
            channel = self.channels[name] = self._make(name)
        if channel.ring is not None:
            self.history.joined(channel.ring)
        channel.subscribers.setdefault(subscriber.form, set()).add(subscriber)
        channel.rosters.pop(subscriber.form, None)
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
        self._remove(subscriber, channel)
        return True

    def leave(self, subscriber: Subscriber) -> None:
        """End all subscriptions of one who is gone. What was on its way to it is for the caller to consider."""
        for channel in list(subscriber.channels):
            self._remove(subscriber, channel)
        self._caught_up.pop(subscriber, None)

    def catch_up(self, subscriber: Subscriber) -> None:
        """Hand over, now, everything published so far on the subscriber's channels, and see that it comes once."""
        if self._round is not None and subscriber.channels:
            self._round.serve_early(subscriber)
        if not self._log:
            return
        seen = max(self._caught_up.get(subscriber, 0) - self._log_start, 0)
        self._caught_up[subscriber] = self._log_start + len(self._log)
        waiting = [entry for entry in self._log[seen:] if entry[0] in subscriber.channels]
        data = b"".join([publication.encoded(subscriber.form) for _, publication in waiting])
        if data:
            self.sends += 1
            self.sent_bytes += len(data)
            subscriber.write(data)

    def next_round(self) -> Round | None:
        """Take what has been published and return the round that delivers it, or None if there is nothing.

        The round before has to be through.
        """
        log = self._take()
        if not log:
            return None
        if self.watchers:
            self.watchers.show(publication for _, publication in log)
        start, end = self._log_start - len(log), self._log_start
        late = {each: seen for each, seen in self._caught_up.items() if seen > start}
        self._caught_up = {each: seen for each, seen in late.items() if seen > end}
        self.rounds += 1
        self._round = Round(self, log, start, late)
        return self._round

    def describe_channels(self, prefix: str = "") -> dict[str, dict[str, object]]:
        """Return what the ``channels`` command shows: who is listened to, of the names that begin with `prefix`."""
        return {
            channel.name: {
                "subscribers": channel.count,
                "epoch": channel.epoch,
                "offset": channel.offset,
                "history": len(channel.ring.entries) if channel.ring is not None else 0,
            }
            for channel in self.channels.values()
            if channel.count and channel.name.startswith(prefix)
        }

    def recent(self, name: object, count: int) -> tuple[Position, list[Publication]]:
        """Return where a channel is, and its last `count` publications that are kept, oldest first.

        Raises `RefusedError` if `name` cannot be a channel.
        """
        channel = self._find(name)
        if channel is None:
            return Position("", 0), []
        kept = self.history.latest(channel.ring, count) if channel.ring is not None else []
        return Position(channel.epoch, channel.offset), _publications(channel, kept)

    def saved(self) -> Iterator[SavedChannel]:
        """Yield every channel that has a history. Nothing may be published meanwhile."""
        for channel in list(self.channels.values()):
            if channel.ring is not None and (entries := self.history.ages(channel.ring)):
                yield SavedChannel(channel.name, channel.epoch, channel.offset, entries)

    def restore(self, channels: Iterable[SavedChannel], later: float) -> None:
        """Take over what `saved` gave, `later` seconds after that, into a hub without channels.

        Epochs and offsets go on, so who comes back finds what was missed.
        """
        rings = []
        for saved in channels:
            channel = Channel(saved.name, saved.epoch, self.history.ring(saved.name))
            if channel.ring is not None:
                channel.offset = saved.offset
                self.channels[channel.name] = channel
                rings.append((channel.ring, saved.offset, saved.entries))
        self.history.restore(rings, later)

    def round_over(self, sends: int, sent_bytes: int) -> None:
        """Take note that the round at hand is through."""
        self.sends += sends
        self.sent_bytes += sent_bytes
        self._round = None

    def _find(self, name: object) -> Channel | None:
        """Return the channel if somebody is subscribed to it. Raises `RefusedError` if `name` cannot be one."""
        channel = self.channels.get(name) if isinstance(name, str) else None
        if channel is None:
            check_channel_name(name)
        return channel

    def _since(self, channel: Channel, since: Position) -> list[Publication] | None:
        """Return what was published after `since`, or None if that is not known any more."""
        if since.epoch != channel.epoch or since.offset > channel.offset:
            return None
        if since.offset == channel.offset:
            return []
        kept = self.history.after(channel.ring, since.offset) if channel.ring is not None else None
        return _publications(channel, kept) if kept is not None else None

    def _make(self, name: str) -> Channel:
        return Channel(name, self._new_epoch(), self.history.ring(name))

    def _forget_if_unused(self, name: str) -> None:
        """Forget a channel of which the history keeps nothing any more, unless it has subscribers."""
        channel = self.channels[name]
        if not channel.count and (channel.ring is None or not channel.ring.entries):
            del self.channels[name]

    def _take(self) -> list[tuple[Channel, Publication]]:
        """Cut from the log what one round may hold: at least one publication, if there is one."""
        whole = self._log
        if (
            len(whole) <= _ROUND_PUBLICATIONS
            and self.log_bytes <= _ROUND_BYTES
            and self.subscriptions <= _ROUND_MEMBERS  # at least as many as the members of all channels in the log
        ):
            self._log = []
            self._log_start += len(whole)
            self.log_bytes = 0
            return whole
        count = size = members = 0
        dirty: set[Channel] = set()
        for channel, publication in self._log[:_ROUND_PUBLICATIONS]:
            size += len(publication.payload)
            if channel not in dirty:
                dirty.add(channel)
                members += channel.count
            if count and (size > _ROUND_BYTES or members > _ROUND_MEMBERS):
                size -= len(publication.payload)
                break
            count += 1
        taken = self._log[:count]
        del self._log[:count]
        self._log_start += count
        self.log_bytes -= size
        return taken

    def _remove(self, subscriber: Subscriber, channel: Channel) -> None:
        self._count_plural(subscriber, channel, -1)
        members = channel.subscribers[subscriber.form]
        members.remove(subscriber)
        channel.rosters.pop(subscriber.form, None)
        if not members:
            del channel.subscribers[subscriber.form]
        channel.count -= 1
        self.subscribed_channels -= not channel.count
        subscriber.channels.remove(channel)
        self.subscriptions -= 1
        if not channel.count:
            if channel.ring is None:
                del self.channels[channel.name]
            else:
                self.history.left(channel.ring)

    def _count_plural(self, subscriber: Subscriber, channel: Channel, change: int) -> None:
        """Keep `Channel.plural` right: `channel` was added to the subscriber's channels, or is about to be removed."""
        if len(subscriber.channels) == 2:
            for each in subscriber.channels:
                each.plural += change
        elif len(subscriber.channels) > 2:
            channel.plural += change

    def _new_epoch(self) -> str:
        """Return an epoch that no channel of this or of another run of the daemon has had."""
        self._epochs += 1
        return f"{self._life}{self._epochs:x}"


class Round:
    """One round of sends.

    Most subscribers listen to one of the round's channels, and for them there are *parts*: the same bytes for everyone
    on a roster. Who listens to several gets a *mix* of their publications in the order published, and so does who has
    been handed some of them already.
    """

    # Invariant: everyone on the rosters before (`_part`, `_at`) has been served, and those in `_early`, wherever they
    # stand; nobody else has. The last roster is that of the mixed; its part has no data of its own.

    def __init__(
        self, hub: Hub, log: Sequence[tuple[Channel, Publication]], start: int, late: Mapping[Subscriber, int]
    ) -> None:
        self._hub = hub
        self._start = start
        self._late = late
        self._entries: dict[Channel, list[tuple[int, Publication]]] = {}
        for number, (channel, publication) in enumerate(log, start):
            if channel in self._entries:
                self._entries[channel].append((number, publication))
            else:
                self._entries[channel] = [(number, publication)]
        mixed = _in_several([channel for channel in self._entries if channel.plural])
        mixed.update(each for each in late if not each.channels.isdisjoint(self._entries))
        self._parts: list[tuple[bytes | None, Sequence[Subscriber]]] = []
        for channel, entries in self._entries.items():
            for form, subscribers in channel.subscribers.items():
                if mixed and not mixed.isdisjoint(subscribers):
                    roster = list(subscribers - mixed)
                else:
                    roster = channel.rosters.get(form) or channel.roster(form)
                if roster:
                    self._parts.append((_joined(entries, form), roster))
        if mixed:
            self._parts.append((None, list(mixed)))
        self._mixes: dict[tuple[WireFormat, int, frozenset[Channel]], bytes] = {}
        self._mixes_size = 0
        self._part = 0
        self._at = 0
        self._early: set[Subscriber] = set()
        self._sends = 0
        self._sent_bytes = 0

    def step(self, budget: int) -> bool:
        """Serve as many subscribers as are worth `budget` small sends; return whether some are left."""
        batch: list[tuple[bytes, Sequence[Subscriber]]] = []
        while budget > 0 and self._part < len(self._parts):
            data, roster = self._parts[self._part]
            size = len(data) if data is not None else 0
            worth = 1 + size // _SMALL_SEND
            if self._at == 0 and len(roster) * worth <= budget:
                served = roster
            else:
                served = roster[self._at : self._at - (-budget // worth)]
            receivers = len(served)
            budget -= receivers * worth
            self._at += receivers
            if self._at >= len(roster):
                self._part += 1
                self._at = 0
            if self._early:
                served = [each for each in served if each not in self._early]
                receivers = len(served)
            if data is not None:
                batch.append((data, served))
                self._sends += receivers
                self._sent_bytes += receivers * size
            else:
                mixes = self._mixes_for(served)
                batch += mixes
                self._sends += sum(len(each) for _, each in mixes)
                self._sent_bytes += sum(len(mix) * len(each) for mix, each in mixes)
        self._hub.deliver(batch)
        if self._part < len(self._parts):
            return True
        self._hub.round_over(self._sends, self._sent_bytes)
        return False

    def serve_early(self, subscriber: Subscriber) -> None:
        """Serve one subscriber out of turn, if its turn is still to come."""
        if subscriber in self._early:
            return
        at = self._at
        for data, roster in self._parts[self._part :]:
            if subscriber in roster[at:]:
                self._early.add(subscriber)
                self._send_to_one(subscriber, self._mix_for(subscriber) if data is None else data)
                return
            at = 0

    def _send_to_one(self, subscriber: Subscriber, data: bytes) -> None:
        if data:  # a mix is empty if all of it has been handed over already
            self._sends += 1
            self._sent_bytes += len(data)
            subscriber.write(data)

    def _mixes_for(self, subscribers: Iterable[Subscriber]) -> Batch:
        """Return the mixes for these subscribers, each with all who get it."""
        receivers: dict[bytes, list[Subscriber]] = {}
        for subscriber in subscribers:
            receivers.setdefault(self._mix_for(subscriber), []).append(subscriber)
        receivers.pop(b"", None)  # who has been handed all of it already
        return list(receivers.items())

    def _mix_for(self, subscriber: Subscriber) -> bytes:
        """Return what the round holds for a subscriber of several channels.

        Its channels are those it had when the round began, or it would have been served early.
        """
        seen = self._late.get(subscriber, self._start)
        key = (subscriber.form, seen, frozenset(subscriber.channels & self._entries.keys()))
        mix = self._mixes.get(key)
        if mix is None:
            # Each publication has a number of its own: sorting puts the channels' entries in the order published.
            merged = sorted(entry for channel in key[2] for entry in self._entries[channel] if entry[0] >= seen)
            mix = _joined(merged, subscriber.form)
            if self._mixes_size + len(mix) > _MIXES_KEPT:
                self._mixes.clear()
                self._mixes_size = 0
            self._mixes[key] = mix
            self._mixes_size += len(mix)
        return mix


def send_each(batch: Batch) -> None:
    """Make one send a subscriber: the loop that everything else is built around."""
    for data, subscribers in batch:
        size = len(data)
        for subscriber in subscribers:
            try:
                sent = subscriber.transmit(data)
            except OSError as error:
                subscriber.transmit_failed(data, error)
            else:
                if sent != size:
                    subscriber.hold(data, sent)


def _publications(channel: Channel, kept: Iterable[Kept]) -> list[Publication]:
    return [Publication(channel.name, each.payload, each.text, each.offset) for each in kept]


def check_channel_name(name: object) -> None:
    """Raise `RefusedError` with the code ``invalid_channel`` if `name` cannot be a channel."""
    if not isinstance(name, str) or _CHANNEL_NAME.fullmatch(name) is None:
        raise RefusedError(
            "invalid_channel",
            f"{quoted(name)} is not a channel name: 1 to 200 characters of A-Z a-z 0-9 _ - = @ , . ; : /",
        )


def _joined(entries: Sequence[tuple[int, Publication]], form: WireFormat) -> bytes:
    if len(entries) == 1:
        return entries[0][1].encoded(form)
    return b"".join([publication.encoded(form) for _, publication in entries])


def _in_several(dirty: Sequence[Channel]) -> set[Subscriber]:
    """Return who is subscribed to more than one of the channels: their frames have to be put in order."""
    if len(dirty) < 2:
        return set()
    seen: set[Subscriber] = set()
    several: set[Subscriber] = set()
    for channel in dirty:
        for subscribers in channel.subscribers.values():
            several |= seen & subscribers
            seen |= subscribers
    return several
