"""Who may connect: the limit on all connections, and the limits on one address. No I/O.

A connection takes its place in the same step that finds room for it, and keeps it until it is gone. Each step takes
constant time, however many connections and addresses there are.

The table has an entry for each address with connections, so there are at most `max_connections` of these. An address
without connections keeps its entry until it may make all the handshakes of a burst again, and at most `_IDLE_KEPT` of
these are kept: beyond it the one that left first is forgotten. That is safe: counts of connections are never forgotten,
and a peer that has so many addresses gets no more handshakes out of it than a burst for each address, which it has
anyway. An entry takes about 260 bytes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple

__all__ = ["LIMITS", "Admission", "Place", "TurnedAway", "counted_as"]

LIMITS: Final = ("max_connections", "max_connections_per_address", "handshakes_per_address")
"""The settings that a connection can be turned away for."""

_RETRY_AFTER: Final = 5
"""Seconds after which a place may be free."""

_BURST: Final = 10.0
"""An address may make as many handshakes at once as in this many seconds in the long run, and one in any case."""

_IDLE_KEPT: Final = 16_384
"""Addresses without connections whose entries are kept."""

_FORGOTTEN_AT_ONCE: Final = 2
"""Idle entries looked at in each step. One step makes one idle at most, so this catches up."""

_SAID_AGAIN: Final = 60.0
"""Seconds after which an address that is still turned away is logged again."""

_LINES: Final = 10
_LINES_SPAN: Final = 60.0
"""All addresses together are logged `_LINES` times at once, and as often in `_LINES_SPAN` seconds after that."""

_TOLERANCE: Final = 1e-6
"""Seconds of rounding errors."""


class TurnedAway(NamedTuple):
    """Why a connection gets no place: the setting, a sentence, and after how many seconds to try again.

    `unlogged` is the number of connections turned away for their address since one was logged last, this one included,
    if it is time for a line in the log again; otherwise 0.
    """

    limit: str
    sentence: str
    retry_after: int
    unlogged: int = 0


class Place:
    """An address and its connections. All connections of an address share one place; see `Admission.leave`.

    `name` is the address as it is counted, "" for connections of which no address is known.
    """

    __slots__ = ("connections", "full_at", "name")

    # `full_at`: when the address may make a whole burst of handshakes again, by the clock.

    def __init__(self, name: str) -> None:
        self.name = name
        self.connections = 0
        self.full_at = -math.inf


class Admission:
    """The places of all connections. `clock` returns seconds."""

    # Invariants: `taken` is the sum of all places' connections. `_by_count` has each place in the
    # table that has connections under their number, and no empty set; `_most` is its largest key, 0 without one.
    # `_idle` has the places in the table that have no connections, those that left first in front. `_said` has those
    # addresses that were logged in the last `_SAID_AGAIN` seconds, and when: 2 × `_LINES` at most.

    def __init__(self, limit: int, per_address: int | None, handshakes: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nameless = Place("")
        self._places: dict[str, Place] = {}
        self._by_count: dict[int, set[Place]] = {}
        self._most = 0
        self._idle: OrderedDict[str, Place] = OrderedDict()
        self._said: OrderedDict[str, float] = OrderedDict()
        self._lines_full_at = -math.inf
        self._unlogged = 0
        self.taken = 0
        self.refused = dict.fromkeys(LIMITS, 0)
        self.configure(limit, per_address, handshakes)

    def configure(self, limit: int, per_address: int | None, handshakes: float) -> None:
        """Set the limits, which hold for newcomers; nobody loses a place.

        `per_address` is half of `limit` if it is None, and 0 for no limit. `handshakes` is a number per second, 0 for
        no limit.
        """
        self.limit = limit
        self.per_address = (limit + 1) // 2 if per_address is None else per_address
        self.handshakes = handshakes

    @property
    def addresses(self) -> int:
        """How many addresses the table has."""
        return len(self._places)

    @property
    def busiest(self) -> Place | None:
        """The place with most connections, or one of these; None if no connection has an address."""
        return next(iter(self._by_count[self._most])) if self._most else None

    def admit(self, address: str) -> Place | TurnedAway:
        """Take a place for a connection, or say why there is none.

        `address` is an IP address, or "" if it is not known: then only the limit on all connections counts.
        """
        now = self._clock()
        self._forget_idle(now)
        if not address:
            place = self._nameless
        else:
            name = counted_as(address)
            place = self._places.get(name) or Place(name)
            if self.per_address and place.connections >= self.per_address:
                sentence = f"The limit of one address, max-connections-per-address, is {self.per_address} connections."
                return self._turn_away(name, now, "max_connections_per_address", sentence, _RETRY_AFTER)
        if self.taken >= self.limit:
            self.refused["max_connections"] += 1
            sentence = f"The limit, max-connections, is {self.limit} connections."
            return TurnedAway("max_connections", sentence, _RETRY_AFTER)
        if address and self.handshakes:
            cost = 1 / self.handshakes
            span = max(_BURST, cost)
            place.full_at, wait = _take(place.full_at, now, cost, span)
            if wait:
                sentence = f"The limit of one address, handshakes-per-address, is {self.handshakes:g} a second."
                return self._turn_away(place.name, now, "handshakes_per_address", sentence, math.ceil(wait))
        self._enter(place)
        return place

    def leave(self, place: Place) -> None:
        """Give a connection's place back."""
        self.taken -= 1
        if place is self._nameless:
            place.connections -= 1
            return
        self._count(place, place.connections - 1)
        now = self._clock()
        if not place.connections:
            self._rest(place, now)
        self._forget_idle(now)

    def _enter(self, place: Place) -> None:
        self.taken += 1
        if place is self._nameless:
            place.connections += 1
            return
        if not place.connections:
            self._idle.pop(place.name, None)
            self._places[place.name] = place
        self._count(place, place.connections + 1)

    def _count(self, place: Place, connections: int) -> None:
        """Change the number of an address's connections by one."""
        before = self._by_count.get(place.connections)
        if before is not None:
            before.remove(place)
            if not before:
                del self._by_count[place.connections]
        place.connections = connections
        if connections:
            self._by_count.setdefault(connections, set()).add(place)
        if connections > self._most or self._most not in self._by_count:
            self._most = connections  # its set became empty, and this place, which left it, has one fewer

    def _rest(self, place: Place, now: float) -> None:
        """Keep the entry of an address without connections as long as it says something."""
        if place.full_at <= now:
            del self._places[place.name]
            return
        self._idle[place.name] = place
        if len(self._idle) > _IDLE_KEPT:
            del self._places[self._idle.popitem(last=False)[0]]

    def _forget_idle(self, now: float) -> None:
        for _ in range(min(_FORGOTTEN_AT_ONCE, len(self._idle))):
            name, place = next(iter(self._idle.items()))
            if place.full_at > now:
                break
            del self._idle[name], self._places[name]

    def _turn_away(self, name: str, now: float, limit: str, sentence: str, retry_after: int) -> TurnedAway:
        """Count who is turned away for its address; say whether that is worth a line in the log."""
        self.refused[limit] += 1
        self._unlogged += 1
        unlogged = 0
        while self._said and next(iter(self._said.values())) <= now - _SAID_AGAIN:
            self._said.popitem(last=False)
        if name not in self._said:
            self._lines_full_at, wait = _take(self._lines_full_at, now, _LINES_SPAN / _LINES, _LINES_SPAN)
            if not wait:
                self._said[name] = now
                unlogged, self._unlogged = self._unlogged, 0
        return TurnedAway(limit, sentence, retry_after, unlogged)


def counted_as(address: str) -> str:
    """Return what stands for an address in the table: an IPv4 address itself, of an IPv6 address its /64.

    Whoever has one address of a /64 can have all of them (RFC 6177). An IPv4 address mapped into IPv6 is IPv4. Raises
    `ValueError` if it is no IP address.
    """
    parsed = ip_address(address)
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    mapped = parsed.ipv4_mapped
    return str(mapped) if mapped is not None else f"{IPv6Address(int(parsed) >> 64 << 64)}/64"


def _take(full_at: float, now: float, cost: float, span: float) -> tuple[float, float]:
    """Take one out of a bucket; return when it will be full again, and in how many seconds one can be had, 0 if now.

    The bucket is known by when it is full. One takes `cost` seconds to come back, all of them `span`.
    """
    full_at = min(max(full_at, now), now + span)  # it may be from a time with another span
    wait = full_at + cost - (now + span)
    return (full_at, wait) if wait > _TOLERANCE else (full_at + cost, 0.0)
