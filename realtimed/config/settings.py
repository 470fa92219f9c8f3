"""Every setting: its default, its unit, what it is for, and the kind of values that it takes.

A new setting is one field of `Config`. The command line, the environment, the file and the documentation's table follow
from it; `realtimed.config.reloading` says whether it can change while the daemon runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from realtimed.config import readers
from realtimed.config.readers import Address, Reader
from realtimed.rpc import address

__all__ = ["SETTINGS", "ChannelRule", "Config", "Setting"]


class ChannelRule(NamedTuple):
    """History settings for channels whose names match a pattern, in which ``*`` stands for any characters."""

    match: str
    history_size: int
    history_age: float


_T = TypeVar("_T")


def _setting(default: _T, read: Reader[_T], panel: str, help: str) -> _T:
    """Return a field of `Config`. In the help its option stands under the heading `panel`."""
    return field(default=default, metadata={"read": read, "panel": panel, "help": help})


_WHERE: Final = "Where to listen"
_CLIENT: Final = "Limits of one client"
_PUBLISHER: Final = "Publishers"
_HISTORY: Final = "History and retries"
_ALL: Final = "The whole daemon"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One consistent configuration. Sizes are bytes, times seconds, rates per second."""

    socket: Path = _setting(
        Path(address.DEFAULT),
        readers.SOCKET,
        _WHERE,
        "Control socket, where publishers send commands: PATH or unix:PATH.",
    )
    websocket: tuple[Address, ...] = _setting(
        (Address(path=Path("/run/realtime-ws.sock")),),
        readers.ADDRESSES,
        _WHERE,
        "Where WebSockets are accepted: unix:PATH or HOST:PORT; may be given more than once.",
    )
    socket_mode: int = _setting(0o660, readers.MODE, _WHERE, "Permissions of the Unix sockets.")
    socket_group: str | None = _setting(
        None, readers.GROUP, _WHERE, "Group of the Unix sockets; if not given, the process's own."
    )
    http: Address | None = _setting(
        None,
        readers.LOCAL_ADDRESS,
        _WHERE,
        "Where /metrics, /healthz and /readyz are served: unix:PATH or a loopback HOST:PORT; if not given, nowhere.",
    )

    max_inbound: int = _setting(
        16 * 2**10, readers.SIZE, _CLIENT, "Largest message that a client may send over its WebSocket."
    )
    inbound_rate: float = _setting(
        50.0, readers.RATE, _CLIENT, "Frames that a client may send each second, in the long run."
    )
    inbound_burst: int = _setting(100, readers.COUNT, _CLIENT, "Frames that a client may send at once.")
    max_channels: int = _setting(128, readers.COUNT, _CLIENT, "Channels that a client may be subscribed to.")
    max_backlog: int = _setting(
        2**20,
        readers.SIZE,
        _CLIENT,
        "Memory for messages that wait for a client; one that needs more is a slow consumer.",
    )
    backlog_timeout: float = _setting(
        10.0, readers.TIME, _CLIENT, "How long a message may wait for a client that reads slowly."
    )
    handshake_timeout: float = _setting(10.0, readers.TIME, _CLIENT, "How long a client's handshake may take.")
    heartbeat: float = _setting(
        25.0, readers.TIME, _CLIENT, "How often clients are pinged; proxies often cut a connection silent for 60 s."
    )
    silence_timeout: float = _setting(
        60.0, readers.TIME, _CLIENT, "A client that sends nothing for this long is disconnected."
    )
    close_timeout: float = _setting(5.0, readers.TIME, _CLIENT, "How long a client may take to answer a Close.")
    max_age: float | None = _setting(
        None,
        readers.TIME,
        _CLIENT,
        "Connections are closed at a random age between half of this and this; if not given, never.",
    )

    max_message: int = _setting(64 * 2**10, readers.SIZE, _PUBLISHER, "Largest message that may be broadcast.")
    command_timeout: float = _setting(
        10.0, readers.TIME, _PUBLISHER, "How long a publisher may take to send one command."
    )
    allow_user: tuple[int, ...] = _setting(
        (),
        readers.USERS,
        _PUBLISHER,
        "Users, by name or number, that may use the control socket; may be given more than once.",
    )
    allow_group: tuple[int, ...] = _setting(
        (),
        readers.GROUPS,
        _PUBLISHER,
        "Groups whose members may use it as well; without this and allow-user, everyone who can open it may.",
    )

    history_size: int = _setting(
        100, readers.COUNT_OR_ZERO, _HISTORY, "Publications kept for each channel; 0 for none."
    )
    history_age: float = _setting(300.0, readers.TIME, _HISTORY, "How long a publication is kept.")
    history_total: int = _setting(
        64 * 2**20,
        readers.SIZE_OR_ZERO,
        _HISTORY,
        "Memory for the history of all channels; beyond it the oldest publications are dropped. 0 for no history.",
    )
    state_file: Path | None = _setting(
        None,
        readers.FILE,
        _HISTORY,
        "Where history is saved at a clean stop, for the next start; if not given, nowhere.",
    )
    retry_window: float = _setting(
        300.0,
        readers.TIME,
        _HISTORY,
        "How long a broadcast's idempotency key is remembered, so that a retry is not sent twice.",
    )

    max_connections: int | None = _setting(
        None, readers.COUNT, _ALL, "WebSockets at a time; if not given, what the limit of open files allows."
    )
    max_connections_per_address: int | None = _setting(
        None,
        readers.LIMIT_OR_ZERO,
        _ALL,
        "WebSockets at a time from one address or IPv6 /64; if not given, half of max-connections; 0 for no limit.",
    )
    handshakes_per_address: float = _setting(
        0.0,
        readers.RATE_OR_ZERO,
        _ALL,
        "Handshakes that one address may make each second, in the long run; 0 for no limit.",
    )
    max_subscriptions: int = _setting(200_000, readers.COUNT, _ALL, "Subscriptions of all clients together.")
    max_backlog_total: int = _setting(
        256 * 2**20,
        readers.SIZE,
        _ALL,
        "Memory for messages that wait for all clients; beyond it the slowest are disconnected.",
    )
    max_answers_total: int = _setting(
        128 * 2**20,
        readers.SIZE,
        _ALL,
        "Memory for answers that publishers have not read, and for commands that they have not finished sending.",
    )
    max_keys_bytes: int = _setting(
        32 * 2**20, readers.SIZE, _ALL, "Memory for idempotency keys; beyond it the oldest are forgotten."
    )
    drain: float = _setting(
        0.0,
        readers.TIME_OR_ZERO,
        _ALL,
        "Time over which a stop spreads its disconnects; 0 for all at once.",
    )
    io_uring: str = _setting(
        "auto",
        readers.AUTO_OR_OFF,
        _ALL,
        "Whether messages are sent through io_uring where the kernel allows it: auto or off.",
    )
    log_level: str = _setting(
        "info", readers.LOG_LEVEL, _ALL, "The lowest level that is logged: debug, info, warning or error."
    )
    log_format: str | None = _setting(
        None, readers.LOG_FORMAT, _ALL, "text, json or journal; if not given, journal under systemd, else text."
    )

    channels: tuple[ChannelRule, ...] = ()
    """Only in the file, as tables; the first one that matches a channel's name holds."""

    def problems(self) -> list[str]:
        """Return a line for each way in which settings, each right by itself, contradict each other."""
        found = []
        if self.silence_timeout <= self.heartbeat:
            found.append(
                f"silence-timeout ({self.silence_timeout:g} s) must be longer than heartbeat ({self.heartbeat:g} s),"
                " or every quiet client would be taken for dead"
            )
        if self.state_file is not None and not self.state_file.parent.is_dir():
            found.append(f"state-file is {self.state_file}, but there is no directory {self.state_file.parent}")
        sockets = [each.path for each in self.websocket if each.path is not None]
        if self.socket in sockets:
            found.append(f"socket and websocket are both {self.socket}; each needs a path of its own")
        if self.http is not None and self.http.path is not None and self.http.path in [self.socket, *sockets]:
            found.append(f"http has the path of another socket, {self.http.path}; it needs one of its own")
        if self.http is not None and self.http.path is None and self.http in self.websocket and self.http.port:
            found.append(f"http and websocket are both {self.http}; each needs an address of its own")
        if len(set(self.websocket)) != len(self.websocket):
            found.append("websocket names the same address twice")
        if self.max_backlog < self.max_message:
            found.append(
                f"max-backlog ({self.max_backlog}) must not be below max-message ({self.max_message}),"
                " or one message would make every client a slow consumer"
            )
        return found


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as the command line and the documentation see it."""

    name: str
    read: Reader[Any]
    panel: str
    help: str
    default: Any

    @property
    def metavar(self) -> str:
        """The kind of value, as help texts show it."""
        return self.read.metavar

    @property
    def shown_default(self) -> str:
        """The default as it may be given, or an empty string if there is none."""
        return "" if self.default in (None, ()) else self.read.show(self.default)

    @property
    def option(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "REALTIME_" + self.name.upper()


SETTINGS: Final[Mapping[str, Setting]] = {
    each.name: Setting(each.name, each.metadata["read"], each.metadata["panel"], each.metadata["help"], each.default)
    for each in fields(Config)
    if each.metadata
}
