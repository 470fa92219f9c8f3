"""What a round sends to subscribers of several of its channels. Pure and synchronous."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from realtimed.hub.channel import Channel, Subscriber
from realtimed.hub.log import Entry
from realtimed.hub.publication import Publication, WireFormat, join_frames

__all__ = ["Mixes", "subscribers_of_several"]

_KEPT_BYTES: Final = 2**20
"""Bytes of mixes that a round keeps for other subscribers of the same channels."""


class Mixes:
    """Publications of several channels in the order published, for each subscriber those it has not had.

    Subscribers that get the same share the bytes. For the parameters see `Round`.
    """

    # Invariants: `_numbered` has the round's publications by channel, each with its number. `_kept` has `_size` bytes,
    # keyed by format, number of the first publication, and channels.

    def __init__(self, entries: Iterable[Entry], first: int, caught_up: Mapping[Subscriber, int]) -> None:
        self._first = first
        self._caught_up = caught_up
        self._numbered: dict[Channel, list[tuple[int, Publication]]] = {}
        for number, (channel, publication) in enumerate(entries, first):
            self._numbered.setdefault(channel, []).append((number, publication))
        self._channels = frozenset(self._numbered)
        self._kept: dict[tuple[WireFormat, int, frozenset[Channel]], bytes] = {}
        self._size = 0

    def mix(self, subscriber: Subscriber) -> bytes:
        """Return what the round has for a subscriber; nothing if the subscriber has had all of it.

        The subscriber has the channels that it had when the round began: before they change, it is served early.
        """
        seen = self._caught_up.get(subscriber, self._first)
        key = (subscriber.form, seen, self._channels & subscriber.channels)
        mix = self._kept.get(key)
        if mix is None:
            # Numbers are unique: sorting by them puts the publications of all channels in the order published.
            merged = sorted(entry for channel in key[2] for entry in self._numbered[channel] if entry[0] >= seen)
            mix = join_frames([publication for _, publication in merged], subscriber.form)
            if self._size + len(mix) > _KEPT_BYTES:
                self._kept.clear()
                self._size = 0
            self._kept[key] = mix
            self._size += len(mix)
        return mix


def subscribers_of_several(channels: Sequence[Channel]) -> set[Subscriber]:
    """Return the subscribers of more than one of the channels."""
    if len(channels) < 2:
        return set()
    seen: set[Subscriber] = set()
    several: set[Subscriber] = set()
    for channel in channels:
        for subscribers in channel.subscribers.values():
            several |= seen & subscribers
            seen |= subscribers
    return several
