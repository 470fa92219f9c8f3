"""A channel, and who is subscribed to it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Protocol

from realtimed.hub.publication import WireFormat
from realtimed.hub.ring import Ring

__all__ = ["Channel", "Roster", "Subscriber"]


class Subscriber(Protocol):
    """What the hub knows of a subscriber."""

    form: WireFormat
    """How publications look to this subscriber. While it has channels, only `Hub.change_form` writes it."""

    @property
    def channels(self) -> set[Channel]:
        """What it is subscribed to. Only the hub writes it."""

    @property
    def fd(self) -> int:
        """The descriptor that bytes may be sent to at once, instead of with `write`; -1 while they may not.

        A subscriber that changes it calls `Channel.descriptor_changed` of all its `channels`.
        """

    def write(self, data: bytes, sent: int = 0) -> None:
        """Send `data`, or keep it until it can be sent. Never waits.

        The first `sent` bytes have gone to `fd` already, and nothing else has been written since.
        """


class Roster(list[Subscriber]):
    """Who gets the same bytes, in an order that stays as it is whoever comes or goes: a list that nobody changes.

    It knows the descriptors of its members as well, so that a round need not look at ten thousand of them, which
    between two rounds have all left the processor's caches. One that is `watched` is told when they change.
    """

    __slots__ = ("_known",)

    # Invariant: `_known` is None if nobody tells when descriptors change; otherwise it has those of the first members,
    # as they are now.

    def __init__(self, members: Iterable[Subscriber], *, watched: bool = False) -> None:
        super().__init__(members)
        self._known = array("i") if watched else None

    def descriptors(self, start: int, stop: int) -> array[int]:
        """Return `fd` of the members from `start` up to `stop`. The result is only to be read."""
        known = self._known
        if known and not start and stop == len(known):  # as it mostly is
            return known
        if known is None or start > len(known):
            return array("i", [each.fd for each in self[start:stop]])
        if stop > len(known):
            known.extend([each.fd for each in self[len(known) : stop]])
        return known[start:stop]

    def descriptor_changed(self) -> None:
        """Take note that a member has another descriptor now."""
        if self._known:
            self._known = array("i")

    def retire(self) -> None:
        """Take note that nobody will tell when descriptors change: a round may need the roster a little longer."""
        self._known = None


class Channel:
    """A channel that somebody is subscribed to, or that has a history.

    `offset` is that of the newest publication, 0 before the first; `epoch` is different for every time that offsets
    began at 1. `number` is higher than that of every channel that was there before.
    """

    __slots__ = ("_audience", "_rosters", "count", "epoch", "name", "number", "offset", "plural", "ring", "subscribers")

    # Invariants: `count` is the number of members of all sets in `subscribers`; none of these sets is empty. The
    # channel is in a subscriber's `channels` exactly if the subscriber is in the set of its form. A roster in
    # `_rosters` has the members of the set of that form; with the next change of the set it is thrown away.
    # `_audience`, unless it is empty, has the roster of every form. `plural` is how many of the subscribers have other
    # channels as well. `ring` is None if no history is kept of this channel; otherwise its newest entry, if it has
    # any, is the publication with `offset`.

    def __init__(self, name: str, epoch: str, ring: Ring | None, number: int = 0) -> None:
        self.name = name
        self.number = number
        self.epoch = epoch
        self.ring = ring
        self.offset = 0
        self.count = 0
        self.plural = 0
        self.subscribers: dict[WireFormat, set[Subscriber]] = {}
        self._rosters: dict[WireFormat, Roster] = {}
        self._audience: tuple[tuple[WireFormat, Roster], ...] = ()

    def describe(self) -> dict[str, object]:
        """Return what the ``channels`` command shows."""
        return {
            "subscribers": self.count,
            "epoch": self.epoch,
            "offset": self.offset,
            "history": self.ring.count if self.ring is not None else 0,
        }

    def audience(self) -> tuple[tuple[WireFormat, Roster], ...]:
        """Return who is subscribed now, by the form of what they get."""
        if not self._audience:
            for form, members in self.subscribers.items():
                if form not in self._rosters:
                    self._rosters[form] = Roster(members, watched=True)
            self._audience = tuple(self._rosters.items())
        return self._audience

    def change_form(self, subscriber: Subscriber, form: WireFormat) -> None:
        """Move one of the subscribers to those who get `form`."""
        former = self.subscribers[subscriber.form]
        former.remove(subscriber)
        if not former:
            del self.subscribers[subscriber.form]
        self.members_changed(subscriber.form)
        self.subscribers.setdefault(form, set()).add(subscriber)
        self.members_changed(form)

    def members_changed(self, form: WireFormat) -> None:
        """Take note that there is somebody more or less who gets `form`."""
        self._audience = ()
        roster = self._rosters.pop(form, None)
        if roster is not None:
            roster.retire()

    def descriptor_changed(self, form: WireFormat) -> None:
        """Take note that one of those who get `form` has another descriptor now."""
        roster = self._rosters.get(form)
        if roster is not None:
            roster.descriptor_changed()
