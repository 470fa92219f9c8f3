"""The seam between publishers and the hub: a broker numbers publications, and the hub takes them in.

A daemon that is alone has `LocalBroker`, whose hub numbers publications itself. Its commands use `publish_one` and
publishers wait for `room`; nothing needs `publish`, `known` and `counted` yet. They are there for a log that several
daemons share: then `control.server` hands over batches with `publish`, a subscribe to a channel that this daemon does
not know waits for `known`, and the hub of each daemon takes publications in with `Hub.apply`.

The hub knows no broker. A broker gives each publication its epoch and offset, and hands it to the hub of every daemon
that belongs together, in the same order: by `Hub.publish` where the hub counts itself, otherwise by `Hub.apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from realtimed.hub.position import Receipt

__all__ = ["Broker", "Message", "OnReceipts"]


class Message(NamedTuple):
    """What is to be published: a channel, a message, and its bytes if `encode_message` has made them already."""

    channel: object
    message: object
    payload: bytes | None = None


OnReceipts: TypeAlias = Callable[[Sequence[Receipt]], object]
"""Called with a receipt for each publication of a batch, in their order."""


class Broker(Protocol):
    """What publishers and subscribers need of a broker."""

    @property
    def publish_one(self) -> Callable[[object, object, bytes | None], Receipt]:
        """A function that publishes one message in the same turn: channel, message, and its bytes if they are made.

        It raises `RefusedError` as `publish` does. Only a broker that numbers publications itself has it.
        """

    def publish(self, messages: Sequence[Message], answered: OnReceipts) -> None:
        """Publish a batch, all of it or none, and call `answered` once: during this call, or later.

        Raises `RefusedError` if a channel or a message cannot be; then nothing is published, and nothing answered.
        """

    async def room(self) -> None:
        """Wait until the broker takes more publications."""

    async def known(self, channel: str) -> None:
        """Wait until the channel's position is known here, so that somebody may subscribe; at once if it is."""

    def counted(self, channel: str, subscribers: int) -> None:
        """Record how many subscribers a channel has here now. Never waits."""
