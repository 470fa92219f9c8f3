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
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from realtimed.config import readers
from realtimed.config.settings import SETTINGS, ChannelRule, Config, Setting
from realtimed.errors import ConfigurationError
from realtimed.hub.names import CHANNEL_CHARACTERS
from realtimed.text import printable, quoted

__all__ = ["load"]

_FILE_LIMIT: Final = 2**20
"""Bytes of a configuration file."""

_WRONG_SHOWN: Final = 50
"""How many things that are wrong are said at once."""

_LINE_SHOWN: Final = 1000
"""Characters of one of these lines."""


_PATTERN: Final = re.compile(f"[{CHANNEL_CHARACTERS}*]+")

_RULE_READERS: Final = {"history_size": readers.read_count_or_none, "history_age": readers.read_seconds}


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
