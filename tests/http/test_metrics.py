"""The daemon's HTTP endpoint: metrics that agree with what was counted, readiness, and the way through Caddy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from wsproto.events import CloseConnection, TextMessage

from realtimed.config.loading import load
from realtimed.errors import ConfigurationError
from realtimed.http.metrics import METRICS
from realtimed.hub.history import ENTRY_BYTES, RING_BYTES
from realtimed.rpc.wire import encode_notification
from tests.kit.clients import REQUEST, RawClient, closing, publisher, raw_client, subscribe, websocket
from tests.kit.handshakes import Answer, get, request
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon, running_caddy, running_daemon

Figures = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def http_socket(daemon: Daemon) -> Path:
    return daemon.control_socket.parent / "http.sock"


@asynccontextmanager
async def daemon_with_http(directory: Path, *options: str) -> AsyncIterator[Daemon]:
    async with running_daemon(directory, "--http", f"unix:{directory}/http.sock", *options) as daemon:
        yield daemon


async def ask(daemon: Daemon, target: str) -> Answer:
    async with await trio.open_unix_socket(http_socket(daemon)) as stream:
        return await request(stream, target)


def figures(page: str) -> Figures:
    """Return every sample of a page, by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(read: Figures, name: str, **labels: str) -> float:
    return read[f"realtimed_{name}", tuple(sorted(labels.items()))]


def with_label(read: Figures, name: str, label: str) -> dict[str, float]:
    """Return the values of a metric that are not 0, by one of its labels."""
    return {
        dict(labels)[label]: number for (each, labels), number in read.items() if each == f"realtimed_{name}" and number
    }


async def settled(daemon: Daemon, **expected: float) -> Figures:
    """Ask until these metrics have these values, and return all of that page."""
    while True:
        read = figures((await ask(daemon, "/metrics")).body)
        if all(value(read, name) == number for name, number in expected.items()):
            return read


async def received(client: RawClient, messages: int) -> int:
    """Read that many messages; return how many bytes they came in."""
    size = count = 0
    while count < messages:
        data = await client.stream.receive_some(2**16)
        assert data
        size += len(data)
        client.frames.receive_data(data)
        count += sum(isinstance(event, TextMessage) and event.message_finished for event in client.frames.events())
    return size


async def test_the_metrics_agree_exactly_with_what_was_counted(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            daemon_with_http(runtime_dir) as daemon,
            publisher(daemon.control_socket) as sender,
            AsyncExitStack() as connections,
        ):
            clients = [await connections.enter_async_context(raw_client(daemon.websocket_socket)) for _ in range(4)]
            for client in clients:
                await client.send(TextMessage(data=subscribe("news")))
            await clients[0].send(TextMessage(data=subscribe("sport")))
            await settled(daemon, subscriptions=5)
            sizes = [0] * 4
            for number in range(7):
                await sender.call("broadcast", "news", "x" * number)
                for at, client in enumerate(clients):  # so that no two of them share a round
                    sizes[at] += await received(client, 1)
            for _ in range(5):
                await sender.call("broadcast", "nobody", "hello")
            await sender.call("broadcast_many", ["news", "sport", "nobody"], "x" * 300)
            for at, client in enumerate(clients):
                sizes[at] += await received(client, 2 if at == 0 else 1)
            assert sizes == [sum(2 + n for n in range(7)) + 304 * n for n in (2, 1, 1, 1)]
            await sender.call("broadcast", "no spaces", "x")
            await sender.call("broadcast", "news", "x" * 70_000)
            await sender.call("broadcast", "news", "x" * 70_000)
            await sender.call("nothing of the kind")
            await sender.stream.send_all(encode_notification("broadcast", ["no spaces", "x"]))
            assert await sender.call("ping") == "pong"
            read = await settled(daemon, commands_total=7 + 5 + 1 + 5 + 1)

    assert value(read, "open_connections") == value(read, "connections_total") == 4
    assert (value(read, "channels"), value(read, "subscriptions"), value(read, "publishers")) == (2, 5, 1)
    assert (value(read, "history_channels"), value(read, "history_publications")) == (3, 15)
    assert value(read, "history_bytes") == sum(range(7)) + 5 * 5 + 3 * 300 + 15 * ENTRY_BYTES + 3 * RING_BYTES
    assert value(read, "publications_total") == 7 + 5 + 3
    assert value(read, "deliveries_total") == 7 * 4 + 4 + 1
    assert value(read, "sends_total") == 7 * 4 + 4, "the one on both channels gets both messages in one"
    assert value(read, "sent_bytes_total") == sum(sizes)
    assert value(read, "rounds_total") == value(read, "round_seconds_count") == 8
    assert value(read, "round_seconds_bucket", le="+Inf") == 8
    assert 0 < value(read, "round_seconds_sum") < PATIENCE
    assert with_label(read, "commands_refused_total", "code") == {
        "invalid_channel": 2, "message_too_large": 2, "unknown_method": 1,
    }  # fmt: skip
    assert with_label(read, "disconnects_total", "code") == {}
    assert with_label(read, "handshakes_refused_total", "status") == {}
    for name in ("backlogged_connections", "backlog_bytes", "unsent_publication_bytes", "watchers"):
        assert value(read, name) == 0


async def test_ends_are_counted_by_code_and_none_is_made_up_by_a_client(runtime_dir: Path) -> None:
    options = ("--close-timeout", "0.2")
    with trio.fail_after(PATIENCE):
        async with daemon_with_http(runtime_dir, *options) as daemon, publisher(daemon.control_socket) as admin:
            for _ in range(3):
                async with websocket(daemon.websocket_socket) as client:
                    await client.send_message("not JSON")
                    assert (await closing(client))[0] == 4400
            async with websocket(daemon.websocket_socket, resource="/elsewhere") as client:
                assert (await closing(client))[0] == 4404
            for code in (1000, 1001, 3456, 4321, 4409):
                async with raw_client(daemon.websocket_socket) as raw:
                    await raw.send(CloseConnection(code=code))
                    await raw.events_until_eof()
            for code in (4403, 4999):
                async with websocket(daemon.websocket_socket) as client:
                    [listed] = [each["id"] for each in await admin.call("clients")]
                    await admin.call("disconnect", listed, code)
                    assert (await closing(client))[0] == code
                await settled(daemon, open_connections=0)
            async with raw_client(daemon.websocket_socket):
                pass  # hangs up without a Close
            read = await settled(daemon, connections_total=12, open_connections=0)
            assert with_label(read, "disconnects_total", "code") == {
                "4400": 3, "4404": 1, "1000": 1, "1001": 1, "4409": 1, "4403": 1, "1006": 1, "other": 3,
            }  # fmt: skip
            assert value(read, "disconnects_total", code="4400", reason="bad_message") == 3
            assert value(read, "disconnects_total", code="1006", reason="abnormal_closure") == 1
            assert value(read, "disconnects_total", code="4409", reason="slow_consumer") == 1
            assert value(read, "disconnects_total", code="4503", reason="come_back") == 0, "known codes begin at 0"
            lines = len(read)
            for code in range(3000, 3050):
                async with raw_client(daemon.websocket_socket) as raw:
                    await raw.send(CloseConnection(code=code))
                    await raw.events_until_eof()
            assert len(await settled(daemon, connections_total=62, open_connections=0)) == lines


async def test_refused_handshakes_are_counted_by_status(runtime_dir: Path) -> None:
    requests = {
        b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n": 426,
        REQUEST.replace(b"Version: 13", b"Version: 8"): 426,
        REQUEST.replace(b"Sec-WebSocket-Version: 13\r\n", b""): 400,
        REQUEST.replace(b"Sec-WebSocket-Key", b"X-Key"): 400,
        REQUEST.replace(b"GET", b"POST"): 400,
        b"Upgrade: websocket\r\n \r\n\r\n": 400,
        b"GET /ws HTTP/1.1\r\nX: " + b"x" * 20_000: 431,
        b"GET /ws HTT": 408,
    }
    options = ("--handshake-timeout", "0.3", "--max-connections", "1")
    with trio.fail_after(PATIENCE):
        async with daemon_with_http(runtime_dir, *options) as daemon:

            async def refused(sent: bytes) -> bytes:
                async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
                    await stream.send_all(sent)
                    return b"".join([data async for data in stream])

            for sent, status in requests.items():
                assert (await refused(sent)).startswith(b"HTTP/1.1 %d " % status), sent
            async with raw_client(daemon.websocket_socket):
                assert (await ask(daemon, "/readyz")).status == 503
                for _ in range(3):
                    assert (await refused(REQUEST)).startswith(b"HTTP/1.1 503 ")
            read = await settled(daemon, open_connections=0, connections_total=1)
            counts = with_label(read, "handshakes_refused_total", "status")
            assert counts == {"426": 2, "400": 4, "431": 1, "408": 1, "503": 3}
            assert value(read, "max_connections") == 1
            assert with_label(read, "handshakes_over_limit_total", "limit") == {"max_connections": 3}


async def test_backlogs_are_seen(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            daemon_with_http(runtime_dir) as daemon,
            raw_client(daemon.websocket_socket) as stalled,
            publisher(daemon.control_socket) as sender,
        ):
            await stalled.send(TextMessage(data=subscribe("news")))
            await settled(daemon, subscriptions=1)
            sent = 0
            while not (await sender.call("stats"))["backlogged"]:
                sent += (await sender.call("broadcast", "news", "x" * 10_000))["recipients"]
            read = await settled(daemon, backlogged_connections=1)
            waiting = value(read, "backlog_bytes")
            assert value(read, "sent_bytes_total") == sent * 10_004, "handed over, if not yet to the kernel"
            await received(stalled, sent)
            await settled(daemon, backlogged_connections=0, backlog_bytes=0)
            assert 0 < waiting <= sent * 10_004


async def test_the_process_is_described(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with daemon_with_http(runtime_dir) as daemon, AsyncExitStack() as connections:
            before = await settled(daemon, publishers=0)
            for _ in range(50):
                await connections.enter_async_context(raw_client(daemon.websocket_socket))
            read = await settled(daemon, open_connections=50)
            limits = await trio.Path(f"/proc/{daemon.process.pid}/limits").read_text()
    assert read["process_open_fds", ()] - before["process_open_fds", ()] == 50
    assert f"Max open files            {read['process_max_fds', ()]:.0f} " in limits
    assert read["process_resident_memory_bytes", ()] > 10 * 2**20
    build = next(dict(labels) for name, labels in read if name == "realtimed_build_info")
    assert build.keys() == {"version", "python", "trio"}


async def test_the_lag_of_the_event_loop_is_measured(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with daemon_with_http(runtime_dir) as daemon:
            await settled(daemon, event_loop_lag_seconds_count=2)
            daemon.process.send_signal(19)  # SIGSTOP
            try:
                await trio.sleep(2)  # the lag itself is what is to be seen
            finally:
                daemon.process.send_signal(18)  # SIGCONT
            read = await settled(daemon)
            while value(read, "event_loop_lag_seconds_bucket", le="0.5") == value(read, "event_loop_lag_seconds_count"):
                read = await settled(daemon)
            assert value(read, "event_loop_lag_seconds_sum") > 0.5


async def test_every_metric_is_there(runtime_dir: Path) -> None:
    async with daemon_with_http(runtime_dir) as daemon:
        answer = await ask(daemon, "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name for family in text_string_to_metric_families(answer.body)}
    assert {name + "_info" if name == "realtimed_build" else name for name in METRICS} <= families
    assert {name for name in families if not name.startswith("realtimed_")} == {
        "process_virtual_memory_bytes", "process_resident_memory_bytes", "process_start_time_seconds",
        "process_cpu_seconds", "process_open_fds", "process_max_fds",
    }  # fmt: skip


async def test_ready_until_it_stops_and_healthy_until_the_end(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with daemon_with_http(runtime_dir, "--close-timeout", "3") as daemon, raw_client(daemon.websocket_socket):
            assert (await ask(daemon, "/readyz")).body == "ready\n"
            assert (await ask(daemon, "/healthz")).body == "ok\n"
            daemon.process.terminate()  # the client does not answer the Close, so this takes its time
            while (answer := await ask(daemon, "/readyz")).status == 200:
                pass
            assert (answer.status, answer.body) == (503, "not ready: stopping\n")
            assert (await ask(daemon, "/healthz")).status == 200
            assert await daemon.wait() == 0
            assert not http_socket(daemon).exists()


async def test_a_port_serves_as_well_and_a_dead_daemons_socket_is_replaced(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime_dir / "http.sock"))
    async with daemon_with_http(runtime_dir) as daemon:
        assert (await ask(daemon, "/healthz")).status == 200
    async with running_daemon(runtime_dir, "--http", "127.0.0.1:0") as daemon:
        async with publisher(daemon.control_socket) as asking:
            port = int((await asking.call("info"))["http"].removeprefix("127.0.0.1:"))
        assert (await get(port, "/healthz")).body == "ok\n"


@pytest.mark.parametrize("address", ["0.0.0.0:9180", "[::]:9180", "192.0.2.1:9180", "localhost:9180"])
def test_it_never_listens_on_the_network(address: str) -> None:
    with pytest.raises(ConfigurationError, match="--http: expected unix:PATH, or a loopback address"):
        load({"http": address})


@pytest.mark.parametrize("address", ["unix:/run/http.sock", "127.0.0.1:9180", "127.8.0.1:1", "[::1]:9180"])
def test_where_it_may_listen(address: str) -> None:
    assert str(load({"http": address}).http) == address


def test_it_needs_an_address_of_its_own() -> None:
    with pytest.raises(ConfigurationError, match=r"http has the path of another socket, /run/realtime\.sock"):
        load({"http": "unix:/run/realtime.sock"})
    with pytest.raises(ConfigurationError, match=r"http and websocket are both 127\.0\.0\.1:9000"):
        load({"http": "127.0.0.1:9000", "websocket": ["127.0.0.1:9000"]})


async def test_without_being_asked_there_is_no_endpoint_and_no_library_for_it(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir) as daemon, publisher(daemon.control_socket) as asking:
        assert (await asking.call("info"))["http"] is None
    script = "import sys, realtimed.daemon; sys.exit('prometheus_client' in sys.modules)"
    await trio.to_thread.run_sync(lambda: subprocess.run([sys.executable, "-c", script], check=True))


# Through Caddy.


async def test_through_caddy_it_is_closed_to_everybody(runtime_dir: Path) -> None:
    upstream = {"REALTIME_HTTP": f"unix/{runtime_dir}/http.sock"}
    async with (
        daemon_with_http(runtime_dir) as daemon,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=upstream) as caddy,
    ):
        for target in ("/realtimed/metrics", "/realtimed/healthz", "/REALTIMED/metrics", "//realtimed//metrics"):
            answer = await get(caddy.port, target)
            assert (answer.status, answer.body) == (404, ""), target


@pytest.mark.parametrize("clients", ["", "10.0.0.0/8"])
async def test_through_caddy_it_is_closed_to_all_others(runtime_dir: Path, clients: str) -> None:
    variables = {"REALTIME_HTTP": f"unix/{runtime_dir}/http.sock", "METRICS_CLIENTS": clients}
    async with (
        daemon_with_http(runtime_dir) as daemon,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy,
    ):
        assert (await get(caddy.port, "/realtimed/metrics")).status == 404
        spoofed = [("X-Forwarded-For", "10.0.0.1")]
        assert (await get(caddy.port, "/realtimed/metrics", spoofed)).status == 404


async def test_through_caddy_it_is_open_to_whom_it_is_opened(runtime_dir: Path) -> None:
    variables = {"REALTIME_HTTP": f"unix/{runtime_dir}/http.sock", "METRICS_CLIENTS": "192.0.2.0/24 127.0.0.0/8"}
    async with (
        daemon_with_http(runtime_dir) as daemon,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy,
    ):
        answer = await get(caddy.port, "/realtimed/metrics")
        assert answer.status == 200
        assert value(figures(answer.body), "open_connections") == 0
        assert (await get(caddy.port, "/realtimed/readyz")).body == "ready\n"
        assert (await get(caddy.port, "/realtimed/elsewhere")).status == 404


async def test_its_socket_has_the_mode_of_the_others(runtime_dir: Path) -> None:
    async with daemon_with_http(runtime_dir, "--socket-mode", "0600") as daemon:
        assert (await trio.Path(http_socket(daemon)).stat()).st_mode & 0o777 == 0o600
        assert (await trio.Path(http_socket(daemon)).stat()).st_gid == os.getegid()
