"""The daemon: puts the parts together, owns every task, ends cleanly."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from typing import Final

import trio

from realtimed import __version__
from realtimed.config.readers import Address
from realtimed.config.reloading import Reloader
from realtimed.config.settings import Config
from realtimed.control.boundary import serve_publisher
from realtimed.control.shedding import shed_largest
from realtimed.core import Core
from realtimed.errors import ConfigurationError, RefusedError
from realtimed.hub.channel import Subscriber
from realtimed.net.accepting import accept
from realtimed.net.listeners import Listeners, Places, Wraps, open_listeners
from realtimed.net.socket_files import SocketFiles
from realtimed.net.stream import QueuedStream
from realtimed.net.uring import open_ring
from realtimed.process import garbage
from realtimed.process.expiry import drop_expired
from realtimed.process.log_retry import retry_log
from realtimed.process.logs import Event
from realtimed.process.portions import HandOverError
from realtimed.process.signals import HEEDED, Signals
from realtimed.process.successor import Predecessor
from realtimed.process.systemd import Handover, ServiceManager, receive_sockets
from realtimed.state import StateFile
from realtimed.upgrade import HandOver, Report, TakeOver
from realtimed.websocket.drain import Drain
from realtimed.websocket.heartbeat import Heartbeat
from realtimed.websocket.shedding import shed_slowest
from realtimed.websocket.stream import ClientStream

__all__ = ["Daemon", "run"]

_MARGIN: Final = 5.0
"""Seconds that a stop may exceed the sum of its deadlines on a busy machine."""

_EXPIRED_AT_ONCE: Final = 1000
"""Publications dropped before other tasks get their turn. They take a fraction of a millisecond."""

log = logging.getLogger(__name__)


class Daemon(Core):
    """One daemon. `serve` runs it; `stop` ends it, and so does `upgrade`, which leaves everything to another process.

    `reread` returns the current configuration, or raises `ConfigurationError`. The sockets of `handover` replace those
    of the configuration. With a `predecessor` it takes over everything from that process. `environ` is the environment
    for a successor.
    """

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config] | None = None,
        handover: Handover | None = None,
        manager: ServiceManager | None = None,
        predecessor: Predecessor | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__(config)
        self._environ = environ
        self._take_over = TakeOver(predecessor) if predecessor is not None else None
        self._listeners: Listeners
        self._hand_over: HandOver | None = None
        self._upgrading = trio.CancelScope()
        self._upgrade_asked = False
        self._reloader = Reloader(config, reread or (lambda: config), self.apply)
        self._handover = handover or Handover()
        self._manager = manager or ServiceManager({})
        self.socket_files = SocketFiles([])
        self._state = StateFile(config.state_file) if config.state_file is not None else None
        self._stopping = trio.Event()
        self._drain: Drain
        self._stop_begun = False
        self._everything = trio.CancelScope()
        self._started: Callable[[], None]

    def stop(self) -> None:
        """Begin to end the daemon: `serve` returns when all clients have been sent away and all sockets are closed."""
        self._upgrading.cancel()
        self._stopping.set()

    def _stop_now(self) -> None:
        """End without waiting for anybody."""
        if not self._given:
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
                    self._listeners = listeners
                    self._started = task_status.started
                    await self._serve(listeners, signals)
        if not self._given:  # otherwise the log of the process in which the service goes on would end with it
            log.info(Event("stopped"))

    # The stages of a life, from the outermost to the innermost. A stop goes from the inside out:
    # 1. `_admit` accepts no more WebSockets.
    # 2. `_accept_all` sends clients away over the time of the drain; meanwhile publishers are served.
    # 3. `_serve_publishers` accepts no more publishers, and lets the last ones finish.
    # 4. `_serve_clients` waits until the last publications have gone out, sends the last clients away, and waits for
    #    their Closes.
    # 5. `_serve` ends what runs in the background, and saves the history.
    #
    # After an upgrade it is the same way, but nobody is sent away, nothing is saved, and the sockets' files stay: this
    # process only waits for what was not handed over, the connections that are ending.

    @property
    def _given(self) -> bool:
        """Whether everything belongs to a successor."""
        return self._hand_over is not None and self._hand_over.given

    async def _serve(self, listeners: Listeners, signals: Signals) -> None:
        if self._state is not None and self._take_over is None:
            self._state.load(self.hub)  # its file is gone then: not before it is certain that this daemon serves
        async with trio.open_nursery() as background:
            self._begin_background(background, listeners, signals)
            await self._serve_clients(listeners)
            if self._given and listeners.http is not None:
                await self.http_over.wait()  # requests have deadlines
            background.cancel_scope.cancel()
        if self._state is not None and not self._given:
            await self._state.save(self.hub)  # after a second signal as well: nothing is published any more

    async def _serve_clients(self, listeners: Listeners) -> None:
        async with trio.open_nursery() as clients:
            await clients.start(self.sessions.run)
            await self._serve_publishers(listeners)
            if not self._given:
                with trio.move_on_after(self.config.close_timeout):
                    await self.fan_out.settle()
                await self._drain.finish()
            with trio.move_on_after(self.config.close_timeout):
                await self.sessions.emptied()
            clients.cancel_scope.cancel()

    async def _serve_publishers(self, listeners: Listeners) -> None:
        async with trio.open_nursery() as publishers:
            self.publishers_nursery = publishers
            await self._accept_all(listeners, publishers)
            for stream in listeners.control.last_ones():
                publishers.start_soon(serve_publisher, stream, self.service)
            await listeners.control.aclose()
            if not self._given:
                self.service.stop()
            publishers.cancel_scope.deadline = trio.current_time() + self.config.close_timeout

    async def _accept_all(self, listeners: Listeners, publishers: trio.Nursery) -> None:
        def serve(stream: QueuedStream) -> None:
            publishers.start_soon(serve_publisher, stream, self.service)

        async with trio.open_nursery() as accepting:
            if self._take_over is not None:
                self._report(self._take_over.run(self.parts))
            accepting.start_soon(partial(accept, listeners.control, serve, gate=self.gate))
            await self._admit(listeners)
            if not self._given:
                self._begin_stop()
            for listener in listeners.websocket:
                await listener.aclose()
            if not self._given:
                await self._drain.run()
            accepting.cancel_scope.cancel()

    async def _admit(self, listeners: Listeners) -> None:
        async with trio.open_nursery() as admitting:
            for listener in listeners.websocket:
                admitting.start_soon(accept, listener, self.sessions.welcome, self.client_files.places, self.gate)
            self._say_ready(listeners)
            await self._stopping.wait()
            admitting.cancel_scope.cancel()

    def _begin_background(self, background: trio.Nursery, listeners: Listeners, signals: Signals) -> None:
        if listeners.http is not None:
            background.start_soon(self.serve_http, listeners.http, self._obstacle)
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
        self._background = background

    async def _open_listeners(self, resources: AsyncExitStack) -> Listeners:
        """Listen at all addresses. The listeners end with `resources`. Raises `ConfigurationError`."""
        wraps = Wraps(self._client_stream, self._publisher_stream, _http_stream)
        listeners = await open_listeners(self._places(), self.config, wraps, resources)
        self.figures.websocket = [str(listener.address) for listener in listeners.websocket]
        self.figures.http = str(listeners.http.address) if listeners.http is not None else None
        self.socket_files = SocketFiles([listener for _, listener in listeners.by_role()])
        return listeners

    def _places(self) -> Places:
        """Return where to listen."""
        if self._take_over is not None:
            return Places(*self._take_over.receive_sockets(self.config))
        websocket, control = self._handover.websocket, self._handover.control
        return Places(websocket or self.config.websocket, control or Address(path=self.config.socket), self.config.http)

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

    def _report(self, report: Report) -> None:
        """Log what has happened, and tell it to whoever has asked for the upgrade."""
        clients, publishers = len(self.sessions.members), self.publishers.taken
        outcome = {"pid": os.getpid(), "version": __version__, "clients": clients, "publishers": publishers}
        self.publishers.report({**report._asdict(), **outcome})
        log.info(
            Event(
                "taken over",
                pid=os.getpid(),
                former_pid=report.former_pid,
                version=__version__,
                former_version=report.former_version,
                pause=report.pause,
                seconds=report.seconds,
                clients=clients,
                publishers=publishers,
            )
        )

    # Upgrades.

    def begin_upgrade(self, caller: Subscriber | None) -> None:
        """See `Core`. Only root and the daemon's own user may."""
        credentials = caller.peer_credentials() if isinstance(caller, QueuedStream) else None
        if credentials is None or credentials[1] not in (0, os.geteuid()):
            raise RefusedError("not_allowed", f"only root and the daemon's own user, {os.geteuid()}, may upgrade it")
        if self._stopping.is_set() or self._upgrade_asked:
            reason = "the daemon is stopping" if self._stopping.is_set() else "another upgrade is under way"
            raise RefusedError("upgrade_failed", reason)
        self._upgrade_asked = True
        self._background.start_soon(self._upgrade)

    async def _upgrade(self) -> None:
        try:
            await self.upgrade()
        except HandOverError as error:
            self._upgrade_asked = False
            for connection in self.service.connections:
                connection.refuse_upgrade(str(error))

    async def upgrade(self) -> None:
        """Leave everything to a new process. Raises `HandOverError` if that fails: then this one goes on."""
        if self._stopping.is_set():
            raise HandOverError("the daemon is stopping")
        if self._hand_over is not None:
            raise HandOverError("another upgrade is under way")
        log.info(Event("upgrading"))
        self._hand_over = HandOver(
            self._environ,
            config=self.config,
            listeners=self._listeners,
            parts=self.parts,
            gates=[self.gate, self.sessions.gate],
            settle=self.fan_out.settle,
            announce=self._manager.announce,
            adopted=self._handover.control is not None,
        )
        try:
            with trio.CancelScope() as self._upgrading:
                pid = await self._hand_over.run()
            if self._upgrading.cancelled_caught:
                raise HandOverError("the daemon is stopping")
        except HandOverError as error:
            log.warning(Event("not upgraded", reason=str(error)))
            raise
        finally:
            if not self._given:
                self._hand_over = None
        self.sessions.gate.open()  # for those that are ending
        self._manager.close()
        self.accepting_http.cancel()
        self._stopping.set()
        log.info(Event("handed over", pid=pid, clients_left=self.sessions.open))

    def _obstacle(self) -> str | None:
        """Return a clause that says why new clients cannot be served, or None."""
        if self._stopping.is_set():
            return "stopping"
        if self.admission.taken >= self.admission.limit:
            return f"the limit, max-connections, is reached: {self.admission.limit} connections"
        return self.client_files.obstacle or self.socket_files.obstacle

    def reload(self) -> None:
        """Read the configuration again, apply what can be applied, and log the result."""
        if self._stopping.is_set():
            log.info(Event("not reloaded", reason="the daemon is stopping"))
            return
        self._manager.reloading()
        self._reloader.reload()
        self._manager.ready(self._status())

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

    def _say_ready(self, listeners: Listeners) -> None:
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


def _http_stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def run(
    config: Config,
    reread: Callable[[], Config],
    environ: MutableMapping[str, str],
    predecessor: Predecessor | None = None,
) -> None:
    """Run a daemon until SIGTERM or SIGINT. At SIGHUP, apply the configuration that `reread` returns.

    With a `predecessor`, take over from it.

    Removes from `environ` the variables that a service manager has set for this process.

    Raises `ConfigurationError` if it cannot listen at an address.
    """
    garbage.calm()
    environment = dict(environ)  # for a successor: the variables of this process are taken out of the other
    with closing(ServiceManager(environ)) as manager:
        try:
            daemon = Daemon(config, reread, receive_sockets(environ), manager, predecessor, environment)
            trio.run(daemon.serve)
        except ConfigurationError as error:
            manager.status(str(error).partition("\n")[0])
            raise
