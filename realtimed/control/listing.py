"""Lists of clients and of channels: filtered, counted, a page at a time. Pure: it knows neither trio nor a socket.

A list is in the order in which its members came. It is made in steps, between which other tasks have their turn. A
member that exists from the first step of the first page to the last step of the last page is listed exactly once. One
that comes or goes meanwhile may be listed or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, Generic, Protocol, TypeVar

from realtimed.control.steps import Steps, Whole
from realtimed.errors import RefusedError
from realtimed.hub.channel import Channel
from realtimed.hub.hub import Hub
from realtimed.text import quoted

__all__ = ["Client", "list_channels", "list_clients"]

_M = TypeVar("_M")

_PAGE: Final = 1000
"""Members of a page, unless the caller asks for another number."""

_PAGE_BYTES: Final = 2**20
"""A page ends when its members take about this many bytes, so that it never exceeds the limit of an answer."""

_STEP: Final = 256
_DESCRIBED_STEP: Final = 16
"""Members examined in one step, and elements described in one: a fraction of a millisecond."""

_CHANNEL_BYTES: Final = 80
_CLIENT_BYTES: Final = 160
"""About how many bytes a member takes in an answer beside its names."""


class Client(Protocol):
    """A connected WebSocket, as the lists show it."""

    @property
    def rank(self) -> int:
        """How many clients were let in before it."""

    @property
    def address(self) -> str:
        """The address of the client, as far as it is known."""

    @property
    def channels(self) -> AbstractSet[Channel]:
        """The channels that it is subscribed to."""

    def describe(self) -> dict[str, object]:
        """Return what the ``clients`` command shows."""


@dataclass
class _Wanted:
    """What the parameters ask for: a whole list, a page of it, or only its length."""

    limit: int = 2**63
    after: int = -1
    count: bool = False
    filters: dict[str, str] = field(default_factory=dict)
    paged: bool = False


def _wanted(options: Mapping[object, object] | None, filters: Sequence[str]) -> _Wanted:
    """Read the options of a list. Raises `RefusedError` for unknown options and wrong values."""
    wanted = _Wanted()
    if options is None:
        return wanted
    wanted.paged, wanted.limit = True, _PAGE
    known = ("limit", "after", "count", *filters)
    for name, value in options.items():
        if name == "limit" and type(value) is int and value > 0:
            wanted.limit = value
        elif name == "after" and type(value) is int and value >= 0:
            wanted.after = value
        elif name == "count" and type(value) is bool:
            wanted.count = value
        elif name in filters and isinstance(value, str):
            wanted.filters[str(name)] = value
        elif name in known:
            raise RefusedError(
                "invalid_params",
                f"{name} cannot be {quoted(value)}: limit is a number from 1, after one from 0, count true or false,"
                " and everything else a str",
            )
        else:
            raise RefusedError("invalid_params", f"there is no option {quoted(name)}; there are {', '.join(known)}")
    return wanted


def list_channels(hub: Hub, prefix: str = "", options: Mapping[object, object] | None = None) -> Steps:
    """List the channels that have subscribers. The elements are a name, its description, the next name, and so on."""
    wanted = _wanted(options, ["prefix"])
    prefix = wanted.filters.get("prefix", prefix)

    def fits(channel: Channel) -> bool:
        return channel.count > 0 and channel.name.startswith(prefix)

    def describe(channel: Channel) -> tuple[Sequence[object], int]:
        return (channel.name, channel.describe()), len(channel.name) + _CHANNEL_BYTES

    listing = _Listing[Channel]("channels", attrgetter("number"), fits, describe, pairs=True)
    return (yield from listing.walk(list(hub.channels.values()), wanted))


def list_clients(hub: Hub, clients: Mapping[str, Client], options: Mapping[object, object] | None = None) -> Steps:
    """List the connected clients."""
    wanted = _wanted(options, ["channel", "address"])
    channel, address = wanted.filters.get("channel"), wanted.filters.get("address")

    def fits(member: tuple[str, Client]) -> bool:
        id, client = member
        return (
            clients.get(id) is client  # it may have gone since the list began
            and (address is None or client.address == address)
            and (channel is None or hub.channels.get(channel) in client.channels)
        )

    def describe(member: tuple[str, Client]) -> tuple[Sequence[object], int]:
        client = member[1]
        return (client.describe(),), _CLIENT_BYTES + sum(len(each.name) + 3 for each in client.channels)

    listing = _Listing[tuple[str, Client]]("clients", lambda member: member[1].rank, fits, describe)
    return (yield from listing.walk(list(clients.items()), wanted))


@dataclass
class _Listing(Generic[_M]):
    """How members of one kind are listed; a page has them under `name`.

    `number` returns a member's place in the order, `fits` whether to list it, and `describe` its elements and about how
    many bytes they take. With `pairs` the elements of a member are a key and its value.
    """

    name: str
    number: Callable[[_M], int]
    fits: Callable[[_M], bool]
    describe: Callable[[_M], tuple[Sequence[object], int]]
    pairs: bool = False

    def walk(self, members: list[_M], wanted: _Wanted) -> Steps:
        """List the members behind `wanted.after`. Changes the list of `members`."""
        if wanted.after >= 0 and not wanted.count:
            del members[: bisect_right(members, wanted.after, key=self.number)]
        found = last = size = 0
        elements: list[object] = []
        for examined, member in enumerate(members, 1):
            if self.fits(member):
                if not wanted.count:
                    if found == wanted.limit or (wanted.paged and size > _PAGE_BYTES):
                        break
                    more, bytes = self.describe(member)
                    elements += more
                    size += bytes
                    last = self.number(member)
                found += 1
            if examined % _STEP == 0 or len(elements) >= _DESCRIBED_STEP:
                yield elements
                elements = []
        else:
            last = -1
        if wanted.count:
            return Whole({"count": found}, None)
        yield elements
        return (
            Whole({"next": last if last >= 0 else None}, self.name, self.pairs)
            if wanted.paged
            else Whole({}, "", self.pairs)
        )
