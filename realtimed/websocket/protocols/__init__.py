"""The protocols spoken over a WebSocket, without I/O: a client's messages in, frames out.

A protocol is a class. Its `name` is the subprotocol that clients ask for, its `form` the wire format of publications,
and each client has an instance. To add a protocol, write its module beside these and list its class in `PROTOCOLS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from realtimed.websocket.protocols.base import CLOSE_CODES, Conversation, ViolationError
from realtimed.websocket.protocols.plain import Plain
from realtimed.websocket.protocols.v1 import RealtimeV1

__all__ = ["CLOSE_CODES", "PROTOCOLS", "Conversation", "ViolationError", "choose"]

PROTOCOLS: Final[dict[str, type[Conversation]]] = {each.name: each for each in (RealtimeV1,)}
"""The subprotocols on offer. A client that asks for none of them speaks `Plain`."""


def choose(proposed: Iterable[str]) -> type[Conversation]:
    """Return the protocol of the first name in `proposed` that is on offer, or `Plain`."""
    return next((PROTOCOLS[name] for name in proposed if name in PROTOCOLS), Plain)
