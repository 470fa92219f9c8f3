"""The limit on all connections, and the limits on each address. No I/O.

A connection takes its place in the same step that finds it free, and keeps it until it is gone. Each step takes
constant time, however many connections and addresses there are.

The table has an entry for each address with connections: at most `max_connections` of them. An address without
connections keeps its entry until it may make a whole burst of handshakes again. At most `_IDLE_KEPT` such entries are
kept; above that, the one that has been idle longest is dropped. That is safe: counts of connections are never dropped,
and a peer with that many addresses gains no more than one burst of handshakes for each address, which it has anyway. An
entry takes about 260 bytes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple

__all__ = ["LIMITS", "AddressEntry", "Admission", "Buckets", "TurnedAway", "counted_as"]

LIMITS: Final = ("max_connections", "max_connections_per_address", "handshakes_per_address")
"""The settings that a connection can be turned away for."""

_RETRY_AFTER: Final = 5
"""Seconds after which a place may be free."""

_BURST: Final = 10.0
"""An address may make at once as many handshakes as its rate allows in this many seconds, and at least one."""

_IDLE_KEPT: Final = 16_384
"""Entries kept of addresses without connections."""

_FORGOTTEN_AT_ONCE: Final = 2
"""Idle entries checked in each step. A step makes at most one entry idle, so this catches up."""

_SAID_AGAIN: Final = 60.0
"""Seconds until an address that is still turned away is logged again."""

_LINES: Final = 10
_LINES_SPAN: Final = 60.0
"""All addresses together get `_LINES` lines at once, and then `_LINES` in each `_LINES_SPAN` seconds."""

_TOLERANCE: Final = 1e-6
"""Seconds that rounding errors may amount to."""


class TurnedAway(NamedTuple):
    """Why a connection gets no place: the setting, a sentence, and in how many seconds to try again.

    `unlogged` is 0 until the log may have another line. Then it counts the connections turned away for their address
    since the last line, this one included.
    """

    limit: str
    sentence: str
    retry_after: int
    unlogged: int = 0


class AddressEntry:
    """An address in the table, and how many connections it has. See `Admission.leave`.

    `name` is what `counted_as` returns, or "" for connections whose address is unknown.
    """

    __slots__ = ("connections", "full_at", "name")

    # `full_at` is when the address may make a whole burst of handshakes again, by the clock.

    def __init__(self, name: str) -> None:
        self.name = name
        self.connections = 0
        self.full_at = -math.inf


class Buckets(NamedTuple):
    """What is known of addresses beside their connections, and what was counted.

    `full_in` says in how many seconds an address may make a whole burst of handshakes again.
    """

    full_in: list[tuple[str, float]]
    refused: dict[str, int]
    unlogged: int


class Admission:
    """The places of all connections. `clock` returns seconds."""

    # Invariants: `taken` is the sum of all entries' connections. `_table` has the entries by name. `_by_count` has the
    # entries with connections by their number of connections, and no empty set. `_most` is its largest key, or 0.
    # `_idle` has the entries without connections, the longest idle first. `_said` has the addresses logged in the last
    # `_SAID_AGAIN` seconds, and when: at most 2 × `_LINES`.

    def __init__(self, limit: int, per_address: int | None, handshakes: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nameless = AddressEntry("")
        self._table: dict[str, AddressEntry] = {}
        self._by_count: dict[int, set[AddressEntry]] = {}
        self._most = 0
        self._idle: OrderedDict[str, AddressEntry] = OrderedDict()
        self._said: OrderedDict[str, float] = OrderedDict()
        self._lines_full_at = -math.inf
        self._unlogged = 0
        self.taken = 0
        self.refused = dict.fromkeys(LIMITS, 0)
        self.configure(limit, per_address, handshakes)

    def configure(self, limit: int, per_address: int | None, handshakes: float) -> None:
        """Set the limits. They apply to new connections; no connection loses its place.

        A `per_address` of None means half of `limit`, and 0 no limit. `handshakes` is a number per second, 0 for no
        limit.
        """
        self.limit = limit
        self.per_address = (limit + 1) // 2 if per_address is None else per_address
        self.handshakes = handshakes

    @property
    def addresses(self) -> int:
        """The number of addresses in the table."""
        return len(self._table)

    @property
    def busiest(self) -> AddressEntry | None:
        """An address that has the most connections; None if no connection has a known address."""
        return next(iter(self._by_count[self._most])) if self._most else None

    def admit(self, address: str) -> AddressEntry | TurnedAway:
        """Take a place for a connection and return its entry, which `leave` takes; or say why there is no place.

        `address` is an IP address, or "" if it is unknown: then only the limit on all connections applies.
        """
        now = self._clock()
        self._forget_idle(now)
        entry = self._entry(address)
        turned_away = self._check(entry, now)
        if turned_away is not None:
            return turned_away
        self._enter(entry)
        return entry

    # For another process, which goes on with the same connections.

    def buckets(self) -> Buckets:
        """Return what is known beside the connections."""
        now = self._clock()
        full_in = [(name, entry.full_at - now) for name, entry in self._table.items() if entry.full_at > now]
        return Buckets(full_in, dict(self.refused), self._unlogged)

    def go_on_from(self, buckets: Buckets) -> None:
        """Go on with what another process has known. The connections have been readmitted before."""
        now = self._clock()
        for name, seconds in buckets.full_in:
            entry = self._table.setdefault(name, AddressEntry(name))
            entry.full_at = now + seconds
            if not entry.connections:
                self._rest(entry, now)
        self.refused |= buckets.refused
        self._unlogged = buckets.unlogged

    def readmit(self, address: str) -> AddressEntry:
        """Take a place for a connection that has had one in another process, whatever the limits; return its entry."""
        entry = self._entry(address)
        self._enter(entry)
        return entry

    def leave(self, entry: AddressEntry) -> None:
        """Give a connection's place back."""
        self.taken -= 1
        if entry is self._nameless:
            entry.connections -= 1
            return
        self._count(entry, entry.connections - 1)
        now = self._clock()
        if not entry.connections:
            self._rest(entry, now)
        self._forget_idle(now)

    def _entry(self, address: str) -> AddressEntry:
        """Return the entry of an address. A new one is not in the table yet."""
        if not address:
            return self._nameless
        name = counted_as(address)
        return self._table.get(name) or AddressEntry(name)

    def _check(self, entry: AddressEntry, now: float) -> TurnedAway | None:
        """Return why an address gets no further place, or None. A handshake counts if no other limit is in its way."""
        known = entry is not self._nameless
        if known and self.per_address and entry.connections >= self.per_address:
            sentence = f"The limit of one address, max-connections-per-address, is {self.per_address} connections."
            return self._turn_away(entry, now, "max_connections_per_address", sentence, _RETRY_AFTER)
        if self.taken >= self.limit:
            self.refused["max_connections"] += 1
            sentence = f"The limit, max-connections, is {self.limit} connections."
            return TurnedAway("max_connections", sentence, _RETRY_AFTER)
        if known and self.handshakes:
            cost = 1 / self.handshakes
            entry.full_at, wait = _take(entry.full_at, now, cost, max(_BURST, cost))
            if wait:
                sentence = f"The limit of one address, handshakes-per-address, is {self.handshakes:g} a second."
                return self._turn_away(entry, now, "handshakes_per_address", sentence, math.ceil(wait))
        return None

    def _enter(self, entry: AddressEntry) -> None:
        self.taken += 1
        if entry is self._nameless:
            entry.connections += 1
            return
        if not entry.connections:
            self._idle.pop(entry.name, None)
            self._table[entry.name] = entry
        self._count(entry, entry.connections + 1)

    def _count(self, entry: AddressEntry, connections: int) -> None:
        """Change the number of an address's connections by one."""
        before = self._by_count.get(entry.connections)
        if before is not None:
            before.remove(entry)
            if not before:
                del self._by_count[entry.connections]
        entry.connections = connections
        if connections:
            self._by_count.setdefault(connections, set()).add(entry)
        if connections > self._most or self._most not in self._by_count:
            self._most = connections  # the set of `_most` became empty: this entry was its last, and has one fewer now

    def _rest(self, entry: AddressEntry, now: float) -> None:
        """Keep the entry of an address without connections until it may make a whole burst again."""
        if entry.full_at <= now:
            del self._table[entry.name]
            return
        self._idle[entry.name] = entry
        if len(self._idle) > _IDLE_KEPT:
            del self._table[self._idle.popitem(last=False)[0]]

    def _forget_idle(self, now: float) -> None:
        for _ in range(min(_FORGOTTEN_AT_ONCE, len(self._idle))):
            name, entry = next(iter(self._idle.items()))
            if entry.full_at > now:
                break
            del self._idle[name], self._table[name]

    def _turn_away(self, entry: AddressEntry, now: float, limit: str, sentence: str, retry_after: int) -> TurnedAway:
        """Count a connection turned away for its address, and say whether the log gets a line about it."""
        self.refused[limit] += 1
        self._unlogged += 1
        unlogged = 0
        while self._said and next(iter(self._said.values())) <= now - _SAID_AGAIN:
            self._said.popitem(last=False)
        if entry.name not in self._said:
            self._lines_full_at, wait = _take(self._lines_full_at, now, _LINES_SPAN / _LINES, _LINES_SPAN)
            if not wait:
                self._said[entry.name] = now
                unlogged, self._unlogged = self._unlogged, 0
        return TurnedAway(limit, sentence, retry_after, unlogged)


def counted_as(address: str) -> str:
    """Return an address's name in the table: an IPv4 address itself, an IPv6 address's /64.

    A peer with one address of a /64 can have all of them (RFC 6177). An IPv4 address mapped into IPv6 is IPv4. Raises
    `ValueError` if `address` is not an IP address.
    """
    parsed = ip_address(address)
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    mapped = parsed.ipv4_mapped
    return str(mapped) if mapped is not None else f"{IPv6Address(int(parsed) >> 64 << 64)}/64"


def _take(full_at: float, now: float, cost: float, span: float) -> tuple[float, float]:
    """Take a token out of a bucket, which is full at `full_at`.

    Return when it is full then, and in how many seconds a token can be had: 0 if one was taken. A token comes back in
    `cost` seconds, a whole bucket in `span`.
    """
    full_at = min(max(full_at, now), now + span)  # the span may have changed since
    wait = full_at + cost - (now + span)
    return (full_at, wait) if wait > _TOLERANCE else (full_at + cost, 0.0)
