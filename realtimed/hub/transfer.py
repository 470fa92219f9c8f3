"""What passes from one process's hub to the next one's: all channels with their history, epochs, counts.

At first each channel goes over with the publications up to a moment, which is when the hand-over begins; at the end,
those that came after it. So the order of time in the history, over all channels, is that of arrival.

Ages count from that moment at first, and from the end at the end: they are the same for all channels. Subscriptions are
not in it: connections subscribe again in the next process. What is not kept there, because its configuration is another
one, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Final, NamedTuple

import msgspec

from realtimed.hub.channel import Channel
from realtimed.hub.epochs import EpochState
from realtimed.hub.history import Aged, KeptOne
from realtimed.hub.hub import Hub
from realtimed.hub.results import Counts
from realtimed.hub.ring import Ring
from realtimed.process.portions import HandOverError, Part, Portion, TakenPortion, decoded

__all__ = ["HubPart"]

_PORTION_BYTES: Final = 128 * 2**10
"""About how many bytes of history one portion has: a fraction of a millisecond."""

_ENTRY_BYTES: Final = 32
"""Bytes that an entry or a channel counts for beside its payload or its name."""

_EVERYTHING: Final = 2**63

_Entry = tuple[float, bytes, bool, int]
"""Age in seconds, payload, whether it is text, time of publication in milliseconds since 1970."""


class _Channel(msgspec.Struct, array_like=True):
    """A channel, or more of one. The last of `entries` has `offset`, and they follow what came before of it."""

    name: str
    epoch: str
    offset: int
    entries: list[_Entry] = []
    anew: bool = False
    """Whether this channel has taken the place of another one of this name, or its history begins anew."""


class _First(msgspec.Struct):
    """Some channels; after the last ones, `end` is set."""

    channels: list[_Channel] = []
    end: bool = False


class _Retained(msgspec.Struct, array_like=True):
    """Publications that are in the history no more, and that a replay may still need."""

    name: str
    entries: list[tuple[int, bytes, bool, int]]
    """Offset, payload, whether it is text, time of publication."""


class _Rest(msgspec.Struct):
    """What has changed since the beginning."""

    channels: list[_Channel]
    gone: list[str]
    vacant: list[tuple[str, float]]
    """Channels without subscribers, and for how many seconds; the longest first."""
    retained: list[_Retained]
    epochs: EpochState
    counts: Counts


class _Sent(NamedTuple):
    """A channel as it has been sent: up to an offset, with this ring."""

    channel: Channel
    epoch: str
    ring: Ring | None
    offset: int


class HubPart(Part):
    """Hands over a hub, or takes one over into a hub that is new. See `realtimed.process.portions`."""

    # Invariants: `_sent` has the channels that have been sent. `_arrived` has the channels that have come, until the
    # last of them has; then all are in the hub. `_began` is when the first ones came, by the history's clock.

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._sent: dict[str, _Sent] = {}
        self._arrived: dict[str, _Channel] = {}
        self._began = 0.0
        self._retained: list[Ring] = []

    # In the process that hands over.

    def first(self) -> Iterator[Portion]:
        """See `Part`. Of each channel, what was published before this call goes over."""
        hub = self._hub
        self._sent.clear()
        began = hub.history.now()
        portion, size = _First(), 0
        for name, channel in list(hub.channels.items()):
            if hub.channels.get(name) is not channel:
                continue  # it has gone meanwhile
            for part in self._parts(channel, began):
                portion.channels.append(part)
                size += len(name) + _ENTRY_BYTES + sum(len(each[1]) + _ENTRY_BYTES for each in part.entries)
                if size >= _PORTION_BYTES:
                    yield Portion(_encode(portion))
                    portion, size = _First(), 0
        portion.end = True
        yield Portion(_encode(portion))

    def _parts(self, channel: Channel, began: float) -> Iterator[_Channel]:
        """Yield a channel, in several parts if it has much, and record what has been sent."""
        ring, at, anew = channel.ring, 0, True
        while True:
            last = channel.offset if ring is None or not ring.count else ring.last_before(began)
            kept = self._hub.history.kept(ring, at, last, _PORTION_BYTES) if ring is not None else []
            at = kept[-1].offset if kept else last
            self._sent[channel.name] = _Sent(channel, channel.epoch, ring, at)
            yield _Channel(channel.name, channel.epoch, at, _entries(kept, began), anew)
            anew = False
            if at >= last or ring is not channel.ring or self._hub.channels.get(channel.name) is not channel:
                return

    @property
    def unrest(self) -> str:
        """See `Part`."""
        return "" if self._hub.idle else "publications are on their way"

    def stay(self) -> None:
        """See `Part`."""
        self._sent.clear()

    def gone(self) -> None:
        """See `Part`. What is left of the hub here serves nobody."""

    def rest(self) -> Portion:
        """See `Part`."""
        hub = self._hub
        now = hub.history.now()
        sent, channels = self._sent, []
        for name, channel in hub.channels.items():
            before = sent.pop(name, None)
            if before is not None and before[:3] == (channel, channel.epoch, channel.ring):
                if before.offset == channel.offset:
                    continue
                channels.append(self._later(channel, now, before.offset, anew=False))
            else:
                channels.append(self._later(channel, now, 0, anew=True))
        being_read = [each.ring for each in hub.channels.values() if each.ring is not None and each.ring.readers]
        rest = _Rest(
            channels,
            list(sent),
            [(ring.name, now - since) for ring, since in sorted(hub.history.vacancies(), key=itemgetter(1))],
            [_Retained(ring.name, ring.evicted_entries()) for ring in being_read],
            hub.epochs.state(),
            hub.counts(),
        )
        return Portion(_encode(rest))

    def _later(self, channel: Channel, now: float, after: int, *, anew: bool) -> _Channel:
        """Return what was published on a channel after an offset."""
        kept = self._hub.history.kept(channel.ring, after, channel.offset, _EVERYTHING) if channel.ring else []
        return _Channel(channel.name, channel.epoch, channel.offset, _entries(kept, now), anew)

    # In the next process.

    def take(self, portion: TakenPortion) -> None:
        """See `Part`."""
        state = decoded(portion.data, _First)
        if not self._arrived:
            self._began = self._hub.history.now()
            self._hub.history.emptied = len  # nobody has subscribed yet, and nothing is unused for that
        for each in state.channels:
            self._collect(each)
        if state.end:
            self._adopt(self._arrived.values(), self._began)
            self._arrived.clear()

    def _collect(self, part: _Channel) -> None:
        """Put a part of a channel behind those that have come, unless something between them has been dropped."""
        before = self._arrived.get(part.name)
        if before is None or part.anew or part.epoch != before.epoch:
            self._arrived[part.name] = part
        elif part.offset - len(part.entries) == before.offset:
            before.entries += part.entries
            before.offset = part.offset
        else:
            before.entries, before.offset = part.entries, part.offset

    def _adopt(self, channels: Iterable[_Channel], at: float) -> None:
        """Put channels into the hub, or more of channels. Ages count from `at`."""
        hub, rings = self._hub, list[tuple[Ring, int, list[Aged]]]()
        for each in channels:
            channel = hub.channels.get(each.name)
            if channel is None:
                channel = hub.adopt(each.name, each.epoch, each.offset)
            elif each.anew or channel.offset != each.offset - len(each.entries):
                channel.epoch = each.epoch
                hub.drop_history(channel)
            channel.offset = each.offset
            if channel.ring is not None and each.entries:
                kept = [Aged(age, data if text else bytearray(data), time) for age, data, text, time in each.entries]
                rings.append((channel.ring, each.offset, kept))
        hub.history.restore(rings, hub.history.now() - at)

    def take_rest(self, portion: TakenPortion) -> None:
        """See `Part`."""
        hub, state = self._hub, decoded(portion.data, _Rest)
        for name in state.gone:
            channel = hub.channels.get(name)
            if channel is not None:
                hub.drop_history(channel)
                channel.offset = 0  # its epoch has been ended, or nobody has seen it
        self._adopt(state.channels, hub.history.now())
        for name, age in state.vacant:
            channel = hub.channels.get(name)
            if channel is not None and channel.ring is not None:
                hub.history.resume_vacancy(channel.ring, age)
        for each in state.retained:
            channel = hub.channels.get(each.name)
            if channel is not None and channel.ring is not None:
                self._retained.append(channel.ring)
                entries = [
                    (offset, data if text else bytearray(data), time) for offset, data, text, time in each.entries
                ]
                hub.history.retain(channel.ring, entries)
        try:
            hub.epochs.go_on_from(state.epochs)
        except ValueError as error:
            raise HandOverError(f"the epochs are not those of this version: {error}") from error
        hub.go_on_from(state.counts)

    def begin(self) -> None:
        """See `Part`. Call it when all connections have subscribed, and read on."""
        for ring in self._retained:
            self._hub.history.readers_resumed(ring)
        self._retained.clear()
        self._hub.keep_what_is_used()


def _entries(kept: Iterable[KeptOne], now: float) -> list[_Entry]:
    return [(now - each.time, bytes(each.payload), type(each.payload) is bytes, each.published) for each in kept]


_encode: Final = msgspec.msgpack.Encoder().encode
