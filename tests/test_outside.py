"""What comes from outside ends in a sentence: files, variables, command lines, and peers of `realtimectl`.

Never in a traceback, a hang, or in characters that steer a terminal.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from realtimed.config import SETTINGS, load
from realtimed.errors import ConfigurationError, quoted

PATIENCE: Final = 20
"""Seconds after which a program hangs."""

CONFIGURATION_BUDGET: Final = 2.0
"""Seconds of processor time for one configuration."""


def sentences(error: Exception) -> list[str]:
    """Return the lines of an error, after seeing that they may be shown."""
    lines = str(error).split("\n")
    assert all(line and line.isprintable() for line in lines), str(error)
    assert all(len(line) <= 1010 for line in lines), "no line is longer than a screen"
    assert len(lines) <= 51
    return lines


def refusal(load_it: Callable[[], object]) -> list[str]:
    """Return how a configuration is refused; a broken promise is raised as what it is."""
    began = time.process_time()
    with pytest.raises(ConfigurationError) as raised:
        load_it()
    assert time.process_time() - began < CONFIGURATION_BUDGET
    return sentences(raised.value)


# Values of settings.

TEXTS: Final = [
    "", " ", "\n", "a\0b", "\udcff", "\x1b[31m", "\u202e", "²", "١", "-1", "0x10", "1_0", "nan", "inf", "1e400",
    "9" * 30, "9" * 5000, "x" * 10_000, "unix:", "unix:a\0b", ":80", "[:80", "a\0b:80", "a b:80", "127.0.0.1:99999",
    "127.0.0.1:" + "9" * 5000, "unix:/a unix:/a", "root\0",
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_texts_as_settings(setting: object) -> None:
    """Each is taken or refused, from the command line and from the environment alike."""
    each = next(known for known in SETTINGS.values() if known is setting)
    refused = 0
    for text in TEXTS:
        option: object = [text] if isinstance(each.default, tuple) else text
        for options, environ in (({each.name: option}, {}), ({}, {each.variable: text})):
            try:
                load(options, environ)
            except ConfigurationError as error:
                [line, *_] = sentences(error)
                name = each.option if options else each.variable
                assert line.startswith(f"{name}: expected ") or line.removeprefix("max-").startswith(
                    (each.name.replace("_", "-"), "http ", "socket ", "backlog ")
                ), line
                refused += 1
    assert refused > 5


VALUES: Final = [
    '"a\\u0000b"', "[]", "[[]]", "[1, [2]]", "{}", "{a = 1}", "true", "nan", "-inf", "-0.0", "0x" + "f" * 5000,
    "9" * 5000, "1979-05-27T07:32:00Z", '"\\u001b[31m"', '"' + "x" * 100_000 + '"', '["a\\u0000:80"]', "[true]",
    "[999999999999999]", '["a\\nb:80"]', "[" * 2000 + "]" * 2000, "[" * 100_000, "{a = " * 2000 + "1" + "}" * 2000,
]  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_values_in_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    refused = 0
    for value in VALUES:
        file.write_text(f"{name} = {value}\n")
        try:
            load(file=file)
        except ConfigurationError as error:
            sentences(error)
            refused += 1
    assert refused >= len(VALUES) - 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xef\xbb\xbfsocket = '/a'", "is not valid TOML: Invalid statement"),
        (b"\xff\xfe\0", "is not valid TOML: 'utf-8' codec"),
        (b"\0" * 1000, "is not valid TOML: Invalid statement"),
        (b"socket = '/a\xff'", "is not valid TOML: 'utf-8' codec"),
        (b"\x1b[31m = 1", "is not valid TOML: Invalid statement"),
        (b"[" * 500_000, "is not valid TOML"),
        (b"a = " + b"[" * 100_000, "is nested too deeply"),
        (b"a" + b".a" * 1000 + b" = 1", "a in "),
        (b"#" * (2**20 + 1), "is larger than 1 MiB"),
        (b'"\\u001b[31m\\n" = 1', r"\x1b[31m\n in "),
        (b'"' + b"x" * 1_000_000 + b'" = 1', "x" * 1000 + "…"),
        (b"\n".join(b"sockett%d = 1" % number for number in range(20_000)), "sockett0 in "),
        (b"channels = 1", "expected a table [[channels]]"),
        (b"channels = 0x" + b"f" * 5000, "expected a table [[channels]]"),
        (b"[[channels]]\nmatch = 1", "expected a table [[channels]]"),
        (b"[[channels]]\nmatch = 'a'\nhistory_size = 0x" + b"f" * 5000, "history_size in "),
        (b"[[channels]]\nmatch = 'a'\n\"\\u001b\" = 1", r"\x1b in channels in "),
        (b"[[channels]]\nmatch = 'a\x7f'", "is not valid TOML"),
        (b"[[channels]]\nmatch = 'a'\n" + b"\n".join(b"k%d = 1" % number for number in range(20_000)), "k0 in "),
    ],
    ids=lambda each: repr(each[:30]),
)
def test_contents_of_a_file(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    assert sentence in refusal(lambda: load(file=file))[0]


def test_not_everything_that_is_wrong_is_said(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("\n".join(f"k{number} = 1" for number in range(1000)))
    assert refusal(lambda: load(file=file))[-1] == "and 950 more"


@pytest.mark.parametrize("variable", ["REALTIME_SOCKETT", "REALTIME_SOCKE\udcff", "REALTIME_SOCKE\x1b[31m"], ids=ascii)
def test_names_of_variables(variable: str) -> None:
    [line] = refusal(lambda: load(environ={variable: "x"}))
    assert line.endswith(": there is no such variable; did you mean REALTIME_SOCKET?")


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [Path.mkdir, a_fifo, a_loop, a_socket, a_device, lambda _: None])
def test_what_is_no_configuration_file(make: Callable[[Path], object], runtime_dir: Path) -> None:
    """A FIFO without a writer would be waited for without end, and a device would fill the memory."""
    file = runtime_dir / "c\x1b[31m"
    make(file)
    [line] = refusal(lambda: load(file=file))
    assert line.startswith(f"--config: cannot read {runtime_dir}/c\\x1b[31m: ")


# What errors quote.


@pytest.mark.parametrize(
    "value",
    [
        None, True, -1, 1.5, float("nan"), "x", "\x1b[31m", b"\xff", [], [[]], {}, [1, [2, {"a": b"x"}], "y"], (1,),
        {"a": 1, 2: [3]}, 10**17, -(10**17), {"a": {"b": {}}},
    ],
)  # fmt: skip
def test_a_small_value_is_quoted_as_python_shows_it(value: object) -> None:
    assert quoted(value) == repr(value)


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        nested(100_000), [0] * 10**7, ["x" * 10**7] * 3, {number: [number] * 1000 for number in range(1000)}, 1 << 10**7,
        -(1 << 10**7), [1 << 10**7], "x" * 10**7, b"x" * 10**7,
    ],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_a_large_value_is_quoted_in_no_time(value: object) -> None:
    began = time.process_time()
    shown = quoted(value)
    assert time.process_time() - began < 0.05
    assert len(shown) < 70
    assert shown.endswith("…")
