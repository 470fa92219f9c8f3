"""The broker of a daemon that is alone: its hub numbers all publications, in the same turn."""

from __future__ import annotations

from collections.abc import Sequence

from realtimed.broker.base import Message, OnReceipts
from realtimed.hub.hub import Hub
from realtimed.hub.names import check_channel_name
from realtimed.hub.publication import encode_message

__all__ = ["LocalBroker"]


class LocalBroker:
    """See `realtimed.broker.base.Broker`. Nothing here waits: every position is known, and there is no queue.

    Publishers wait for the fan-out, whatever the broker: see `realtimed.net.fanout.FanOut.room`.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.publish_one = hub.publish  # the hub's own: most publications pass here, one by one

    def publish(self, messages: Sequence[Message], answered: OnReceipts) -> None:
        """Publish a batch and call `answered` during this call."""
        payloads: list[bytes] = []
        for channel, message, payload in messages:
            check_channel_name(channel)
            payloads.append(encode_message(message, self._hub.max_message) if payload is None else payload)
        answered(
            [
                self._hub.publish(channel, message, payload)
                for (channel, message, _), payload in zip(messages, payloads, strict=True)
            ]
        )

    async def room(self) -> None:
        """Return at once."""

    async def known(self, channel: str) -> None:
        """Return at once."""

    def counted(self, channel: str, subscribers: int) -> None:
        """Do nothing: the hub counts its subscribers itself."""
