"""A connection that has ended frees its memory at once, however it ended: the garbage collector finds nothing.

The daemon runs in this process here, so that its objects can be counted.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from wsproto.events import CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import FrameProtocol

from realtimed.config.loading import load
from realtimed.control.server import Connection
from realtimed.daemon import Daemon
from realtimed.rpc.wire import encode_request
from realtimed.websocket import sessions
from tests.kit.clients import REQUEST, RawClient, closing, publisher, raw_client, subscribe, websocket
from tests.kit.patience import PATIENCE

REPEATS = 5


@contextmanager
def no_automatic_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@asynccontextmanager
async def daemon_in_this_process(directory: Path, **settings: str) -> AsyncIterator[Daemon]:
    daemon = Daemon(
        load({
            "socket": f"{directory}/c", "websocket": f"unix:{directory}/w", "handshake_timeout": "0.1",
            "close_timeout": "0.1", "command_timeout": "0.1", "backlog_timeout": "0.2", "max_backlog": "64K",
            **settings,
        })
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.serve)
        yield daemon
        daemon.stop()


Ending = Callable[[Path, Path], Awaitable[None]]


async def hangs_up(clients: Path, _: Path) -> None:
    async with websocket(clients) as client:
        await client.send_message(subscribe("news"))


async def says_goodbye(clients: Path, _: Path) -> None:
    async with raw_client(clients) as client:
        await client.send(CloseConnection(code=1000))
        assert await client.close_code() == 1000


async def breaks_the_plain_protocol(clients: Path, _: Path) -> None:
    async with websocket(clients) as client:
        await client.send_message("not JSON")
        await closing(client)


async def breaks_the_websocket_protocol(clients: Path, _: Path) -> None:
    async with raw_client(clients) as client:
        await client.stream.send_all(b"\xff\xff\xff\xff")
        assert await client.close_code() == 1002


async def sends_too_much(clients: Path, _: Path) -> None:
    async with raw_client(clients) as client:
        await client.send(*[Ping()] * 300)
        assert await client.close_code() == 4429


async def does_not_answer_a_close(clients: Path, _: Path) -> None:
    async with raw_client(clients) as client:
        await client.send(TextMessage(data="not JSON"))
        await client.events_until_eof()


async def does_not_read(clients: Path, control: Path) -> None:
    async with raw_client(clients) as client, publisher(control) as sender:
        await client.send(TextMessage(data=subscribe("news")))
        while not (await sender.call("stats"))["closed"].get("4409", 0):
            await sender.call("broadcast", "news", "x" * 30_000)


async def is_refused(clients: Path, _: Path) -> None:
    for request in (b"GET / HTTP/1.1\r\n\r\n", REQUEST.replace(b"13", b"12"), b"GET / HTTP/1.1\r\n"):
        async with await trio.open_unix_socket(clients) as stream:
            await stream.send_all(request)
            async for _data in stream:
                pass


async def publishes(_: Path, control: Path) -> None:
    async with publisher(control) as watcher, publisher(control) as sender:
        await watcher.call("subscribe", "news")
        await sender.call("broadcast", "news", "x")


async def breaks_the_rpc(_: Path, control: Path) -> None:
    for sent in (b"\xc1", b"\x94", encode_request(1, "broadcast", ["no spaces", "x"])[:-1]):
        async with publisher(control) as sender:
            await sender.stream.send_all(sent)
            async for _data in sender.stream:
                pass


@pytest.mark.parametrize(
    "ending",
    [hangs_up, says_goodbye, breaks_the_plain_protocol, breaks_the_websocket_protocol, sends_too_much,
     does_not_answer_a_close, does_not_read, is_refused, publishes, breaks_the_rpc],
)  # fmt: skip
async def test_nothing_is_left_for_the_garbage_collector(runtime_dir: Path, ending: Ending) -> None:
    with trio.fail_after(PATIENCE):
        async with daemon_in_this_process(runtime_dir) as daemon:

            async def end_one() -> None:
                await ending(runtime_dir / "w", runtime_dir / "c")
                while daemon.sessions.members or daemon.service.connections:
                    await trio.lowlevel.checkpoint()
                daemon.sessions.closed.clear()
                await trio.testing.wait_all_tasks_blocked()  # engines end a little later

            await end_one()  # what is made once, and kept, is made now
            with no_automatic_collection():
                for _ in range(REPEATS):
                    await end_one()
                parsers = [each for each in gc.get_objects() if isinstance(each, FrameProtocol) and not each.client]
                # The garbage collector's own account does not have what has a finalizer.
                assert len(parsers) == daemon.sessions.engines.count
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                ours = Counter(type(each).__qualname__ for each in gc.garbage if is_ours(each))
    assert not ours


async def test_what_was_shed_is_kept_by_nobody(runtime_dir: Path) -> None:
    """Neither by a cycle nor by the task that ended it and waits for the next time."""
    begun = encode_request(1, "broadcast", ["news", "x" * 900_000])[:-1]
    with trio.fail_after(PATIENCE):
        async with (
            daemon_in_this_process(runtime_dir, max_answers_total="1M", command_timeout="60") as daemon,
            AsyncExitStack() as stack,
        ):
            for _ in range(3):
                sender = await stack.enter_async_context(publisher(runtime_dir / "c"))
                with suppress(trio.BrokenResourceError):
                    await sender.stream.send_all(begun)
            while len(daemon.service.connections) > 1:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            assert sum(isinstance(each, Connection) for each in gc.get_objects()) == 1


async def hangs_up_in_a_frame(daemon: Daemon, client: RawClient) -> None:
    await client.stream.send_all(b"\x81\xfe")
    while not daemon.sessions.members:
        await trio.lowlevel.checkpoint()


async def ends_a_frame_after_the_close(daemon: Daemon, client: RawClient) -> None:
    """What is no command closes the connection, while the library waits for the end of a frame that has begun."""
    bad, other = b"\x81\x83\0\0\0\0bad", b"\x82\x84\0\0\0\0last"
    await client.stream.send_all(bad + other[:8])
    while not daemon.sessions.closed:
        await trio.lowlevel.checkpoint()
    await client.stream.send_all(other[8:] + b"\x88\x82\0\0\0\0\x03\xe8")
    await client.events_until_eof()
    daemon.sessions.closed.clear()


@pytest.mark.parametrize("leave", [hangs_up_in_a_frame, ends_a_frame_after_the_close])
async def test_what_must_be_left_is_collected_in_the_end(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, leave: Callable[[Daemon, RawClient], Awaitable[None]]
) -> None:
    monkeypatch.setattr(sessions, "_ABANDONED_PARSERS", 3)
    with trio.fail_after(PATIENCE):
        async with daemon_in_this_process(runtime_dir) as daemon:
            with no_automatic_collection():
                for left in (1, 2, 0):
                    async with raw_client(runtime_dir / "w") as client:
                        await leave(daemon, client)
                    while daemon.sessions.members:
                        await trio.lowlevel.checkpoint()
                    assert daemon.sessions.abandoned_parsers == left
                    await trio.testing.wait_all_tasks_blocked()  # engines end a little later
                parsers = [each for each in gc.get_objects() if isinstance(each, FrameProtocol) and not each.client]
                assert len(parsers) == daemon.sessions.engines.count + 1, "the last one was not left yet"


def is_ours(found: object) -> bool:
    """Whether an object belongs to a connection of the daemon; the test's own clients leave garbage too."""
    kind = type(found)
    return kind.__module__.startswith("realtimed") and not kind.__module__.startswith("realtimed.rpc.wire")
