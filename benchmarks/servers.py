"""The servers to measure.

The peers written for this suite share one way of publishing; the others have their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import tools
from benchmarks.go_servers import CADDYHUB, CENTRIFUGO, MERCURE
from benchmarks.targets import CHANNEL, REQUEST, Server, Target, length_prefixed, started
from tests.kit.stack import ROOT, Daemon, running_caddy, running_daemon

__all__ = [
    "FLOOR",
    "OTHER_CHECKOUT",
    "REALTIMED",
    "SERVERS",
    "other_checkout",
    "realtimed_behind_caddy",
    "realtimed_v1",
    "running_checkout",
]


def _nothing() -> None:
    pass


def _string(size: int) -> bytes:
    """Return MessagePack's header of a str of `size` bytes."""
    if size < 32:
        return bytes([0xA0 | size])
    if size < 2**8:
        return b"\xd9" + size.to_bytes(1, "big")
    return b"\xda" + size.to_bytes(2, "big")


def _notification(size: int) -> tuple[bytes, bytes]:
    """Return what surrounds a message in MessagePack-RPC: [2, "broadcast", [channel, message]]."""
    return b"\x93\x02\xa9broadcast\x92\xa8" + CHANNEL + _string(size), b""


# realtimed itself, directly and behind Caddy.


def _environment(checkout: Path) -> dict[str, str]:
    """Return what makes Python run the package of a checkout: not that of the working directory, nor one installed."""
    return {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}


def running_checkout(directory: Path, checkout: Path, *options: str) -> AbstractAsyncContextManager[Daemon]:
    """Run the daemon of a checkout of the project, with this Python and what is installed for it."""
    return running_daemon(directory, *options, environment=_environment(checkout))


@asynccontextmanager
async def _running_realtimed(directory: Path, checkout: Path = ROOT) -> AsyncIterator[Target]:
    # The load client subscribes to all channels of a client at once, beyond a browser's burst of requests. Behind Caddy
    # all clients have the address of this machine.
    options = ("--inbound-burst", "1000", "--max-connections-per-address", "0")
    async with running_checkout(directory, checkout, *options) as daemon:
        yield Target(
            processes={"realtimed": daemon.process.pid},
            address=f"unix:{daemon.websocket_socket}",
            publish_address=f"unix:{daemon.control_socket}",
            publication=_notification,
            request=REQUEST % (b"/ws", b""),
            subscription=b'{"action":"subscribe","channel":"%b"}' % CHANNEL,
        )


@asynccontextmanager
async def realtimed_behind_caddy(directory: Path) -> AsyncIterator[Target]:
    """Run both with the project's Caddyfile; clients come through Caddy, over TCP on the loopback interface."""
    async with (
        _running_realtimed(directory) as target,
        running_caddy(directory, websocket_socket=Path(target.address.removeprefix("unix:"))) as caddy,
    ):
        origin = b"Origin: http://localhost:%d\r\n" % caddy.port
        yield replace(
            target,
            processes={**target.processes, "Caddy": caddy.process.pid},
            address=f"tcp:{caddy.port}",
            request=REQUEST % (b"/ws", origin),
        )


@asynccontextmanager
async def realtimed_v1(directory: Path) -> AsyncIterator[Target]:
    """Run realtimed for clients that speak realtime.v1: an envelope around each message, with its offset."""
    async with _running_realtimed(directory) as target:
        yield replace(
            target,
            request=REQUEST % (b"/ws", b"Sec-WebSocket-Protocol: realtime.v1\r\n"),
            payload_at=len('{"event":"message","channel":"########","offset":1,"time":1767225600000,"data":"'),
            payload_tail=len('"}'),
        )


# The peers.


def _own(
    name: str, command: Callable[[], Sequence[str | Path]], **environment: str
) -> Callable[[Path], AbstractAsyncContextManager[Target]]:
    """Return what runs a server of this suite, which gets its two sockets on its command line."""

    @asynccontextmanager
    async def run(directory: Path) -> AsyncIterator[Target]:
        websocket, control = directory / "websocket", directory / "control"
        async with started(
            name, [*command(), websocket, control], directory, [websocket, control], **environment
        ) as process:
            yield Target(
                processes={name: process.pid},
                address=f"unix:{websocket}",
                publish_address=f"unix:{control}",
                publication=length_prefixed,
            )

    return run


def _python(script: str, *packages: str) -> Callable[[], Sequence[str | Path]]:
    return lambda: [tools.need_python(*packages), tools.HERE / "peers" / script]


def _node(script: str, *packages: str) -> Callable[[], Sequence[str | Path]]:
    return lambda: [tools.need_node(*packages), tools.HERE / "peers" / script]


def _prepare_socketio() -> None:
    tools.need_node("socket.io")


@asynccontextmanager
async def _running_socketio(directory: Path) -> AsyncIterator[Target]:
    async with _own("socket.io", _node("socketio.js", "socket.io"), NODE_PATH=str(tools.NODE_MODULES))(
        directory
    ) as target:
        yield replace(
            target,
            request=REQUEST % (b"/socket.io/?EIO=4&transport=websocket", b""),
            subscription=b'40{"channel":"%b"}' % CHANNEL,
            payload_at=len('42["message","'),
        )


_NGINX: Final = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/nginx-errors.log warn;
load_module {module};
worker_rlimit_nofile 65536;
events {{ worker_connections 32768; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    client_body_buffer_size 128k;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    nchan_max_reserved_memory 512M;
    server {{
        listen unix:{directory}/websocket backlog=4096;
        listen unix:{directory}/control;
        location ~ ^/subscribe/(\\w+)$ {{
            nchan_subscriber websocket;
            nchan_channel_id $1;
            nchan_subscriber_first_message newest;
        }}
        location ~ ^/publish/(\\w+)$ {{
            nchan_publisher http;
            nchan_channel_id $1;
            nchan_message_buffer_length 1000;
            nchan_message_timeout 10s;
        }}
    }}
}}
"""
_NCHAN_MODULE: Final = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


def _prepare_nchan() -> None:
    tools.need_program("nginx", "nginx", "libnginx-mod-nchan")
    if not _NCHAN_MODULE.exists():
        raise tools.AbsentError("nginx is there without nchan: apt-get install libnginx-mod-nchan")


@asynccontextmanager
async def _running_nchan(directory: Path) -> AsyncIterator[Target]:
    config = directory / "nginx.conf"
    config.write_text(_NGINX.format(directory=directory, module=_NCHAN_MODULE))
    listening = [directory / "websocket", directory / "control"]
    command: list[str | Path] = [tools.need_program("nginx", "nginx"), "-c", config, "-p", directory]
    async with started("nchan", command, directory, listening) as process:

        def publication(size: int) -> tuple[bytes, bytes]:
            head = b"POST /publish/%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            return head % (CHANNEL, size), b""

        yield Target(
            processes={"nchan": process.pid},
            address=f"unix:{directory}/websocket",
            publish_address=f"unix:{directory}/control",
            publication=publication,
            request=REQUEST % (b"/subscribe/" + CHANNEL, b""),
        )


def _prepare_redis() -> None:
    tools.need_program("redis-server", "redis-server")


@asynccontextmanager
async def _running_redis(directory: Path) -> AsyncIterator[Target]:
    path = directory / "redis"
    command: list[str | Path] = [
        tools.need_program("redis-server", "redis-server"), "--port", "0", "--unixsocket", path, "--save", "",
        "--appendonly", "no", "--dir", directory, "--maxclients", "15000", "--tcp-backlog", "4096",
        "--client-output-buffer-limit", "pubsub 0 0 0",
    ]  # fmt: skip
    async with started("redis", command, directory, [path]) as process:

        def bulk(value: bytes) -> bytes:
            return b"$%d\r\n%b\r\n" % (len(value), value)

        def publication(size: int) -> tuple[bytes, bytes]:
            return b"*3\r\n" + bulk(b"PUBLISH") + bulk(CHANNEL) + b"$%d\r\n" % size, b"\r\n"

        yield Target(
            processes={"Redis": process.pid},
            address=f"unix:{path}",
            publish_address=f"unix:{path}",
            publication=publication,
            status=None,
            request=b"*2\r\n" + bulk(b"SUBSCRIBE") + bulk(CHANNEL),
            greeting_bytes=len(b"*3\r\n" + bulk(b"subscribe") + bulk(CHANNEL) + b":1\r\n"),
            fixed_header=lambda size: len(b"*3\r\n" + bulk(b"message") + bulk(CHANNEL) + b"$%d\r\n" % size),
            answers_pings=False,
        )


@asynccontextmanager
async def _running_floor(directory: Path) -> AsyncIterator[Target]:
    program = tools.compiled("floor", directory)
    async with _own("floor", lambda: [program])(directory) as target:
        yield replace(target, answers_pings=False)


def other_checkout(checkout: Path) -> Server:
    """Return the daemon of another checkout of the project, to be compared with ours."""

    def prepare() -> None:
        done = subprocess.run(
            [sys.executable, "-c", "import realtimed; print(realtimed.__file__)"],
            env={**os.environ, **_environment(checkout)}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        if done.stdout.strip() != str(checkout / "realtimed" / "__init__.py"):
            raise tools.AbsentError(f"{checkout} is not a checkout of this project")

    return Server(OTHER_CHECKOUT, prepare, partial(_running_realtimed, checkout=checkout))


def _peer(name: str, command: Callable[[], Sequence[str | Path]], slow: bool = False, **environment: str) -> Server:
    return Server(name, command, _own(name, command, **environment), slow=slow)


OTHER_CHECKOUT: Final = "other checkout"
"""The name of the server of another checkout."""

REALTIMED: Final = Server("realtimed", _nothing, _running_realtimed)
FLOOR: Final = Server("floor", _nothing, _running_floor, many_channels=False, is_websocket=False)

SERVERS: Final = (
    REALTIMED,
    _peer("trio-websocket", _python("trio_websocket_plain.py"), slow=True),
    _peer("websockets", _python("websockets_broadcast.py", "websockets"), PYTHONPATH=str(tools.PYTHON_PACKAGES)),
    _peer("ws", _node("ws.js", "ws"), NODE_PATH=str(tools.NODE_MODULES)),
    Server("socket.io", _prepare_socketio, _running_socketio),
    _peer("uWebSockets", _node("uwebsockets.js", "uwebsockets"), NODE_PATH=str(tools.NODE_MODULES)),
    Server("nchan", _prepare_nchan, _running_nchan),
    Server("Redis", _prepare_redis, _running_redis, is_websocket=False),
    CADDYHUB,
    CENTRIFUGO,
    MERCURE,
    FLOOR,
)
