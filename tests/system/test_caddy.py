"""The project's Caddyfile in the real Caddy: addresses, certificates, the way to the daemon and to PHP."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import WebSocketConnection, open_websocket

from tests.kit.caddy import GO_SETTINGS
from tests.kit.clients import closing, publisher, subscribe, websocket
from tests.kit.handshakes import Answer, connected, get, handshake, request, upgrade
from tests.kit.stack import (
    CADDYFILE,
    Caddy,
    Daemon,
    find_caddy,
    free_port,
    running_caddy,
    running_daemon,
    running_php_fpm,
)

ANSWER_TIMEOUT = 10
"""Seconds within which whatever a test waits for has happened."""


# Addresses.


def test_the_defaults_are_those_of_the_documentation() -> None:
    command: list[str | Path] = [find_caddy(), "adapt", "--config", CADDYFILE]
    adapted = subprocess.run(command, env={}, capture_output=True, check=True, text=True)
    assert "not formatted" not in adapted.stderr
    config = json.loads(adapted.stdout)
    servers = config["apps"]["http"]["servers"].values()
    assert sorted(address for server in servers for address in server["listen"]) == [
        "127.0.0.1:2018",
        ":8080",
        "unix/@caddy-certificates-2018",
    ]
    for expected in ("unix//run/realtime-ws.sock", "unix//run/php/php-fpm.sock", '"http://localhost:8080"'):
        assert expected in adapted.stdout


@pytest.mark.parametrize(
    "form",
    [
        ":{port}",
        "http://:{port}",
        "http://localhost:{port}",
        ":{port} :{other}",
        "http://127.0.0.1:{other}, http://localhost:{port}",
    ],
)
async def test_plain_addresses_speak_plain_http(form: str, runtime_dir: Path, daemon: Daemon) -> None:
    port, other = free_port(), free_port()
    environment = {"SERVER_ADDRESS": form.format(port=port, other=other), "ALLOWED_ORIGINS": "http://a.example"}
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=environment):
        assert (await handshake(port, "/ws", "http://a.example")).status == 101
        assert (await handshake(port, "/ws", "http://evil.example")).status == 403


# Certificates, from Caddy's own authority in place of a public one.


@dataclass
class SecureCaddy:
    """A Caddy that takes `https_port` for 443 and `http_port` for 80."""

    https_port: int
    http_port: int
    storage: Path

    async def handshake(self, host: str, origin: str) -> Answer:
        authority = self.storage / "caddy/pki/authorities/local/root.crt"
        context = ssl.create_default_context(cafile=str(authority))
        async with connected(self.https_port, context, host) as stream:
            return await request(stream, "/ws", upgrade(origin), host)

    def certificates(self) -> set[str]:
        """Return the names that certificates have been had for."""
        return {path.stem for path in self.storage.glob("caddy/certificates/**/*.crt")}


@asynccontextmanager
async def secure_caddy(
    directory: Path, daemon: Daemon, address: str, allowed: str, **more: str
) -> AsyncIterator[SecureCaddy]:
    """Run Caddy at `address`, in which ``{https}`` stands for its HTTPS port."""
    https_port, http_port, storage = free_port(), free_port(), directory / "caddy-data"
    environment = {
        "SERVER_ADDRESS": address.format(https=https_port),
        "ALLOWED_ORIGINS": allowed,
        "CADDY_GLOBAL_OPTIONS": f"local_certs\nskip_install_trust\nhttps_port {https_port}\nhttp_port {http_port}",
        **more,
    }
    async with running_caddy(directory, websocket_socket=daemon.websocket_socket, environment=environment):
        yield SecureCaddy(https_port, http_port, storage)


@pytest.mark.parametrize("address", [":{https}", "https://", "https://:{https}"])
async def test_a_bare_https_port_has_certificates_for_the_hosts_of_allowed_origins(
    address: str, runtime_dir: Path, daemon: Daemon
) -> None:
    allowed = "https://yourdomain.com https://www.yourdomain.com:8443 http://plain.example"
    async with secure_caddy(runtime_dir, daemon, address, allowed) as caddy:
        assert caddy.certificates() == set()
        assert (await caddy.handshake("yourdomain.com", "https://yourdomain.com")).status == 101
        assert (await caddy.handshake("yourdomain.com", "https://evil.example")).status == 403
        assert (await caddy.handshake("www.yourdomain.com", "https://yourdomain.com")).status == 101
        for host in ("evil.example", "plain.example", "domain.com", "com", "a.yourdomain.com", "localhost"):
            with pytest.raises(trio.BrokenResourceError) as refusal:
                await caddy.handshake(host, "https://yourdomain.com")
            assert isinstance(refusal.value.__cause__, ssl.SSLError)
        assert caddy.certificates() == {"yourdomain.com", "www.yourdomain.com"}


async def test_a_bare_https_port_redirects_from_plain_http(runtime_dir: Path, daemon: Daemon) -> None:
    async with secure_caddy(runtime_dir, daemon, ":{https}", "https://yourdomain.com") as caddy:
        answer = await get(caddy.http_port, "/page?x=1", host="yourdomain.com")
        assert answer.status == 308
        assert answer.headers["location"] == "https://yourdomain.com/page?x=1"


async def test_https_at_one_port_leaves_another_plain(runtime_dir: Path, daemon: Daemon) -> None:
    plain = free_port()
    allowed = f"https://yourdomain.com http://localhost:{plain}"
    async with secure_caddy(runtime_dir, daemon, f":{plain} :{{https}}", allowed) as caddy:
        assert (await handshake(plain, "/ws", f"http://localhost:{plain}")).status == 101
        assert (await caddy.handshake("yourdomain.com", "https://yourdomain.com")).status == 101


@pytest.mark.parametrize(("options", "offered"), [({}, True), ({"CADDY_SERVER_OPTIONS": "protocols h1 h2"}, False)])
async def test_http3_is_offered_unless_it_is_switched_off(
    options: dict[str, str], offered: bool, runtime_dir: Path, daemon: Daemon
) -> None:
    """A reload cuts WebSockets over HTTP/3: who minds does without it."""
    own = "https://yourdomain.com"
    async with secure_caddy(runtime_dir, daemon, ":{https}", own, **options) as caddy:
        answer = await caddy.handshake("yourdomain.com", "https://evil.example")
        assert ("h3" in answer.headers.get("alt-svc", "")) is offered
        assert (await caddy.handshake("yourdomain.com", own)).status == 101


async def test_a_domain_name_has_its_certificate_before_anyone_asks(runtime_dir: Path, daemon: Daemon) -> None:
    # The pages may well come from elsewhere: the name is that of SERVER_ADDRESS, not of an origin.
    async with secure_caddy(runtime_dir, daemon, "ws.yourdomain.com", "https://www.yourdomain.com") as caddy:
        with trio.fail_after(ANSWER_TIMEOUT):
            while caddy.certificates() != {"ws.yourdomain.com"}:  # noqa: ASYNC110 - nothing tells of a new file
                await trio.sleep(0.01)
            while True:
                try:
                    answer = await caddy.handshake("ws.yourdomain.com", "https://www.yourdomain.com")
                except trio.BrokenResourceError:  # the certificate is in its file, and Caddy is about to take it up
                    continue
                break
        assert answer.status == 101
        assert (await get(caddy.http_port, "/", host="ws.yourdomain.com")).status == 308


# Memory.


async def stacks_of_websockets(directory: Path, daemon: Daemon, number: int, **environment: str) -> float:
    """Return the bytes that Caddy's stacks have grown by when `number` WebSockets are open."""

    async def stacks() -> float:
        async with await trio.open_unix_socket(str(caddy.admin_socket)) as stream:
            page = await request(stream, "/metrics", [("Connection", "close")], host="")
        match = re.search(r"^go_memstats_stack_inuse_bytes (\S+)$", page.body, re.MULTILINE)
        assert match is not None, page.body
        return float(match[1])

    async with (
        running_caddy(directory, websocket_socket=daemon.websocket_socket, environment=environment) as caddy,
        AsyncExitStack() as stack,
    ):
        before = await stacks()
        for _ in range(number):
            stream = await stack.enter_async_context(connected(caddy.port))
            assert (await request(stream, "/ws", upgrade(origin_of(caddy)))).status == 101
        return await stacks() - before


async def test_the_setting_of_caddys_unit_makes_stacks_smaller(runtime_dir: Path, daemon: Daemon) -> None:
    """Go ignores settings that it does not know: this fails when a new version knows it no more."""
    usual = await stacks_of_websockets(runtime_dir, daemon, 300, GODEBUG="adaptivestackstart=1")
    ours = await stacks_of_websockets(runtime_dir, daemon, 300, GODEBUG=GO_SETTINGS)
    assert ours < 0.9 * usual


def test_http_1_alone_is_served_where_it_is_asked_for() -> None:
    command: list[str | Path] = [find_caddy(), "adapt", "--config", CADDYFILE]
    for options, protocols in ({"CADDY_SERVER_OPTIONS": "protocols h1"}, ["h1"]), ({}, None):
        adapted = subprocess.run(command, env=options, capture_output=True, check=True, text=True)
        servers = json.loads(adapted.stdout)["apps"]["http"]["servers"].values()
        assert [server.get("protocols") for server in servers if server["listen"] == [":8080"]] == [protocols]


# The way to the daemon.


async def test_the_daemon_sees_the_real_address_of_a_client(daemon: Daemon, caddy_alone: Caddy) -> None:
    forged = [*upgrade(origin_of(caddy_alone)), ("X-Forwarded-For", "192.0.2.7")]
    async with connected(caddy_alone.port) as stream:
        assert (await request(stream, "/ws", forged)).status == 101
        async with publisher(daemon.control_socket) as control:
            clients = await control.call("clients")
    assert [client["address"] for client in clients] == ["127.0.0.1"]


FORWARDED = [
    # what Caddy trusts, the header that reaches it, who the daemon sees
    ("127.0.0.1", ["203.0.113.7"], "203.0.113.7"),
    ("127.0.0.1", ["192.0.2.9, 203.0.113.7"], "203.0.113.7"),
    ("127.0.0.1", ["192.0.2.9", "203.0.113.7"], "203.0.113.7"),
    ("127.0.0.1", ["2001:db8::7"], "2001:db8::7"),
    ("192.0.2.0/24 127.0.0.0/8", ["203.0.113.7, 192.0.2.9"], "203.0.113.7"),
    ("private_ranges", ["203.0.113.7, 10.0.0.1, 127.0.0.1"], "203.0.113.7"),
    ("127.0.0.1", [], "127.0.0.1"),
    ("127.0.0.1", ["unknown"], "127.0.0.1"),
    ("192.0.2.0/24", ["203.0.113.7"], "127.0.0.1"),
    ("", ["203.0.113.7"], "127.0.0.1"),
    (None, ["203.0.113.7"], "127.0.0.1"),
]


@pytest.mark.parametrize(("trusted", "told", "seen"), FORWARDED)
async def test_whom_the_daemon_sees_behind_another_proxy(
    runtime_dir: Path, daemon: Daemon, trusted: str | None, told: list[str], seen: str
) -> None:
    variables = {"TRUSTED_PROXIES": trusted}
    async with (
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy,
        connected(caddy.port) as stream,
        publisher(daemon.control_socket) as control,
    ):
        headers = [*upgrade(origin_of(caddy)), *(("X-Forwarded-For", each) for each in told)]
        assert (await request(stream, "/ws", headers)).status == 101
        assert [client["address"] for client in await control.call("clients")] == [seen]


async def test_behind_a_trusted_proxy_each_visitor_has_a_limit_of_its_own(runtime_dir: Path) -> None:
    variables = {"TRUSTED_PROXIES": "127.0.0.1"}
    async with (
        running_daemon(runtime_dir, "--max-connections-per-address", "1") as daemon,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy,
        connected(caddy.port) as first,
        connected(caddy.port) as second,
        connected(caddy.port) as third,
    ):
        own = upgrade(origin_of(caddy))
        assert (await request(first, "/ws", [*own, ("X-Forwarded-For", "203.0.113.7")])).status == 101
        refused = await request(second, "/ws", [*own, ("X-Forwarded-For", "192.0.2.1, 203.0.113.7")])
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert "max-connections-per-address, is 1 connections" in refused.body
        assert (await request(third, "/ws", [*own, ("X-Forwarded-For", "203.0.113.8")])).status == 101


@pytest.mark.parametrize("target", ["/ws", "/realtimed/healthz"])
async def test_nothing_from_outside_passes_for_what_caddy_says(runtime_dir: Path, target: str) -> None:
    heads: list[bytes] = []
    upstream = runtime_dir / "upstream.sock"

    async def record(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some()
        heads.append(head)
        await stream.send_all(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(upstream))
        listening.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        variables = {"REALTIME_HTTP": f"unix/{upstream}", "METRICS_CLIENTS": "127.0.0.1"}
        async with (
            trio.open_nursery() as nursery,
            running_caddy(runtime_dir, websocket_socket=upstream, environment=variables) as caddy,
            connected(caddy.port) as stream,
        ):
            nursery.start_soon(trio.serve_listeners, record, [listener])
            outside = [
                ("Realtime-User", "admin"), ("realtime-token", "x"), ("REALTIME-X", "y"), ("Realtime-", "z"),
                ("Cookie", "session=1"), ("cookie", "more=2"), ("X-Forwarded-For", "192.0.2.9"), ("X-Real", "kept"),
            ]  # fmt: skip
            assert (await request(stream, target, [*upgrade(origin_of(caddy)), *outside])).status == 426
            nursery.cancel_scope.cancel()
    [head] = heads
    fields = [line.partition(": ") for line in head.decode().lower().split("\r\n")[1:-2]]
    names = [name for name, _, _ in fields]
    assert "x-real" in names
    assert [name for name in names if name.startswith(("realtime", "cookie"))] == []
    assert [value for name, _, value in fields if name == "x-forwarded-for"] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("trusted", "ranges"),
    [(None, None), ("", None), ("192.0.2.1 2001:db8::/32", ["192.0.2.1", "2001:db8::/32"])],
)
def test_no_proxy_is_trusted_unless_it_is_named(trusted: str | None, ranges: list[str] | None) -> None:
    environment = {} if trusted is None else {"TRUSTED_PROXIES": trusted}
    command: list[str | Path] = [find_caddy(), "adapt", "--config", CADDYFILE]
    adapted = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    for server in json.loads(adapted.stdout)["apps"]["http"]["servers"].values():
        assert server["trusted_proxies"].get("ranges") == ranges
        assert server["trusted_proxies_strict"] == 1


def test_a_trusted_proxy_that_is_no_address_stops_caddy_at_its_start(tmp_path: Path) -> None:
    command: list[str | Path] = [find_caddy(), "validate", "--config", CADDYFILE]
    environment = {"TRUSTED_PROXIES": "proxy.example", "HOME": str(tmp_path)}
    validated = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
    assert validated.returncode == 1
    assert "invalid IP address: 'proxy.example'" in validated.stderr


async def test_a_header_of_a_cdn_can_tell_the_address(runtime_dir: Path, daemon: Daemon) -> None:
    variables = {"TRUSTED_PROXIES": "127.0.0.1", "CADDY_SERVER_OPTIONS": "client_ip_headers CF-Connecting-IP"}
    async with (
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy,
        connected(caddy.port) as stream,
        publisher(daemon.control_socket) as control,
    ):
        told = [("X-Forwarded-For", "192.0.2.9"), ("CF-Connecting-IP", "203.0.113.7")]
        assert (await request(stream, "/ws", [*upgrade(origin_of(caddy)), *told])).status == 101
        assert [client["address"] for client in await control.call("clients")] == ["203.0.113.7"]


async def test_a_reload_keeps_connections(runtime_dir: Path, daemon: Daemon, caddy_alone: Caddy) -> None:
    changed = runtime_dir / "Changed"
    changed.write_text(CADDYFILE.read_text().replace("are not allowed here", "are not welcome"))
    async with (
        open_websocket(
            "localhost",
            caddy_alone.port,
            "/ws",
            use_ssl=False,
            subprotocols=["realtime.v1"],
            extra_headers=[(b"Origin", origin_of(caddy_alone).encode())],
        ) as websocket,
        publisher(daemon.control_socket) as control,
    ):
        await websocket.send_message(subscribe("news"))
        await event(websocket, "subscribed")
        await caddy_alone.reload(changed)
        assert "not welcome" in (await handshake(caddy_alone.port, "/ws", "http://evil.example")).body
        await caddy_alone.reload(changed, "--force")
        await control.call("broadcast", "news", "still here")
        assert (await event(websocket, "message"))["data"] == "still here"


@pytest.mark.parametrize(("options", "codes"), [(["--max-age", "2"], {4503}), ([], {1001})])
async def test_who_has_reached_an_age_is_not_cut_off_by_a_reload(
    runtime_dir: Path, options: list[str], codes: set[int]
) -> None:
    """Caddy closes what its old configuration still serves after `stream_close_delay`: those who are told are gone."""
    impatient = runtime_dir / "Impatient"
    impatient.write_text(CADDYFILE.read_text().replace("stream_close_delay 24h", "stream_close_delay 4s"))
    ended: list[int] = []

    async def stay() -> None:
        async with websocket(caddy.port, headers=[("Origin", origin_of(caddy))]) as client:
            connected_all.release()
            code, _ = await closing(client)
            ended.append(code)

    with trio.fail_after(ANSWER_TIMEOUT):
        async with (
            running_daemon(runtime_dir, "--heartbeat", "0.1", *options),
            running_caddy(runtime_dir, config=impatient) as caddy,
            trio.open_nursery() as nursery,
        ):
            connected_all = trio.Semaphore(0)
            for _ in range(20):
                nursery.start_soon(stay)
            for _ in range(20):
                await connected_all.acquire()
            await caddy.reload(impatient, "--force")
    assert len(ended) == 20
    assert set(ended) == codes


async def test_newcomers_wait_for_a_daemon_that_restarts(runtime_dir: Path) -> None:
    async with running_caddy(runtime_dir) as caddy, connected(caddy.port) as stream, trio.open_nursery() as nursery:
        answered = trio.Event()

        async def newcomer() -> None:
            assert (await request(stream, "/ws", upgrade(origin_of(caddy)))).status == 101
            answered.set()

        nursery.start_soon(newcomer)
        async with running_daemon(runtime_dir):
            with trio.fail_after(ANSWER_TIMEOUT):
                await answered.wait()
            await stream.aclose()


# The demo.


@pytest.fixture
async def demo(runtime_dir: Path) -> AsyncIterator[Caddy]:
    """Serve a little application of the same shape as the demo."""
    app = runtime_dir / "app"
    files = {
        "index.php": "<?php echo 'page ', getenv('REALTIME_SOCKET');",
        "send.php": "<?php echo $_SERVER['REQUEST_URI'];",
        "realtime.php": "<?php echo 'library';",
        "realtime.js": "export const script = 1",
        ".secret.php": "<?php echo 'secret';",
        ".git/config": "secret",
        "more/.env": "secret",
        "more/index.php": "<?php echo 'more';",
    }
    for name, content in files.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(content)
    async with (
        running_php_fpm(runtime_dir, {"REALTIME_SOCKET": "/run/realtime.sock"}) as fpm,
        running_caddy(runtime_dir, php_socket=fpm.socket, app=app) as caddy,
    ):
        yield caddy


async def test_the_demo_itself_is_served_by_its_files(caddy: Caddy) -> None:
    assert "realtimed" in (await get(caddy.port, "/")).body
    assert (await get(caddy.port, "/realtime.js")).status == 200
    for missing in ("/missing", "/missing.php", "/realtime.php", "/page.php"):
        assert (await get(caddy.port, missing)).status == 404, missing


async def test_pages_and_files_are_served(demo: Caddy) -> None:
    assert (await get(demo.port, "/")).body == "page /run/realtime.sock"
    assert (await get(demo.port, "/index.php")).body == "page /run/realtime.sock"
    assert (await get(demo.port, "/send.php?x=1")).body == "/send.php?x=1"
    assert (await get(demo.port, "/more/")).body == "more"
    script = await get(demo.port, "/realtime.js")
    assert script.body == "export const script = 1"
    assert script.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "target",
    [
        "/realtime.php",
        "/realtime.php/",
        "/realtime.php/x",
        "/realtime.php?x=1",
        "//realtime.php",
        "/./realtime.php",
        "/more/../realtime.php",
        "/more/..%2frealtime.php",
        "/more/%2e%2e/realtime.php",
        "/%72ealtime.php",
        "/realtime%2ephp",
        "/Realtime.PHP",
        "/realtime.php%00",
        "/realtime.php%20",
        "/realtime.php.",
        "/.secret.php",
        "/%2esecret.php",
        "/./.secret.php",
        "/.git/config",
        "/more/.env",
        "/more//.env",
        "/missing",
        "/missing.php",
        "/index.php/x/../../realtime.php",
    ],
)
async def test_what_is_no_page_is_not_there(target: str, demo: Caddy) -> None:
    answer = await get(demo.port, target)
    assert answer.status in (400, 404)
    assert answer.body == ""


@pytest.mark.parametrize("started_in", [".", "caddy"])
async def test_the_demo_is_found_from_the_root_and_from_beside_the_caddyfile(
    started_in: str, runtime_dir: Path
) -> None:
    for directory in ("caddy", "app", "other"):
        (runtime_dir / directory).mkdir()
    for directory in ("app", "other"):
        (runtime_dir / directory / "realtime.php").touch()
        (runtime_dir / directory / "name.txt").write_text(directory)
    started = runtime_dir / started_in
    async with running_caddy(runtime_dir, app=None, working_directory=started) as caddy:
        assert (await get(caddy.port, "/name.txt")).body == "app"
    async with running_caddy(runtime_dir, app=runtime_dir / "other", working_directory=started) as caddy:
        assert (await get(caddy.port, "/name.txt")).body == "other"


@pytest.fixture
async def framework(runtime_dir: Path, daemon: Daemon) -> AsyncIterator[Caddy]:
    """Serve an application whose index.php answers for all that is no file, as Laravel's and Symfony's do."""
    public = runtime_dir / "application" / "public"
    report = "echo json_encode([$_SERVER['SCRIPT_NAME'], $_SERVER['REQUEST_URI'], $_SERVER['REQUEST_METHOD'], $_GET]);"
    files = {
        "index.php": f"<?php if ($_SERVER['REQUEST_URI'] === '/gone') http_response_code(410); {report}",
        "tool.php": f"<?php {report}",
        "build/app.js": "export const script = 1",
        "storage/index.html": "a directory's page",
        ".htaccess": "secret",
        "build/.env": "secret",
        ".well-known/security.txt": "Contact: mailto:a@a.example",
    }
    for name, content in files.items():
        (public / name).parent.mkdir(parents=True, exist_ok=True)
        (public / name).write_text(content)
    (public.parent / ".env").write_text("secret")
    (public.parent / "artisan").write_text("secret")
    async with (
        running_php_fpm(runtime_dir) as fpm,
        running_caddy(
            runtime_dir, websocket_socket=daemon.websocket_socket, php_socket=fpm.socket, app=public
        ) as caddy,
    ):
        yield caddy


@pytest.mark.parametrize(
    ("target", "script", "parameters"),
    [
        ("/", "/index.php", []),
        ("/?page=2", "/index.php", {"page": "2"}),
        ("/news/42?x=1", "/index.php", {"x": "1"}),
        ("/news/", "/index.php", []),
        ("/index.php", "/index.php", []),
        ("/missing.php", "/index.php", []),
        ("/missing.css", "/index.php", []),
        ("/.well-known/change-password", "/index.php", []),
        ("/caf%C3%A9", "/index.php", []),
        ("/tool.php?x=1", "/tool.php", {"x": "1"}),
        ("/wsx", "/index.php", []),
    ],
)
async def test_a_front_controller_answers_for_all_that_is_no_file(
    target: str, script: str, parameters: object, framework: Caddy
) -> None:
    answer = await get(framework.port, target)
    assert (answer.status, json.loads(answer.body)) == (200, [script, target, "GET", parameters])


async def test_beside_a_front_controller_files_are_served_as_they_are(framework: Caddy) -> None:
    script = await get(framework.port, "/build/app.js")
    assert (script.body, script.headers["content-type"].partition(";")[0]) == (
        "export const script = 1",
        "text/javascript",
    )
    assert (await get(framework.port, "/.well-known/security.txt")).body == "Contact: mailto:a@a.example"
    assert (await get(framework.port, "/gone")).status == 410


@pytest.mark.parametrize(
    "target",
    [
        "/.htaccess", "/build/.env", "/.env", "/../.env", "/%2e%2e/.env", "/build/..%2f..%2f.env", "/.git/config",
        "/.well-known/../.htaccess", "/.well-known/%2e%2e/.htaccess", "/realtime.php", "/Realtime.PHP",
    ],
)  # fmt: skip
async def test_a_front_controller_is_not_asked_for_what_is_nobodys_business(target: str, framework: Caddy) -> None:
    answer = await get(framework.port, target)
    assert (answer.status in (400, 404), answer.body) == (True, "")


async def test_what_is_above_a_front_controller_is_not_served(framework: Caddy) -> None:
    for target in ("/../artisan", "/%2e%2e/artisan", "/build/..%2f..%2fartisan", "/..%5cartisan"):
        assert "secret" not in (await get(framework.port, target)).body


async def test_a_websocket_beside_a_front_controller(framework: Caddy) -> None:
    own = f"http://localhost:{framework.port}"
    assert (await handshake(framework.port, "/ws", own)).status == 101
    assert (await handshake(framework.port, "/ws", "http://evil.example")).status == 403


def origin_of(caddy: Caddy) -> str:
    return f"http://localhost:{caddy.port}"


async def event(websocket: WebSocketConnection, name: str) -> dict[str, Any]:
    """Read until an event of this name comes."""
    with trio.fail_after(ANSWER_TIMEOUT):
        while True:
            message: dict[str, Any] = json.loads(await websocket.get_message())
            if message["event"] == name:
                return message
