"""The JavaScript client: its own tests, in Node, and its meeting with the real daemon."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import playwright
import pytest
import trio

from tests.clients import publisher
from tests.stack import ROOT, free_port, running_daemon

TESTS: Final = ROOT / "tests" / "js"
CLIENT: Final = TESTS / "daemon_client.mjs"

PATIENCE: Final = 30
"""Seconds within which whatever a test waits for has happened."""


@pytest.fixture(scope="session")
def node() -> str:
    """Find a Node that has a WebSocket class: the one that Playwright brings along, or the system's."""
    bundled = Path(playwright.__file__).parent / "driver" / "node"
    found = str(bundled) if bundled.exists() else shutil.which("node")
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

    async def line_with(self, key: str) -> Any:
        """Pass over all others."""
        while key not in (line := await self.line()):
            pass
        return line


@asynccontextmanager
async def javascript_client(node: str, port: int, *channels: str) -> AsyncIterator[JavaScriptClient]:
    url = f"ws://127.0.0.1:{port}/ws"
    async with trio.open_nursery() as nursery:
        command = [node, CLIENT, url, *channels]
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
        assert await client.line() == {"subscribed": "news", "missed": False}
        assert await client.line() == {"refused": "a b", "code": "invalid_channel"}
        async with publisher(daemon.control_socket) as control:
            await control.call("broadcast", "news", "hëllo")
            await control.call("broadcast", "news", b"\x00\xff")
        assert await client.line() == {"message": "news", "offset": 1, "text": "hëllo"}
        assert await client.line() == {"message": "news", "offset": 2, "bytes": [0, 255]}

        await daemon.stop()
        lost = await client.line()
        assert lost["state"] == "waiting"
        assert lost["code"] == 4503
        assert 1000 <= lost["retryIn"] <= 3000
        async with running_daemon(runtime_dir, *address) as restarted:
            assert await client.line_with("subscribed") == {"subscribed": "news", "missed": True}
            async with publisher(restarted.control_socket) as control:
                await control.call("broadcast", "news", "again")
            assert await client.line_with("message") == {"message": "news", "offset": 1, "text": "again"}


async def test_the_daemon_lets_it_subscribe_to_all_channels_it_may(node: str, runtime_dir: Path) -> None:
    port = free_port()
    channels = [f"channel-{number}" for number in range(128)]
    async with (
        running_daemon(runtime_dir, "--websocket", f"127.0.0.1:{port}"),
        javascript_client(node, port, *channels, "one-too-many") as client,
    ):
        assert await client.line() == {"state": "connected"}
        for channel in channels:
            assert await client.line() == {"subscribed": channel, "missed": False}
        assert await client.line() == {"refused": "one-too-many", "code": "too_many_channels"}
