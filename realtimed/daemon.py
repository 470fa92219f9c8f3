"""The daemon: puts the parts together, owns every task, ends cleanly."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Collection, MutableMapping
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from typing import Final, NamedTuple, TypeVar

import trio

from realtimed.broker.base import Broker
from realtimed.broker.local import LocalBroker
from realtimed.config.readers import Address
from realtimed.config.reloading import Reloader
from realtimed.config.settings import Config
from realtimed.control.commands import Context
from realtimed.control.idempotency import KeyedReceipts
from realtimed.control.server import serve_publisher
from realtimed.control.service import WAITING_LIMIT, Service
from realtimed.control.shedding import shed_largest
from realtimed.errors import ConfigurationError
from realtimed.hub.channel import Subscriber
from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.hub.watch import Watcher
from realtimed.net.accepting import ClientFiles, accept
from realtimed.net.backlogs import Backlogs
from realtimed.net.fanout import FanOut
from realtimed.net.listener import SocketListener, listen
from realtimed.net.socket_files import SocketFiles
from realtimed.net.stream import QueuedStream
from realtimed.net.uring import open_ring
from realtimed.process import garbage
from realtimed.process.expiry import drop_expired
from realtimed.process.log_retry import retry_log
from realtimed.process.logs import Event
from realtimed.process.open_files import files_for_clients
from realtimed.process.signals import HEEDED, Signals
from realtimed.process.systemd import Handover, ServiceManager, receive_sockets
from realtimed.state import StateFile
from realtimed.stats import Figures
from realtimed.websocket.drain import Drain
from realtimed.websocket.frames import CLOSE_REASONS
from realtimed.websocket.heartbeat import Heartbeat
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.shedding import shed_slowest
from realtimed.websocket.stream import ClientStream

__all__ = ["Daemon", "run"]

_MARGIN: Final = 5.0
"""Seconds that a stop may exceed the sum of its deadlines on a busy machine."""

_EXPIRED_AT_ONCE: Final = 1000
"""Publications dropped before other tasks get their turn. They take a fraction of a millisecond."""

log = logging.getLogger(__name__)

_S = TypeVar("_S")


class Daemon:
    """One daemon. `serve` runs it; `stop` ends it.

    `reread` returns the current configuration, or raises `ConfigurationError`. The sockets of `handover` replace those
    of the configuration.
    """

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config] | None = None,
        handover: Handover | None = None,
        manager: ServiceManager | None = None,
    ) -> None:
        self.config = config
        self._reloader = Reloader(config, reread or (lambda: config), self._apply)
        self._handover = handover or Handover()
        self._manager = manager or ServiceManager({})
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
            ),
            config=config,
            answers=self.answers,
            until_publishable=self._until_publishable,
            publish_now=self.fan_out.publish_now,
            settle=self.fan_out.settle,
        )
        self.socket_files = SocketFiles([])
        self._state = StateFile(config.state_file) if config.state_file is not None else None
        self._stopping = trio.Event()
        self._drain: Drain
        self._stop_begun = False
        self._everything = trio.CancelScope()
        self._started: Callable[[], None]

    def stop(self) -> None:
        """Begin to end the daemon: `serve` returns when all clients have been sent away and all sockets are closed."""
        self._stopping.set()

    def _stop_now(self) -> None:
        """End without waiting for anybody."""
        self._begin_stop()
        self._drain.finish_now()
        self._everything.cancel()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, and serve until `stop`, SIGTERM or SIGINT.

        Raises `ConfigurationError` if it cannot listen at an address. Nothing is served then.
        """
        # Signals first: when a peer can connect, the daemon can also be stopped.
        with trio.open_signal_receiver(*HEEDED) as received, ExitStack() as stack:
            signals = Signals(received, stop=self.stop, stop_now=self._stop_now, reload=self.reload)
            trio.lowlevel.add_instrument(self.service.turns)
            stack.callback(trio.lowlevel.remove_instrument, self.service.turns)
            async with AsyncExitStack() as resources:
                self._use_io_uring(resources)
                listeners = await signals.unless_stopped(partial(self._open_listeners, resources))
                if listeners is not None:
                    self._started = task_status.started
                    await self._serve(listeners, signals)
        log.info(Event("stopped"))

    # The stages of a life, from the outermost to the innermost. A stop goes from the inside out:
    # 1. `_admit` accepts no more WebSockets.
    # 2. `_accept_all` sends clients away over the time of the drain; meanwhile publishers are served.
    # 3. `_serve_publishers` accepts no more publishers, and lets the last ones finish.
    # 4. `_serve_clients` waits until the last publications have gone out, sends the last clients away, and waits for
    #    their Closes.
    # 5. `_serve` ends what runs in the background, and saves the history.

    async def _serve(self, listeners: _Listeners, signals: Signals) -> None:
        if self._state is not None:
            self._state.load(self.hub)  # its file is gone then: not before it is certain that this daemon serves
        async with trio.open_nursery() as background:
            self._begin_background(background, listeners, signals)
            await self._serve_clients(listeners)
            background.cancel_scope.cancel()
        if self._state is not None:
            await self._state.save(self.hub)  # after a second signal as well: nothing is published any more

    async def _serve_clients(self, listeners: _Listeners) -> None:
        async with trio.open_nursery() as clients:
            await clients.start(self.sessions.run)
            await self._serve_publishers(listeners)
            with trio.move_on_after(self.config.close_timeout):
                await self.fan_out.settle()
            await self._drain.finish()
            with trio.move_on_after(self.config.close_timeout):
                await self.sessions.emptied()
            clients.cancel_scope.cancel()

    async def _serve_publishers(self, listeners: _Listeners) -> None:
        async with trio.open_nursery() as publishers:
            await self._accept_all(listeners, publishers)
            for stream in listeners.control.last_ones():
                publishers.start_soon(serve_publisher, stream, self.service)
            await listeners.control.aclose()
            self.service.stop()
            publishers.cancel_scope.deadline = trio.current_time() + self.config.close_timeout

    async def _accept_all(self, listeners: _Listeners, publishers: trio.Nursery) -> None:
        def serve(stream: QueuedStream) -> None:
            publishers.start_soon(serve_publisher, stream, self.service)

        async with trio.open_nursery() as accepting:
            accepting.start_soon(accept, listeners.control, serve)
            await self._admit(listeners)
            self._begin_stop()
            for listener in listeners.websocket:
                await listener.aclose()
            await self._drain.run()
            accepting.cancel_scope.cancel()

    async def _admit(self, listeners: _Listeners) -> None:
        async with trio.open_nursery() as admitting:
            for listener in listeners.websocket:
                admitting.start_soon(accept, listener, self.sessions.welcome, self.client_files.places)
            self._say_ready(listeners)
            await self._stopping.wait()
            admitting.cancel_scope.cancel()

    def _begin_background(self, background: trio.Nursery, listeners: _Listeners, signals: Signals) -> None:
        if listeners.http is not None:
            background.start_soon(self._serve_http, listeners.http, background)
        background.start_soon(self.figures.loop_lag.run)
        background.start_soon(garbage.look_often)
        background.start_soon(self.fan_out.run)
        background.start_soon(Heartbeat(self.sessions, lambda: self.config).run)
        background.start_soon(shed_slowest, self.sessions, lambda: self.service.connections)
        background.start_soon(shed_largest, self.service)
        background.start_soon(
            drop_expired, partial(self.hub.history.expire, _EXPIRED_AT_ONCE), self.keyed_receipts.forget
        )
        background.start_soon(retry_log)
        background.start_soon(self.socket_files.run)
        background.start_soon(self._manager.watch, self._status)
        background.start_soon(signals.run)
        self._everything = background.cancel_scope

    async def _open_listeners(self, resources: AsyncExitStack) -> _Listeners:
        """Listen at all addresses. The listeners end with `resources`. Raises `ConfigurationError`."""
        begin = partial(self._listen, resources)
        # HTTP starts before the others and ends after them, so that a supervisor sees the daemon stop.
        http = await begin(self.config.http, _http_stream) if self.config.http is not None else None
        addresses = self._handover.websocket or self.config.websocket
        websocket = [await begin(address, self._client_stream) for address in addresses]
        control = await begin(self._handover.control or Address(path=self.config.socket), self._publisher_stream)
        self.figures.websocket = [str(listener.address) for listener in websocket]
        self.figures.http = str(http.address) if http is not None else None
        self.socket_files = SocketFiles([*websocket, control, *([http] if http is not None else [])])
        return _Listeners(websocket, control, http)

    async def _listen(
        self, resources: AsyncExitStack, where: Address | socket.socket, wrap: Callable[[socket.socket], _S]
    ) -> SocketListener[_S]:
        mode, group = self.config.socket_mode, self.config.socket_group
        return await resources.enter_async_context(await listen(where, wrap, mode=mode, group=group))

    def _use_io_uring(self, resources: AsyncExitStack) -> None:
        """Send through io_uring if that is wanted and possible."""
        ring = open_ring() if self.config.io_uring != "off" else None
        if ring is not None:
            resources.callback(ring.close)
            self.hub.deliver = ring
            self.figures.io_uring = True

    def _client_stream(self, sock: socket.socket) -> ClientStream:
        self.client_files.taken += 1
        return self.sessions.client_stream(sock)

    def _publisher_stream(self, sock: socket.socket) -> QueuedStream:
        return QueuedStream(sock, self.answers)

    async def _serve_http(self, listener: SocketListener[trio.SocketStream], nursery: trio.Nursery) -> None:
        # Import these only now: a daemon without HTTP spends no memory on them.
        from realtimed.http.metrics import Exposition, Reading  # noqa: PLC0415
        from realtimed.http.routes import Routes  # noqa: PLC0415
        from realtimed.http.server import serve  # noqa: PLC0415

        loop_lag = self.figures.loop_lag

        def read() -> Reading:
            return Reading(
                self.figures.stats(), CLOSE_REASONS, self.admission.limit, self.fan_out.round_times, loop_lag.times
            )

        await serve(listener, nursery, Routes(self._obstacle, Exposition(read).page))

    def _give_up(self, subscribers: Collection[Subscriber | Watcher]) -> None:
        """End the connections of subscribers that may have missed something, so that they reconnect and ask for it."""
        missed = frozenset(subscribers)
        self.sessions.give_up(missed)
        self.service.give_up(missed)

    def _obstacle(self) -> str | None:
        """Return a clause that says why new clients cannot be served, or None."""
        if self._stopping.is_set():
            return "stopping"
        if self.admission.taken >= self.admission.limit:
            return f"the limit, max-connections, is reached: {self.admission.limit} connections"
        return self.client_files.obstacle or self.socket_files.obstacle

    async def _until_publishable(self) -> None:
        await self.broker.room()
        await self.fan_out.room()
        await self.backlogs.room()

    def reload(self) -> None:
        """Read the configuration again, apply what can be applied, and log the result."""
        if self._stopping.is_set():
            log.info(Event("not reloaded", reason="the daemon is stopping"))
            return
        self._manager.reloading()
        self._reloader.reload()
        self._manager.ready(self._status())

    def _apply(self, config: Config) -> None:
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

    def _begin_stop(self) -> None:
        """Say that the daemon stops, and begin the time of the drain, unless that has been done."""
        if self._stop_begun:
            return
        config = self.config
        log.info(Event("stopping", clients=len(self.sessions.members), drain=config.drain))
        self._drain = Drain(self.sessions, config.drain)
        self._stop_begun = True
        # Publishers, the fan-out and the last clients may each take a close-timeout.
        self._manager.stopping(self._status(), config.drain + 3 * config.close_timeout + _MARGIN)

    def _status(self) -> str:
        if self._stop_begun:
            return f"Stopping: {len(self.sessions.members)} clients left"
        clients, channels = len(self.sessions.members), self.hub.subscribed_channels
        return f"Serving {clients} clients on {channels} channels{self._reloader.note}"

    def _say_ready(self, listeners: _Listeners) -> None:
        log.info(
            Event(
                "ready",
                control=str(listeners.control.address.path),
                websocket=",".join(self.figures.websocket),
                http=self.figures.http,
                max_connections=self.admission.limit,
            )
        )
        self._manager.ready(self._status())
        self._started()


class _Listeners(NamedTuple):
    """The listening sockets."""

    websocket: list[SocketListener[ClientStream]]
    control: SocketListener[QueuedStream]
    http: SocketListener[trio.SocketStream] | None


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


def _http_stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def run(config: Config, reread: Callable[[], Config], environ: MutableMapping[str, str]) -> None:
    """Run a daemon until SIGTERM or SIGINT. At SIGHUP, apply the configuration that `reread` returns.

    Removes from `environ` the variables that a service manager has set for this process.

    Raises `ConfigurationError` if it cannot listen at an address.
    """
    garbage.calm()
    with closing(ServiceManager(environ)) as manager:
        try:
            daemon = Daemon(config, reread, receive_sockets(environ), manager)
            trio.run(daemon.serve)
        except ConfigurationError as error:
            manager.status(str(error).partition("\n")[0])
            raise
