"""realtimed: broadcast to every browser that watches a channel.

    from realtimed import broadcast

    broadcast("news", "hello")

`broadcast` is for scripts, `Client` for programs that do it often, `AsyncClient` for trio and asyncio. What they raise
are children of `RealtimeError`. The daemon is started by the command ``realtimed``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realtimed.client.awaiting import AsyncClient, AsyncSubscription
    from realtimed.client.blocking import Client, Subscription, broadcast
    from realtimed.client.calls import ChannelInfo, ChannelMessage, ClientInfo, History
    from realtimed.errors import NoDaemonError, ProtocolError, RealtimeError, RefusedError, RequestTimeoutError
    from realtimed.hub.position import Position, Receipt

__all__ = [
    "AsyncClient",
    "AsyncSubscription",
    "ChannelInfo",
    "ChannelMessage",
    "Client",
    "ClientInfo",
    "History",
    "NoDaemonError",
    "Position",
    "ProtocolError",
    "RealtimeError",
    "Receipt",
    "RefusedError",
    "RequestTimeoutError",
    "Subscription",
    "__version__",
    "broadcast",
]

__version__ = "0.1.0"

# Everything is imported when it is first used: `Client` needs no anyio, and no client needs the daemon or trio.
_HOMES = {
    "AsyncClient": "realtimed.client.awaiting",
    "AsyncSubscription": "realtimed.client.awaiting",
    "ChannelInfo": "realtimed.client.calls",
    "ChannelMessage": "realtimed.client.calls",
    "Client": "realtimed.client.blocking",
    "ClientInfo": "realtimed.client.calls",
    "History": "realtimed.client.calls",
    "NoDaemonError": "realtimed.errors",
    "Position": "realtimed.hub.position",
    "ProtocolError": "realtimed.errors",
    "RealtimeError": "realtimed.errors",
    "Receipt": "realtimed.hub.position",
    "RefusedError": "realtimed.errors",
    "RequestTimeoutError": "realtimed.errors",
    "Subscription": "realtimed.client.blocking",
    "broadcast": "realtimed.client.blocking",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # so that it is looked up only once
    return value


def __dir__() -> list[str]:
    return __all__
