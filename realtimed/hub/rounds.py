"""One round of sends: a plan of who gets which bytes, and a walk over it. Pure and synchronous."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from realtimed.hub.channel import Channel, Roster, Subscriber
from realtimed.hub.log import Entry
from realtimed.hub.mixes import Mixes, subscribers_of_several
from realtimed.hub.publication import Publication, WireFormat, join_frames

__all__ = ["Batch", "Round", "send_each"]

_SMALL_SEND: Final = 4096
"""Bytes up to which the length of a send hardly matters; a larger one counts as several, so that no step is long."""

Part: TypeAlias = tuple[bytes, Roster, int, int]
"""Bytes, and the subscribers that get them: the members of a roster from one place up to another."""

Batch: TypeAlias = Sequence[Part]
"""The sends of one step. No subscriber is in it twice."""

_Group: TypeAlias = tuple[bytes | None, Roster, tuple[Channel, WireFormat] | None]
"""Bytes, the subscribers that get them, and the channel and format that they have in common.

The group of those who get mixes has neither bytes nor channel.
"""


class Round:
    """One round of sends.

    Most subscribers are on one of the round's channels. They form *groups*, and a group's members get the same bytes.
    A subscriber of several of the channels gets a *mix*: their publications in the order published. So does a
    subscriber that has some of them already, because it has been caught up.

    `entries` are the publications, each with its channel; the first has the number `first`. A subscriber in `caught_up`
    has every publication below the number given there. `deliver` makes the sends of one step. At the end `finished`
    gets the numbers of sends and of bytes sent.
    """

    # Invariants:
    # - No subscriber is in two groups. The last group is that of the mixed, if there are any; `_mixes` has their bytes.
    # - The subscribers before place `_at` of group `_group` have been served, and those in `_served_early`, wherever
    #   they are; no others have.
    # - `_group_of` finds the group of a channel and a format, and `_places` the place of a group's member. Both are
    #   filled when a subscriber is served early.

    def __init__(
        self,
        entries: Sequence[Entry],
        first: int,
        caught_up: Mapping[Subscriber, int],
        deliver: Callable[[Batch], None],
        finished: Callable[[int, int], None],
    ) -> None:
        self._deliver = deliver
        self._finished = finished
        self._groups, mixed = _plan(entries, caught_up)
        self._mixes = Mixes(entries, first, caught_up) if mixed else None
        self._group = 0
        self._at = 0
        self._served_early: set[Subscriber] = set()
        self._group_of: dict[tuple[Channel, WireFormat] | None, int] = {}
        self._places: dict[int, dict[Subscriber, int]] = {}
        self._sends = 0
        self._sent_bytes = 0

    def step(self, budget: int) -> bool:
        """Serve as many subscribers as `budget` small sends are worth; return whether there are more to serve.

        The last step may be worth twice as much: coming back for a small rest would cost more.
        """
        batch: list[Part] = []
        groups, count = self._groups, len(self._groups)
        while budget > 0 and self._group < count:
            data, roster, _ = groups[self._group]
            if data is None:
                self._add_mixes(batch, roster, budget)
                break
            size = len(data)
            start, stop = self._at, len(roster)
            worth = 1 + size // _SMALL_SEND
            share = -(-budget // worth)
            if stop - start <= share or (stop - start <= 2 * share and self._group + 1 == count):
                self._group += 1
                self._at = 0
            else:
                stop = self._at = start + share
            budget -= (stop - start) * worth
            if self._served_early:
                roster = Roster(each for each in roster[start:stop] if each not in self._served_early)
                start, stop = 0, len(roster)
            batch.append((data, roster, start, stop))
            self._sends += stop - start
            self._sent_bytes += (stop - start) * size
        self._deliver(batch)
        if self._group < count:
            return True
        self._finished(self._sends, self._sent_bytes)
        return False

    def _add_mixes(self, batch: list[Part], roster: Roster, budget: int) -> None:
        """Add to `batch` the mixes of the next subscribers of the last group, each with all that get it.

        The worth of a mix is known when it has been made. So mixes are made one by one, and no more than are sent.
        """
        assert self._mixes is not None, "only these give a group without bytes"
        receivers: dict[bytes, list[Subscriber]] = {}
        while budget > 0 and self._at < len(roster):
            subscriber = roster[self._at]
            self._at += 1
            mix = self._mixes.mix(subscriber) if subscriber not in self._served_early else b""
            if mix:
                receivers.setdefault(mix, []).append(subscriber)
            budget -= 1 + len(mix) // _SMALL_SEND
        if self._at == len(roster):
            self._group += 1
            self._at = 0
        for mix, subscribers in receivers.items():
            batch.append((mix, Roster(subscribers), 0, len(subscribers)))
            self._sends += len(subscribers)
            self._sent_bytes += len(subscribers) * len(mix)

    def serve_early(self, subscriber: Subscriber) -> None:
        """Serve one subscriber now, unless it has been served."""
        if subscriber in self._served_early:
            return
        for group in self._groups_of(subscriber):
            place = self._place(group, subscriber)
            if place is not None:
                if group > self._group or place >= self._at:
                    self._served_early.add(subscriber)
                    self._send_to_one(subscriber, group)
                return

    def _groups_of(self, subscriber: Subscriber) -> list[int]:
        """Return the groups that a subscriber may be in and that are not through yet: it is in one of them at most."""
        if not self._group_of:
            self._group_of = {key: group for group, (_, _, key) in enumerate(self._groups)}
        form = subscriber.form
        keys = [None, *((channel, form) for channel in subscriber.channels)]
        found = [self._group_of.get(key, -1) for key in keys]
        return [group for group in found if group >= self._group]

    def _place(self, group: int, subscriber: Subscriber) -> int | None:
        """Return a subscriber's place in a group, if it is a member. The first call for a group walks over all."""
        places = self._places.get(group)
        if places is None:
            places = self._places[group] = {each: place for place, each in enumerate(self._groups[group][1])}
        return places.get(subscriber)

    def _send_to_one(self, subscriber: Subscriber, group: int) -> None:
        data = self._groups[group][0]
        if data is None:
            assert self._mixes is not None, "only these give a group without bytes"
            data = self._mixes.mix(subscriber)
        if data:  # a mix is empty if the subscriber has had all of it
            self._sends += 1
            self._sent_bytes += len(data)
            subscriber.write(data)


def send_each(batch: Batch) -> None:
    """Make one send a subscriber: the loop that everything else is built around."""
    for data, roster, start, stop in batch:
        for subscriber in roster if stop - start == len(roster) else roster[start:stop]:
            subscriber.write(data)


def _plan(entries: Sequence[Entry], caught_up: Mapping[Subscriber, int]) -> tuple[list[_Group], set[Subscriber]]:
    """Divide the subscribers of the entries' channels into groups; return these, and the members of the mixed one."""
    by_channel: dict[Channel, list[Publication]] = {}
    for channel, publication in entries:
        if channel in by_channel:
            by_channel[channel].append(publication)
        else:
            by_channel[channel] = [publication]
    mixed = _mixed(by_channel, caught_up)
    groups: list[_Group] = []
    for channel, publications in by_channel.items():
        for form, everyone in channel.audience():
            roster = everyone
            if mixed and not mixed.isdisjoint(channel.subscribers[form]):
                roster = Roster(channel.subscribers[form] - mixed)
            if roster:
                groups.append((join_frames(publications, form), roster, (channel, form)))
    if mixed:
        groups.append((None, Roster(mixed), None))
    return groups, mixed


def _mixed(channels: Iterable[Channel], caught_up: Mapping[Subscriber, int]) -> set[Subscriber]:
    """Return the subscribers of a round's channels that need mixes."""
    mixed = subscribers_of_several([channel for channel in channels if channel.plural])
    if caught_up:
        of_round = frozenset(channels)  # with two sets, `isdisjoint` walks over the smaller one
        mixed.update(each for each in caught_up if not each.channels.isdisjoint(of_round))
    return mixed
