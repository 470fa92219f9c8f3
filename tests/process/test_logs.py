"""The log: three forms, one line an event, none a message, nothing raw, and no line that is not documented."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from wsproto.events import CloseConnection, TextMessage

import realtimed
from realtimed.config.settings import SETTINGS
from realtimed.process.logs import FORMATS, Event, goes_to_journal
from realtimed.rpc.wire import encode_notification
from tests.kit.clients import REQUEST, closing, publisher, raw_client, subscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.stack import ROOT, Daemon, running_daemon

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e"


def record(
    message: object, level: int = logging.INFO, error: Exception | None = None, name: str = "realtimed"
) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error is not None else None
    made = logging.LogRecord(name, level, "", 0, message, None, info)
    made.created = 1.5
    return made


def formatted(form: str, *given: object, **more: object) -> str:
    return FORMATS[form]().format(record(*given, **more))  # type: ignore[arg-type]


def raised(message: str) -> Exception:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


# The forms.


def test_text_is_the_name_and_the_fields() -> None:
    event = Event("client closed", client="c-1", code=1000, reason="", address=None, seconds=1.5)
    line = formatted("text", event)
    assert re.fullmatch(r"1970-01-0\d \d\d:\d\d:01\.500 INFO client closed .*", line)
    assert line.partition("INFO ")[2] == "client closed client=c-1 code=1000 reason='' address=- seconds=1.5"
    assert str(Event("x", path="/run/a.sock", sentence="two words", quote="it's", trick="a b=c")) == (
        "x path=/run/a.sock sentence='two words' quote=\"it's\" trick='a b=c'"
    )


def test_json_is_an_object_with_the_fields() -> None:
    assert json.loads(formatted("json", Event("client closed", code=1000, reason="sö", address=None))) == {
        "time": "1970-01-01T00:00:01.500Z", "level": "info", "event": "client closed",
        "code": 1000, "reason": "sö", "address": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_the_journal_has_the_level_before_every_line(level: int, priority: int) -> None:
    assert formatted("journal", Event("ready", a=1), level=level) == f"<{priority}>ready a=1"
    lines = formatted("journal", Event("internal error"), level=level, error=raised("x\ny")).split("\n")
    assert len(lines) > 3
    assert all(line.startswith(f"<{priority}>") for line in lines)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_raw_gets_through_in_any_form(form: str) -> None:
    error = raised(f"{ESCAPE}\r\nforged line")
    for message in (Event("x", value=ESCAPE + "\nforged"), f"from a library: {ESCAPE}\nforged"):
        lines = formatted(form, message, error=error).split("\n")
        assert not [line for line in lines if not line.isprintable() or line.startswith("forged")]
    assert json.loads(formatted("json", Event("x", value=ESCAPE)))["value"] == ESCAPE, "JSON keeps what was said"


@pytest.mark.parametrize("form", FORMATS)
def test_a_line_is_bounded(form: str) -> None:
    assert len(formatted(form, Event("x", value="\x1b" * 100_000))) < 200 * 6 + 100


def test_what_a_library_logs_is_an_object_too() -> None:
    line = json.loads(formatted("json", "no event", name="trio"))
    assert (line["event"], line["logger"], line["message"]) == ("message", "trio", "no event")


def test_the_journal_is_recognized_by_its_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        status = os.fstat(log.fileno())
        there = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert goes_to_journal(there, log.fileno())
        assert not goes_to_journal({}, log.fileno())
        assert not goes_to_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}, log.fileno())
        closed = log.fileno()
    assert not goes_to_journal(there, closed)


async def test_standard_error_that_is_the_journal_gets_its_form(runtime_dir: Path) -> None:
    log = runtime_dir / "realtimed.log"
    status = make(log)
    journal = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    async with running_daemon(runtime_dir, environment=journal):
        pass
    first, *_, last = log.read_text().splitlines()
    assert first.startswith("<6>ready control=")
    assert last == "<6>stopped"
    log.write_text("")
    async with running_daemon(runtime_dir, "--log-format", "text", environment=journal):
        pass
    assert re.match(r"\d{4}-\d\d-\d\d [\d:.]{12} INFO ready ", log.read_text())


def make(path: Path) -> os.stat_result:
    path.touch()
    return path.stat()


# The daemon.


@pytest.mark.parametrize("form", FORMATS)
async def test_hostile_peers_write_nothing_raw_into_the_log(runtime_dir: Path, form: str) -> None:
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir, "--log-format", form, "--log-level", "debug") as daemon:
            async with raw_client(daemon.websocket_socket) as client:
                await client.send(CloseConnection(code=4000, reason=f"{ESCAPE}\nforged"))
                await client.events_until_eof()
            async with websocket(daemon.websocket_socket, resource="/%1b[31m%0aforged") as client2:
                await closing(client2)
            async with websocket(daemon.websocket_socket) as client3:
                await client3.send_message(subscribe(f"{ESCAPE}\nforged"))
                await closing(client3)
            async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
                await stream.send_all(b"GET /\x1b[31m HTTP/1.1\r\nUpgrade: \x1b\r\n\r\n")
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")
            async with publisher(daemon.control_socket) as sender:
                await sender.stream.send_all(encode_notification(f"{ESCAPE}\nforged", []))
                assert await sender.call("ping") == "pong"
                await sender.stream.send_all(b"\xc1")
                await sender.answer()
        lines = daemon.log.splitlines()
        assert all(line.isprintable() for line in lines)
        assert not [line for line in lines if line.startswith("forged")]
        if form == "json":
            events = [json.loads(line) for line in lines]
            closed = [each for each in events if each["event"] == "client closed"]
            assert [each["code"] for each in closed] == [4000, 4404, 4400]
            assert closed[0]["reason"] == f"{ESCAPE}\nforged"
            assert {each["event"] for each in events} >= {
                "ready", "client connected", "handshake refused", "publisher connected", "publisher disconnected",
                "notification refused", "stopped",
            }  # fmt: skip
        else:
            assert sum("owned" in line for line in lines) >= 3, "what was said is there, escaped"


async def test_a_refused_handshake_is_logged_with_its_header_and_who_sent_it(runtime_dir: Path) -> None:
    refused = {
        b"X-Forwarded-For: 1.1.1.1, 2001:db8::1\r\nFo\x1bo : bar\r\n": "header='Fo\\x1bo' address=2001:db8::1",
        b"Foo: \0\r\nX-Forwarded-For: 203.0.113.7\r\n": "header=Foo address=203.0.113.7",
        b"Sec-WebSocket-Version: 8\r\nX-Forwarded-For: 203.0.113.8\r\n":
            "header=Sec-WebSocket-Version address=203.0.113.8",
        b"X: " + b"a" * 16_384: "header=- address=''",
    }  # fmt: skip
    with trio.fail_after(PATIENCE):
        async with running_daemon(runtime_dir) as daemon:
            for lines, logged in refused.items():
                async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
                    await stream.send_all(REQUEST.removesuffix(b"\r\n") + lines + b"\r\n")
                    assert b"".join([data async for data in stream]).startswith(b"HTTP/1.1 4")
                line = daemon.log.splitlines()[-1]
                assert "handshake refused" in line
                assert line.endswith(logged)


async def test_no_line_for_a_message(daemon: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(daemon.websocket_socket) as client, publisher(daemon.control_socket) as sender:
            for number in range(90):
                await client.send(TextMessage(data=subscribe(f"c{number}")))
            while (await sender.call("stats"))["subscriptions"] < 90:
                pass
            before = daemon.log
            for number in range(1000):
                await sender.call("broadcast", f"c{number % 90}", "hello")
                await sender.call("broadcast", "not a channel", "hello")
                await sender.stream.send_all(encode_notification("broadcast", ["not a channel", "hello"]))
            assert (await sender.call("stats"))["commands_refused"] == 2000
            [line] = daemon.log.removeprefix(before).splitlines()
            assert "notification refused code=invalid_channel" in line, "the first of a connection"


# The list in the documentation.


def calls_of_the_log() -> Iterator[tuple[Path, ast.Call]]:
    for path in sorted(Path(realtimed.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
                and node.func.attr != "isEnabledFor"
            ):
                yield path, node


def documented() -> dict[tuple[str, str], set[str]]:
    """Return the fields of each event and level in the table of the documentation."""
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `([^`|]+)` \| (debug|info|warning|error) \| ([^|]*) \| .+ \|$", text, re.MULTILINE)
    found: dict[tuple[str, str], set[str]] = {}
    for name, level, fields in rows:
        assert (name, level) not in found, f"{name} is listed twice"
        found[name, level] = set(re.findall(r"`(\w+)`", fields))
    return found


def test_every_line_of_the_log_is_an_event_and_documented() -> None:
    logged: dict[tuple[str, str], set[str]] = {}
    for path, call in calls_of_the_log():
        where = f"{path.name}:{call.lineno}"
        assert isinstance(call.func, ast.Attribute)
        level = {"exception": "error"}.get(call.func.attr, call.func.attr)
        [event] = call.args
        assert isinstance(event, ast.Call), f"{where} logs what is no Event"
        assert isinstance(event.func, ast.Name), where
        assert event.func.id == "Event", f"{where} logs what is no Event"
        [name] = event.args
        assert isinstance(name, ast.Constant), f"{where}: an event's name is fixed"
        fields = logged.setdefault((str(name.value), level), set())
        for keyword in event.keywords:
            fields |= {keyword.arg} if keyword.arg is not None else {"pid", "uid", "gid"}  # `**self._peer`
    assert documented() == logged


def test_the_documentation_says_where_the_peer_is_logged() -> None:
    """What the test above takes `**` for is what it is."""
    source = (Path(realtimed.__file__).parent / "control" / "server.py").read_text()
    assert 'self._peer = {"pid": pid, "uid": uid, "gid": gid}' in source
    expanded = {
        ast.unparse(keyword.value)
        for _, call in calls_of_the_log()
        for event in call.args
        if isinstance(event, ast.Call)
        for keyword in event.keywords
        if keyword.arg is None
    }
    assert expanded == {"self._peer"}


def test_the_forms_are_those_of_the_option() -> None:
    assert all(SETTINGS["log_format"].read(form) == form for form in FORMATS)
