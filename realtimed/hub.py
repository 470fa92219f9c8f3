"""Who listens to what, and what is on its way to them. Pure and synchronous: it knows no socket, clock or task.

A publication goes through two steps.

1. `Hub.publish` appends it to the *log*. That costs the same for one subscriber as for ten thousand, and wakes
   whoever fans out.
2. `Hub.next_round` takes what the log holds by then and turns it into a `Round`: for each group of subscribers that
   get the same publications, their frames joined once, and the group's roster as it is at that moment. The caller
   runs `Round.step` until it is through, letting other tasks run in between. Each subscriber gets one send a round,
   however many publications came together in it: the busier the daemon, the fewer sends a message.

Between two steps of a round the world may change. What keeps the order: before a subscriber's channels change, and
before it is told goodbye, `Hub.catch_up` hands it at once all that was published for it so far, and marks it so that
neither the round at hand nor the log's publications reach it again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from realtimed.errors import RefusedError, quoted
from realtimed.frames import Publication, WireFormat

__all__ = ["Channel", "Hub", "Receipt", "Round", "Subscriber", "check_channel_name", "encode_message"]

_ROUND_PUBLICATIONS: Final = 512
"""How many publications one round takes: so many channels are sorted out before other tasks get their turn."""

_ROUND_BYTES: Final = 256 * 1024
"""How many bytes of messages one round takes, so that clients may read one before the next fills their backlog."""

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
    def transmit(self) -> Callable[[bytes], int]:
        """Takes as many of the bytes as it can at once and returns how many; raises OSError if it can take none."""

    def hold(self, data: bytes, sent: int) -> None:
        """Keep `data`, of which `transmit` took the first `sent` bytes, until it can be sent."""

    def transmit_failed(self, data: bytes, error: OSError) -> None:
        """Deal with an error of `transmit`, which has taken nothing of `data`."""

    def write(self, data: bytes) -> None:
        """Send or keep `data`: `transmit` and what may have to follow it, in one."""


class Receipt(NamedTuple):
    """What a publisher learns: how many clients the message was queued for, and its place in the channel."""

    recipients: int
    epoch: str
    offset: int


class Channel:
    """A channel that somebody is subscribed to.

    `offset` is that of the newest publication, 0 before the first; `epoch` is different for every time that offsets
    began at 1.
    """

    __slots__ = ("count", "epoch", "name", "offset", "subscribers")

    # Invariant: `count` is the number of members of all sets in `subscribers`; none of these sets is empty. The
    # channel is in a subscriber's `channels` exactly if the subscriber is in the set of its form.

    def __init__(self, name: str, epoch: str) -> None:
        self.name = name
        self.epoch = epoch
        self.offset = 0
        self.count = 0
        self.subscribers: dict[WireFormat, set[Subscriber]] = {}


def encode_message(message: object, limit: int) -> bytes:
    """Return a message's bytes. Raises `RefusedError` for anything but valid text or bytes of at most `limit` bytes."""
    if isinstance(message, str):
        try:
            payload = message.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                "invalid_utf8",
                f"the message is not valid UTF-8 at character {error.start}: send text as UTF-8, or bytes as bin",
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
    """All channels, their subscribers, and the publications on their way to them."""

    # Invariants:
    # - `channels` holds exactly the channels that have a subscriber.
    # - `_log` is what has been published and is in no round yet, each with the channel it went to. The first entry is
    #   publication number `_log_start` of this hub; `log_bytes` is the sum of the payloads.
    # - `_caught_up[s] = n` says that `s` has everything below number n already. Entries that no longer matter to
    #   the log are gone when the next round is taken.
    # - `_round`, while set, is the one round that is under way.

    def __init__(self, *, max_message: int, max_channels: int) -> None:
        self.max_message = max_message
        self.max_channels = max_channels
        self.channels: dict[str, Channel] = {}
        self.wake: Callable[[], None] = lambda: None
        self.log_bytes = 0
        self.publications = 0
        self.deliveries = 0
        self.sends = 0
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
            return Receipt(0, self._new_epoch(), 1)
        channel.offset += 1
        publication = Publication(channel.name, payload, isinstance(message, str), channel.offset)
        self._log.append((channel, publication))
        self.log_bytes += len(payload)
        self.deliveries += channel.count
        if len(self._log) == 1:
            self.wake()
        return Receipt(channel.count, channel.epoch, channel.offset)

    def subscribe(self, subscriber: Subscriber, name: object) -> Channel:
        """Let `subscriber` have all that is published on `name` from now on; a second time changes nothing.

        Raises `RefusedError`, with the code ``invalid_channel`` or ``too_many_channels``.
        """
        channel = self._find(name)
        if channel is not None and channel in subscriber.channels:
            self.catch_up(subscriber)
            return channel
        if len(subscriber.channels) >= self.max_channels:
            raise RefusedError(
                "too_many_channels", f"the limit, max-channels, is {self.max_channels} channels a client"
            )
        self.catch_up(subscriber)
        if channel is None:
            channel = Channel(str(name), self._new_epoch())
            self.channels[channel.name] = channel
        channel.subscribers.setdefault(subscriber.form, set()).add(subscriber)
        channel.count += 1
        subscriber.channels.add(channel)
        self.subscriptions += 1
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
        data = _joined(
            (publication for channel, publication in self._log[seen:] if channel in subscriber.channels),
            subscriber.form,
        )
        if data:
            self.sends += 1
            subscriber.write(data)

    def next_round(self) -> Round | None:
        """Take what has been published and return the round that delivers it, or None if there is nothing.

        The round before has to be through.
        """
        log = self._take()
        if not log:
            return None
        start, end = self._log_start - len(log), self._log_start
        dirty: dict[Channel, list[tuple[int, Publication]]] = {}
        for number, (channel, publication) in enumerate(log, start):
            dirty.setdefault(channel, []).append((number, publication))
        late = {each: seen for each, seen in self._caught_up.items() if seen > start}
        self._caught_up = {each: seen for each, seen in late.items() if seen > end}
        special = _in_several(dirty) if len(dirty) > 1 else set()
        special.update(each for each in late if not each.channels.isdisjoint(dirty))
        parts: list[tuple[bytes, Sequence[Subscriber]]] = []
        for channel, entries in dirty.items():
            for form, subscribers in channel.subscribers.items():
                roster = list(subscribers - special) if special else list(subscribers)
                if roster:
                    parts.append((_joined((publication for _, publication in entries), form), roster))
        groups: dict[tuple[WireFormat, int, frozenset[Channel]], list[Subscriber]] = {}
        for each in special:
            key = (each.form, late.get(each, start), frozenset(each.channels & dirty.keys()))
            groups.setdefault(key, []).append(each)
        for (form, seen, channels), members in groups.items():
            # Each publication has a number of its own: sorting puts the channels' entries in the order published.
            merged = sorted(entry for channel in channels for entry in dirty[channel] if entry[0] >= seen)
            if merged:
                parts.append((_joined((publication for _, publication in merged), form), members))
        self.rounds += 1
        self._round = Round(self, parts)
        return self._round

    def describe_channels(self, prefix: str = "") -> dict[str, dict[str, object]]:
        """Return what the ``channels`` command shows of the channels whose names begin with `prefix`."""
        return {
            channel.name: {"subscribers": channel.count, "epoch": channel.epoch, "offset": channel.offset}
            for channel in self.channels.values()
            if channel.name.startswith(prefix)
        }

    def round_over(self, sends: int) -> None:
        """Take note that the round at hand is through."""
        self.sends += sends
        self._round = None

    def _find(self, name: object) -> Channel | None:
        """Return the channel if somebody is subscribed to it. Raises `RefusedError` if `name` cannot be one."""
        channel = self.channels.get(name) if isinstance(name, str) else None
        if channel is None:
            check_channel_name(name)
        return channel

    def _take(self) -> list[tuple[Channel, Publication]]:
        """Cut from the log what one round may hold: at least one publication, if there is one."""
        count = size = 0
        for _, publication in self._log[:_ROUND_PUBLICATIONS]:
            size += len(publication.payload)
            if count and size > _ROUND_BYTES:
                size -= len(publication.payload)
                break
            count += 1
        taken = self._log[:count]
        del self._log[:count]
        self._log_start += count
        self.log_bytes -= size
        return taken

    def _remove(self, subscriber: Subscriber, channel: Channel) -> None:
        members = channel.subscribers[subscriber.form]
        members.remove(subscriber)
        if not members:
            del channel.subscribers[subscriber.form]
        channel.count -= 1
        subscriber.channels.remove(channel)
        self.subscriptions -= 1
        if not channel.count:
            del self.channels[channel.name]

    def _new_epoch(self) -> str:
        """Return an epoch that no channel of this or of another run of the daemon has had."""
        self._epochs += 1
        return f"{self._life}{self._epochs:x}"


class Round:
    """One round of sends: for each part, the same bytes to every subscriber on its roster."""

    # Invariant: everyone on the rosters before (`_part`, `_at`) has been served, and those in `_early`, wherever they
    # stand; nobody else has.

    def __init__(self, hub: Hub, parts: Sequence[tuple[bytes, Sequence[Subscriber]]]) -> None:
        self._hub = hub
        self._parts = parts
        self._part = 0
        self._at = 0
        self._early: set[Subscriber] = set()
        self._sends = 0

    def step(self, budget: int) -> bool:
        """Serve up to `budget` subscribers; return whether some are left."""
        while budget > 0 and self._part < len(self._parts):
            data, roster = self._parts[self._part]
            served = roster[self._at : self._at + budget]
            budget -= len(served)
            self._at += len(served)
            if self._at >= len(roster):
                self._part += 1
                self._at = 0
            if self._early:
                served = [each for each in served if each not in self._early]
            self._sends += len(served)
            size = len(data)
            for subscriber in served:
                try:
                    sent = subscriber.transmit(data)
                except OSError as error:
                    subscriber.transmit_failed(data, error)
                else:
                    if sent != size:
                        subscriber.hold(data, sent)
        if self._part < len(self._parts):
            return True
        self._hub.round_over(self._sends)
        return False

    def serve_early(self, subscriber: Subscriber) -> None:
        """Serve one subscriber out of turn, if its turn is still to come."""
        if subscriber in self._early:
            return
        at = self._at
        for data, roster in self._parts[self._part :]:
            if subscriber in roster[at:]:
                self._early.add(subscriber)
                self._sends += 1
                subscriber.write(data)
                return
            at = 0


def check_channel_name(name: object) -> None:
    """Raise `RefusedError` with the code ``invalid_channel`` if `name` cannot be a channel."""
    if not isinstance(name, str) or _CHANNEL_NAME.fullmatch(name) is None:
        raise RefusedError(
            "invalid_channel",
            f"{quoted(name)} is not a channel name: 1 to 200 characters of A-Z a-z 0-9 _ - = @ , . ; : /",
        )


def _joined(publications: Iterable[Publication], form: WireFormat) -> bytes:
    return b"".join([publication.encoded(form) for publication in publications])


def _in_several(dirty: Iterable[Channel]) -> set[Subscriber]:
    """Return who is subscribed to more than one of the channels: their frames have to be put in order."""
    seen: set[Subscriber] = set()
    several: set[Subscriber] = set()
    for channel in dirty:
        for subscribers in channel.subscribers.values():
            several |= seen & subscribers
            seen |= subscribers
    return several
