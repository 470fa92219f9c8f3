"""The core: the parts of the daemon, put together, without a task or a listening socket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

import trio

from realtimed.broker.base import Broker
from realtimed.broker.local import LocalBroker
from realtimed.config.settings import Config
from realtimed.control.boundary import run_connection
from realtimed.control.commands import Context
from realtimed.control.idempotency import KeyedReceipts
from realtimed.control.server import Connection
from realtimed.control.service import WAITING_LIMIT, Service
from realtimed.control.transfer import PublishersPart
from realtimed.errors import RefusedError
from realtimed.hub.channel import Subscriber
from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.transfer import HubPart
from realtimed.hub.watch import Watcher
from realtimed.net.accepting import ClientFiles
from realtimed.net.backlogs import Backlogs
from realtimed.net.fanout import FanOut
from realtimed.net.gate import Gate
from realtimed.net.listener import SocketListener
from realtimed.process.open_files import files_for_clients
from realtimed.process.portions import Part
from realtimed.stats import Figures, FiguresPart
from realtimed.websocket.frames import CLOSE_REASONS
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.transfer import SessionsPart

__all__ = ["Core"]


class Core:
    """The parts, as `config` says. Publishers and whoever connects pass `gate`; clients pass that of the sessions."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gate = Gate()
        self.hub = _make_hub(config)
        self.broker: Broker = LocalBroker(self.hub)
        self.fan_out = FanOut(self.hub, self._give_up)
        self.client_files = ClientFiles(files_for_clients())
        self.sessions = Sessions(config, self.hub, self.client_files.release)
        self.backlogs = self.sessions.backlogs
        self.admission = self.sessions.admission
        self.answers = Backlogs(
            limit=WAITING_LIMIT, timeout=config.backlog_timeout, total_limit=config.max_answers_total
        )
        self.keyed_receipts = KeyedReceipts(config.retry_window, time.monotonic, config.max_keys_bytes)
        self.figures = figures = Figures(config, self.hub, self.sessions)
        self.service = figures.service = Service(
            Context(
                hub=self.hub,
                publish=self.broker.publish_one,
                clients=self.sessions.members,
                disconnect=self.sessions.disconnect,
                stats=figures.stats,
                info=figures.info,
                keyed_receipts=self.keyed_receipts,
                upgrade=self.begin_upgrade,
            ),
            config=config,
            answers=self.answers,
            until_publishable=self._until_publishable,
            publish_now=self.fan_out.publish_now,
            settle=self.fan_out.settle,
            gate=self.gate,
        )
        self.publishers = PublishersPart(self.service, self.keyed_receipts, self.start_publisher)
        self.parts: list[Part] = [
            HubPart(self.hub),
            SessionsPart(self.sessions),
            self.publishers,
            FiguresPart(figures, self.fan_out.round_times),
        ]
        """What is handed over to a successor, in this order."""
        self.accepting_http = trio.CancelScope()
        self.http_over = trio.Event()
        self.publishers_nursery: trio.Nursery
        """Where the connections of publishers run; set while there may be any."""

    def _give_up(self, subscribers: Collection[Subscriber | Watcher]) -> None:
        """End the connections of subscribers that may have missed something, so that they reconnect and ask for it."""
        missed = frozenset(subscribers)
        self.sessions.give_up(missed)
        self.service.give_up(missed)

    async def _until_publishable(self) -> None:
        await self.broker.room()
        await self.fan_out.room()
        await self.backlogs.room()

    def begin_upgrade(self, caller: Subscriber | None) -> None:
        """Begin an upgrade for a caller of the control socket. Raises `RefusedError` if it may not, or cannot begin."""
        raise RefusedError("upgrade_failed", "this daemon has no program of its own")

    def start_publisher(self, connection: Connection) -> None:
        """Serve a publisher's connection."""
        self.publishers_nursery.start_soon(run_connection, connection)

    async def serve_http(self, listener: SocketListener[trio.SocketStream], obstacle: Callable[[], str | None]) -> None:
        """Serve the HTTP endpoint until `accepting_http` is cancelled and all requests have been answered."""
        # Import these only now: a daemon without HTTP spends no memory on them.
        from realtimed.http.metrics import Exposition, Reading  # noqa: PLC0415
        from realtimed.http.routes import Routes  # noqa: PLC0415
        from realtimed.http.server import serve  # noqa: PLC0415

        loop_lag = self.figures.loop_lag

        def read() -> Reading:
            return Reading(
                self.figures.stats(), CLOSE_REASONS, self.admission.limit, self.fan_out.round_times, loop_lag.times
            )

        async with trio.open_nursery() as requests:
            with self.accepting_http:
                await serve(listener, requests, Routes(obstacle, Exposition(read).page), self.gate)
        self.http_over.set()

    def apply(self, config: Config) -> None:
        """Apply a configuration that differs only in settings that can change."""
        self.config = self.service.config = self.figures.config = config
        self.hub.max_message, self.hub.max_channels = config.max_message, config.max_channels
        self.hub.max_subscriptions = config.max_subscriptions
        self.hub.watchers.max_patterns = config.max_channels
        self.sessions.configure(config)
        self.client_files.limit = files_for_clients()
        self.keyed_receipts.limit = config.max_keys_bytes
        self.answers.configure(WAITING_LIMIT, config.backlog_timeout, config.max_answers_total)
        for publisher in self.service.connections:
            publisher.stream.limits_changed()
        logging.getLogger().setLevel(config.log_level.upper())


def _make_hub(config: Config) -> Hub:
    history = History(
        limit=config.history_total,
        clock=time.monotonic,
        default=Retention(config.history_size, config.history_age),
        rules=[(rule.match, Retention(rule.history_size, rule.history_age)) for rule in config.channels],
    )
    return Hub(
        max_message=config.max_message,
        max_channels=config.max_channels,
        max_subscriptions=config.max_subscriptions,
        history=history,
        time_ns=time.time_ns,
    )
