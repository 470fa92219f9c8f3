"""Every setting: its default, its unit, its reason, and where its value may come from.

The command line wins, then the environment, then the TOML file. A setting `max_message` is the option
``--max-message``, the variable ``REALTIME_MAX_MESSAGE`` and the key ``max_message`` of the file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from realtimed import values
from realtimed.errors import ConfigurationError, printable, quoted
from realtimed.values import Address

__all__ = ["CHANNEL_CHARACTERS", "SETTINGS", "Address", "ChannelRule", "Config", "Setting", "load"]

_FILE_LIMIT: Final = 2**20
"""Bytes of a configuration file."""

_WRONG_SHOWN: Final = 50
"""How many things that are wrong are said at once."""

_LINE_SHOWN: Final = 1000
"""Characters of one of these lines."""


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
        Path("/run/realtime.sock"),
        values.read_socket,
        _WHERE,
        "Control socket: where publishers send commands; PATH or unix:PATH.",
    )
    websocket: tuple[Address, ...] = _setting(
        (Address(path=Path("/run/realtime-ws.sock")),),
        values.read_addresses,
        _WHERE,
        "Where WebSockets come in, unix:PATH or HOST:PORT; may be given more than once.",
    )
    socket_mode: int = _setting(0o660, values.read_mode, _WHERE, "Permissions of the Unix sockets.")
    socket_group: str | None = _setting(
        None, values.read_group, _WHERE, "Group of the Unix sockets; the process's own if not given."
    )

    http: Address | None = _setting(
        None,
        values.read_local_address,
        _WHERE,
        "Where /metrics, /healthz and /readyz are served, unix:PATH or a loopback HOST:PORT; nowhere if not given.",
    )

    max_inbound: int = _setting(
        16 * 2**10, values.read_size, _CLIENT, "Largest message a client may send over its WebSocket."
    )
    inbound_rate: float = _setting(
        50.0, values.read_rate, _CLIENT, "Frames a client may send each second, in the long run."
    )
    inbound_burst: int = _setting(100, values.read_count, _CLIENT, "Frames a client may send at once.")
    max_channels: int = _setting(128, values.read_count, _CLIENT, "Channels a client may be subscribed to.")
    max_backlog: int = _setting(
        2**20, values.read_size, _CLIENT, "Bytes waiting for a client before it counts as a slow consumer."
    )
    backlog_timeout: float = _setting(
        10.0, values.read_seconds, _CLIENT, "How long a message may wait for a client that reads slowly."
    )
    handshake_timeout: float = _setting(
        10.0, values.read_seconds, _CLIENT, "How long a client may take for its handshake."
    )
    heartbeat: float = _setting(
        25.0, values.read_seconds, _CLIENT, "How often clients are pinged; proxies cut what is silent for 60."
    )
    silence_timeout: float = _setting(
        60.0, values.read_seconds, _CLIENT, "A client of which nothing is heard for so long is gone."
    )
    close_timeout: float = _setting(5.0, values.read_seconds, _CLIENT, "How long a client may take to answer a Close.")
    max_age: float | None = _setting(
        None,
        values.read_seconds,
        _CLIENT,
        "Connections are closed at an age between half of this and this; never if not given.",
    )

    max_message: int = _setting(64 * 2**10, values.read_size, _PUBLISHER, "Largest message that may be broadcast.")
    command_timeout: float = _setting(
        10.0, values.read_seconds, _PUBLISHER, "How long a publisher may take over one command."
    )
    allow_user: tuple[int, ...] = _setting(
        (),
        values.read_users,
        _PUBLISHER,
        "Users, by name or number, who may use the control socket; may be given more than once.",
    )
    allow_group: tuple[int, ...] = _setting(
        (),
        values.read_groups,
        _PUBLISHER,
        "Groups whose members may use it as well; all who can open it if neither this nor allow-user is given.",
    )

    history_size: int = _setting(
        100, values.read_count_or_none, _HISTORY, "Publications of a channel that are kept; 0 for none."
    )
    history_age: float = _setting(300.0, values.read_seconds, _HISTORY, "How long a publication is kept.")
    history_total: int = _setting(
        64 * 2**20,
        values.read_size_or_none,
        _HISTORY,
        "Bytes of all history; beyond it the oldest is dropped. 0 for none.",
    )
    state_file: Path | None = _setting(
        None,
        values.read_file,
        _HISTORY,
        "Where history is put at a clean stop, for the next start; nowhere if not given.",
    )
    retry_window: float = _setting(
        300.0,
        values.read_seconds,
        _HISTORY,
        "How long a broadcast's idempotency key is known, so that a retry is not sent twice.",
    )

    max_connections: int | None = _setting(
        None, values.read_count, _ALL, "WebSockets at a time; what open files allow if not given."
    )
    max_connections_per_address: int | None = _setting(
        None,
        values.read_limit_or_none,
        _ALL,
        "WebSockets of one address, or one IPv6 /64, at a time; half of max-connections if not given, 0 for no limit.",
    )
    handshakes_per_address: float = _setting(
        0.0,
        values.read_rate_or_none,
        _ALL,
        "Handshakes that one address may make each second, in the long run; 0 for no limit.",
    )
    max_subscriptions: int = _setting(200_000, values.read_count, _ALL, "Subscriptions of all clients together.")
    max_backlog_total: int = _setting(
        256 * 2**20,
        values.read_size,
        _ALL,
        "Memory for what waits for all clients; beyond it the slowest are disconnected.",
    )
    max_answers_total: int = _setting(
        128 * 2**20,
        values.read_size,
        _ALL,
        "Memory for what the control socket's connections have not read or not finished sending.",
    )
    max_keys_bytes: int = _setting(
        32 * 2**20, values.read_size, _ALL, "Memory for idempotency keys; beyond it the oldest is forgotten."
    )
    drain: float = _setting(
        0.0,
        values.read_seconds_or_none,
        _ALL,
        "Over how long clients are sent away when the daemon stops; 0: all at once.",
    )
    io_uring: str = _setting(
        "auto",
        values.read_auto_or_off,
        _ALL,
        "Whether the fan-out sends through io_uring where the kernel allows it: auto or off.",
    )
    log_level: str = _setting("info", values.read_level, _ALL, "How much is logged: debug, info, warning or error.")
    log_format: str | None = _setting(
        None, values.read_log_format, _ALL, "text, json or journal; if not given, journal under systemd, else text."
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
        return values.METAVARS[self.read]

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

CHANNEL_CHARACTERS: Final = r"A-Za-z0-9_\-=@,.;:/"
"""What channels' names are made of, as a set in a regular expression has it."""

_PATTERN: Final = re.compile(f"[{CHANNEL_CHARACTERS}*]+")

_RULE_READERS: Final = {"history_size": values.read_count_or_none, "history_age": values.read_seconds}


def load(
    options: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Put a configuration together from the command line's `options`, the environment and a TOML `file`.

    Raises `ConfigurationError`, with a line for each thing that is wrong.
    """
    wrong: list[str] = []
    chosen: dict[str, Any] = {}
    rules: list[object] = []

    def take(setting: Setting, value: object, named: str) -> None:
        try:
            chosen[setting.name] = setting.read(value)
        except ValueError as error:
            given = value
            if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
                given = " ".join(value)
            wrong.append(f"{named}: {error}, got {quoted(given)}")

    for key, value in _read_file(file).items() if file is not None else ():
        if key == "channels":
            rules = value if isinstance(value, list) else [value]
        elif key in SETTINGS:
            take(SETTINGS[key], value, f"{key} in {file}")
        else:
            hint = _meant(key, SETTINGS) if len(wrong) < _WRONG_SHOWN else ""
            wrong.append(f"{key} in {file}: there is no such setting{hint}")
    for setting in SETTINGS.values():
        if environ is not None and setting.variable in environ:
            take(setting, environ[setting.variable], setting.variable)
    variables = {setting.variable for setting in SETTINGS.values()}
    # Only what looks like one of ours: other programs' variables may begin in the same way, as Caddy's do.
    strange = [name for name in environ or {} if name.startswith("REALTIME_") and name not in variables][:_WRONG_SHOWN]
    meant = {name: _meant(name, variables) for name in strange}
    wrong += [f"{name}: there is no such variable{hint}" for name, hint in meant.items() if hint]
    for name, value in (options or {}).items():
        take(SETTINGS[name], value, SETTINGS[name].option)
    usual = Config(**chosen)
    chosen["channels"] = tuple(_read_rules(rules, usual, f"channels in {file}", wrong))
    if not wrong:
        config = Config(**chosen)
        wrong = config.problems()
        if not wrong:
            return config
    shown = [_one_line(line) for line in wrong[:_WRONG_SHOWN]]
    if len(wrong) > len(shown):
        shown.append(f"and {len(wrong) - len(shown)} more")
    raise ConfigurationError("\n".join(shown))


def _one_line(text: str) -> str:
    """Return `text` as a line of an error: names in it come from a file or the environment."""
    return printable(text if len(text) <= _LINE_SHOWN else text[:_LINE_SHOWN] + "…")


def _meant(name: str, known: Iterable[str]) -> str:
    """Return what may have been meant by a name that is not known, as the end of a sentence."""
    close = get_close_matches(name.replace("-", "_"), known, 1, 0.85)
    return f"; did you mean {close[0]}?" if close else ""


def _read_rules(rules: list[object], usual: Config, named: str, wrong: list[str]) -> Iterator[ChannelRule]:
    """Read the tables ``[[channels]]``; what one does not say is as usual."""
    for number, rule in enumerate(rules, 1):
        where = f"{named}, number {number}"
        if not isinstance(rule, dict) or not isinstance(rule.get("match"), str):
            wrong.append(f'{where}: expected a table [[channels]] with match = "PATTERN", got {quoted(rule)}')
            continue
        if _PATTERN.fullmatch(rule["match"]) is None:
            wrong.append(f"match in {where}: no channel has such a name, got {quoted(rule['match'])}")
        read: dict[str, Any] = {"history_size": usual.history_size, "history_age": usual.history_age}
        for key, value in rule.items():
            if key in _RULE_READERS:
                try:
                    read[key] = _RULE_READERS[key](value)
                except ValueError as error:
                    wrong.append(f"{key} in {where}: {error}, got {quoted(value)}")
            elif key != "match":
                wrong.append(f"{key} in {where}: there is no such key; there are match, {', '.join(_RULE_READERS)}")
        yield ChannelRule(rule["match"], **read)


def _read_file(file: Path) -> dict[str, object]:
    """Return what a TOML file holds.

    Raises `ConfigurationError`, and does so at once for what is not a file: a FIFO may never end, a device neither.
    """
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a file, but a directory, a FIFO, a device or a socket")
            data = opened.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError(_one_line(f"--config: cannot read {file}: {error.strerror}")) from error
    except ValueError as error:  # a zero byte in the path
        raise ConfigurationError(_one_line(f"--config: cannot read {file}: {error}")) from error
    if len(data) > _FILE_LIMIT:
        raise ConfigurationError(_one_line(f"--config: {file} is larger than {_FILE_LIMIT // 2**20} MiB"))
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise ConfigurationError(_one_line(f"--config: {file} is not valid TOML: {error}")) from error
    except RecursionError:
        raise ConfigurationError(_one_line(f"--config: {file} is nested too deeply")) from None
