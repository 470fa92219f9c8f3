"""A bug in the fan-out ends the connections that may have missed something, and the daemon goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio
from wsproto.events import TextMessage

from realtimed.config.loading import load
from realtimed.daemon import Daemon
from realtimed.hub.rounds import Batch
from realtimed.rpc.wire import encode_notification
from tests.kit.clients import publisher, raw_client, subscribe, until_subscribed
from tests.kit.patience import PATIENCE


def fail(_: Batch) -> None:
    raise ZeroDivisionError


async def test_connections_that_may_have_missed_something_end_and_others_do_not(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    daemon = Daemon(load({"socket": f"{runtime_dir}/c", "websocket": f"unix:{runtime_dir}/w"}))
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon.serve)
            async with (
                raw_client(runtime_dir / "w") as client,
                raw_client(runtime_dir / "w") as other,
                publisher(runtime_dir / "c") as listening,
                publisher(runtime_dir / "c") as sender,
            ):
                await client.send(TextMessage(data=subscribe("news")))
                await other.send(TextMessage(data=subscribe("sport")))
                await listening.call("subscribe", "news")
                await until_subscribed(sender, "news", 2)
                await until_subscribed(sender, "sport", 1)
                deliver, daemon.hub.deliver = daemon.hub.deliver, fail
                await sender.stream.send_all(encode_notification("broadcast", ["news", "lost"]))
                assert await client.events_until_eof() == []
                assert await listening.stream.receive_some() == b""
                daemon.hub.deliver = deliver
                await sender.call("broadcast", "sport", "kept")
                assert await other.stream.receive_some() == b"\x81\x04kept"
                assert (await sender.call("stats"))["ended"]["fault"] == 1
            daemon.stop()
    assert "ending=fault" in caplog.text
    assert "code=internal_error" in caplog.text
