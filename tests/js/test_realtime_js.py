"""The JavaScript client: its own tests, in Node, and its meeting with the real daemon."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.js.typescript import find_node
from tests.kit.clients import Publisher, publisher
from tests.kit.patience import PATIENCE
from tests.kit.plug import Plug, running_plug
from tests.kit.stack import ROOT, free_port, running_daemon

TESTS: Final = ROOT / "tests" / "js"
CLIENT: Final = TESTS / "daemon_client.mjs"
LAST_CLIENT: Final = TESTS / "last_client.mjs"
REMOUNTING_CLIENT: Final = TESTS / "remounting_client.mjs"


@pytest.fixture(scope="session")
def node() -> str:
    """Return the Node that runs these tests."""
    found = find_node()
    if found is None:
        pytest.fail("Node.js is not installed: apt-get install nodejs (version 22 or later)")
    return found


@pytest.mark.parametrize("file", sorted(TESTS.glob("*.test.mjs")), ids=lambda file: file.name.removesuffix(".test.mjs"))
def test_in_node(file: Path, node: str) -> None:
    result = subprocess.run([node, "--test", file], capture_output=True, text=True, timeout=4 * PATIENCE, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


class JavaScriptClient:
    """A running `daemon_client.mjs`."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout is not None
        self._output = process.stdout
        self._text = ""

    async def line(self) -> Any:
        while "\n" not in self._text:
            data = await self._output.receive_some()
            assert data, "the client has ended"
            self._text += data.decode()
        line, self._text = self._text.split("\n", 1)
        return json.loads(line)

    async def ended(self) -> None:
        """Wait until the client has nothing more to do; it must not have said anything in the meantime."""
        assert await self._output.receive_some() == b""
        assert self._text == ""

    async def line_with(self, key: str) -> Any:
        """Pass over all others."""
        while key not in (line := await self.line()):
            pass
        return line


@asynccontextmanager
async def javascript_client(
    node: str, port: int, *channels: str, options: Mapping[str, object] | None = None, script: Path = CLIENT
) -> AsyncIterator[JavaScriptClient]:
    url = f"ws://127.0.0.1:{port}/ws"
    async with trio.open_nursery() as nursery:
        command = [node, script, url, json.dumps(options or {}), *channels]
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        )
        with trio.fail_after(PATIENCE):
            yield JavaScriptClient(process)
        process.kill()


async def test_it_speaks_with_the_daemon(node: str, runtime_dir: Path) -> None:
    port = free_port()
    address = ("--websocket", f"127.0.0.1:{port}")
    async with running_daemon(runtime_dir, *address) as daemon, javascript_client(node, port, "news", "a b") as client:
        assert await client.line() == {"state": "connected"}
        assert await client.line() == {"subscribed": "news", "replayed": 0}
        assert await client.line() == {"refused": "a b", "code": "invalid_channel"}
        async with publisher(daemon.control_socket) as control:
            await control.call("broadcast", "news", "hëllo")
            await control.call("broadcast", "news", b"\x00\xff")
        assert await client.line() == {"message": "news", "offset": 1, "replayed": False, "text": "hëllo"}
        assert await client.line() == {"message": "news", "offset": 2, "replayed": False, "bytes": [0, 255]}

        await daemon.stop()
        lost = await client.line()
        assert lost["state"] == "waiting"
        assert lost["code"] == 4503
        assert 1000 <= lost["retryIn"] <= 3000
        async with running_daemon(runtime_dir, *address) as restarted:
            # The new daemon cannot know what the old one published: history does not outlive it.
            assert await client.line_with("subscribed") == {"subscribed": "news", "recovered": False, "replayed": 0}
            async with publisher(restarted.control_socket) as control:
                await control.call("broadcast", "news", "again")
            again = {"message": "news", "offset": 1, "replayed": False, "text": "again"}
            assert await client.line_with("message") == again


async def test_the_daemon_lets_it_subscribe_to_all_channels_it_may(node: str, runtime_dir: Path) -> None:
    port = free_port()
    channels = [f"channel-{number}" for number in range(128)]
    async with (
        running_daemon(runtime_dir, "--websocket", f"127.0.0.1:{port}"),
        javascript_client(node, port, *channels, "one-too-many") as client,
    ):
        assert await client.line() == {"state": "connected"}
        for channel in channels:
            assert await client.line() == {"subscribed": channel, "replayed": 0}
        assert await client.line() == {"refused": "one-too-many", "code": "too_many_channels"}


async def test_sent_away_for_good_it_says_so_and_stays_away(node: str, runtime_dir: Path) -> None:
    port = free_port()
    async with (
        running_daemon(runtime_dir, "--websocket", f"127.0.0.1:{port}") as daemon,
        publisher(daemon.control_socket) as control,
        javascript_client(node, port, "news") as client,
    ):
        await client.line_with("subscribed")
        (connected,) = await control.call("clients")
        await control.call("disconnect", connected["id"], 4403, "no more of this")
        assert await client.line() == {"state": "closed", "code": 4403}
        refusal = await client.line()
        assert refusal["error"] == "closed"
        assert "not allowed here (4403, no more of this)" in refusal["message"]
        await client.ended()  # no timer and no connection is left that would keep Node running
        assert await control.call("clients") == []


async def test_last_opens_with_the_newest_messages_and_their_times(node: str, runtime_dir: Path) -> None:
    port = free_port()
    began = int(time.time() * 1000)
    async with (
        running_daemon(runtime_dir, "--websocket", f"127.0.0.1:{port}") as daemon,
        publisher(daemon.control_socket) as control,
    ):
        for number in range(1, 6):
            await control.call("broadcast", "news", str(number))
        sent = int(time.time() * 1000)
        async with javascript_client(node, port, "news", script=LAST_CLIENT, options={"last": 3}) as client:
            seen = [await client.line() for _ in range(3)]
            assert [(line["message"], line["replayed"]) for line in seen] == [("3", True), ("4", True), ("5", True)]
            assert all(began <= line["time"] <= sent for line in seen), (began, seen, sent)
            await control.call("broadcast", "news", "new")
            line = await client.line()
            assert (line["message"], line["replayed"]) == ("new", False)
            assert line["time"] >= sent


@pytest.mark.parametrize("options", [{}, {"rate": 20, "burst": 4}], ids=["at-its-pace", "held-up"])
async def test_a_page_that_keeps_remounting_has_everything_once(
    node: str, runtime_dir: Path, options: dict[str, object]
) -> None:
    port, count = free_port(), 1500
    async with (
        running_daemon(
            runtime_dir, "--websocket", f"127.0.0.1:{port}", "--history-size", "2000", "--inbound-rate", "1000"
        ) as daemon,
        publisher(daemon.control_socket) as control,
        javascript_client(node, port, "news", options=options, script=REMOUNTING_CLIENT) as client,
    ):
        assert await client.line() == {"subscribed": True}
        for number in range(1, count + 1):
            await control.call("broadcast", "news", str(number))
        await control.call("broadcast", "news", "end")
        seen = []
        while "remounts" not in (line := await client.line()):
            seen.append(line["message"])
        assert seen == [*map(str, range(1, count + 1)), "end"]
        assert line["remounts"] >= 15
        assert line["missed"] == 0


# Across failures of the network: nothing is lost, nothing comes twice.


@asynccontextmanager
async def unreliable_network(
    node: str, directory: Path, *channels: str, daemon_options: tuple[str, ...] = (), **options: object
) -> AsyncIterator[tuple[Plug, Publisher, JavaScriptClient]]:
    """Run a client and the daemon with a plug between them; wait until the client is subscribed."""
    port = free_port()
    async with (
        running_daemon(directory, "--websocket", f"127.0.0.1:{port}", *daemon_options) as daemon,
        running_plug(free_port(), port) as plug,
        publisher(daemon.control_socket) as control,
        javascript_client(node, plug.port, *channels, options={"minDelay": 20, "maxDelay": 100, **options}) as client,
    ):
        for _ in channels:
            await client.line_with("subscribed")
        yield plug, control, client


async def test_what_was_published_while_it_was_away_comes_when_it_is_back(node: str, runtime_dir: Path) -> None:
    async with unreliable_network(node, runtime_dir, "news", "sport") as (plug, control, client):
        await control.call("broadcast", "news", "1")
        assert (await client.line_with("message"))["text"] == "1"
        plug.pull()
        assert (await client.line_with("state"))["state"] == "waiting"
        for number in range(2, 12):
            await control.call("broadcast", "news", str(number))
        plug.put_back()
        assert await client.line_with("subscribed") == {"subscribed": "news", "recovered": True, "replayed": 10}
        seen: list[tuple[str, int, str]] = []
        while len(seen) < 10:
            line = await client.line()
            if "message" in line:
                assert line["replayed"]
                seen.append((line["message"], line["offset"], line["text"]))
            else:
                assert line == {"subscribed": "sport", "recovered": True, "replayed": 0}
        assert seen == [("news", number, str(number)) for number in range(2, 12)]
        await control.call("broadcast", "news", "live")
        live = {"message": "news", "offset": 12, "replayed": False, "text": "live"}
        assert await client.line_with("message") == live


async def test_it_says_when_history_does_not_reach_back(node: str, runtime_dir: Path) -> None:
    async with unreliable_network(node, runtime_dir, "news") as (plug, control, client):
        plug.pull()
        assert (await client.line_with("state"))["state"] == "waiting"
        for number in range(1, 151):
            await control.call("broadcast", "news", str(number))
        plug.put_back()
        assert await client.line_with("subscribed") == {"subscribed": "news", "recovered": False, "replayed": 0}
        await control.call("broadcast", "news", "live")
        live = {"message": "news", "offset": 151, "replayed": False, "text": "live"}
        assert await client.line_with("message") == live


async def test_a_connection_that_has_fallen_silent_is_noticed(node: str, runtime_dir: Path) -> None:
    async with unreliable_network(
        node, runtime_dir, "news", daemon_options=("--heartbeat", "1"), answerTimeout=500
    ) as (plug, control, client):
        plug.clog()
        await control.call("broadcast", "news", "into the tunnel")
        lost = await client.line()
        assert (lost["state"], lost["code"]) == ("waiting", 4408)
        plug.put_back()
        assert await client.line_with("subscribed") == {"subscribed": "news", "recovered": True, "replayed": 1}
        assert (await client.line_with("message"))["text"] == "into the tunnel"


async def test_a_network_that_fails_again_and_again_loses_nothing(node: str, runtime_dir: Path) -> None:
    chance = random.Random(4503)
    failures, published, lost, recovered = 40, 0, 0, 0
    seen: list[int] = []
    async with unreliable_network(node, runtime_dir, "news") as (plug, control, client):

        async def listen() -> None:
            nonlocal lost, recovered
            line = await client.line()
            if "message" in line:
                seen.append(line["offset"])
            elif "subscribed" in line:
                assert line["recovered"], line
                recovered += line["replayed"]
            else:
                lost += line["state"] == "waiting"

        for _ in range(failures):
            # In the middle of a message, of a replay, of the handshake: wherever it happens to be.
            plug.pull_after(chance.randrange(1, 4000))
            while not plug.pulled:
                if published - len(seen) < 60:  # beyond 100, history need not reach back
                    published += 1
                    await control.call("broadcast", "news", "x" * chance.randrange(200))
                else:
                    await listen()
            plug.put_back()
        while len(seen) < published:
            await listen()
    assert seen == list(range(1, published + 1))
    assert lost >= failures
    assert recovered > failures
