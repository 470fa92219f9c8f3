"""One round of sends: publications, joined for those who get the same, and who gets them. Pure and synchronous."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from realtimed.hub.channel import Channel, Roster, Subscriber
from realtimed.hub.publication import Publication, WireFormat

__all__ = ["Batch", "Entry", "Round", "send_each"]

_SMALL_SEND: Final = 4096
"""Bytes up to which the length of a send hardly matters; a larger one counts as several, so that no step is long."""

_MIXES_KEPT: Final = 2**20
"""Bytes of mixes that a round keeps for other subscribers of the same channels."""

Entry: TypeAlias = tuple[Channel, Publication]
"""A publication, and the channel it went to."""

Part: TypeAlias = tuple[bytes, Roster, int, int]
"""Bytes, and who gets them: the members of a roster from one place up to another."""

Batch: TypeAlias = Sequence[Part]
"""Nobody is in it twice."""


class Round:
    """One round of sends.

    Most subscribers listen to one of the round's channels, and for them there are *parts*: the same bytes for everyone
    on a roster. Who listens to several gets a *mix* of their publications in the order published, and so does who has
    been handed some of them already.

    `log` has the publications, the first of which is number `start`, each with its channel. Who is in `late` has
    everything below the number that stands there. `deliver` makes the sends of a step; `over` is told how many sends
    and bytes there were when all is through.
    """

    # Invariants: everyone on the rosters before (`_part`, `_at`) has been served, and those in `_early`, wherever they
    # stand; nobody else has. The last roster is that of the mixed; its part has no data of its own. If there is one,
    # `_dirty` is the channels with publications, and `_numbered` has these by channel, with their numbers.
    # Both of these are made when somebody is served early: `_part_of` finds the part of a channel and a form, and
    # `_places` where each member of a part stands.

    def __init__(
        self,
        log: Sequence[Entry],
        start: int,
        late: Mapping[Subscriber, int],
        deliver: Callable[[Batch], None],
        over: Callable[[int, int], None],
    ) -> None:
        self._deliver = deliver
        self._over = over
        self._start = start
        self._late = late
        self._numbered: dict[Channel, list[tuple[int, Publication]]] = {}
        self._dirty: frozenset[Channel] = frozenset()
        dirty: dict[Channel, list[Publication]] = {}
        for channel, publication in log:
            if channel in dirty:
                dirty[channel].append(publication)
            else:
                dirty[channel] = [publication]
        mixed = _in_several([channel for channel in dirty if channel.plural])
        if late:
            of_round = frozenset(dirty)  # of two sets the smaller one is walked over
            mixed.update(each for each in late if not each.channels.isdisjoint(of_round))
        self._parts: list[tuple[bytes | None, Roster, tuple[Channel, WireFormat] | None]] = []
        self._part_of: dict[tuple[Channel, WireFormat] | None, int] = {}
        self._places: dict[int, dict[Subscriber, int]] = {}
        for channel, publications in dirty.items():
            for form, members in channel.audience():
                if mixed and not mixed.isdisjoint(channel.subscribers[form]):
                    roster = Roster(channel.subscribers[form] - mixed)
                else:
                    roster = members
                if roster:
                    self._parts.append((_joined(publications, form), roster, (channel, form)))
        if mixed:
            self._parts.append((None, Roster(mixed), None))
            for number, (channel, publication) in enumerate(log, start):
                self._numbered.setdefault(channel, []).append((number, publication))
            self._dirty = frozenset(dirty)
        self._mixes: dict[tuple[WireFormat, int, frozenset[Channel]], bytes] = {}
        self._mixes_size = 0
        self._part = 0
        self._at = 0
        self._early: set[Subscriber] = set()
        self._sends = 0
        self._sent_bytes = 0

    def step(self, budget: int) -> bool:
        """Serve as many subscribers as are worth `budget` small sends; return whether some are left.

        At the end it may be twice as many: to come back for a small rest would cost more than it is worth.
        """
        batch: list[Part] = []
        parts = self._parts
        while budget > 0 and self._part < len(parts):
            data, roster, _ = parts[self._part]
            if data is None:
                budget = self._add_mixes(batch, roster, budget)
                continue
            size = len(data)
            start, stop = self._at, len(roster)
            worth = 1 + size // _SMALL_SEND
            share = -(-budget // worth)
            if stop - start <= share or (stop - start <= 2 * share and self._part + 1 == len(parts)):
                self._part += 1
                self._at = 0
            else:
                stop = self._at = start + share
            budget -= (stop - start) * worth
            if self._early:
                roster = Roster(each for each in roster[start:stop] if each not in self._early)
                start, stop = 0, len(roster)
            batch.append((data, roster, start, stop))
            self._sends += stop - start
            self._sent_bytes += (stop - start) * size
        self._deliver(batch)
        if self._part < len(parts):
            return True
        self._over(self._sends, self._sent_bytes)
        return False

    def serve_early(self, subscriber: Subscriber) -> None:
        """Serve one subscriber out of turn, if its turn is still to come."""
        if subscriber in self._early:
            return
        for part in self._parts_of(subscriber):
            place = self._place(part, subscriber)
            if place is not None:
                if part > self._part or (part == self._part and place >= self._at):
                    self._early.add(subscriber)
                    data = self._parts[part][0]
                    self._send_to_one(subscriber, self._mix_for(subscriber) if data is None else data)
                return

    def _parts_of(self, subscriber: Subscriber) -> list[int]:
        """Return the parts that a subscriber may be in: it is in one of them at most."""
        if not self._part_of:
            self._part_of = {key: part for part, (_, _, key) in enumerate(self._parts)}
        form = subscriber.form
        keys = [None, *((channel, form) for channel in subscriber.channels)]
        found = [self._part_of.get(key, -1) for key in keys]
        return [part for part in found if part >= self._part]

    def _place(self, part: int, subscriber: Subscriber) -> int | None:
        """Return where in a part's roster a subscriber stands, if it does. Who asks first looks at the whole roster."""
        places = self._places.get(part)
        if places is None:
            places = self._places[part] = {each: place for place, each in enumerate(self._parts[part][1])}
        return places.get(subscriber)

    def _send_to_one(self, subscriber: Subscriber, data: bytes) -> None:
        if data:  # a mix is empty if all of it has been handed over already
            self._sends += 1
            self._sent_bytes += len(data)
            subscriber.write(data)

    def _add_mixes(self, batch: list[Part], roster: Roster, budget: int) -> int:
        """Add to `batch` the mixes of those whose turn it is, each with all who get it; return what is left to spend.

        What a mix is worth shows only when it has been made. So they are made one by one, and no more than are sent.
        """
        receivers: dict[bytes, list[Subscriber]] = {}
        while budget > 0 and self._at < len(roster):
            subscriber = roster[self._at]
            self._at += 1
            mix = self._mix_for(subscriber) if subscriber not in self._early else b""
            if mix:  # it is empty if all of it has been handed over already
                receivers.setdefault(mix, []).append(subscriber)
            budget -= 1 + len(mix) // _SMALL_SEND
        if self._at == len(roster):
            self._part += 1
            self._at = 0
        for mix, each in receivers.items():
            batch.append((mix, Roster(each), 0, len(each)))
            self._sends += len(each)
            self._sent_bytes += len(each) * len(mix)
        return budget

    def _mix_for(self, subscriber: Subscriber) -> bytes:
        """Return what the round holds for a subscriber of several channels.

        Its channels are those it had when the round began, or it would have been served early.
        """
        seen = self._late.get(subscriber, self._start)
        key = (subscriber.form, seen, self._dirty & subscriber.channels)
        mix = self._mixes.get(key)
        if mix is None:
            # Each publication has a number of its own: sorting puts the channels' entries in the order published.
            merged = sorted(entry for channel in key[2] for entry in self._numbered[channel] if entry[0] >= seen)
            mix = _joined([publication for _, publication in merged], subscriber.form)
            if self._mixes_size + len(mix) > _MIXES_KEPT:
                self._mixes.clear()
                self._mixes_size = 0
            self._mixes[key] = mix
            self._mixes_size += len(mix)
        return mix


def send_each(batch: Batch) -> None:
    """Make one send a subscriber: the loop that everything else is built around."""
    for data, roster, start, stop in batch:
        for subscriber in roster if stop - start == len(roster) else roster[start:stop]:
            subscriber.write(data)


def _joined(publications: Sequence[Publication], form: WireFormat) -> bytes:
    if len(publications) == 1:
        return publications[0].encoded(form)
    return b"".join([each.encoded(form) for each in publications])


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
