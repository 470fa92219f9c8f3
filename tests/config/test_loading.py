"""Settings: what each kind of value may be, who wins, and what the errors name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from realtimed.config.loading import load
from realtimed.config.readers import Address
from realtimed.config.settings import SETTINGS, Config, Setting
from realtimed.config.units import as_seconds, as_size, shown_seconds, shown_size
from realtimed.errors import ConfigurationError


def test_without_anything_the_defaults_hold() -> None:
    assert load() == Config()
    assert Config().problems() == []


def test_the_command_line_wins_then_the_environment_then_the_file(tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    file.write_text('max_channels = 1\nmax_message = "1K"\nheartbeat = 5\nwebsocket = ["unix:/run/a", "[::1]:80"]\n')
    environ = {"REALTIME_MAX_CHANNELS": "2", "REALTIME_MAX_MESSAGE": "2K", "REALTIME_UNRELATED": "x"}
    config = load({"max_channels": "3"}, environ, file)
    assert (config.max_channels, config.max_message, config.heartbeat) == (3, 2048, 5.0)
    assert config.websocket == (Address(path=Path("/run/a")), Address(host="::1", port=80))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("socket", "/run/x.sock", Path("/run/x.sock")),
        ("websocket", "unix:/run/x localhost:80", (Address(path=Path("/run/x")), Address(host="localhost", port=80))),
        ("websocket", "[::]:0", (Address(host="::", port=0),)),
        ("socket_mode", "0600", 0o600),
        ("socket_mode", "666", 0o666),
        ("socket_mode", "0o640", 0o640),
        ("socket_group", "root", "root"),
        ("max_message", "100", 100),
        ("max_message", 100, 100),
        ("max_message", "64K", 65536),
        ("max_message", "64KiB", 65536),
        ("max_backlog_total", "2G", 2**31),
        ("max_channels", "5", 5),
        ("heartbeat", "2.5", 2.5),
        ("inbound_rate", 0.5, 0.5),
        ("socket", "unix:/run/x.sock", Path("/run/x.sock")),
        ("socket", "unix:///run/x.sock", Path("/run/x.sock")),
        ("socket", "./127.0.0.1:9999", Path.cwd() / "127.0.0.1:9999"),
        ("websocket", "/run/x unix:///run/y", (Address(path=Path("/run/x")), Address(path=Path("/run/y")))),
        ("http", "/run/x", Address(path=Path("/run/x"))),
        ("log_level", "debug", "debug"),
    ],
)
def test_values_are_read(name: str, text: object, value: Any) -> None:
    assert SETTINGS[name].read(text) == value


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("socket", "", "the path of a socket"),
        ("socket", 5, "the path of a socket"),
        ("socket", "127.0.0.1:9999", "a Unix socket has no port"),
        ("socket", "unix:127.0.0.1:9999", "a Unix socket has no port"),
        ("socket", "localhost:9999", "a Unix socket has no port"),
        ("socket", "[::1]:9999", "a Unix socket has no port"),
        ("socket", ":9999", "a Unix socket has no port"),
        ("socket", "9999", "a Unix socket has no port"),
        ("socket", "tcp://127.0.0.1:9999", "it is a path, not a URL"),
        ("socket", "unix//run/x", "here it is '/run/x'"),
        ("socket", "@realtime", "a socket without a file has no permissions"),
        ("socket", "unix:", "the path of a socket"),
        ("websocket", "unix//run/x", "here it is '/run/x'"),
        ("websocket", "unix:@realtime", "a socket without a file has no permissions"),
        ("http", "unix//run/x", "here it is '/run/x'"),
        ("socket", "/" + "x" * 107, "at most 107 bytes"),
        ("websocket", "", "at least one"),
        ("websocket", [], "at least one"),
        ("websocket", "8080", "unix:PATH or HOST:PORT"),
        ("websocket", ":8080", "unix:PATH or HOST:PORT"),
        ("websocket", "localhost:http", "unix:PATH or HOST:PORT"),
        ("websocket", "localhost:65536", "a port of at most 65535"),
        ("websocket", [5], "unix:PATH or HOST:PORT"),
        ("websocket", "localhost:" + "9" * 5000, "expected"),
        ("socket_mode", "rw", "octal number"),
        ("socket_mode", "0888", "octal number"),
        ("socket_mode", 432, "octal number"),
        ("socket_group", "no such group", "no"),
        ("socket_group", "", "the name of a group"),
        ("max_message", "0", "bytes above 0"),
        ("max_message", "-1", "bytes above 0"),
        ("max_message", "64 XB", "bytes above 0"),
        ("max_message", "1.5", "bytes above 0"),
        ("max_message", "64iB", "bytes above 0"),
        ("max_message", "0K", "bytes above 0"),
        ("max_message", "9" * 5000, "bytes above 0"),
        ("max_message", "9" * 20 + "G", "bytes above 0"),
        ("max_message", True, "bytes above 0"),
        ("max_channels", "1.5", "a whole number above 0"),
        ("max_channels", True, "a whole number above 0"),
        ("max_channels", "0", "a whole number above 0"),
        ("max_channels", 10**9, "a whole number above 0"),
        ("history_size", "-1", "0 for none"),
        ("log_format", "", "text, json or journal"),
        ("io_uring", "on", "auto or off"),
        ("heartbeat", "0", "seconds above 0"),
        ("heartbeat", "nan", "seconds above 0"),
        ("heartbeat", "inf", "seconds above 0"),
        ("heartbeat", "soon", "seconds above 0"),
        ("heartbeat", "5 weeks", "500ms, 90s, 5m, 12h, 7d or 1h30m"),
        ("heartbeat", "1h30", "seconds above 0"),
        ("heartbeat", "h", "seconds above 0"),
        ("heartbeat", "-5s", "seconds above 0"),
        ("heartbeat", "0h0m", "seconds above 0"),
        ("heartbeat", "9" * 39 + "d" * 39, "seconds above 0"),
        ("heartbeat", "1s" * 5000, "seconds above 0"),
        ("heartbeat", True, "seconds above 0"),
        ("drain", "soon", "or 0"),
        ("history_total", "much", "or 2G; or 0"),
        ("inbound_rate", "fast", "a number above 0"),
        ("inbound_rate", "5s", "50/s or 30/m"),
        ("inbound_rate", "5/y", "a number above 0"),
        ("inbound_rate", "0/s", "a number above 0"),
        ("handshakes_per_address", "many", "0 for no limit"),
        ("log_level", "loud", "debug, info, warning or error"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_it_was_given_under(name: str, text: object, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected) as wrong:
        load({name: text})
    assert str(wrong.value).startswith(f"--{name.replace('_', '-')}: expected")
    if isinstance(text, str):
        with pytest.raises(ConfigurationError, match=expected) as wrong:
            load(environ={f"REALTIME_{name.upper()}": text})
        assert str(wrong.value).startswith(f"REALTIME_{name.upper()}: expected")


TIMES = [
    (25, 25), (2.5, 2.5), ("25", 25), ("25s", 25), ("25 s", 25), ("500ms", 0.5), ("1.5m", 90), ("5m", 300),
    ("12h", 43_200), ("7d", 604_800), ("1h30m", 5_400), ("1h 30m 5s", 5_405), ("1e2", 100),
]  # fmt: skip
SIZES = [
    (65536, 65536), ("65536", 65536), ("64K", 65536), ("64k", 65536), ("64KB", 65536), ("64 KB", 65536),
    ("64KiB", 65536), ("64Ki", 65536), ("64kib", 65536), ("64B", 64),
    ("1M", 2**20), ("1.5M", 3 * 2**19), ("2G", 2**31), ("2 GiB", 2**31),
]  # fmt: skip
RATES = [(5, 5), ("5", 5), ("0.5", 0.5), ("5/s", 5), ("5 / s", 5), ("30/m", 0.5), ("3600/h", 1), ("86400/d", 1)]
KINDS: dict[str, Sequence[tuple[Any, float]]] = {"TIME": TIMES, "SIZE": SIZES, "RATE": RATES}


@pytest.mark.parametrize(
    ("name", "kind"), [(each.name, each.metavar) for each in SETTINGS.values() if each.metavar in KINDS]
)
def test_every_setting_that_has_a_unit_takes_it_wherever_it_is_given(name: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    others: dict[str, object] = (
        {"max_backlog": "4G", "silence_timeout": "99d"} if name in ("max_message", "heartbeat") else {}
    )
    others |= {"max_message": 1, "heartbeat": "1ms"} if name in ("max_backlog", "silence_timeout") else {}
    for given, meant in KINDS[kind]:
        file.write_text(f"{name} = {given!r}\n")
        for config in (
            load({name: given, **others}),
            load(others, {f"REALTIME_{name.upper()}": str(given)}),
            load(others, file=file),
        ):
            assert getattr(config, name) == pytest.approx(meant), given


def test_a_rule_for_channels_takes_units_too(tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    file.write_text("[[channels]]\nmatch = 'chat:*'\nhistory_age = '1h'\n")
    assert load(file=file).channels[0].history_age == 3600


@pytest.mark.parametrize("seconds", [0, 0.001, 0.1, 0.25, 1, 1.5, 59, 60, 90, 300, 3600, 5400, 86_400, 604_800, 0.0005])
def test_a_time_is_shown_as_it_is_read(seconds: float) -> None:
    assert as_seconds(shown_seconds(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 2**16, 2**20, 3 * 2**19, 2**30])
def test_a_size_is_shown_as_it_is_read(size: int) -> None:
    assert as_size(shown_size(size)) == size


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigurationError) as wrong:
        load({
            "heartbeat": "60", "socket": "/run/x", "websocket": ["unix:/run/x", "unix:/run/x"], "max_backlog": "1K",
        })  # fmt: skip
    lines = str(wrong.value).splitlines()
    assert [line.split()[0] for line in lines] == ["silence-timeout", "socket", "websocket", "max-backlog"]


def test_the_file_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--config: cannot read .*: No such file"):
        load(file=tmp_path / "none.toml")
    file = tmp_path / "bad.toml"
    file.write_text("max_message = ")
    with pytest.raises(ConfigurationError, match=r"--config: .*bad\.toml is not valid TOML"):
        load(file=file)
    file.write_text('max_mesage = 5\nheartbeat = "never"\n')
    a_time = "a number of seconds above 0, or a time such as 500ms, 90s, 5m, 12h, 7d or 1h30m"
    with pytest.raises(ConfigurationError) as wrong:
        load(file=file)
    assert str(wrong.value).splitlines() == [
        f"max_mesage in {file}: there is no such setting; did you mean max_message?",
        f"heartbeat in {file}: expected {a_time}, got 'never'",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_message = " + "[" * 10_000, "is nested too deeply"),
        ("max_message = 0x" + "F" * 5000, "max_message in "),
        ("max_channels = 0x" + "F" * 5000, "a whole number above 0, got 0xff"),
        ("max_message = [0x" + "F" * 5000 + "]", "got [0xff"),
        ("max_message = " + "9" * 5000, "is not valid TOML"),
        ("heartbeat = [0x" + "F" * 5000 + "]", "or 1h30m, got [0xff"),
        ("[[channels]]\nmatch = 'a'\nhistory_size = 0x" + "F" * 5000, "history_size in "),
        ("[[channels]]\nmatch = 0x" + "F" * 5000, "expected a table [[channels]] with match"),
    ],
    ids=["deep", "int", "count", "[int]", "digits", "[number]", "a rule's int", "a rule's pattern"],
)
def test_what_python_cannot_show_ends_in_a_sentence_too(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "realtimed.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as wrong:
        load(file=file)
    assert says in str(wrong.value)
    assert len(str(wrong.value)) < 500


def test_a_pattern_that_no_channel_can_match_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    for match in ("a b", "", "news#*"):
        file.write_text(f"[[channels]]\nmatch = '{match}'\nhistory_size = 5\n")
        with pytest.raises(ConfigurationError) as wrong:
            load(file=file)
        assert str(wrong.value) == f"match in channels in {file}, number 1: no channel has such a name, got {match!r}"


def test_several_values_are_shown_as_they_were_given() -> None:
    with pytest.raises(ConfigurationError, match=r"^--websocket: expected unix:PATH or HOST:PORT, got 'foo'$"):
        load({"websocket": ["foo"]})


def test_addresses_are_shown_as_they_are_given() -> None:
    for text in ("unix:/run/x", "localhost:80", "[::1]:80"):
        [address] = load({"websocket": [text]}).websocket
        assert str(address) == text


def test_a_name_that_is_nearly_right_is_told_what_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    file.write_text("max-channels = 5\n")
    with pytest.raises(ConfigurationError) as caught:
        load(environ={"REALTIME_HARTBEAT": "3", "REALTIME_UPSTREAM": "x", "REALTIME_APP": "y"}, file=file)
    assert str(caught.value).splitlines() == [
        f"max-channels in {file}: there is no such setting; did you mean max_channels?",
        "REALTIME_HARTBEAT: there is no such variable; did you mean REALTIME_HEARTBEAT?",
    ]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_default_is_shown_as_it_is_read(setting: Setting) -> None:
    if setting.default not in (None, ()):
        assert setting.read(setting.shown_default) == setting.default


def test_an_error_names_all_faults_of_all_sources_but_not_too_many(tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    file.write_text("heartbeat = 0\ndrain = 'x'\n")
    with pytest.raises(ConfigurationError) as caught:
        load({"heartbeat": "y"}, {"REALTIME_HEARTBEAT": "z"}, file)
    names = [line.partition(": ")[0] for line in str(caught.value).splitlines()]
    assert names == [f"heartbeat in {file}", f"drain in {file}", "REALTIME_HEARTBEAT", "--heartbeat"]
    file.write_text("".join(f"strange{number} = 0\n" for number in range(60)))
    with pytest.raises(ConfigurationError) as caught:
        load(file=file)
    assert len(str(caught.value).splitlines()) == 51
    assert str(caught.value).endswith("\nand 10 more")
