"""The servers written in Go: Centrifugo and Mercure as their makers ship them, and a hub inside Caddy of this suite."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks import tools
from benchmarks.targets import CHANNEL, REQUEST, Server, Target, length_prefixed, started
from tests.kit.stack import free_port

__all__ = ["CADDYHUB", "CADDYHUB_JOINED", "CENTRIFUGO", "MERCURE"]


def _centrifugo() -> Path:
    return tools.need_go_program("centrifugo", "github.com/centrifugal/centrifugo/v6")


@asynccontextmanager
async def _running_centrifugo(directory: Path) -> AsyncIterator[Target]:
    """Run it with its bidirectional JSON protocol and without history. It listens on TCP only."""
    port = free_port()
    settings = {
        "client": {
            "allow_anonymous_connect_without_token": True,
            "ping_interval": "1h",
            "stale_close_delay": "1h",  # of a client that only pings
        },
        "channel": {"without_namespace": {"allow_subscribe_for_anonymous": True, "allow_subscribe_for_client": True}},
        "http_api": {"insecure": True},
        "http_server": {"address": "127.0.0.1", "port": port},
        "log": {"level": "error"},
    }
    config = directory / "centrifugo.json"
    config.write_text(json.dumps(settings))
    async with started("centrifugo", [_centrifugo(), "-c", config], directory, [port]) as process:
        api = b"POST /api/publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

        def publication(size: int) -> tuple[bytes, bytes]:
            before, after = b'{"channel":"%b","data":"' % CHANNEL, b'"}'
            head = api + b"Content-Length: %d\r\n\r\n" % (len(before) + size + len(after))
            return head + before, after

        yield Target(
            processes={"Centrifugo": process.pid},
            address=f"tcp:{port}",
            publish_address=f"tcp:{port}",
            publication=publication,
            request=REQUEST % (b"/connection/websocket", b""),
            subscription=b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"%b"}}' % CHANNEL,
            payload_at=len('{"push":{"channel":"########","pub":{"data":"'),
            joined_tail=len('"}}}'),
        )


_KEY: Final = "a key of this benchmark, which protects nothing"
_CADDYFILE: Final = """
{{
    auto_https off
    admin off
    persist_config off
    log {{
        level ERROR
    }}
}}
http:// {{
    bind unix/{socket}
    mercure {{
        transport local
        publisher_jwt "{key}"
        anonymous
        heartbeat 1h
    }}
}}
"""
_EVENT_ID: Final = len("urn:uuid:01234567-0123-0123-0123-0123456789ab")


def _mercure() -> Path:
    return tools.need_go_program("mercure")  # the hub is a module of Caddy, which one command cannot build


def _token() -> bytes:
    """Return a JSON Web Token that allows to publish to all topics (RFC 7515, appendix A.1)."""

    def encoded(value: bytes) -> bytes:
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    signed = encoded(b'{"alg":"HS256","typ":"JWT"}') + b"." + encoded(b'{"mercure":{"publish":["*"]}}')
    return signed + b"." + encoded(hmac.digest(_KEY.encode(), signed, "sha256"))


@asynccontextmanager
async def _running_mercure(directory: Path) -> AsyncIterator[Target]:
    """Run it without history. Subscribers read server-sent events, in HTTP/1.0, where nothing divides them further."""
    path = directory / "mercure"
    config = directory / "Caddyfile"
    config.write_text(_CADDYFILE.format(socket=path, key=_KEY))
    command: list[str | Path] = [_mercure(), "run", "--config", config]
    async with started("mercure", command, directory, [path]) as process:
        token = _token()

        def publication(size: int) -> tuple[bytes, bytes]:
            before = b"topic=%b&data=" % CHANNEL
            head = (
                b"POST /.well-known/mercure HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n"
                b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\n"
            )
            return head % (token, len(before) + size) + before, b""

        yield Target(
            processes={"Mercure": process.pid},
            address=f"unix:{path}",
            publish_address=f"unix:{path}",
            publication=publication,
            request=b"GET /.well-known/mercure?topic=%b HTTP/1.0\r\nHost: localhost\r\n\r\n" % CHANNEL,
            status=200,
            greeting_bytes=len(":\n"),
            fixed_header=lambda _: len("id: ") + _EVENT_ID + len("\ndata: "),
            answers_pings=False,
        )


_HUB_CADDYFILE: Final = """
{{
    auto_https off
    admin off
    persist_config off
    log {{
        level ERROR
    }}
}}
http://:{port} {{
    handle /ws {{
        @foreign not header Origin http://localhost:{port}
        respond @foreign 403
        hub unix/{publishers} {form}
    }}
}}
"""


def _caddyhub() -> Path:
    return tools.need_go_build("caddyhub")


def _caddyhub_in(form: str) -> Callable[[Path], AbstractAsyncContextManager[Target]]:
    """Return what runs it with a policy for origins, as the project's Caddyfile has one. Clients come over TCP."""

    @asynccontextmanager
    async def run(directory: Path) -> AsyncIterator[Target]:
        port, publishers, config = free_port(), directory / "publishers", directory / "Caddyfile"
        config.write_text(_HUB_CADDYFILE.format(port=port, publishers=publishers, form=form))
        command: list[str | Path] = [_caddyhub(), "run", "--config", config]
        async with started("caddyhub", command, directory, [port, publishers]) as process:
            yield Target(
                processes={"caddyhub": process.pid},
                address=f"tcp:{port}",
                publish_address=f"unix:{publishers}",
                publication=length_prefixed,
                request=REQUEST % (b"/ws", b"Origin: http://localhost:%d\r\n" % port),
                subscription=b'{"action":"subscribe","channel":"%b"}' % CHANNEL,
            )

    return run


CADDYHUB: Final = Server("caddyhub", _caddyhub, _caddyhub_in(""))
CADDYHUB_JOINED: Final = Server("caddyhub-joined", _caddyhub, _caddyhub_in("joined"))
"""The same, but messages that wait for one client are written with one system call."""
CENTRIFUGO: Final = Server("Centrifugo", _centrifugo, _running_centrifugo)
MERCURE: Final = Server("Mercure", _mercure, _running_mercure, is_websocket=False)
