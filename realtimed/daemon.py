"""The daemon: binds its sockets, owns every task, and ends cleanly."""

from __future__ import annotations

import logging
import os
import platform
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from typing import Final, TypeVar

import trio

from realtimed import __version__
from realtimed.config.readers import Address
from realtimed.config.reloading import compare
from realtimed.config.settings import Config
from realtimed.control.commands import Context
from realtimed.control.idempotency import Answered
from realtimed.control.server import Connection
from realtimed.control.service import WAITING_LIMIT, Service
from realtimed.control.shedding import shed_largest
from realtimed.errors import ConfigurationError
from realtimed.hub.history import History, Retention
from realtimed.hub.hub import Hub
from realtimed.net.accepting import ClientRoom, accept
from realtimed.net.admission import Admission
from realtimed.net.backlog import Backlogs
from realtimed.net.fanout import FanOut
from realtimed.net.listener import SocketListener, adopt_listener, open_listener
from realtimed.net.socket_files import SocketFiles
from realtimed.net.stream import QueuedStream
from realtimed.net.uring import SendRing
from realtimed.process import garbage, logs
from realtimed.process.lag import LoopLag
from realtimed.process.logs import Event
from realtimed.process.open_files import connection_limit, files_for_clients
from realtimed.process.systemd import Handover, ServiceManager, receive_sockets
from realtimed.state import StateFile
from realtimed.websocket.drain import Drain
from realtimed.websocket.heartbeat import heartbeat
from realtimed.websocket.protocols import PROTOCOLS
from realtimed.websocket.session import Session
from realtimed.websocket.sessions import Sessions
from realtimed.websocket.shedding import relief
from realtimed.websocket.stream import ClientStream

__all__ = ["Daemon", "run"]

_MARGIN: Final = 5.0
"""Seconds that a stop may take longer than all its deadlines together, on a busy machine."""

_EXPIRY_INTERVAL: Final = 1.0
"""Seconds between two looks for history that has become too old; recovery itself looks at the age exactly."""

_LOG_INTERVAL: Final = 1.0
_LOG_INTERVAL_BEHIND: Final = 0.05
"""Seconds between two looks whether lines of the log are lost, and whether a slow reader of it has made room."""

_EXPIRED_AT_ONCE: Final = 1000
"""Publications dropped before other tasks get their turn: a fraction of a millisecond."""

log = logging.getLogger(__name__)

_S = TypeVar("_S", bound=trio.abc.Stream)
_T = TypeVar("_T")


class Daemon:
    """One running daemon. `serve` is its life; `stop` ends it.

    `reread` returns the configuration as it is now, or raises `ConfigurationError`. The sockets of `handover` take the
    place of those in the configuration.
    """

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config] | None = None,
        handover: Handover | None = None,
        manager: ServiceManager | None = None,
    ) -> None:
        self.config = config
        self._reread = reread or (lambda: config)
        self._handover = handover or Handover()
        self._manager = manager or ServiceManager({})
        self.started = time.time()
        self._started_at = time.monotonic()
        self.history = History(
            limit=config.history_total,
            clock=time.monotonic,
            default=Retention(config.history_size, config.history_age),
            rules=[(rule.match, Retention(rule.history_size, rule.history_age)) for rule in config.channels],
        )
        self.hub = Hub(
            max_message=config.max_message,
            max_channels=config.max_channels,
            max_subscriptions=config.max_subscriptions,
            history=self.history,
            time_ns=time.time_ns,
        )
        self.fan_out = FanOut(self.hub)
        self.backlogs = Backlogs(
            limit=config.max_backlog,
            timeout=config.backlog_timeout,
            total_limit=config.max_backlog_total,
            replays=self.hub.replays,
        )
        self.admission = Admission(*_admission_limits(config), time.monotonic)
        self.sessions = Sessions(self.admission, self.backlogs)
        self.client_room = ClientRoom(files_for_clients())
        self.answers = Backlogs(
            limit=WAITING_LIMIT, timeout=config.backlog_timeout, total_limit=config.max_answers_total
        )
        self._state = StateFile(config.state_file) if config.state_file is not None else None
        self.answered = Answered(config.retry_window, time.monotonic, config.max_keys_bytes)
        self.service = Service(
            Context(self.hub, self.sessions.members, self.stats, self.info, self.answered),
            config,
            self.answers,
            self._room,
            self.fan_out.at_once,
            settle=self.fan_out.settle,
        )
        self.websocket_addresses: list[Address] = []
        self.http_listener: SocketListener[trio.SocketStream] | None = None
        self.socket_files = SocketFiles([])
        self.loop_lag = LoopLag()
        self.io_uring = False
        self._stopping = trio.Event()
        self._drain: Drain | None = None
        self._note = ""
        self._reload_due = False

    def stop(self) -> None:
        """Begin to end the daemon: `serve` returns when all clients have been told and all sockets are closed."""
        self._stopping.set()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, and serve until `stop`, SIGTERM or SIGINT.

        Raises `ConfigurationError` if an address cannot be listened at; nothing is being served then.
        """
        # Signals first: whoever can connect may also believe that the daemon can be stopped.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals, ExitStack() as stack:
            for turns in (self.service.turns, self.sessions.turns):
                trio.lowlevel.add_instrument(turns)
                stack.callback(trio.lowlevel.remove_instrument, turns)
            await self._serve(signals, task_status)

    async def _serve(self, signals: AsyncIterator[int], task_status: trio.TaskStatus[None]) -> None:
        async with AsyncExitStack() as resources, AsyncExitStack() as endpoint, AsyncExitStack() as sockets:
            self._use_io_uring(resources)
            opened = await self._unless_stopped(signals, partial(self._open_listeners, endpoint, sockets))
            if opened is None:
                log.info(Event("stopped"))
                return
            listeners, control = opened
            self.websocket_addresses = [listener.address for listener in listeners]
            http = [self.http_listener] if self.http_listener is not None else []
            self.socket_files = SocketFiles([*listeners, control, *http])
            if self._state is not None:
                self._state.load(self.hub)  # its file is gone then: not before it is certain that this daemon serves
            async with trio.open_nursery() as background:
                if self.http_listener is not None:
                    background.start_soon(self._serve_http, self.http_listener, background)
                background.start_soon(self.loop_lag.run)
                background.start_soon(garbage.look_often)
                background.start_soon(self.fan_out.run)
                background.start_soon(heartbeat, self.sessions, lambda: self.config)
                background.start_soon(relief, self.sessions, lambda: self.service.connections)
                background.start_soon(shed_largest, self.service)
                background.start_soon(self._expire_history)
                background.start_soon(_keep_log_going)
                background.start_soon(self.socket_files.run)
                background.start_soon(self._heed_signals, signals, background.cancel_scope)
                room = self.client_room.room
                async with trio.open_nursery() as clients:
                    async with trio.open_nursery() as publishers:
                        async with trio.open_nursery() as accepting:
                            accepting.start_soon(accept, control, self._serve_publisher, publishers)
                            async with trio.open_nursery() as admitting:
                                for listener in listeners:
                                    admitting.start_soon(accept, listener, self._serve_client, clients, room)
                                self._say_ready(control.address)
                                background.start_soon(self._manager.watch, self._status)
                                task_status.started()
                                await self._stopping.wait()
                                admitting.cancel_scope.cancel()
                            drain = self._begin_drain()
                            for listener in listeners:
                                await listener.aclose()
                            # As long as somebody listens, publishers are served.
                            await drain.run()
                            accepting.cancel_scope.cancel()
                        for stream in control.last_ones():
                            publishers.start_soon(self._serve_publisher, stream)
                        await sockets.aclose()
                        self.service.stop()
                        publishers.cancel_scope.deadline = trio.current_time() + self.config.close_timeout
                    # All commands are answered. What they published goes out before the rest is sent away.
                    with trio.move_on_after(self.config.close_timeout):
                        await self.fan_out.settle()
                    await drain.finish()
                    clients.cancel_scope.deadline = trio.current_time() + self.config.close_timeout
                background.cancel_scope.cancel()
            if self._state is not None:
                await self._state.save(self.hub)  # after a second signal as well: nothing is published any more
        log.info(Event("stopped"))

    async def _open_listeners(
        self, endpoint: AsyncExitStack, sockets: AsyncExitStack
    ) -> tuple[list[SocketListener[ClientStream]], SocketListener[QueuedStream]]:
        """Listen everywhere; return the listeners for WebSockets and the one for publishers. They end with the stacks.

        Raises `ConfigurationError`.
        """
        if self.config.http is not None:
            # It is there before the other listeners and after them: who watches over the daemon sees it stop.
            self.http_listener = await endpoint.enter_async_context(await self._listen(self.config.http, _http_stream))
        listeners = [
            await sockets.enter_async_context(await self._listen(where, self._client_stream))
            for where in self._handover.websocket or self.config.websocket
        ]
        where = self._handover.control or Address(path=self.config.socket)
        return listeners, await sockets.enter_async_context(await self._listen(where, self._publisher_stream))

    async def _unless_stopped(self, signals: AsyncIterator[int], work: Callable[[], Awaitable[_T]]) -> _T | None:
        """Return what `work` returns, or None if SIGTERM or SIGINT cancels it. Raises its `ConfigurationError`."""
        result: _T | None = None
        failure: ConfigurationError | None = None
        async with trio.open_nursery() as nursery:

            async def heed() -> None:
                async for number in signals:
                    log.info(Event("signal", name=signal.Signals(number).name))
                    if number == signal.SIGHUP:
                        self._reload_due = True  # once there is something that can be reloaded
                    else:
                        self.stop()
                        nursery.cancel_scope.cancel()

            nursery.start_soon(heed)
            try:
                result = await work()
            except ConfigurationError as error:  # by hand, or the nursery would wrap it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    def stats(self) -> dict[str, object]:
        """Return what the ``stats`` command shows. Counters count from the start; the others are as of now."""
        return {
            "uptime": round(time.monotonic() - self._started_at, 3),
            "clients": len(self.sessions.members),
            "channels": self.hub.subscribed_channels,
            "subscriptions": self.hub.subscriptions,
            "history_channels": self.history.channels,
            "history_publications": self.history.publications,
            "history_bytes": self.history.bytes,
            "publishers": len(self.service.connections),
            "answers_bytes": self.answers.held,
            "keys": len(self.answered),
            "keys_bytes": self.answered.bytes,
            "watchers": len(self.hub.watchers),
            "backlogged": self.backlogs.streams,
            "backlog_bytes": self.backlogs.held,
            "commands": self.service.commands,
            "commands_refused": sum(self.service.refused.values()),
            "commands_refused_with": dict(sorted(self.service.refused.items())),
            "publications": self.hub.publications,
            "deliveries": self.hub.deliveries,
            "sends": self.hub.sends,
            "sent_bytes": self.hub.sent_bytes,
            "unsent_bytes": self.hub.unsent_bytes,
            "rounds": self.hub.rounds,
            "loop_lag": round(self.loop_lag.latest, 6),
            "connections": self.sessions.connections,
            "handshakes_refused": sum(self.sessions.refused.values()),
            "handshakes_refused_with": {str(code): count for code, count in sorted(self.sessions.refused.items())},
            "handshakes_over_limit": dict(self.admission.refused),
            "log_lines_lost": logs.lines_lost(),
            "closed": {str(int(code)): count for code, count in sorted(self.sessions.closed.items())},
        }

    def info(self) -> dict[str, object]:
        """Return what the ``info`` command shows."""
        config = self.config
        return {
            "version": __version__,
            "python": platform.python_version(),
            "pid": os.getpid(),
            "started": self.started,
            "protocols": ["plain", *PROTOCOLS],
            "allow_user": list(config.allow_user),
            "allow_group": list(config.allow_group),
            "io_uring": self.io_uring,
            "websocket": [str(address) for address in self.websocket_addresses],
            "http": self._http_address(),
            "busiest_address": self._busiest_address(),
            "limits": {
                "max_message": config.max_message,
                "max_inbound": config.max_inbound,
                "inbound_rate": config.inbound_rate,
                "inbound_burst": config.inbound_burst,
                "max_channels": config.max_channels,
                "max_subscriptions": config.max_subscriptions,
                "max_backlog": config.max_backlog,
                "max_backlog_total": config.max_backlog_total,
                "backlog_timeout": config.backlog_timeout,
                "max_answers_total": config.max_answers_total,
                "max_keys_bytes": config.max_keys_bytes,
                "max_connections": self.admission.limit,
                "max_connections_wanted": config.max_connections,
                "max_connections_per_address": self.admission.per_address,
                "handshakes_per_address": self.admission.handshakes,
                "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            },
        }

    def _busiest_address(self) -> dict[str, object] | None:
        """Return which address has most connections, how many, and how many there are of all addresses and of none."""
        busiest = self.admission.busiest
        if busiest is None:
            return None
        return {"address": busiest.name, "connections": busiest.connections, "of": self.admission.taken}

    async def _listen(self, where: Address | socket.socket, wrap: Callable[[socket.socket], _S]) -> SocketListener[_S]:
        if isinstance(where, socket.socket):
            return adopt_listener(where, wrap)
        return await open_listener(where, wrap, mode=self.config.socket_mode, group=self.config.socket_group)

    def _use_io_uring(self, resources: AsyncExitStack) -> None:
        """Let the fan-out send through io_uring, if that is wanted and possible."""
        if self.config.io_uring == "off":
            return
        try:
            ring = SendRing()
        except (OSError, MemoryError) as error:  # MemoryError: ctypes where no memory may be executable
            log.info(Event("io_uring is not used", reason=getattr(error, "strerror", str(error))))
        else:
            resources.callback(ring.close)
            self.hub.deliver = ring
            self.io_uring = True

    def _client_stream(self, sock: socket.socket) -> ClientStream:
        self.client_room.taken += 1
        return ClientStream(
            sock,
            self.backlogs,
            max_inbound=self.config.max_inbound,
            rate=self.config.inbound_rate,
            burst=self.config.inbound_burst,
            turns=self.sessions.turns,
        )

    def _publisher_stream(self, sock: socket.socket) -> QueuedStream:
        return QueuedStream(sock, self.answers)

    # One exception boundary for each connection: the only places that catch everything. What goes wrong inside is
    # a bug, and ends that connection only.

    async def _serve_client(self, stream: ClientStream) -> None:
        session = Session(stream, self.hub, self.config, self.sessions)
        try:
            await session.run()
        except Exception:
            log.exception(Event("internal error", client=session.id))
        finally:
            self.client_room.taken -= 1

    async def _serve_publisher(self, stream: QueuedStream) -> None:
        try:
            await Connection(stream, self.service).run()
        except Exception:
            log.exception(Event("internal error", client="publisher"))

    def _http_address(self) -> str | None:
        return str(self.http_listener.address) if self.http_listener is not None else None

    async def _serve_http(self, listener: SocketListener[trio.SocketStream], nursery: trio.Nursery) -> None:
        # Only now: who does not ask for it spends no memory on it.
        from realtimed.http.metrics import Exposition, Reading  # noqa: PLC0415
        from realtimed.http.server import Endpoint  # noqa: PLC0415

        def read() -> Reading:
            return Reading(self.stats(), self.admission.limit, self.fan_out.round_times, self.loop_lag.times)

        endpoint = Endpoint(self._obstacle, Exposition(read).page)

        async def serve(stream: trio.SocketStream) -> None:
            try:
                await endpoint.serve(stream)
            except Exception:
                log.exception(Event("internal error", client="http"))

        await accept(listener, serve, nursery, endpoint.room)

    def _obstacle(self) -> str | None:
        """Return what keeps newcomers from being served, if there is anything."""
        if self._stopping.is_set():
            return "stopping"
        if self.admission.taken >= self.admission.limit:
            return f"the limit, max-connections, is reached: {self.admission.limit} connections"
        return self.client_room.obstacle or self.socket_files.obstacle

    async def _expire_history(self) -> None:
        """Drop what has become too old, for ever: a little at a time, so that it never holds anyone up."""
        while True:
            await trio.sleep(_EXPIRY_INTERVAL)
            while self.history.expire(_EXPIRED_AT_ONCE) or self.answered.forget():
                await trio.lowlevel.checkpoint()

    async def _room(self) -> None:
        await self.fan_out.room()
        await self.backlogs.room()

    async def _heed_signals(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        """Stop at the first SIGTERM or SIGINT; at the second, without waiting for anyone. SIGHUP means `reload`."""
        if self._reload_due:
            self.reload()
        async for number in signals:
            log.info(Event("signal", name=signal.Signals(number).name))
            if number == signal.SIGHUP:
                self.reload()
            elif not self._stopping.is_set():
                self.stop()
            else:
                (self._drain or self._begin_drain()).finish_now()
                everything.cancel()

    def reload(self) -> None:
        """Read the configuration again and apply what can be applied; log the outcome."""
        if self._stopping.is_set():
            log.info(Event("not reloaded", reason="the daemon is stopping"))
            return
        self._manager.reloading()
        try:
            change = compare(self.config, self._reread())
        except ConfigurationError as error:
            for line in str(error).splitlines():
                log.error(Event("not reloaded", reason=line))
            self._note = f"; not reloaded: {error}".partition("\n")[0]
        else:
            self._apply(change.config)
            applied, waiting = (", ".join(names) for names in (change.applied, change.needs_restart))
            if waiting:
                log.warning(Event("reloaded", applied=applied, needs_restart=waiting))
            else:
                log.info(Event("reloaded", applied=applied, needs_restart=waiting))
            self._note = f"; only a restart applies {waiting}" if waiting else ""
        self._manager.ready(self._status())

    def _apply(self, config: Config) -> None:
        """Let a configuration hold that differs only in what can change. What is read from it when needed follows."""
        self.config = self.service.config = config
        self.hub.max_message, self.hub.max_channels = config.max_message, config.max_channels
        self.hub.max_subscriptions = config.max_subscriptions
        self.hub.watchers.max_patterns = config.max_channels
        self.admission.configure(*_admission_limits(config))
        self.client_room.limit = files_for_clients()
        self.backlogs.limit = config.max_backlog
        self.answered.limit = config.max_keys_bytes
        for backlogs, limit in ((self.backlogs, config.max_backlog_total), (self.answers, config.max_answers_total)):
            backlogs.timeout, backlogs.total_limit = config.backlog_timeout, limit
            backlogs.check()
            backlogs.freed()  # publishers may be waiting for what there is now room for
        for session in self.sessions.members.values():
            session.stream.limits_changed()
        logging.getLogger().setLevel(config.log_level.upper())

    def _begin_drain(self) -> Drain:
        clients, config = len(self.sessions.members), self.config
        log.info(Event("stopping", clients=clients, drain=config.drain))
        # Publishers, the fan-out and the last clients may each take a close-timeout.
        self._drain = Drain(self.sessions, config.drain)
        self._manager.stopping(self._status(), config.drain + 3 * config.close_timeout + _MARGIN)
        return self._drain

    def _status(self) -> str:
        if self._drain is not None:
            return f"Stopping: {len(self.sessions.members)} clients left"
        return f"Serving {len(self.sessions.members)} clients on {self.hub.subscribed_channels} channels{self._note}"

    def _say_ready(self, control: Address) -> None:
        log.info(
            Event(
                "ready",
                control=str(control.path),
                websocket=",".join(map(str, self.websocket_addresses)),
                http=self._http_address(),
                max_connections=self.admission.limit,
            )
        )
        self._manager.ready(self._status())


def _admission_limits(config: Config) -> tuple[int, int | None, float]:
    """Return what `Admission` takes: the limit of connections, those of one address, and its handshakes a second."""
    return (
        connection_limit(config.max_connections),
        config.max_connections_per_address,
        config.handshakes_per_address,
    )


def _http_stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def _keep_log_going() -> None:
    """Write what the reader of the log did not take at once, for ever."""
    while True:
        behind = logs.catch_up()
        await trio.sleep(_LOG_INTERVAL_BEHIND if behind else _LOG_INTERVAL)


def run(config: Config, reread: Callable[[], Config], environ: MutableMapping[str, str]) -> None:
    """Run a daemon until SIGTERM or SIGINT; at SIGHUP, go on with the configuration that `reread` returns.

    The variables in `environ` that are a service manager's word to this process are removed.

    Raises `ConfigurationError` if it cannot listen where it should.
    """
    garbage.calm()
    with closing(ServiceManager(environ)) as manager:
        try:
            daemon = Daemon(config, reread, receive_sockets(environ), manager)
            trio.run(daemon.serve)
        except ConfigurationError as error:
            manager.status(str(error).partition("\n")[0])
            raise
