"""Where the value of a setting comes from.

The command line wins, then the environment, then the TOML file. A setting `max_message` is the option
``--max-message``, the variable ``REALTIME_MAX_MESSAGE`` and the key ``max_message`` of the file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple

from realtimed.config.settings import SETTINGS, ChannelRule, Config, Setting
from realtimed.errors import ConfigurationError
from realtimed.hub.names import CHANNEL_CHARACTERS
from realtimed.text import printable, quoted

__all__ = ["load"]

_FILE_LIMIT: Final = 2**20
"""Bytes of a configuration file."""

_FAULTS_SHOWN: Final = 50
"""Lines of one error."""

_LINE_SHOWN: Final = 1000
"""Characters of one of these lines."""

_PATTERN: Final = re.compile(f"[{CHANNEL_CHARACTERS}*]+")

_RULE_KEYS: Final = ("history_size", "history_age")
"""Settings that a table ``[[channels]]`` may have as well, beside ``match``."""


def load(
    options: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Return the configuration from the command line's `options`, the environment and a TOML `file`.

    Raises `ConfigurationError` with a line for each fault. A value has to be right even if another source overrides it.
    """
    faults = _Faults()
    table = _read_file(file) if file is not None else {}
    rules = table.pop("channels", [])
    chosen: dict[str, Any] = {}
    for source in (
        _from_file(table, file, faults),
        _from_environment(environ or {}, faults),
        _from_options(options or {}),
    ):
        for given in source:
            _read(given, chosen, faults)
    config = Config(**chosen)
    config = replace(config, channels=tuple(_read_rules(rules, config, f"channels in {file}", faults)))
    faults.check()
    for problem in config.problems():
        faults.add(problem)
    faults.check()
    return config


class _Faults:
    """Collects faults, so that one error names them all."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @property
    def enough(self) -> bool:
        """Whether no further fault would be shown."""
        return len(self._lines) >= _FAULTS_SHOWN

    def add(self, line: str) -> None:
        self._lines.append(line)

    def check(self) -> None:
        """Raise `ConfigurationError` if there is a fault."""
        if not self._lines:
            return
        shown = [_one_line(line) for line in self._lines[:_FAULTS_SHOWN]]
        if len(self._lines) > len(shown):
            shown.append(f"and {len(self._lines) - len(shown)} more")
        raise ConfigurationError("\n".join(shown))


def _one_line(text: str) -> str:
    """Return `text` as a line of an error: names in it come from a file or the environment."""
    return printable(text if len(text) <= _LINE_SHOWN else text[:_LINE_SHOWN] + "…")


# The sources.


class _Given(NamedTuple):
    """A value for a setting, and the name that it was given under."""

    setting: Setting
    value: object
    named: str


def _from_file(table: Mapping[str, object], file: Path | None, faults: _Faults) -> Iterator[_Given]:
    for key, value in table.items():
        if key in SETTINGS:
            yield _Given(SETTINGS[key], value, f"{key} in {file}")
        else:
            hint = "" if faults.enough else _did_you_mean(key, SETTINGS)
            faults.add(f"{key} in {file}: there is no such setting{hint}")


def _from_environment(environ: Mapping[str, str], faults: _Faults) -> Iterator[_Given]:
    settings = {setting.variable: setting for setting in SETTINGS.values()}
    for name, setting in settings.items():
        if name in environ:
            yield _Given(setting, environ[name], name)
    unknown = [name for name in environ if name.startswith("REALTIME_") and name not in settings]
    for name in unknown[:_FAULTS_SHOWN]:
        # Other programs' variables may begin in the same way, as Caddy's do: only what resembles one of ours is wrong.
        hint = _did_you_mean(name, settings)
        if hint:
            faults.add(f"{name}: there is no such variable{hint}")


def _from_options(options: Mapping[str, object]) -> Iterator[_Given]:
    for name, value in options.items():
        yield _Given(SETTINGS[name], value, SETTINGS[name].option)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name that resembles `name`, as the end of a sentence, or an empty string."""
    close = get_close_matches(name.replace("-", "_"), known, 1, 0.85)
    return f"; did you mean {close[0]}?" if close else ""


# The values.


def _read(given: _Given, chosen: dict[str, Any], faults: _Faults) -> None:
    """Put the value that was given into `chosen`."""
    try:
        chosen[given.setting.name] = given.setting.read(given.value)
    except ValueError as error:
        value = given.value
        if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
            value = " ".join(value)
        faults.add(f"{given.named}: {error}, got {quoted(value)}")


def _read_rules(tables: object, defaults: Config, named: str, faults: _Faults) -> Iterator[ChannelRule]:
    """Yield what the tables ``[[channels]]`` say; for what one does not say, `defaults` hold."""
    for number, table in enumerate(tables if isinstance(tables, list) else [tables], 1):
        where = f"{named}, number {number}"
        if not isinstance(table, dict) or not isinstance(table.get("match"), str):
            faults.add(f'{where}: expected a table [[channels]] with match = "PATTERN", got {quoted(table)}')
            continue
        if _PATTERN.fullmatch(table["match"]) is None:
            faults.add(f"match in {where}: no channel has such a name, got {quoted(table['match'])}")
        chosen = {key: getattr(defaults, key) for key in _RULE_KEYS}
        for key, value in table.items():
            if key in _RULE_KEYS:
                _read(_Given(SETTINGS[key], value, f"{key} in {where}"), chosen, faults)
            elif key != "match":
                faults.add(f"{key} in {where}: there is no such key; there are match, {', '.join(_RULE_KEYS)}")
        yield ChannelRule(table["match"], **chosen)


# The file.


def _read_file(file: Path) -> dict[str, object]:
    """Return the contents of a TOML file. Raises `ConfigurationError`."""
    try:
        return tomllib.loads(_read_bytes(file).decode())
    except ValueError as error:
        raise ConfigurationError(_one_line(f"--config: {file} is not valid TOML: {error}")) from error
    except RecursionError:
        raise ConfigurationError(_one_line(f"--config: {file} is nested too deeply")) from None


def _read_bytes(file: Path) -> bytes:
    """Return the bytes of a file. Only a regular file is read: reading a FIFO or a device might never end."""
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
    return data
