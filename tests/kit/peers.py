"""Peers of realtimed for tests that hold in memory as well as over real sockets: one test body, two drivers.

`InMemory` is the core without sockets: hub, history, fan-out, conversations, and the control socket's connections on
streams in memory. `OverSockets` is a daemon in a process of its own. A test asks either of them for peers: a `Browser`
speaks over a WebSocket, a `Publisher` on the control socket.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from trio.testing import MemoryReceiveStream
from trio_websocket import ConnectionClosed, WebSocketConnection
from wsproto.connection import Connection as FrameReader
from wsproto.connection import ConnectionType
from wsproto.events import BytesMessage, TextMessage

from realtimed.config.loading import load
from realtimed.control.server import Connection
from realtimed.daemon import Daemon as Core
from realtimed.errors import RefusedError
from realtimed.hub.publication import Frames, WireFormat
from realtimed.net.gate import Gate
from realtimed.net.outbound import Owner
from realtimed.net.stream import QueuedStream
from realtimed.rpc.wire import Decoder, Message, Notification, Response, encode_request
from realtimed.websocket.protocols import ViolationError, choose
from tests.kit.clients import websocket
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, running_daemon, runtime_directory
from tests.kit.subscribers import Listener

__all__ = [
    "ALONE",
    "FEW",
    "FLEETING",
    "FORGETFUL",
    "LIVELY",
    "SMALL",
    "SMALL_BACKLOG",
    "STRICT",
    "Browser",
    "ClosedError",
    "Daemons",
    "InMemory",
    "Opening",
    "OverSockets",
    "Peers",
    "Publisher",
    "Settings",
    "opening",
    "running_daemons",
    "written",
]

_T = TypeVar("_T")

# Settings that many tests need, so that they share a daemon.
FEW: Final = {"max_subscriptions": 2}
SMALL: Final = {"max_channels": 2, "max_message": 100, "history_size": 3}
FORGETFUL: Final = {"history_size": 0}
FLEETING: Final = {"history_age": 0.3, "command_timeout": 0.2, "retry_window": 0.2}
LIVELY: Final = {"heartbeat": 0.1, "silence_timeout": 0.5, "close_timeout": 0.1}
SMALL_BACKLOG: Final = {"max_backlog": 500_000, "max_message": 500_000, "close_timeout": 0.2}
STRICT: Final = {
    "max_inbound": 1000,
    "inbound_rate": 0.001,
    "inbound_burst": 10,
    "handshake_timeout": 0.2,
    "close_timeout": 0.2,
    "command_timeout": 0.2,
    "backlog_timeout": 0.2,
}
"""Low limits and short deadlines."""

ALONE: Final = {"max_channels": 77}
"""A daemon for one test at a time, which waits until nobody else is there."""

Settings: TypeAlias = Mapping[str, Any]


_EXPIRY_INTERVAL: Final = 0.1
"""Seconds between two looks for history that is too old, for which a daemon has a task of its own."""


class ClosedError(Exception):
    """The server has closed the WebSocket, with a code and a reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Browser(ABC):
    """A client with a WebSocket."""

    @abstractmethod
    async def send(self, message: str | bytes) -> None:
        """Send a message."""

    @abstractmethod
    async def receive(self) -> str | bytes:
        """Return the next message from the server. Raises `ClosedError` when the server has closed."""

    async def say(self, action: str, channel: object = None, **fields: object) -> None:
        """Send an action."""
        named = {} if channel is None else {"channel": channel}
        await self.send(json.dumps({"action": action, **named, **fields}))

    async def event(self) -> dict[str, Any]:
        """Return the next message, as the JSON object that it is."""
        event = json.loads(await self.receive())
        assert isinstance(event, dict)
        return event

    async def ask(self, action: str, channel: object = None, **fields: object) -> dict[str, Any]:
        """Send an action and return the next event."""
        await self.say(action, channel, **fields)
        return await self.event()

    async def until(self, name: str) -> list[dict[str, Any]]:
        """Return the events up to the first with this name."""
        events = [await self.event()]
        while events[-1]["event"] != name:
            events.append(await self.event())
        return events

    async def nothing_more(self) -> None:
        """Fail if there is anything still to come before the answer to a ping."""
        assert await self.ask("ping") == {"event": "pong"}

    async def rest(self) -> tuple[list[str | bytes], int, str]:
        """Return all that comes until the server closes, and with what it does."""
        messages = []
        try:
            while True:
                messages.append(await self.receive())
        except ClosedError as closed:
            return messages, closed.code, closed.reason

    async def closing(self) -> tuple[int, str]:
        """Return with what the server closes, which has to be the next that it does."""
        messages, code, reason = await self.rest()
        assert messages == []
        return code, reason


class ByteStream(Protocol):
    """What a publisher needs of its connection."""

    async def send_all(self, data: bytes, /) -> None: ...
    async def receive_some(self, max_bytes: int, /) -> bytes | bytearray: ...


class Publisher:
    """A client of the control socket, on a stream of either kind."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decoder = Decoder(2**26)
        self._heard: deque[Message] = deque()
        self.notified: deque[list[object]] = deque()

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self._stream.send_all(data)

    async def receive(self) -> Message | None:
        """Return what the daemon says next, or None when it has hung up."""
        with trio.fail_after(PATIENCE):
            while not self._heard:
                data = await self._stream.receive_some(2**16)
                if not data:
                    return None
                self._heard += self._decoder.feed(bytes(data))
            return self._heard.popleft()

    async def answer(self) -> Response:
        """Return the next answer; messages that come before it go to `notified`."""
        while not isinstance(heard := await self.receive(), Response):
            assert isinstance(heard, Notification), heard
            assert heard.method == "message"
            self.notified.append(heard.params)
        return heard

    async def message(self) -> list[object]:
        """Return the next message of what is subscribed to or watched: channel, message, offset."""
        if self.notified:
            return self.notified.popleft()
        heard = await self.receive()
        assert isinstance(heard, Notification), heard
        assert heard.method == "message"
        return heard.params

    async def call(self, method: str, *params: object) -> Any:
        """Return the result of a method. Raises `RefusedError`."""
        await self.send(encode_request(1, method, params))
        answer = await self.answer()
        if answer.error is not None:
            assert isinstance(answer.error, dict)
            assert (answer.id, answer.result, set(answer.error)) == (1, None, {"code", "message"})
            raise RefusedError(**answer.error)
        return answer.result

    async def until_alone(self) -> None:
        """Wait until nobody is left who was here before."""
        with trio.fail_after(PATIENCE):
            while (stats := await self.call("stats"))["clients"] or stats["publishers"] > 1:
                pass

    async def until_subscribed(self, channel: str, subscribers: int = 1) -> None:
        """Wait until a channel has this many subscribers."""
        with trio.fail_after(PATIENCE):
            while (await self.call("channels")).get(channel, {}).get("subscribers", 0) != subscribers:
                pass


class Peers(ABC):
    """Where peers come from. They live in tasks of a nursery, and are gone when it is cancelled."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery

    @abstractmethod
    async def browser(self, *subprotocols: str) -> Browser:
        """Connect a WebSocket."""

    @abstractmethod
    async def publisher(self) -> Publisher:
        """Connect to the control socket."""

    async def enveloped(self) -> Browser:
        """Connect a client of realtime.v1, and pass over its welcome."""
        browser = await self.browser("realtime.v1")
        assert (await browser.event())["event"] == "welcome"
        return browser


def written(settings: Settings, directory: Path) -> Path:
    """Write settings into a configuration file; `channels` is a list of tables."""
    rules = settings.get("channels", [])
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if name != "channels"]
    for rule in rules:
        lines += ["[[channels]]", *(f"{name} = {json.dumps(value)}" for name, value in rule.items())]
    path = directory / "realtimed.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


# In memory.


class _Ears(Listener):
    """A subscriber that reads as a WebSocket client does."""

    def __init__(self, form: WireFormat, heard: trio.MemorySendChannel[str | bytes | ClosedError]) -> None:
        super().__init__(form)
        self.heard = heard
        self._frames = FrameReader(ConnectionType.CLIENT)
        self._parts: list[str | bytes] = []

    def take(self, data: bytes) -> None:
        self._frames.receive_data(data)
        for event in self._frames.events():
            assert isinstance(event, (TextMessage, BytesMessage)), event
            self._parts.append(bytes(event.data) if isinstance(event, BytesMessage) else event.data)
            if event.message_finished:
                self.heard.send_nowait(self._parts[0][:0].join(self._parts))  # type: ignore[arg-type]  # all of a kind
                self._parts.clear()


class _Conversing(Browser):
    """A conversation without a WebSocket around it."""

    def __init__(self, core: Core, client: str, subprotocols: Sequence[str]) -> None:
        protocol = choose(subprotocols)
        heard, self._hear = trio.open_memory_channel[str | bytes | ClosedError](2**20)
        self._hub = core.hub
        self._ears = _Ears(protocol.form, heard)
        self._conversation = protocol(core.hub, self._ears)
        self._closed = False
        if greeting := self._conversation.greeting(client, core.config.heartbeat):
            self._ears.write(greeting)

    async def send(self, message: str | bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            return
        try:
            frames = self._conversation.receive(message)
        except ViolationError as violation:
            self._hub.catch_up(self._ears)
            self.leave()
            self._ears.heard.send_nowait(ClosedError(self._conversation.close_code(violation.ending), violation.reason))
        else:
            for frame in frames:
                self._ears.write(bytes(frame))

    async def receive(self) -> str | bytes:
        with trio.fail_after(PATIENCE):
            heard = await self._hear.receive()
        if isinstance(heard, ClosedError):
            raise heard
        return heard

    def leave(self) -> None:
        self._closed = True
        self._hub.leave(self._ears)


class _Pipe:
    """A publisher's end of a connection in memory."""

    def __init__(self) -> None:
        self.to_daemon = MemoryReceiveStream()
        self.to_publisher = MemoryReceiveStream()

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.to_daemon.put_data(data)

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        return await self.to_publisher.receive_some(max_bytes)


class _PipeStream(QueuedStream):
    """The daemon's end of it, which takes everything at once."""

    def __init__(self, pipe: _Pipe) -> None:
        # Not that of the class above: it wants a socket, and all that uses one is overridden here.
        self._pipe = pipe
        self.channels = set()
        self.fd = -1

    def attach(self, nursery: trio.Nursery, owner: Owner, gate: Gate | None = None) -> None:
        pass

    def resume_draining(self) -> None:
        pass

    def detach(self) -> None:
        pass

    def peer_credentials(self) -> tuple[int, int, int] | None:
        return 1, 2, 3

    def peer_groups(self) -> frozenset[int]:
        return frozenset([3, 4])

    def write(self, data: bytes, sent: int = 0) -> None:
        self._pipe.to_publisher.put_data(data[sent:])

    def seal(self) -> None:
        pass

    def write_frames(self, frames: Iterable[Frames]) -> None:
        self.write(b"".join(frames))

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def shut(self) -> None:
        with suppress(trio.ClosedResourceError):
            self._pipe.to_publisher.put_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._pipe.to_daemon.receive_some(max_bytes))


async def _expire(core: Core) -> None:
    while True:
        await trio.sleep(_EXPIRY_INTERVAL)
        core.hub.history.expire(1000)


class InMemory(Peers):
    """The core of a daemon that listens nowhere."""

    def __init__(self, settings: Settings, nursery: trio.Nursery, *, fan_out: bool = True) -> None:
        super().__init__(nursery)
        with runtime_directory() as directory:
            self.core = Core(load(file=written(settings, directory)))
        self._browsers = 0
        if fan_out:
            nursery.start_soon(self.core.fan_out.run)
        nursery.start_soon(_expire, self.core)

    async def browser(self, *subprotocols: str) -> Browser:
        await trio.lowlevel.checkpoint()
        self._browsers += 1
        return _Conversing(self.core, f"c-{self.core.sessions.run_id}-{self._browsers:x}", subprotocols)

    async def publisher(self) -> Publisher:
        await trio.lowlevel.checkpoint()
        pipe = _Pipe()
        self.nursery.start_soon(Connection(_PipeStream(pipe), self.core.service).run)
        return Publisher(pipe)


# Over real sockets.


class _Connected(Browser):
    """A WebSocket of trio-websocket."""

    def __init__(self, connection: WebSocketConnection) -> None:
        self._connection = connection

    async def send(self, message: str | bytes) -> None:
        with suppress(ConnectionClosed):  # the next read raises it
            await self._connection.send_message(message)

    async def receive(self) -> str | bytes:
        try:
            with trio.fail_after(PATIENCE):
                message: str | bytes = await self._connection.get_message()
                return message
        except ConnectionClosed:
            ending = self._connection.closed
            assert ending is not None
            raise ClosedError(ending.code, ending.reason or "") from None


async def _hold(opening: AbstractAsyncContextManager[_T], *, task_status: trio.TaskStatus[_T]) -> None:
    async with opening as opened:
        task_status.started(opened)
        await trio.sleep_forever()


class OverSockets(Peers):
    """A daemon in a process of its own, with sockets. Other tests may use the same."""

    def __init__(self, daemon: Daemon, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.daemon = daemon

    async def browser(self, *subprotocols: str) -> Browser:
        connecting = websocket(self.daemon.websocket_socket, subprotocols=subprotocols)
        connection: WebSocketConnection = await self.nursery.start(_hold, connecting)
        return _Connected(connection)

    async def publisher(self) -> Publisher:
        connecting = await trio.open_unix_socket(self.daemon.control_socket)
        stream: trio.SocketStream = await self.nursery.start(_hold, connecting)
        return Publisher(stream)


class Daemons:
    """Daemons that tests share, one for each set of settings, each started when it is needed first."""

    def __init__(self, portal: BlockingPortal, stack: ExitStack) -> None:
        self._portal = portal
        self._stack = stack
        self._running: dict[str, Daemon] = {}

    def get(self, settings: Settings) -> Daemon:
        """Return the daemon with these settings. Blocks while it is starting."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._running:
            directory = self._stack.enter_context(runtime_directory())
            options = ("--config", str(written(settings, directory)))
            starting = self._portal.wrap_async_context_manager(running_daemon(directory, *options))
            self._running[key] = self._stack.enter_context(starting)
        return self._running[key]


@contextmanager
def running_daemons() -> Iterator[Daemons]:
    """Run daemons on demand; they end with this context."""
    with start_blocking_portal("trio") as portal, ExitStack() as stack:
        yield Daemons(portal, stack)
        # The stack ends them one after the other, each at once: nobody is connected any more.


Opening: TypeAlias = Callable[..., Awaitable[Peers]]
"""Opens peers of a service with the given settings."""


@asynccontextmanager
async def opening(daemons: Daemons | None) -> AsyncIterator[Opening]:
    """Give a function that opens peers, of one of the daemons or in memory, which are there until this context ends."""
    async with trio.open_nursery() as nursery:

        async def open_peers(**settings: object) -> Peers:
            if daemons is None:
                return InMemory(settings, nursery)
            return OverSockets(await trio.to_thread.run_sync(daemons.get, settings), nursery)

        yield open_peers
        nursery.cancel_scope.cancel()
