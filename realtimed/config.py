"""Every setting: its default, its unit, its reason, and where its value may come from.

The command line wins, then the environment, then the TOML file. A setting `max_message` is the option
``--max-message``, the variable ``REALTIME_MAX_MESSAGE`` and the key ``max_message`` of the file.
"""

from __future__ import annotations

import errno
import grp
import ipaddress
import math
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from realtimed.errors import ConfigurationError, printable, quoted

__all__ = ["CHANNEL_CHARACTERS", "SETTINGS", "Address", "ChannelRule", "Config", "Setting", "load"]

_SOCKET_PATH_LIMIT: Final = 107
"""Bytes of a Unix socket's path, without the closing zero byte (unix(7), sun_path)."""

_FILE_LIMIT: Final = 2**20
"""Bytes of a configuration file."""

_WRONG_SHOWN: Final = 50
"""How many things that are wrong are said at once."""

_LINE_SHOWN: Final = 1000
"""Characters of one of these lines."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the daemon listens for WebSockets: a Unix socket's `path`, or a TCP `host` and `port`."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ChannelRule(NamedTuple):
    """What is different for the channels whose names match a pattern, in which ``*`` stands for any characters."""

    match: str
    history_size: int
    history_age: float


# Readers: what a text, or a value of the TOML file, means. Each raises ValueError with the rest of the sentence
# "max-message: expected …".


def _path(value: object) -> Path:
    path = _file(value)
    if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
        raise ValueError(f"expected a path of at most {_SOCKET_PATH_LIMIT} bytes, as the kernel allows for a socket")
    return path


def _file(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("expected a path")
    return Path(value).absolute()


_HOST: Final = re.compile(r"[^\s\x00-\x20/?#@\[\]]{1,253}")


def _is_host(name: str) -> bool:
    """Return whether a name is one that the resolver can be asked for."""
    try:
        return _HOST.fullmatch(name) is not None and (name.isascii() or bool(name.encode("idna")))
    except UnicodeError:
        return False


def _address(text: object) -> Address:
    if isinstance(text, str):
        if text.startswith("unix:"):
            return Address(path=_path(text.removeprefix("unix:")))
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if colon and _is_host(host) and port.isascii() and port.isdigit():
            if len(port) <= 5 and int(port) < 65536:
                return Address(host=host, port=int(port))
            raise ValueError("expected a port of at most 65535")
    raise ValueError("expected unix:PATH or HOST:PORT")


def _addresses(value: object) -> tuple[Address, ...]:
    texts = value.split() if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError("expected at least one unix:PATH or HOST:PORT")
    return tuple(_address(text) for text in texts)


def _local_address(value: object) -> Address:
    address = _address(value)
    try:
        local = address.path is not None or ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ValueError("expected unix:PATH, or a loopback address in numbers, such as 127.0.0.1:9180")
    return address


def _mode(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value):
        return int(value.replace("o", ""), 8)
    raise ValueError('expected an octal number such as "0660"')


def _group(value: object) -> str:
    if isinstance(value, str) and value:
        try:
            grp.getgrnam(value)
        except (KeyError, ValueError):  # ValueError: a zero byte
            raise ValueError("expected a group of this system") from None
        return value
    raise ValueError("expected the name of a group")


def _users(value: object) -> tuple[int, ...]:
    return _ids(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def _groups(value: object) -> tuple[int, ...]:
    return _ids(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _ids(value: object, kind: str, find: Callable[[str], int]) -> tuple[int, ...]:
    """Return the numbers of users or groups that are given by name or number."""
    given = str(value).split() if isinstance(value, (str, int)) else value
    if not isinstance(given, (list, tuple)) or not given or isinstance(value, bool):
        raise ValueError(f"expected the name or number of at least one {kind}")
    found = []
    for each in map(str, given):
        try:
            found.append(int(each) if re.fullmatch(r"\d{1,9}", each) else find(each))
        except (KeyError, ValueError):
            raise ValueError(f"expected a {kind} of this system; there is none called {quoted(each)}") from None
    return tuple(found)


_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _size(value: object) -> int:
    match = re.fullmatch(r"(\d{1,12})([KMG]?)(iB)?", str(value)) if not isinstance(value, bool) else None
    if match is None or int(match[1]) == 0:
        raise ValueError("expected a number of bytes above 0, such as 65536 or 64K")
    return int(match[1]) * _UNITS[match[2]]


def _count(value: object) -> int:
    if re.fullmatch(r"\d{1,9}", str(value)) and int(str(value)) > 0 and not isinstance(value, bool):
        return int(str(value))
    raise ValueError("expected a whole number above 0")


def _seconds(value: object) -> float:
    try:
        seconds = float(str(value).removesuffix("s"))
    except ValueError:
        seconds = 0
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError("expected a number of seconds above 0")
    return seconds


def _seconds_or_none(value: object) -> float:
    if re.fullmatch(r"0(\.0*)?s?", str(value)):
        return 0.0
    try:
        return _seconds(value)
    except ValueError:
        raise ValueError("expected a number of seconds, or 0") from None


def _count_or_none(value: object) -> int:
    if str(value) == "0" and not isinstance(value, bool):
        return 0
    try:
        return _count(value)
    except ValueError:
        raise ValueError("expected a whole number, 0 for none") from None


def _size_or_none(value: object) -> int:
    if str(value) == "0" and not isinstance(value, bool):
        return 0
    return _size(value)


def _rate(value: object) -> float:
    try:
        return _seconds(value)
    except ValueError:
        raise ValueError("expected a number above 0") from None


def _rate_or_none(value: object) -> float:
    if re.fullmatch(r"0(\.0*)?", str(value)):
        return 0.0
    try:
        return _rate(value)
    except ValueError:
        raise ValueError("expected a number, 0 for no limit") from None


def _limit_or_none(value: object) -> int:
    try:
        return _count_or_none(value)
    except ValueError:
        raise ValueError("expected a whole number, 0 for no limit") from None


def _level(value: object) -> str:
    if value in ("debug", "info", "warning", "error"):
        return str(value)
    raise ValueError("expected debug, info, warning or error")


def _log_format(value: object) -> str:
    if value in ("text", "json", "journal"):
        return str(value)
    raise ValueError("expected text, json or journal")


def _auto_or_off(value: object) -> str:
    if value in ("auto", "off"):
        return str(value)
    raise ValueError("expected auto or off")


_METAVARS: Final[Mapping[Callable[[object], object], str]] = {
    _path: "PATH",
    _file: "PATH",
    _addresses: "ADDRESS",
    _mode: "MODE",
    _group: "GROUP",
    _users: "USER",
    _groups: "GROUP",
    _local_address: "ADDRESS",
    _size: "BYTES",
    _size_or_none: "BYTES",
    _count: "NUMBER",
    _count_or_none: "NUMBER",
    _rate: "NUMBER",
    _rate_or_none: "NUMBER",
    _limit_or_none: "NUMBER",
    _seconds: "SECONDS",
    _seconds_or_none: "SECONDS",
    _level: "LEVEL",
    _log_format: "FORMAT",
    _auto_or_off: "CHOICE",
}

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
        Path("/run/realtime.sock"), _path, _WHERE, "Control socket: where publishers send commands."
    )
    websocket: tuple[Address, ...] = _setting(
        (Address(path=Path("/run/realtime-ws.sock")),),
        _addresses,
        _WHERE,
        "Where WebSockets come in, unix:PATH or HOST:PORT; may be given more than once.",
    )
    socket_mode: int = _setting(0o660, _mode, _WHERE, "Permissions of the Unix sockets.")
    socket_group: str | None = _setting(
        None, _group, _WHERE, "Group of the Unix sockets; the process's own if not given."
    )

    http: Address | None = _setting(
        None,
        _local_address,
        _WHERE,
        "Where /metrics, /healthz and /readyz are served, unix:PATH or a loopback HOST:PORT; nowhere if not given.",
    )

    max_inbound: int = _setting(16 * 2**10, _size, _CLIENT, "Largest message a client may send over its WebSocket.")
    inbound_rate: float = _setting(50.0, _rate, _CLIENT, "Frames a client may send each second, in the long run.")
    inbound_burst: int = _setting(100, _count, _CLIENT, "Frames a client may send at once.")
    max_channels: int = _setting(128, _count, _CLIENT, "Channels a client may be subscribed to.")
    max_backlog: int = _setting(
        2**20, _size, _CLIENT, "Bytes waiting for a client before it counts as a slow consumer."
    )
    backlog_timeout: float = _setting(
        10.0, _seconds, _CLIENT, "How long a message may wait for a client that reads slowly."
    )
    handshake_timeout: float = _setting(10.0, _seconds, _CLIENT, "How long a client may take for its handshake.")
    heartbeat: float = _setting(
        25.0, _seconds, _CLIENT, "How often clients are pinged; proxies cut what is silent for 60."
    )
    silence_timeout: float = _setting(
        60.0, _seconds, _CLIENT, "A client of which nothing is heard for so long is gone."
    )
    close_timeout: float = _setting(5.0, _seconds, _CLIENT, "How long a client may take to answer a Close.")
    max_age: float | None = _setting(
        None, _seconds, _CLIENT, "Connections are closed at an age between half of this and this; never if not given."
    )

    max_message: int = _setting(64 * 2**10, _size, _PUBLISHER, "Largest message that may be broadcast.")
    command_timeout: float = _setting(10.0, _seconds, _PUBLISHER, "How long a publisher may take over one command.")
    allow_user: tuple[int, ...] = _setting(
        (), _users, _PUBLISHER, "Users, by name or number, who may use the control socket; may be given more than once."
    )
    allow_group: tuple[int, ...] = _setting(
        (),
        _groups,
        _PUBLISHER,
        "Groups whose members may use it as well; all who can open it if neither this nor allow-user is given.",
    )

    history_size: int = _setting(100, _count_or_none, _HISTORY, "Publications of a channel that are kept; 0 for none.")
    history_age: float = _setting(300.0, _seconds, _HISTORY, "How long a publication is kept.")
    history_total: int = _setting(
        64 * 2**20, _size_or_none, _HISTORY, "Bytes of all history; beyond it the oldest is dropped. 0 for none."
    )
    state_file: Path | None = _setting(
        None, _file, _HISTORY, "Where history is put at a clean stop, for the next start; nowhere if not given."
    )
    retry_window: float = _setting(
        300.0, _seconds, _HISTORY, "How long a broadcast's idempotency key is known, so that a retry is not sent twice."
    )

    max_connections: int | None = _setting(
        None, _count, _ALL, "WebSockets at a time; what open files allow if not given."
    )
    max_connections_per_address: int | None = _setting(
        None,
        _limit_or_none,
        _ALL,
        "WebSockets of one address, or one IPv6 /64, at a time; half of max-connections if not given, 0 for no limit.",
    )
    handshakes_per_address: float = _setting(
        0.0, _rate_or_none, _ALL, "Handshakes that one address may make each second, in the long run; 0 for no limit."
    )
    max_subscriptions: int = _setting(200_000, _count, _ALL, "Subscriptions of all clients together.")
    max_backlog_total: int = _setting(
        256 * 2**20, _size, _ALL, "Memory for what waits for all clients; beyond it the slowest are disconnected."
    )
    max_answers_total: int = _setting(
        128 * 2**20,
        _size,
        _ALL,
        "Memory for what the control socket's connections have not read or not finished sending.",
    )
    max_keys_bytes: int = _setting(
        32 * 2**20, _size, _ALL, "Memory for idempotency keys; beyond it the oldest is forgotten."
    )
    drain: float = _setting(
        0.0, _seconds_or_none, _ALL, "Over how long clients are sent away when the daemon stops; 0: all at once."
    )
    io_uring: str = _setting(
        "auto",
        _auto_or_off,
        _ALL,
        "Whether the fan-out sends through io_uring where the kernel allows it: auto or off.",
    )
    log_level: str = _setting("info", _level, _ALL, "How much is logged: debug, info, warning or error.")
    log_format: str | None = _setting(
        None, _log_format, _ALL, "text, json or journal; if not given, journal under systemd, else text."
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
        return _METAVARS[self.read]

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

_RULE_READERS: Final = {"history_size": _count_or_none, "history_age": _seconds}


def load(
    options: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Put a configuration together from the command line's `options`, the environment and a TOML `file`.

    Raises `ConfigurationError`, with a line for each thing that is wrong.
    """
    wrong: list[str] = []
    values: dict[str, Any] = {}
    rules: list[object] = []

    def take(setting: Setting, value: object, named: str) -> None:
        try:
            values[setting.name] = setting.read(value)
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
    usual = Config(**values)
    values["channels"] = tuple(_read_rules(rules, usual, f"channels in {file}", wrong))
    if not wrong:
        config = Config(**values)
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
