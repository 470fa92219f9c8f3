"""A channel, who is subscribed to it, and what its name and its messages may be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Protocol

from realtimed.config import CHANNEL_CHARACTERS
from realtimed.errors import RefusedError, quoted
from realtimed.frames import WireFormat
from realtimed.history import Ring

__all__ = ["Channel", "Subscriber", "check_channel_name", "encode_message"]

_CHANNEL_NAME: Final = re.compile(rf"[{CHANNEL_CHARACTERS}]{{1,200}}")


class Subscriber(Protocol):
    """What the hub knows of a subscriber."""

    @property
    def form(self) -> WireFormat:
        """How publications look to this subscriber. Never changes."""

    @property
    def channels(self) -> set[Channel]:
        """What it is subscribed to. Only the hub writes it."""

    @property
    def fd(self) -> int:
        """The descriptor that bytes may be sent to at once instead of by `transmit`; -1 while they may not."""

    @property
    def transmit(self) -> Callable[[bytes], int]:
        """Takes as many of the bytes as it can at once and returns how many; raises OSError if it can take none."""

    def hold(self, data: bytes, sent: int) -> None:
        """Keep `data`, of which `transmit` took the first `sent` bytes, until it can be sent."""

    def transmit_failed(self, data: bytes, error: OSError) -> None:
        """Deal with an error of `transmit`, which has taken nothing of `data`."""

    def write(self, data: bytes) -> None:
        """Send or keep `data`: `transmit` and what may have to follow it, in one."""


class Channel:
    """A channel that somebody is subscribed to, or that has a history.

    `offset` is that of the newest publication, 0 before the first; `epoch` is different for every time that offsets
    began at 1.
    """

    __slots__ = ("count", "epoch", "name", "offset", "plural", "ring", "rosters", "subscribers")

    # Invariants: `count` is the number of members of all sets in `subscribers`; none of these sets is empty. The
    # channel is in a subscriber's `channels` exactly if the subscriber is in the set of its form. A list in `rosters`
    # has the members of the set of that form; it is never changed, only thrown away. `plural` is how many of the
    # subscribers have other channels as well. `ring` is None if no history is kept of this channel; otherwise its
    # newest entry, if it has any, is the publication with `offset`.

    def __init__(self, name: str, epoch: str, ring: Ring | None) -> None:
        self.name = name
        self.epoch = epoch
        self.ring = ring
        self.offset = 0
        self.count = 0
        self.plural = 0
        self.subscribers: dict[WireFormat, set[Subscriber]] = {}
        self.rosters: dict[WireFormat, list[Subscriber]] = {}

    def roster(self, form: WireFormat) -> list[Subscriber]:
        """Return who gets `form`, as a list that stays as it is whoever comes or goes."""
        roster = self.rosters[form] = list(self.subscribers[form])
        return roster


def check_channel_name(name: object) -> None:
    """Raise `RefusedError` with the code ``invalid_channel`` if `name` cannot be a channel."""
    if not isinstance(name, str) or _CHANNEL_NAME.fullmatch(name) is None:
        raise RefusedError(
            "invalid_channel",
            f"{quoted(name, 20)} is not a channel name: 1 to 200 characters of A-Z a-z 0-9 _ - = @ , . ; : /",
        )


def encode_message(message: object, limit: int) -> bytes:
    """Return a message's bytes. Raises `RefusedError` for anything but valid text or bytes of at most `limit` bytes."""
    if isinstance(message, str):
        try:
            payload = message.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                "invalid_utf8",
                f"the message is not valid UTF-8 at character {error.start}: what is not text can be sent as binary",
            ) from None
    elif isinstance(message, bytes):
        payload = message
    else:
        raise RefusedError("invalid_params", f"a message is str or bin, not {type(message).__name__}")
    if len(payload) > limit:
        raise RefusedError(
            "message_too_large", f"the message has {len(payload)} bytes; the limit, max-message, is {limit}"
        )
    return payload
