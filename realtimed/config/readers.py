"""The kinds of values that settings have: how each is read from text or from a TOML file, and how it is shown."""

from __future__ import annotations

import grp
import ipaddress
import math
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from realtimed.config.units import as_rate, as_seconds, as_size, shown_seconds, shown_size
from realtimed.rpc import address
from realtimed.text import quoted

__all__ = [
    "ADDRESSES",
    "AUTO_OR_OFF",
    "COUNT",
    "COUNT_OR_ZERO",
    "FILE",
    "GROUP",
    "GROUPS",
    "LIMIT_OR_ZERO",
    "LOCAL_ADDRESS",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "MODE",
    "RATE",
    "RATE_OR_ZERO",
    "SIZE",
    "SIZE_OR_ZERO",
    "SOCKET",
    "TIME",
    "TIME_OR_ZERO",
    "USERS",
    "Address",
    "Reader",
]

_T_co = TypeVar("_T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Reader(Generic[_T_co]):
    """Reads one kind of value."""

    metavar: str
    """The kind, as help texts show it."""
    expected: str
    """What a value has to be, in words, for errors."""
    convert: Callable[[object], _T_co]
    """Returns the value, or raises `ValueError`: with words if it knows better than `expected` what is wrong."""
    show: Callable[[Any], str] = str
    """Returns a value as text that can be read again."""

    def __call__(self, value: object) -> _T_co:
        """Return what `value` means. Raises `ValueError` with the rest of the sentence "max-message: expected …"."""
        try:
            return self.convert(value)
        except ValueError as error:
            raise ValueError(f"expected {str(error) or self.expected}") from None


# Paths and addresses.


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener is: a Unix socket's `path`, or a TCP `host` and `port`."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_HOST: Final = re.compile(r"[^\s\x00-\x20/?#@\[\]]{1,253}")


def _socket(value: object) -> Path:
    fault = address.fault(value) if isinstance(value, str) else "that is not the path of a socket"
    if fault is not None:
        raise ValueError(f"PATH or unix:PATH; {fault}")
    return Path(address.plain(str(value))).absolute()


def _file(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return Path(value).absolute()


def _address(value: object) -> Address:
    if not isinstance(value, str):
        raise ValueError("unix:PATH or HOST:PORT")
    if value.startswith(("unix:", "unix/", "/", "./", "../")):
        return Address(path=_socket(value))
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (_is_host(host) and port.isascii() and port.isdigit()):
        raise ValueError("unix:PATH or HOST:PORT")
    if len(port) > 5 or int(port) > 65535:
        raise ValueError("a port of at most 65535")
    return Address(host=host, port=int(port))


def _is_host(name: str) -> bool:
    """Return whether a resolver can be asked for `name`."""
    try:
        return _HOST.fullmatch(name) is not None and (name.isascii() or bool(name.encode("idna")))
    except UnicodeError:
        return False


def _addresses(value: object) -> tuple[Address, ...]:
    given = value.split() if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError
    return tuple(_address(each) for each in given)


def _local_address(value: object) -> Address:
    found = _address(value)
    if found.path is None and not _is_loopback(found.host):
        raise ValueError
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


SOCKET: Final = Reader("PATH", "PATH or unix:PATH", _socket)
FILE: Final = Reader("PATH", "a path", _file)
ADDRESSES: Final = Reader(
    "ADDRESS", "at least one unix:PATH or HOST:PORT", _addresses, lambda several: " ".join(map(str, several))
)
LOCAL_ADDRESS: Final = Reader(
    "ADDRESS", "unix:PATH, or a loopback address in numbers, such as 127.0.0.1:9180", _local_address
)


# Permissions.


def _mode(value: object) -> int:
    if not isinstance(value, str) or re.fullmatch(r"(0o?)?[0-7]{3}", value) is None:
        raise ValueError
    return int(value.replace("o", ""), 8)


def _group(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    try:
        grp.getgrnam(value)
    except (KeyError, ValueError):  # ValueError: a zero byte
        raise ValueError("a group of this system") from None
    return value


def _ids(kind: str, find: Callable[[str], int]) -> Callable[[object], tuple[int, ...]]:
    """Return a converter of users or groups, given by name or by number, to their numbers."""

    def convert(value: object) -> tuple[int, ...]:
        given = str(value).split() if isinstance(value, (str, int)) else value
        if not isinstance(given, (list, tuple)) or not given or isinstance(value, bool):
            raise ValueError
        return tuple(map(number, map(str, given)))

    def number(each: str) -> int:
        try:
            return int(each) if re.fullmatch(r"\d{1,9}", each) else find(each)
        except (KeyError, ValueError):  # ValueError: a zero byte
            raise ValueError(f"a {kind} of this system; there is none called {quoted(each)}") from None

    return convert


MODE: Final = Reader("MODE", 'an octal number such as "0660"', _mode, "{:04o}".format)
GROUP: Final = Reader("GROUP", "the name of a group", _group)
USERS: Final = Reader(
    "USER", "the name or number of at least one user", _ids("user", lambda name: pwd.getpwnam(name).pw_uid)
)
GROUPS: Final = Reader(
    "GROUP", "the name or number of at least one group", _ids("group", lambda name: grp.getgrnam(name).gr_gid)
)


# Sizes, times, rates and counts.

_SIZE_LIMIT: Final = 2**62

_A_SIZE: Final = "a number of bytes above 0, such as 65536, 64K, 64KiB, 1.5M or 2G"
_A_TIME: Final = "a number of seconds above 0, or a time such as 500ms, 90s, 5m, 12h, 7d or 1h30m"

_Number = TypeVar("_Number", int, float)


def _number(
    convert: Callable[[object], _Number], below: float = math.inf, *, zero: bool = False
) -> Callable[[object], _Number]:
    """Return `convert` for numbers above 0 and below `below`, and for 0 if `zero`."""

    def read(value: object) -> _Number:
        number = convert(value)
        if not (0 < number < below or (zero and number == 0)):
            raise ValueError
        return number

    return read


def _count(value: object) -> int:
    """Return a whole number of at most nine digits."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**9:
        raise ValueError
    return value


def _shown_number(number: float) -> str:
    return f"{number:g}"


SIZE: Final = Reader("SIZE", _A_SIZE, _number(as_size, _SIZE_LIMIT), shown_size)
SIZE_OR_ZERO: Final = Reader("SIZE", f"{_A_SIZE}; or 0", _number(as_size, _SIZE_LIMIT, zero=True), shown_size)
TIME: Final = Reader("TIME", _A_TIME, _number(as_seconds), shown_seconds)
TIME_OR_ZERO: Final = Reader("TIME", f"{_A_TIME}; or 0", _number(as_seconds, zero=True), shown_seconds)
RATE: Final = Reader(
    "RATE", "a number above 0 for each second, such as 50, 0.5, 50/s or 30/m", _number(as_rate), _shown_number
)
RATE_OR_ZERO: Final = Reader(
    "RATE",
    "a number for each second, such as 5, 0.5, 5/s or 30/m; 0 for no limit",
    _number(as_rate, zero=True),
    _shown_number,
)
COUNT: Final = Reader("NUMBER", "a whole number above 0", _number(_count))
COUNT_OR_ZERO: Final = Reader("NUMBER", "a whole number, 0 for none", _count)
LIMIT_OR_ZERO: Final = Reader("NUMBER", "a whole number, 0 for no limit", _count)


# Choices.


def _one_of(metavar: str, *choices: str) -> Reader[str]:
    def convert(value: object) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return Reader(metavar, " or ".join([", ".join(choices[:-1]), choices[-1]]), convert)


LOG_LEVEL: Final = _one_of("LEVEL", "debug", "info", "warning", "error")
LOG_FORMAT: Final = _one_of("FORMAT", "text", "json", "journal")
AUTO_OR_OFF: Final = _one_of("CHOICE", "auto", "off")
