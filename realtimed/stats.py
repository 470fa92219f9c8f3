"""The figures of a running daemon: the answers to ``stats`` and ``info``."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass, field

import msgspec

from realtimed import __version__
from realtimed.config.settings import Config
from realtimed.control.service import Service
from realtimed.hub.hub import Hub
from realtimed.net.admission import Admission
from realtimed.process import logs
from realtimed.process.histogram import Histogram
from realtimed.process.lag import LoopLag
from realtimed.process.portions import Portion, SmallPart, TakenPortion, decoded
from realtimed.websocket.protocols import PROTOCOLS
from realtimed.websocket.sessions import Sessions

__all__ = ["Figures", "FiguresPart"]


@dataclass
class Figures:
    """The parts of a daemon that have figures. `config` changes when the daemon reloads it."""

    config: Config
    hub: Hub
    sessions: Sessions
    service: Service = field(init=False)
    """Set once there is a service. Its commands show these figures."""
    loop_lag: LoopLag = field(default_factory=LoopLag)
    websocket: list[str] = field(default_factory=list)
    """The addresses that accept WebSockets."""
    http: str | None = None
    io_uring: bool = False
    started: float = field(default_factory=time.time)
    upgrades: int = 0
    """How many times the service has passed to another process."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def uptime(self) -> float:
        """Seconds since the service began, in this process or in one before it."""
        return time.monotonic() - self._began

    def go_on_from(self, started: float, uptime: float, upgrades: int) -> None:
        """Go on with the figures of the process before this one."""
        self.started, self.upgrades = started, upgrades
        self._began = time.monotonic() - uptime

    @property
    def admission(self) -> Admission:
        """The limits on connections."""
        return self.sessions.admission

    def stats(self) -> dict[str, object]:
        """Return the answer to ``stats``. Counters count from the start; the others are current values."""
        hub, sessions, service = self.hub, self.sessions, self.service
        keyed, backlogs = service.context.keyed_receipts, sessions.backlogs
        return {
            "uptime": round(self.uptime, 3),
            "upgrades": self.upgrades,
            "clients": len(sessions.members),
            "channels": hub.subscribed_channels,
            "subscriptions": hub.subscriptions,
            "history_channels": hub.history.channels,
            "history_publications": hub.history.publications,
            "history_bytes": hub.history.bytes,
            "publishers": len(service.connections),
            "answers_bytes": service.answers.held,
            "keys": len(keyed),
            "keys_bytes": keyed.bytes,
            "watchers": len(hub.watchers),
            "backlogged": backlogs.streams,
            "backlog_bytes": backlogs.held,
            "commands": service.commands,
            "commands_refused": sum(service.refused.values()),
            "commands_refused_with": dict(sorted(service.refused.items())),
            "publications": hub.publications,
            "deliveries": hub.deliveries,
            "sends": hub.sends,
            "sent_bytes": hub.sent_bytes,
            "unsent_bytes": hub.unsent_bytes,
            "rounds": hub.rounds,
            "loop_lag": round(self.loop_lag.latest, 6),
            "connections": sessions.connections,
            "handshakes_refused": sum(sessions.refused.values()),
            "handshakes_refused_with": {str(code): count for code, count in sorted(sessions.refused.items())},
            "handshakes_over_limit": dict(self.admission.refused),
            "log_lines_lost": logs.lines_lost(),
            "closed": {str(int(code)): count for code, count in sorted(sessions.closed.items())},
            "ended": {ending.value: count for ending, count in sessions.ended.items()},
        }

    def info(self) -> dict[str, object]:
        """Return the answer to ``info``."""
        return {
            "version": __version__,
            "python": platform.python_version(),
            "pid": os.getpid(),
            "started": self.started,
            "protocols": ["plain", *PROTOCOLS],
            "allow_user": list(self.config.allow_user),
            "allow_group": list(self.config.allow_group),
            "io_uring": self.io_uring,
            "websocket": self.websocket,
            "http": self.http,
            "busiest_address": self._busiest_address(),
            "limits": self._limits(),
        }

    def _limits(self) -> dict[str, object]:
        config, admission = self.config, self.admission
        return {
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
            "max_connections": admission.limit,
            "max_connections_wanted": config.max_connections,
            "max_connections_per_address": admission.per_address,
            "handshakes_per_address": admission.handshakes,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        }

    def _busiest_address(self) -> dict[str, object] | None:
        """Return the address with the most connections, how many it has, and how many there are in all."""
        busiest = self.admission.busiest
        if busiest is None:
            return None
        return {"address": busiest.name, "connections": busiest.connections, "of": self.admission.taken}


class _Figures(msgspec.Struct):
    """What is handed over of the figures: ages in seconds, counts, and the histograms' counts and sums."""

    uptime: float
    started: float
    upgrades: int
    lag: list[int]
    lag_sum: float
    rounds: list[int]
    rounds_sum: float


class FiguresPart(SmallPart):
    """Hands over the figures that belong to no other part, so that metrics go on."""

    def __init__(self, figures: Figures, round_times: Histogram) -> None:
        self._figures = figures
        self._round_times = round_times

    def rest(self) -> Portion:
        """See `Part`."""
        figures, lag, rounds = self._figures, self._figures.loop_lag.times, self._round_times
        state = _Figures(
            figures.uptime, figures.started, figures.upgrades, lag.counts(), lag.sum, rounds.counts(), rounds.sum
        )
        return Portion(msgspec.msgpack.encode(state))

    def take_rest(self, portion: TakenPortion) -> None:
        """See `Part`."""
        state = decoded(portion.data, _Figures)
        self._figures.go_on_from(state.started, state.uptime, state.upgrades + 1)
        self._figures.loop_lag.times.add(state.lag, state.lag_sum)
        self._round_times.add(state.rounds, state.rounds_sum)
