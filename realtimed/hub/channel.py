"""A channel and its subscribers."""

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
    """An immutable list of subscribers that get the same bytes.

    It keeps the descriptors of its members, if its owner reports their changes: then a round need not look at ten
    thousand subscribers, all of which have left the processor's caches since the round before.
    """

    __slots__ = ("_descriptors",)

    # Invariant: `_descriptors` has the current descriptors of the first members; None if nobody reports changes.

    def __init__(self, members: Iterable[Subscriber], *, changes_reported: bool = False) -> None:
        super().__init__(members)
        self._descriptors = array("i") if changes_reported else None

    def descriptors(self, start: int, stop: int) -> array[int]:
        """Return `fd` of the members from `start` up to `stop`. Do not change the result."""
        known = self._descriptors
        if known and not start and stop == len(known):  # the usual case
            return known
        if known is None or start > len(known):
            return array("i", [each.fd for each in self[start:stop]])
        if stop > len(known):
            known.extend([each.fd for each in self[len(known) : stop]])
        return known[start:stop]

    def descriptor_changed(self) -> None:
        """Forget the descriptors, as one has changed."""
        if self._descriptors:
            self._descriptors = array("i")

    def retire(self) -> None:
        """Keep no descriptors any more: a round may still use the roster, but nobody reports changes to it."""
        self._descriptors = None


class Channel:
    """A channel with subscribers or a history.

    `offset` is that of the newest publication, 0 before the first. `epoch` changes whenever offsets begin
    at 1 again. `number` is higher than that of every earlier channel.
    """

    __slots__ = ("_audience", "_rosters", "count", "epoch", "name", "number", "offset", "plural", "ring", "subscribers")

    # Invariants:
    # - `subscribers` has a set for each form, none of them empty; `count` is the number of all members. The channel is
    #   in a subscriber's `channels` if and only if the subscriber is in the set of its form.
    # - `plural` is how many of the subscribers have other channels as well.
    # - A roster in `_rosters` has the members of the set of its form; it is thrown away when the set changes.
    #   `_audience` has the roster of every form, or is empty.
    # - `ring` is None if no history is kept of this channel. Otherwise its newest publication, if it has one, is the
    #   one with `offset`.

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
        """Return a roster of the subscribers of each form."""
        if not self._audience:
            for form, members in self.subscribers.items():
                if form not in self._rosters:
                    self._rosters[form] = Roster(members, changes_reported=True)
            self._audience = tuple(self._rosters.items())
        return self._audience

    def change_form(self, subscriber: Subscriber, form: WireFormat) -> None:
        """Move a subscriber from the set of its form to that of `form`."""
        former = self.subscribers[subscriber.form]
        former.remove(subscriber)
        if not former:
            del self.subscribers[subscriber.form]
        self.members_changed(subscriber.form)
        self.subscribers.setdefault(form, set()).add(subscriber)
        self.members_changed(form)

    def members_changed(self, form: WireFormat) -> None:
        """Throw the roster of `form` away, as its set has changed."""
        self._audience = ()
        roster = self._rosters.pop(form, None)
        if roster is not None:
            roster.retire()

    def descriptor_changed(self, form: WireFormat) -> None:
        """Report to the roster of `form` that a member has another descriptor now."""
        roster = self._rosters.get(form)
        if roster is not None:
            roster.descriptor_changed()
