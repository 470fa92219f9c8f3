"""What the text of a setting means, or its value in a TOML file: a reader for each kind of value."""

from __future__ import annotations

import grp
import ipaddress
import math
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from realtimed.config.units import as_rate, as_seconds, as_size
from realtimed.rpc import address
from realtimed.text import quoted

__all__ = [
    "METAVARS",
    "Address",
    "read_addresses",
    "read_auto_or_off",
    "read_count",
    "read_count_or_none",
    "read_file",
    "read_group",
    "read_groups",
    "read_level",
    "read_limit_or_none",
    "read_local_address",
    "read_log_format",
    "read_mode",
    "read_rate",
    "read_rate_or_none",
    "read_seconds",
    "read_seconds_or_none",
    "read_size",
    "read_size_or_none",
    "read_socket",
    "read_users",
]


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


# Each reader raises ValueError with the rest of the sentence "max-message: expected …".


def read_socket(value: object) -> Path:
    """Read the path of a Unix socket, written PATH or unix:PATH."""
    fault = address.fault(value) if isinstance(value, str) else "that is not the path of a socket"
    if fault is not None:
        raise ValueError(f"expected PATH or unix:PATH; {fault}")
    return Path(address.plain(str(value))).absolute()


def read_file(value: object) -> Path:
    """Read a path."""
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
        if text.startswith(("unix:", "unix/", "/", "./", "../")):
            return Address(path=read_socket(text))
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if colon and _is_host(host) and port.isascii() and port.isdigit():
            if len(port) <= 5 and int(port) < 65536:
                return Address(host=host, port=int(port))
            raise ValueError("expected a port of at most 65535")
    raise ValueError("expected unix:PATH or HOST:PORT")


def read_addresses(value: object) -> tuple[Address, ...]:
    """Read addresses, each unix:PATH, /PATH or HOST:PORT."""
    texts = value.split() if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError("expected at least one unix:PATH or HOST:PORT")
    return tuple(_address(text) for text in texts)


def read_local_address(value: object) -> Address:
    """Read an address that cannot be reached from other machines."""
    address = _address(value)
    try:
        local = address.path is not None or ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ValueError("expected unix:PATH, or a loopback address in numbers, such as 127.0.0.1:9180")
    return address


def read_mode(value: object) -> int:
    """Read a file's permissions."""
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value):
        return int(value.replace("o", ""), 8)
    raise ValueError('expected an octal number such as "0660"')


def read_group(value: object) -> str:
    """Read the name of a group."""
    if isinstance(value, str) and value:
        try:
            grp.getgrnam(value)
        except (KeyError, ValueError):  # ValueError: a zero byte
            raise ValueError("expected a group of this system") from None
        return value
    raise ValueError("expected the name of a group")


def read_users(value: object) -> tuple[int, ...]:
    """Read users; return their numbers."""
    return _ids(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def read_groups(value: object) -> tuple[int, ...]:
    """Read groups; return their numbers."""
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


_SIZE_LIMIT: Final = 2**62

_A_SIZE: Final = "a number of bytes above 0, such as 65536, 64K, 64KiB, 1.5M or 2G"
_A_TIME: Final = "a number of seconds above 0, or a time such as 500ms, 90s, 5m, 12h, 7d or 1h30m"


def read_size(value: object) -> int:
    """Read a number of bytes above 0."""
    try:
        size = as_size(value)
    except ValueError:
        size = 0
    if not 0 < size < _SIZE_LIMIT:
        raise ValueError(f"expected {_A_SIZE}")
    return size


def read_size_or_none(value: object) -> int:
    """Read a number of bytes, or 0."""
    return 0 if _is_nothing(value, as_size) else read_size(value)


def read_seconds(value: object) -> float:
    """Read a time above 0, in seconds."""
    try:
        seconds = as_seconds(value)
    except ValueError:
        seconds = 0
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"expected {_A_TIME}")
    return seconds


def read_seconds_or_none(value: object) -> float:
    """Read a time in seconds, or 0."""
    if _is_nothing(value, as_seconds):
        return 0.0
    try:
        return read_seconds(value)
    except ValueError:
        raise ValueError(f"expected {_A_TIME}; or 0") from None


def _is_nothing(value: object, read: Callable[[object], float]) -> bool:
    try:
        return read(value) == 0
    except ValueError:
        return False


def read_count(value: object) -> int:
    """Read a whole number above 0."""
    if re.fullmatch(r"\d{1,9}", str(value)) and int(str(value)) > 0 and not isinstance(value, bool):
        return int(str(value))
    raise ValueError("expected a whole number above 0")


def read_count_or_none(value: object) -> int:
    """Read a whole number, or 0 for none."""
    if str(value) == "0" and not isinstance(value, bool):
        return 0
    try:
        return read_count(value)
    except ValueError:
        raise ValueError("expected a whole number, 0 for none") from None


def read_rate(value: object) -> float:
    """Read a number a second above 0."""
    try:
        rate = as_rate(value)
    except ValueError:
        rate = 0
    if not math.isfinite(rate) or rate <= 0:
        raise ValueError("expected a number above 0 for each second, such as 50, 0.5, 50/s or 30/m")
    return rate


def read_rate_or_none(value: object) -> float:
    """Read a number a second, or 0."""
    if _is_nothing(value, as_rate):
        return 0.0
    try:
        return read_rate(value)
    except ValueError:
        raise ValueError("expected a number for each second, such as 5, 0.5, 5/s or 30/m; 0 for no limit") from None


def read_limit_or_none(value: object) -> int:
    """Read a whole number, or 0 for no limit."""
    try:
        return read_count_or_none(value)
    except ValueError:
        raise ValueError("expected a whole number, 0 for no limit") from None


def read_level(value: object) -> str:
    """Read the level of a log."""
    if value in ("debug", "info", "warning", "error"):
        return str(value)
    raise ValueError("expected debug, info, warning or error")


def read_log_format(value: object) -> str:
    """Read the form of a log."""
    if value in ("text", "json", "journal"):
        return str(value)
    raise ValueError("expected text, json or journal")


def read_auto_or_off(value: object) -> str:
    """Read a switch."""
    if value in ("auto", "off"):
        return str(value)
    raise ValueError("expected auto or off")


METAVARS: Final[Mapping[Callable[[object], object], str]] = {
    read_socket: "PATH",
    read_file: "PATH",
    read_addresses: "ADDRESS",
    read_mode: "MODE",
    read_group: "GROUP",
    read_users: "USER",
    read_groups: "GROUP",
    read_local_address: "ADDRESS",
    read_size: "SIZE",
    read_size_or_none: "SIZE",
    read_count: "NUMBER",
    read_count_or_none: "NUMBER",
    read_rate: "RATE",
    read_rate_or_none: "RATE",
    read_limit_or_none: "NUMBER",
    read_seconds: "TIME",
    read_seconds_or_none: "TIME",
    read_level: "LEVEL",
    read_log_format: "FORMAT",
    read_auto_or_off: "CHOICE",
}
