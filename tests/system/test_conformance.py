"""RFC 6455 as others have written it down, in the Autobahn test suite; and what it means for our own protocols."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trio
from wsproto.events import Event, Ping, Pong, TextMessage

from realtimed.websocket.frames import CloseCode
from tests.kit.clients import closing, publisher, raw_client, subscribe, websocket
from tests.kit.patience import LONG_PATIENCE
from tests.kit.stack import ROOT, Daemon, running_daemon
from tests.system.conformance import (
    COMPRESSION,
    EXPLAINED,
    LIMITS,
    PROTOCOL,
    Verdict,
    case_numbers,
    echo_behind_caddy,
    echo_daemon,
    run,
)

THROUGH_CADDY = (*PROTOCOL, *COMPRESSION, "9.1.*")
"""`make conformance` runs the others too: they send the same in more pieces."""


def shown(verdicts: list[Verdict]) -> list[str]:
    return [f"{each.case}: {each.behavior}, {each.close}: {each.what}" for each in verdicts if not each.as_expected]


async def test_all_autobahn_cases(runtime_dir: Path) -> None:
    async with echo_daemon(runtime_dir) as (daemon, url):
        patterns = (*PROTOCOL, *LIMITS, *COMPRESSION)
        with trio.fail_after(LONG_PATIENCE):
            verdicts = await run(url, *patterns)
        assert {verdict.case for verdict in verdicts} == case_numbers(patterns)
        assert shown(verdicts) == []
        async with publisher(daemon.control_socket) as asking:
            stats = await asking.call("stats")
            while stats["clients"]:  # who hung up without a word is noticed in a moment
                stats = await asking.call("stats")
        assert stats["connections"] == len(verdicts)
        assert stats["backlog_bytes"] == 0
    assert "Traceback" not in daemon.log


async def test_autobahn_cases_through_caddy(runtime_dir: Path) -> None:
    async with echo_behind_caddy(runtime_dir) as (daemon, url):
        with trio.fail_after(LONG_PATIENCE):
            verdicts = await run(url, *THROUGH_CADDY)
        assert {verdict.case for verdict in verdicts} == case_numbers(THROUGH_CADDY)
        assert shown(verdicts) == []
    assert "Traceback" not in daemon.log


async def test_the_suite_notices_who_is_no_echo_server(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir, "--websocket", "127.0.0.1:0") as daemon:
        async with publisher(daemon.control_socket) as asking:
            [address] = [each for each in (await asking.call("info"))["websocket"] if not each.startswith("unix:")]
        with trio.fail_after(LONG_PATIENCE):
            verdicts = await run(f"ws://{address}/ws", "1.1.2", "9.1.1")
    assert {verdict.case for verdict in verdicts if not verdict.as_expected} == {"1.1.2", "9.1.1"}


def test_the_specification_tells_the_cases_that_are_not_passed() -> None:
    section = (ROOT / "docs" / "protocol.md").read_text().partition("## 10.")[2]
    assert set(re.findall(r"\b\d+\.\d+\.\d+\b", section)) == set(EXPLAINED)
    assert f"{len(case_numbers((*PROTOCOL, *LIMITS)))} cases" in section
    assert f"{len(case_numbers(COMPRESSION))} cases" in section


def in_fragments(text: str) -> list[Event]:
    """Cut a message into fragments of one character, with a ping behind each."""
    events: list[Event] = []
    for at, character in enumerate(text):
        events += [TextMessage(data=character, message_finished=at == len(text) - 1), Ping(payload=b"%d" % at)]
    return events


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 4096])
async def test_a_command_in_fragments_between_pings_is_carried_out(runtime_dir: Path, piece: int) -> None:
    command = subscribe("news")
    async with (
        running_daemon(runtime_dir, "--inbound-burst", "1000") as daemon,
        raw_client(daemon.websocket_socket) as client,
        publisher(daemon.control_socket) as sender,
    ):
        sent = b"".join(client.frames.send(event) for event in in_fragments(command))
        with trio.fail_after(LONG_PATIENCE):
            for at in range(0, len(sent), piece):
                await client.stream.send_all(sent[at : at + piece])
            while "news" not in await sender.call("channels"):
                pass
            await sender.call("broadcast", "news", "hello")
            events: list[Event] = []
            while len(events) <= len(command):
                client.frames.receive_data(await client.stream.receive_some(4096))
                events += client.frames.events()
    assert [bytes(event.payload) for event in events if isinstance(event, Pong)] == [
        b"%d" % at for at in range(len(command))
    ]
    assert [event.data for event in events if isinstance(event, TextMessage)] == ["hello"]


async def test_a_text_that_is_no_command_is_answered_as_the_protocol_says(daemon: Daemon) -> None:
    async with (
        websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
        websocket(daemon.websocket_socket) as plain,
    ):
        with trio.fail_after(LONG_PATIENCE):
            await client.get_message()
            await client.send_message("*" * 125)
            event = json.loads(await client.get_message())
            await plain.send_message("*" * 125)
            code, _ = await closing(plain)
    assert (event["event"], event["code"]) == ("error", "invalid_message")
    assert code == CloseCode.BAD_MESSAGE
