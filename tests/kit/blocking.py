"""The real parts and both clients for tests that block: what is async runs in a thread with an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from realtimed import AsyncClient, AsyncSubscription, ChannelMessage, Client, Position, Receipt, RefusedError
from tests.kit.stack import Daemon, free_port, running_caddy, running_daemon

FLAVOURS = ("blocking", "trio", "asyncio")

_RECENT = 600
"""Seconds within which a test has published what it looks at."""


@contextmanager
def daemon_in_thread(directory: Path, *options: str, module: str = "realtimed") -> Iterator[Daemon]:
    """Run the daemon with its sockets in `directory`, or another `module` that takes the same command line."""
    with (
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(running_daemon(directory, *options, module=module)) as daemon,
    ):
        yield daemon


@contextmanager
def caddy_in_thread(directory: Path, daemon: Daemon) -> Iterator[int]:
    """Run Caddy with TLS in front of a daemon; return its port."""
    port = free_port()
    site = f"https://localhost:{port}"
    with (
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(
            running_caddy(
                directory,
                websocket_socket=daemon.websocket_socket,
                environment={"SERVER_ADDRESS": site, "ALLOWED_ORIGINS": site},
            )
        ),
    ):
        yield port


def untimed(message: ChannelMessage | None) -> ChannelMessage:
    """Return a message without its time of publication, which has to be about now."""
    assert message is not None
    assert message.time is not None
    assert abs(message.time - time.time()) < _RECENT
    return message._replace(time=None)


class _PortalSubscription:
    def __init__(self, portal: BlockingPortal, subscription: AsyncSubscription) -> None:
        self._portal = portal
        self._subscription = subscription
        self.positions = subscription.positions
        self.recovered = subscription.recovered

    @property
    def seen(self) -> dict[str, Position]:
        return self._subscription.seen

    def __iter__(self) -> _PortalSubscription:
        return self

    def __next__(self) -> ChannelMessage:
        return self._portal.call(self._subscription.__anext__)


class _PortalClient:
    """An `AsyncClient` that is called like a `Client`."""

    def __init__(self, portal: BlockingPortal, client: AsyncClient) -> None:
        self._portal = portal
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *given, **named: self._portal.call(partial(method, *given, **named))

    def close(self) -> None:
        self._portal.call(self._client.aclose)

    @contextmanager
    def watch(self, *patterns: str) -> Iterator[_PortalSubscription]:
        with self._portal.wrap_async_context_manager(self._client.watch(*patterns)) as subscription:
            yield _PortalSubscription(self._portal, subscription)

    @contextmanager
    def subscribe(
        self, *channels: str, since: Mapping[str, Position] | None = None, last: int | None = None
    ) -> Iterator[_PortalSubscription]:
        subscribing = self._client.subscribe(*channels, since=since, last=last)
        with self._portal.wrap_async_context_manager(subscribing) as subscription:
            yield _PortalSubscription(self._portal, subscription)


class Opener:
    """Opens clients of one flavour, all of which are called like `Client`, and closes them at the end."""

    def __init__(self, portal: BlockingPortal | None) -> None:
        self._portal = portal
        self._opened: list[Client] = []

    def __call__(self, path: Path | str, timeout: float = 5.0) -> Client:
        if self._portal is None:
            client = Client(path, timeout=timeout)
        else:
            client = cast(Client, _PortalClient(self._portal, AsyncClient(path, timeout=timeout)))
        self._opened.append(client)
        return client

    def close(self) -> None:
        for client in self._opened:
            client.close()


@contextmanager
def opener(flavour: str) -> Iterator[Opener]:
    """Give an `Opener` for one of `FLAVOURS`."""
    if flavour == "blocking":
        opening = Opener(None)
        yield opening
        opening.close()
    else:
        with start_blocking_portal(flavour) as portal:
            opening = Opener(portal)
            yield opening
            opening.close()


def offsets(outcomes: list[Receipt | RefusedError]) -> list[int | str]:
    return [outcome.code if isinstance(outcome, RefusedError) else outcome.offset for outcome in outcomes]
