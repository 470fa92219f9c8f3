"""The hub: channels, their subscribers, and the way of a publication to them. Pure: no I/O, no clock, no task.

A publication takes two steps.

1. `Hub.publish` appends it to the *log* and wakes the fan-out. This costs the same for one subscriber as for ten
   thousand. `Hub.apply` does so with a publication that another daemon has numbered.
2. `Hub.next_round` takes what is in the log and makes a `Round` of it: groups of subscribers that get the same
   publications, the frames of each group joined once. The caller repeats `Round.step` until the round has ended, and
   other tasks run in between. A subscriber gets one send a round, however many publications came together: the busier
   the daemon, the fewer sends a message.

Subscriptions may change between two steps of a round. The order holds because of `Hub.catch_up`: before a subscriber's
channels change, and before its goodbye, it delivers at once what was published for the subscriber so far, and records
this, so that neither the round under way nor the next ones deliver it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Final

from realtimed.errors import RefusedError
from realtimed.hub.channel import Channel, Subscriber
from realtimed.hub.epochs import Epochs
from realtimed.hub.history import History, Retention
from realtimed.hub.log import PUBLICATION_BYTES, Entry, Log
from realtimed.hub.names import check_channel_name
from realtimed.hub.position import Position, Receipt
from realtimed.hub.publication import Publication, WireFormat, encode_message
from realtimed.hub.replays import Excerpt, Replays, count_latest, count_since, tail
from realtimed.hub.results import Counts, Joined
from realtimed.hub.rounds import Batch, Round, send_each
from realtimed.hub.watch import Watchers

__all__ = ["Hub"]

_receipt: Final[Callable[[tuple[int, str, int, bool]], Receipt]] = partial(tuple.__new__, Receipt)
"""Makes a receipt. Each publication needs one, and this takes half the time of a named tuple's constructor."""


class Hub:
    """All channels, their subscribers, and the publications on their way to them. Without `history` nothing is kept.

    `time_ns` is the wall clock, in nanoseconds since 1970, as `time.time_ns`. It dates publications and decides
    nothing.
    """

    # Invariants:
    # - `channels` holds exactly the channels that have a subscriber or publications in the history, or had a subscriber
    #   so recently that `history` keeps them. They are in the order of their numbers. `subscribed_channels` is how many
    #   of them have a subscriber now, and `subscriptions` how many subscriptions these have together.
    # - `_taken` is what is in the round that is being made or under way, which is `_round` once it is made.

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
        self.publications = 0
        self.skipped = 0
        """Publications that `apply` never got, though it got later ones of the same epoch."""
        self.deliveries = 0
        self.sends = 0
        self.sent_bytes = 0
        self.rounds = 0
        self.subscriptions = 0
        self._time_ns = time_ns
        self._numbers = itertools.count(1)
        self.epochs = Epochs()
        self._log = Log()
        self._taken: list[Entry] = []
        self._round: Round | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way: no round is under way, and neither the log nor watchers' queue has more."""
        return not self._log.entries and self._round is None and self.watchers.idle

    @property
    def log_bytes(self) -> int:
        """The memory of the publications that are in no round yet."""
        return self._log.bytes

    @property
    def unsent_bytes(self) -> int:
        """The memory of the publications that are in no round yet, or are queued for watchers."""
        return self._log.bytes + self.watchers.queued_bytes

    def publish(self, name: object, message: object, payload: bytes | None = None) -> Receipt:
        """Give a message the next number of the channel `name`, and put it on its way to all subscribers.

        `payload` is the result of `encode_message` for this message, if several channels share it.

        Raises `RefusedError` for a bad channel name or message; see `encode_message`.
        """
        if payload is None:
            payload = encode_message(message, self.max_message)
        channel = self.channels.get(name) if isinstance(name, str) else None
        if channel is None:  # `_find` by hand, as every publication passes here
            check_channel_name(name)
            channel = self.new_channel(str(name))
        offset = channel.offset + 1
        time = self._time_ns() // 1_000_000
        recipients = self._enqueue(channel, offset, payload, isinstance(message, str), time)
        return _receipt((recipients, channel.epoch, offset, False))

    def apply(self, name: str, epoch: str, offset: int, payload: bytes, text: bool, time: int) -> int | None:
        """Put a publication on its way that was numbered elsewhere; see `Publication` for the parameters.

        Returns the number of its recipients here, or None if it was dropped because it has been here before: its offset
        is not above the channel's. If offsets are left out in between, these publications count as `skipped`, and the
        channel's history begins with this one: clients that come back from before it do not recover. In another
        epoch the channel begins at this publication.

        Raises `RefusedError` for a bad channel name.
        """
        channel = self._find(name)
        if channel is None:
            channel = self.new_channel(name, epoch, offset - 1)
        elif channel.epoch != epoch:
            channel.epoch = epoch
            self.drop_history(channel)
        elif offset <= channel.offset:
            return None
        elif offset > channel.offset + 1:
            self.skipped += offset - channel.offset - 1
            self.drop_history(channel)
        return self._enqueue(channel, offset, payload, text, time)

    def _enqueue(self, channel: Channel, offset: int, payload: bytes, text: bool, time: int) -> int:
        """Keep a publication, and put it on its way to subscribers and watchers; return the number of recipients."""
        self.publications += 1
        channel.offset = offset
        if channel.ring is not None:
            self.history.keep(channel.ring, offset, payload if text else bytearray(payload), time)
        recipients = channel.count
        if not recipients and not self.watchers.members:
            return 0
        self.deliveries += recipients
        self._log.bytes += len(payload) + PUBLICATION_BYTES
        entries = self._log.entries
        entries.append((channel, Publication(channel.name, payload, text, offset, time)))
        if len(entries) == 1:
            self.wake()
        return recipients

    def new_channel(self, name: str, epoch: str = "", offset: int = 0) -> Channel:
        """Return a new channel at a position, by default at the beginning of a new epoch.

        It is among `channels` only if a history is kept of it. Otherwise it is forgotten with its first publication,
        unless somebody subscribes, and a new epoch is one that no other publication has.
        """
        ring = self.history.ring(name)
        if not epoch:
            epoch = self.epochs.of(name) if ring is not None else self.epochs.unique()
        channel = Channel(name, epoch, ring, next(self._numbers))
        channel.offset = offset
        if ring is not None:
            self.channels[name] = channel
        return channel

    def drop_history(self, channel: Channel) -> None:
        """Drop a channel's history: what comes now does not follow it."""
        if channel.ring is not None:
            self.history.discard(channel.ring)
            channel.ring = self.history.ring(channel.name)

    def subscribe(
        self, subscriber: Subscriber, name: object, since: Position | None = None, *, last: int | None = None
    ) -> Joined:
        """Deliver what is published on `name` from now on to `subscriber`, too; a second time changes nothing.

        With `since`, the result has what was published between then and now, or says that not all of it is known. With
        `last`, it has so many of the last publications, or as many as are kept. Write the result to the subscriber
        before anything else happens: then nothing is lost between it and what follows.

        Raises `RefusedError`, with the code ``invalid_channel``, ``too_many_channels`` or ``too_many_subscriptions``.
        """
        channel = self._find(name)
        if channel is None or channel not in subscriber.channels:
            channel = self._join(subscriber, channel, str(name))
        else:
            self.catch_up(subscriber)
        if since is None:
            kept = count_latest(self.history, channel, last or 0)
            return Joined(channel.epoch, channel.offset, None, tail(channel, kept), kept if last is not None else None)
        missed = count_since(self.history, channel, since)
        return Joined(channel.epoch, channel.offset, missed is not None, tail(channel, missed or 0))

    def _join(self, subscriber: Subscriber, channel: Channel | None, name: str) -> Channel:
        """Subscribe to a channel, or a new one; return it. Raises `RefusedError` beyond the limits."""
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
        if len(subscriber.channels) < before:  # that was more than may wait for it, and it has left
            return channel or self._channel_for_subscribers(name)
        return self._enter(subscriber, channel, name)

    def rejoin(self, subscriber: Subscriber, name: str) -> None:
        """Go on with a subscription that another process had: whatever the limits are, and without catching up."""
        channel = self.channels.get(name)
        if channel is None or channel not in subscriber.channels:
            self._enter(subscriber, channel, name)

    def _enter(self, subscriber: Subscriber, channel: Channel | None, name: str) -> Channel:
        """Make a subscription to a channel, or to a new one; return the channel."""
        if channel is None:
            channel = self.channels[name] = self._channel_for_subscribers(name)
        if channel.ring is not None:
            self.history.occupied(channel.ring)
        channel.subscribers.setdefault(subscriber.form, set()).add(subscriber)
        channel.members_changed(subscriber.form)
        self.subscribed_channels += not channel.count
        channel.count += 1
        subscriber.channels.add(channel)
        self.subscriptions += 1
        self._count_plural(subscriber, channel, 1)
        return channel

    def unsubscribe(self, subscriber: Subscriber, name: object) -> bool:
        """Deliver what was published before and end a subscription. Returns whether there was one.

        Raises `RefusedError` if `name` cannot be a channel.
        """
        channel = self._find(name)
        if channel is None or channel not in subscriber.channels:
            return False
        self.catch_up(subscriber)
        if channel in subscriber.channels:  # otherwise that was more than may wait for it, and it has left
            self._remove(subscriber, channel)
        return True

    def change_form(self, subscriber: Subscriber, form: WireFormat) -> None:
        """Deliver what was published before, and encode publications for `subscriber` in `form` from now on."""
        if subscriber.form is form:
            return
        self.catch_up(subscriber)
        for channel in subscriber.channels:
            channel.change_form(subscriber, form)
        subscriber.form = form

    def leave(self, subscriber: Subscriber) -> None:
        """End all subscriptions of a subscriber. Call `catch_up` first to deliver what is pending."""
        for channel in list(subscriber.channels):
            self._remove(subscriber, channel)
        self._log.caught_up.pop(subscriber, None)

    def catch_up(self, subscriber: Subscriber) -> None:
        """Deliver, now, all that was published so far on the subscriber's channels, and see that it comes once.

        The subscriber may leave during this call, because more waits for it than may; see `leave`.
        """
        if self._round is not None and subscriber.channels:
            self._round.serve_early(subscriber)
        if not self._log.entries:
            return
        data = self._log.catch_up(subscriber)
        if data:
            self.sends += 1
            self.sent_bytes += len(data)
            subscriber.write(data)

    def next_round(self) -> Round | None:
        """Take what has been published and return the round that delivers it, or None if there is nothing.

        The round before has to have ended.
        """
        entries, first, caught_up = self._log.take(self.subscriptions)
        self._taken = entries
        if not entries:
            return None
        if self.watchers.members:
            self.watchers.show(publication for _, publication in entries)
        self.rounds += 1
        self._round = Round(entries, first, caught_up, self.deliver, self._round_ended)
        return self._round

    def abandon_round(self) -> list[Subscriber]:
        """Give up the round that is under way or could not be made; return all that may have missed some of it."""
        channels = {channel for channel, _ in self._taken}
        self._taken = []
        self._round = None
        return list({each for channel in channels for members in channel.subscribers.values() for each in members})

    def _round_ended(self, sends: int, sent_bytes: int) -> None:
        self.sends += sends
        self.sent_bytes += sent_bytes
        self._taken = []
        self._round = None

    # For another process, which goes on with all of this: see `realtimed.hub.transfer`.

    def counts(self) -> Counts:
        """Return what was counted."""
        return Counts(self.publications, self.skipped, self.deliveries, self.sends, self.sent_bytes, self.rounds)

    def go_on_from(self, counts: Counts) -> None:
        """Go on counting."""
        self.publications, self.skipped, self.deliveries, self.sends, self.sent_bytes, self.rounds = counts

    def adopt(self, name: str, epoch: str, offset: int) -> Channel:
        """Return a new channel at a position, which is among `channels` at least until `keep_what_is_used`."""
        channel = self.channels[name] = Channel(name, epoch, self.history.ring(name), next(self._numbers))
        channel.offset = offset
        return channel

    def keep_what_is_used(self) -> None:
        """Forget the channels that nothing needs, now and from now on: see the invariants."""
        self.history.emptied = self._forget_if_unused
        for channel in list(self.channels.values()):
            ring = channel.ring
            if not channel.count and (ring is None or not (ring.count or self.history.is_vacant(ring))):
                self._forget(channel)

    def recent(self, name: object, count: int) -> tuple[Position, Excerpt]:
        """Return where a channel is, and its last `count` publications that are kept, oldest first.

        Raises `RefusedError` if `name` cannot be a channel.
        """
        channel = self._find(name)
        if channel is None:
            return Position("", 0), Excerpt("", "", None, 0, 0)
        return Position(channel.epoch, channel.offset), tail(channel, count_latest(self.history, channel, count))

    def _find(self, name: object) -> Channel | None:
        """Return the channel if there is one. Raises `RefusedError` if `name` cannot be one."""
        channel = self.channels.get(name) if isinstance(name, str) else None
        if channel is None:
            check_channel_name(name)
        return channel

    def _channel_for_subscribers(self, name: str) -> Channel:
        """Return a new channel for subscribers."""
        return Channel(name, self.epochs.of(name), self.history.ring(name), next(self._numbers))

    def _forget(self, channel: Channel) -> None:
        del self.channels[channel.name]
        if channel.offset:
            self.epochs.end(channel.name)

    def _forget_if_unused(self, name: str) -> None:
        """Forget a channel of which the history keeps nothing any more, unless it has subscribers."""
        channel = self.channels[name]
        if not channel.count and (channel.ring is None or not channel.ring.count):
            self._forget(channel)

    def _remove(self, subscriber: Subscriber, channel: Channel) -> None:
        """End a subscription; forget the channel if nothing needs it any more."""
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
                self.history.vacated(channel.ring)

    def _count_plural(self, subscriber: Subscriber, channel: Channel, change: int) -> None:
        """Keep `Channel.plural` right: `channel` was added to the subscriber's channels, or is about to be removed."""
        if len(subscriber.channels) == 2:
            for each in subscriber.channels:
                each.plural += change
        elif len(subscriber.channels) > 2:
            channel.plural += change
