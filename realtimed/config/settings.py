"""Every setting: its default, its unit, its reason, and where its value may come from.

The command line wins, then the environment, then the TOML file. A setting `max_message` is the option
``--max-message``, the variable ``REALTIME_MAX_MESSAGE`` and the key ``max_message`` of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from realtimed.config import readers
from realtimed.config.readers import Address
from realtimed.rpc import address

__all__ = ["SETTINGS", "ChannelRule", "Config", "Setting"]


class ChannelRule(NamedTuple):
    """What is different for the channels whose names match a pattern, in which ``*`` stands for any characters."""

    match: str
    history_size: int
    history_age: float


_T = TypeVar("_T")


def _setting(default: _T, read: Callable[[object], _T], panel: str, help: str) -> _T:
    return field(default=default, metadata={"read": read, "panel": panel, "help": help})


_WHERE: Final = "Where to listen"
_CLIENT: Final = "What one client may do"
_PUBLISHER: Final = "What publishers may do"
_HISTORY: Final = "What is kept for those who come back"
_ALL: Final = "All together"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One consistent configuration. Sizes are bytes, times seconds."""

    socket: Path = _setting(
        Path(address.DEFAULT),
        readers.read_socket,
        _WHERE,
        "Control socket: where publishers send commands; PATH or unix:PATH.",
    )
    websocket: tuple[Address, ...] = _setting(
        (Address(path=Path("/run/realtime-ws.sock")),),
        readers.read_addresses,
        _WHERE,
        "Where WebSockets come in, unix:PATH or HOST:PORT; may be given more than once.",
    )
    socket_mode: int = _setting(0o660, readers.read_mode, _WHERE, "Permissions of the Unix sockets.")
    socket_group: str | None = _setting(
        None, readers.read_group, _WHERE, "Group of the Unix sockets; the process's own if not given."
    )

    http: Address | None = _setting(
        None,
        readers.read_local_address,
        _WHERE,
        "Where /metrics, /healthz and /readyz are served, unix:PATH or a loopback HOST:PORT; nowhere if not given.",
    )

    max_inbound: int = _setting(
        16 * 2**10, readers.read_size, _CLIENT, "Largest message a client may send over its WebSocket."
    )
    inbound_rate: float = _setting(
        50.0, readers.read_rate, _CLIENT, "Frames a client may send each second, in the long run."
    )
    inbound_burst: int = _setting(100, readers.read_count, _CLIENT, "Frames a client may send at once.")
    max_channels: int = _setting(128, readers.read_count, _CLIENT, "Channels a client may be subscribed to.")
    max_backlog: int = _setting(
        2**20, readers.read_size, _CLIENT, "Bytes waiting for a client before it counts as a slow consumer."
    )
    backlog_timeout: float = _setting(
        10.0, readers.read_seconds, _CLIENT, "How long a message may wait for a client that reads slowly."
    )
    handshake_timeout: float = _setting(
        10.0, readers.read_seconds, _CLIENT, "How long a client may take for its handshake."
    )
    heartbeat: float = _setting(
        25.0, readers.read_seconds, _CLIENT, "How often clients are pinged; proxies cut what is silent for 60."
    )
    silence_timeout: float = _setting(
        60.0, readers.read_seconds, _CLIENT, "A client of which nothing is heard for so long is gone."
    )
    close_timeout: float = _setting(5.0, readers.read_seconds, _CLIENT, "How long a client may take to answer a Close.")
    max_age: float | None = _setting(
        None,
        readers.read_seconds,
        _CLIENT,
        "Connections are closed at an age between half of this and this; never if not given.",
    )

    max_message: int = _setting(64 * 2**10, readers.read_size, _PUBLISHER, "Largest message that may be broadcast.")
    command_timeout: float = _setting(
        10.0, readers.read_seconds, _PUBLISHER, "How long a publisher may take over one command."
    )
    allow_user: tuple[int, ...] = _setting(
        (),
        readers.read_users,
        _PUBLISHER,
        "Users, by name or number, who may use the control socket; may be given more than once.",
    )
    allow_group: tuple[int, ...] = _setting(
        (),
        readers.read_groups,
        _PUBLISHER,
        "Groups whose members may use it as well; all who can open it if neither this nor allow-user is given.",
    )

    history_size: int = _setting(
        100, readers.read_count_or_none, _HISTORY, "Publications of a channel that are kept; 0 for none."
    )
    history_age: float = _setting(300.0, readers.read_seconds, _HISTORY, "How long a publication is kept.")
    history_total: int = _setting(
        64 * 2**20,
        readers.read_size_or_none,
        _HISTORY,
        "Bytes of all history; beyond it the oldest is dropped. 0 for none.",
    )
    state_file: Path | None = _setting(
        None,
        readers.read_file,
        _HISTORY,
        "Where history is put at a clean stop, for the next start; nowhere if not given.",
    )
    retry_window: float = _setting(
        300.0,
        readers.read_seconds,
        _HISTORY,
        "How long a broadcast's idempotency key is known, so that a retry is not sent twice.",
    )

    max_connections: int | None = _setting(
        None, readers.read_count, _ALL, "WebSockets at a time; what open files allow if not given."
    )
    max_connections_per_address: int | None = _setting(
        None,
        readers.read_limit_or_none,
        _ALL,
        "WebSockets of one address, or one IPv6 /64, at a time; half of max-connections if not given, 0 for no limit.",
    )
    handshakes_per_address: float = _setting(
        0.0,
        readers.read_rate_or_none,
        _ALL,
        "Handshakes that one address may make each second, in the long run; 0 for no limit.",
    )
    max_subscriptions: int = _setting(200_000, readers.read_count, _ALL, "Subscriptions of all clients together.")
    max_backlog_total: int = _setting(
        256 * 2**20,
        readers.read_size,
        _ALL,
        "Memory for what waits for all clients; beyond it the slowest are disconnected.",
    )
    max_answers_total: int = _setting(
        128 * 2**20,
        readers.read_size,
        _ALL,
        "Memory for what the control socket's connections have not read or not finished sending.",
    )
    max_keys_bytes: int = _setting(
        32 * 2**20, readers.read_size, _ALL, "Memory for idempotency keys; beyond it the oldest is forgotten."
    )
    drain: float = _setting(
        0.0,
        readers.read_seconds_or_none,
        _ALL,
        "Over how long clients are sent away when the daemon stops; 0: all at once.",
    )
    io_uring: str = _setting(
        "auto",
        readers.read_auto_or_off,
        _ALL,
        "Whether the fan-out sends through io_uring where the kernel allows it: auto or off.",
    )
    log_level: str = _setting("info", readers.read_level, _ALL, "How much is logged: debug, info, warning or error.")
    log_format: str | None = _setting(
        None, readers.read_log_format, _ALL, "text, json or journal; if not given, journal under systemd, else text."
    )

    channels: tuple[ChannelRule, ...] = ()

    def problems(self) -> list[str]:
        """Return what is wrong between settings that are right by themselves."""
        found = []
        if self.silence_timeout <= self.heartbeat:
            found.append(
                f"silence-timeout ({self.silence_timeout:g} s) must be longer than heartbeat ({self.heartbeat:g} s),"
                " or every quiet client would be taken for dead"
            )
        if self.state_file is not None and not self.state_file.parent.is_dir():
            found.append(f"state-file is {self.state_file}, but there is no directory {self.state_file.parent}")
        sockets = [address.path for address in self.websocket if address.path is not None]
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
    read: Callable[[object], Any]
    panel: str
    help: str
    default: Any

    @property
    def metavar(self) -> str:
        """The kind of value, as help texts show it."""
        return readers.METAVARS[self.read]

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
