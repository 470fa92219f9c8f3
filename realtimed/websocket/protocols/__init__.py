"""What is said over a WebSocket, without I/O: a client's messages in, frames out.

A protocol is a class with a `name` (the subprotocol that clients ask for), the `form` its subscribers get
publications in, and one instance for each client. To add one, write it beside these and list it in `PROTOCOLS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from realtimed.websocket.protocols.base import CLOSE_CODES, Conversation, ViolationError
from realtimed.websocket.protocols.plain import Plain
from realtimed.websocket.protocols.v1 import RealtimeV1

__all__ = ["CLOSE_CODES", "PROTOCOLS", "Conversation", "ViolationError", "choose"]

PROTOCOLS: Final[dict[str, type[Conversation]]] = {each.name: each for each in (RealtimeV1,)}
"""The subprotocols on offer. A client that asks for none speaks `Plain`."""


def choose(proposed: Iterable[str]) -> type[Conversation]:
    """Return the first of the client's subprotocols that is known here, or `Plain`."""
    return next((PROTOCOLS[name] for name in proposed if name in PROTOCOLS), Plain)
