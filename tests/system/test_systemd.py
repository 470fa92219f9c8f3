"""The daemon under systemd: notifications, watchdog, sockets handed over, reload, restart, and the units themselves."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing

from realtimed import AsyncClient
from realtimed.config.loading import load
from realtimed.config.reloading import Change, compare
from realtimed.config.settings import Config
from realtimed.errors import ConfigurationError
from realtimed.process.systemd import Handover, ServiceManager, receive_sockets
from tests.kit.caddy import GO_SETTINGS
from tests.kit.clients import closing, handshake_of, publisher, raw_client, subscribe, websocket
from tests.kit.patience import LONG_PATIENCE
from tests.kit.service_manager import Manager, find_systemd, listening, service_manager
from tests.kit.stack import APP, ROOT, Daemon, PartFailedError, find_php, running_daemon

UNITS: Final = ROOT / "systemd"
REALTIMED: Final = Path(sys.executable).parent / "realtimed"
REALTIMECTL: Final = Path(sys.executable).parent / "realtimectl"


@pytest.fixture
def notified(runtime_dir: Path) -> Iterator[Manager]:
    with service_manager(runtime_dir / "notify.sock") as manager:
        yield manager


# Notifications.


@pytest.mark.parametrize("abstract", [False, True])
async def test_ready_is_said_when_both_sockets_serve(runtime_dir: Path, abstract: bool) -> None:
    address = f"@{runtime_dir.name}-notify" if abstract else str(runtime_dir / "notify.sock")
    with trio.fail_after(LONG_PATIENCE), service_manager(address) as manager:
        async with running_daemon(runtime_dir, environment=manager.environment) as daemon:
            first = await manager.next()
            assert first == {"READY": "1", "STATUS": "Serving 0 clients on 0 channels"}
            async with publisher(daemon.control_socket) as asking, raw_client(daemon.websocket_socket):
                assert await asking.call("ping") == "pong"


async def test_a_daemon_that_cannot_start_is_never_ready_and_says_why(runtime_dir: Path, notified: Manager) -> None:
    taken = runtime_dir / "realtime-ws.sock"
    taken.write_text("precious")
    with trio.fail_after(LONG_PATIENCE), pytest.raises(PartFailedError, match="ended with status 2"):
        async with running_daemon(runtime_dir, environment=notified.environment):
            pass
    [told] = notified.rest()
    assert set(told) == {"STATUS"}
    assert told["STATUS"].startswith(f"cannot listen at unix:{taken}: there is something that is not a socket")


async def test_stopping_is_said_with_the_time_it_may_take(runtime_dir: Path, notified: Manager) -> None:
    options = ("--drain", "0.5", "--close-timeout", "2")
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, *options, environment=notified.environment) as daemon,
            websocket(daemon.websocket_socket) as client,
        ):
            daemon.process.terminate()
            stopping = await notified.until("STOPPING")
            assert stopping["STATUS"] == "Stopping: 1 clients left"
            assert int(stopping["EXTEND_TIMEOUT_USEC"]) == 11_500_000, "drain, three close-timeouts and a margin"
            await closing(client)
            assert await daemon.wait() == 0
    assert "READY" not in notified.told[-1]


async def test_the_status_follows_the_number_of_clients(runtime_dir: Path, notified: Manager) -> None:
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, environment=notified.environment) as daemon,
            websocket(daemon.websocket_socket) as client,
        ):
            await client.send_message(subscribe("news"))
            assert await notified.until("STATUS", "1 clients on 1 channels") == {
                "STATUS": "Serving 1 clients on 1 channels",
            }  # fmt: skip


async def test_nobody_to_notify_is_logged_and_nothing_else(runtime_dir: Path) -> None:
    nowhere = {"NOTIFY_SOCKET": str(runtime_dir / "nobody.sock")}
    with trio.fail_after(LONG_PATIENCE):
        async with (
            running_daemon(runtime_dir, environment=nowhere) as daemon,
            publisher(daemon.control_socket) as asking,
        ):
            assert await asking.call("ping") == "pong"
            daemon.process.terminate()
            assert await daemon.wait() == 0
    assert daemon.log.count("service manager not notified reason='No such file or directory'") == 1


# The watchdog.


async def test_the_watchdog_is_fed_at_half_its_time(notified: Manager, autojump_clock: trio.testing.MockClock) -> None:
    environ = {**notified.environment, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    manager = ServiceManager(environ)
    assert environ == {}
    times = []

    async def listen() -> None:
        while True:
            if "WATCHDOG" in await notified.next():
                times.append(autojump_clock.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        nursery.start_soon(manager.watch, lambda: "as ever")
        manager.ready("as ever")
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    manager.close()
    assert [round(moment - times[0]) for moment in times] == [0, 15, 30, 45, 60, 75, 90]


@pytest.mark.parametrize("variables", [{}, {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"}])
async def test_without_a_watchdog_of_ours_none_is_fed(
    notified: Manager, autojump_clock: trio.testing.MockClock, variables: dict[str, str]
) -> None:
    manager = ServiceManager({**notified.environment, **variables})
    manager.ready("at first")
    with trio.move_on_after(100):
        await manager.watch(lambda: "as ever")
    assert autojump_clock.current_time() == 100
    manager.close()
    assert notified.rest() == [{"READY": "1", "STATUS": "at first"}, {"STATUS": "as ever"}]


async def test_the_watchdog_is_fed_only_once_the_daemon_is_ready(
    notified: Manager,
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    manager = ServiceManager({**notified.environment, "WATCHDOG_USEC": "20000"})
    with trio.move_on_after(1):
        await manager.watch(lambda: "as ever")
    manager.close()
    assert notified.rest() == []


async def test_a_loop_that_hangs_feeds_no_watchdog(notified: Manager) -> None:
    manager = ServiceManager({**notified.environment, "WATCHDOG_USEC": "20000"})
    with trio.fail_after(LONG_PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.watch, lambda: "as ever")
            manager.ready("as ever")
            for _ in range(3):
                await notified.until("WATCHDOG")
            notified.rest()
            notified.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                notified.socket.recv(100)  # this blocks the loop for 15 times the interval
            notified.socket.setblocking(False)
            await notified.until("WATCHDOG")
            nursery.cancel_scope.cancel()
    manager.close()


async def test_the_daemon_feeds_its_watchdog(runtime_dir: Path, notified: Manager) -> None:
    environment = {**notified.environment, "WATCHDOG_USEC": "100000"}
    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, environment=environment):
            for _ in range(10):
                assert await notified.until("WATCHDOG") == {"WATCHDOG": "1"}


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, "NOTIFY_SOCKET: expected a path or @NAME, got 'vsock:2:1234'"),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "soon"}, "WATCHDOG_USEC: expected a number, got 'soon'"),
    ],
)
def test_variables_that_make_no_sense_are_named(environ: dict[str, str], wrong: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        ServiceManager(environ)
    assert str(error.value) == wrong
    assert environ == {}


# Sockets that are handed over.


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "control", "PATH": "/bin"}
    assert receive_sockets(environ) == Handover()
    assert environ == {"PATH": "/bin"}


async def test_sockets_handed_over_are_used_and_stay_as_they_are(runtime_dir: Path) -> None:
    with trio.fail_after(LONG_PATIENCE), listening(runtime_dir) as sockets:
        paths = [runtime_dir / "realtime.sock", runtime_dir / "realtime-ws.sock"]
        for path in paths:
            path.chmod(0o606)
        before = [(path.stat().st_ino, stat.S_IMODE(path.stat().st_mode), path.stat().st_ctime_ns) for path in paths]
        async with running_daemon(runtime_dir, "--socket-mode", "0600", sockets=sockets) as daemon:
            async with publisher(daemon.control_socket) as asking, websocket(daemon.websocket_socket) as client:
                await client.send_message(subscribe("news"))
                while (await asking.call("broadcast", "news", "hello"))["recipients"] == 0:
                    pass
                assert await client.get_message() == "hello"
                assert (await asking.call("info"))["websocket"] == [f"unix:{paths[1]}"]
                daemon.process.terminate()
                assert (await closing(client))[0] == 4503
            assert await daemon.wait() == 0
        assert f"ready control={paths[0]} websocket=unix:{paths[1]} " in daemon.log
        assert before == [
            (path.stat().st_ino, stat.S_IMODE(path.stat().st_mode), path.stat().st_ctime_ns) for path in paths
        ]


async def test_one_socket_may_be_handed_over_and_the_other_be_configured(runtime_dir: Path) -> None:
    own = runtime_dir / "own.sock"
    with trio.fail_after(LONG_PATIENCE), listening(runtime_dir) as sockets:
        handed = {"websocket": sockets["websocket"]}
        async with running_daemon(runtime_dir, "--socket", str(own), sockets=handed) as daemon:
            async with raw_client(daemon.websocket_socket), publisher(own) as asking:
                assert (await asking.call("stats"))["clients"] == 1
            assert await daemon.stop() == 0
        assert not own.exists()
        assert daemon.websocket_socket.exists()


async def test_abstract_sockets_may_be_handed_over(runtime_dir: Path) -> None:
    name = f"{runtime_dir.name}-control"
    with trio.fail_after(LONG_PATIENCE), listening(runtime_dir) as sockets, socket.socket(socket.AF_UNIX) as control:
        control.bind("\0" + name)
        control.listen()
        async with running_daemon(runtime_dir, sockets={**sockets, "control": control}) as daemon:
            async with raw_client(daemon.websocket_socket):
                pass
            assert f"ready control=@{name} " in daemon.log


async def test_systemd_socket_activate_starts_it(runtime_dir: Path) -> None:
    control, ws = runtime_dir / "a.sock", runtime_dir / "b.sock"
    command: list[str | Path] = [
        find_systemd("systemd-socket-activate"), f"--listen={control}", f"--listen={ws}",
        "--fdname=control:websocket", sys.executable, "-m", "realtimed",
    ]  # fmt: skip
    with trio.fail_after(LONG_PATIENCE):
        process = await trio.lowlevel.open_process(command, stderr=subprocess.PIPE)
        assert process.stderr is not None
        try:
            log = b""
            while log.count(b"Listening on") < 2:
                log += await process.stderr.receive_some()
            async with publisher(control) as asking:
                assert await asking.call("ping") == "pong"
            async with raw_client(ws):
                pass
        finally:
            process.terminate()
            log += b"".join([data async for data in process.stderr])
            assert await process.wait() == 0, log
    assert control.exists()
    assert ws.exists()


def unix_socket(directory: Path, kind: socket.SocketKind = socket.SOCK_STREAM, *, listen: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(directory / "some.sock"))
    if listen:
        sock.listen()
    return sock


@pytest.mark.parametrize(
    ("name", "make", "wrong"),
    [
        ("http", unix_socket, "called 'http', has a name that says nothing here: FileDescriptorName= is control or"),
        ("", unix_socket, "called 'unknown', has a name that says nothing here: FileDescriptorName= is control or"),
        ("control:websocket", unix_socket, "2 names for 1 sockets (LISTEN_FDS)"),
        ("control", partial(unix_socket, listen=False), "is not a listening stream socket: use ListenStream="),
        ("control", partial(unix_socket, kind=socket.SOCK_DGRAM, listen=False), "is not a listening stream socket"),
        ("control", lambda _: socket.create_server(("127.0.0.1", 0)), "is not a Unix socket: the control socket is"),
    ],
)
async def test_a_socket_that_is_of_no_use_is_named(
    runtime_dir: Path, name: str, make: Callable[[Path], socket.socket], wrong: str
) -> None:
    with trio.fail_after(LONG_PATIENCE), make(runtime_dir) as sock:
        async with running_daemon(runtime_dir, sockets={name: sock}) as daemon:
            assert await daemon.wait() == 2
    assert daemon.log.startswith("realtimed: LISTEN_FDNAMES: "), daemon.log
    assert wrong in daemon.log


def test_what_is_no_socket_is_named() -> None:
    shell = 'LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=websocket exec "$0" -m realtimed 3</dev/null'
    result = subprocess.run(
        ["/bin/sh", "-c", shell, sys.executable], capture_output=True, text=True, timeout=LONG_PATIENCE, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "realtimed: LISTEN_FDNAMES: file descriptor 3, called 'websocket', is not a socket\n"


def test_a_number_of_sockets_that_is_none_is_named() -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}
    with pytest.raises(ConfigurationError, match="LISTEN_FDS: expected a number, got 'many'"):
        receive_sockets(environ)


async def test_a_second_control_socket_is_refused(runtime_dir: Path) -> None:
    class Twice(dict[str, socket.socket]):
        """Two sockets of one name, which a dict cannot hold."""

        def __iter__(self) -> Any:
            return iter(("control", "control"))

    with trio.fail_after(LONG_PATIENCE), listening(runtime_dir) as sockets:
        async with running_daemon(runtime_dir, sockets=Twice(sockets)) as daemon:
            assert await daemon.wait() == 2
    assert "called 'control', is a second one: there is one control socket" in daemon.log


# Restart.


class Repeated:
    """Something that is done again and again, until it is cancelled; it must not fail once."""

    def __init__(self, action: Callable[[], Awaitable[object]]) -> None:
        self._action = action
        self._done = trio.Event()

    async def run(self) -> None:
        while True:
            await self._action()
            self._done.set()
            self._done = trio.Event()

    async def once_more(self) -> None:
        """Wait until it has been done from the beginning to the end."""
        for _ in range(2):
            await self._done.wait()


async def each_once_more(actions: Sequence[Repeated]) -> None:
    async with trio.open_nursery() as nursery:
        for action in actions:
            nursery.start_soon(action.once_more)


PHP_LOOP: Final = """
require $argv[1];
for ($sent = 0; !file_exists($argv[2]); $sent++) {
    (new Realtime\\Client())->broadcast('news', "php $sent");
}
echo $sent;
"""


@pytest.mark.parametrize("drain", ["0", "0.3"])
async def test_over_a_restart_no_publisher_fails_and_newcomers_wait(runtime_dir: Path, drain: str) -> None:
    """Each kind of publisher broadcasts again and again, newcomers connect, and the daemon is replaced twice."""
    control, ws = runtime_dir / "realtime.sock", runtime_dir / "realtime-ws.sock"
    stop_php = runtime_dir / "stop"
    environment = {"REALTIME_SOCKET": str(control), "PATH": "/usr/bin:/bin"}
    command: list[str | Path] = [REALTIMECTL, "broadcast", "news", "from the shell"]

    async def one_shot() -> None:
        async with AsyncClient(control, timeout=LONG_PATIENCE) as client:
            await client.broadcast("news", "from a new connection")

    async def newcomer() -> None:
        async with raw_client(ws):
            pass

    kept = AsyncClient(control, timeout=LONG_PATIENCE)
    php: list[str | Path] = [find_php(), "-r", PHP_LOOP, "--", APP / "realtime.php", stop_php]
    with trio.fail_after(LONG_PATIENCE), listening(runtime_dir) as sockets:
        actions = [
            Repeated(one_shot),
            Repeated(partial(kept.broadcast, "news", "from a connection that is kept")),
            Repeated(partial(trio.run_process, command, env=environment, capture_stdout=True)),
            Repeated(newcomer),
        ]
        async with kept, trio.open_nursery() as nursery:
            for action in actions:
                nursery.start_soon(action.run)
            php_done = trio.Event()

            async def run_php() -> None:
                result = await trio.run_process(php, env=environment, capture_stdout=True, stderr=subprocess.STDOUT)
                assert int(result.stdout) >= 3
                php_done.set()

            nursery.start_soon(run_php)
            for _ in range(3):
                async with running_daemon(runtime_dir, "--drain", drain, sockets=sockets) as daemon:
                    await each_once_more(actions)
                    # The next one is only started when this one has ended: what is asked meanwhile has to wait.
                    assert await daemon.stop() == 0
            async with running_daemon(runtime_dir, sockets=sockets):
                stop_php.touch()
                await php_done.wait()
                await each_once_more(actions)
                nursery.cancel_scope.cancel()
    assert "Traceback" not in daemon.log
    assert daemon.log.count("stopped") == 4


# Reload.


async def reload(daemon: Daemon, manager: Manager) -> str:
    """Send SIGHUP, check what systemd is told, and return the status."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    daemon.process.send_signal(signal.SIGHUP)
    reloading = await manager.until("RELOADING")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    return (await manager.until("READY"))["STATUS"]


async def test_a_reload_applies_what_it_can_and_says_what_it_cannot(runtime_dir: Path, notified: Manager) -> None:
    file = runtime_dir / "realtimed.toml"
    file.write_text("max_message = 100\n")
    options = ("--config", str(file))
    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, *options, environment=notified.environment) as daemon:
            await notified.until("READY")
            async with publisher(daemon.control_socket) as asking:
                assert (await asking.call("broadcast", "news", "x" * 101))["code"] == "message_too_large"

                file.write_text(
                    'max_message = 200\nmax_connections = 1\nmax_age = 0.5\ndrain = 7\nlog_level = "debug"\n'
                    'max_channels = 1\nmax_backlog = "2M"\nheartbeat = 24\nsocket_mode = "0600"\n'
                )
                status = await reload(daemon, notified)
                assert status == "Serving 0 clients on 0 channels; only a restart applies socket-mode, heartbeat"
                assert (
                    "WARNING reloaded applied='max-channels, max-backlog, max-age, max-message, max-connections, drain,"
                    " log-level' needs_restart='socket-mode, heartbeat'\n"
                ) in daemon.log
                assert (await asking.call("broadcast", "news", "x" * 101))["offset"] == 1
                limits = (await asking.call("info"))["limits"]
                assert (limits["max_message"], limits["max_connections"]) == (200, 1)
                assert (limits["max_channels"], limits["max_backlog"]) == (1, 2**21)
                async with websocket(daemon.websocket_socket) as client:
                    while "DEBUG client connected client=c-" not in daemon.log:
                        assert await asking.call("ping") == "pong"
                    code, reason = await closing(client)
                    assert (code, reason.partition(",")[0]) == (4503, "connected for max-age")

                file.write_text('max_message = "much"\nmax_mesage = 5\n')
                status = await reload(daemon, notified)
                a_size = "a number of bytes above 0, such as 65536, 64K, 64KiB, 1.5M or 2G"
                wrong = f"max_message in {file}: expected {a_size}, got 'much'"
                assert status.endswith(f"; not reloaded: {wrong}")
                refused = [line for line in daemon.log.splitlines() if "ERROR not reloaded reason=" in line]
                assert all(
                    text in line for text, line in zip(("max_message in", "max_mesage in"), refused, strict=True)
                )
                assert (await asking.call("info"))["limits"] == limits

                file.write_text("drain = 3\nheartbeat = 25\n")
                assert "only a restart" not in await reload(daemon, notified), "the heartbeat is what it was"
                assert (await asking.call("info"))["limits"]["max_message"] == 65536
            daemon.process.terminate()
            assert int((await notified.until("STOPPING"))["EXTEND_TIMEOUT_USEC"]) == 23_000_000
            assert await daemon.wait() == 0
    assert daemon.log.rstrip().endswith("INFO stopped")


def test_a_setting_that_nobody_has_declared_live_needs_a_restart() -> None:
    old = Config()
    change = compare(old, Config(heartbeat=20, max_message=5, socket_mode=0o600))
    assert change.config == Config(max_message=5)
    assert (change.applied, change.needs_restart) == (("max-message",), ("socket-mode", "heartbeat"))
    assert compare(old, old) == Change(old, (), ())


def test_what_stands_in_the_file_only_is_compared_as_well(tmp_path: Path) -> None:
    file = tmp_path / "realtimed.toml"
    file.write_text('[[channels]]\nmatch = "chat:*"\nhistory_size = 5\n')
    change = compare(Config(), load(file=file))
    assert (change.config, change.needs_restart) == (Config(), ("channels",))


async def test_a_reload_changes_the_limits_of_one_address(runtime_dir: Path, notified: Manager) -> None:
    file = runtime_dir / "realtimed.toml"
    file.write_text("max_connections = 6\n")
    options, address = ("--config", str(file)), "203.0.113.7"

    async def is_let_in() -> bool:
        async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
            await stream.send_all(handshake_of(address))
            return b" 101 " in await stream.receive_some()

    with trio.fail_after(LONG_PATIENCE):
        async with running_daemon(runtime_dir, *options, environment=notified.environment) as daemon:
            await notified.until("READY")
            async with (
                publisher(daemon.control_socket) as asking,
                raw_client(daemon.websocket_socket, address),
                raw_client(daemon.websocket_socket, address),
                raw_client(daemon.websocket_socket, address),
            ):
                assert not await is_let_in()
                file.write_text("max_connections = 6\nmax_connections_per_address = 5\n")
                await reload(daemon, notified)
                assert await is_let_in()
                file.write_text("max_connections = 6\nmax_connections_per_address = 2\n")
                await reload(daemon, notified)
                assert not await is_let_in()
                assert (await asking.call("stats"))["clients"] >= 3, "who is there stays"
                file.write_text(
                    "max_connections = 600\nmax_connections_per_address = 0\nhandshakes_per_address = 0.01\n"
                )
                await reload(daemon, notified)
                assert await is_let_in()
                assert not await is_let_in()
                limits = (await asking.call("info"))["limits"]
                assert (limits["max_connections_per_address"], limits["handshakes_per_address"]) == (0, 0.01)
                file.write_text("max_connections = 600\n")
                await reload(daemon, notified)
                assert await is_let_in()
                limits = (await asking.call("info"))["limits"]
                assert (limits["max_connections_per_address"], limits["handshakes_per_address"]) == (300, 0)


def test_a_reload_that_would_contradict_what_needs_a_restart_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"silence-timeout .*; a restart would help"):
        compare(Config(), Config(heartbeat=5, silence_timeout=10))


async def test_a_reload_without_a_service_manager_is_a_matter_of_the_log(daemon: Daemon) -> None:
    with trio.fail_after(LONG_PATIENCE):
        daemon.process.send_signal(signal.SIGHUP)
        async with publisher(daemon.control_socket) as asking:
            while "INFO reloaded applied='' needs_restart=''\n" not in daemon.log:
                assert await asking.call("ping") == "pong"


# The units.


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Give a directory with the units as an installation has them, but with this environment's realtimed."""
    for unit in UNITS.glob("*.s*"):
        if unit.is_file():
            text = unit.read_text()
            (tmp_path / unit.name).write_text(text.replace("/opt/realtimed/bin/realtimed", str(REALTIMED)))
    for service in ("caddy.service", "php-fpm.service"):
        (tmp_path / service).write_text("[Service]\nExecStart=/bin/true\n")
        shutil.copytree(UNITS / f"{service}.d", tmp_path / f"{service}.d")
    return tmp_path


def run(program: str, *arguments: str | Path) -> str:
    """Run one of systemd's programs, and return all that it writes."""
    result = subprocess.run(
        [find_systemd(program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
        timeout=LONG_PATIENCE,
    )  # fmt: skip
    return result.stdout


def unit(name: str) -> configparser.ConfigParser:
    class Unit(configparser.ConfigParser):
        def optionxform(self, optionstr: str) -> str:
            return optionstr

    parser = Unit(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.read(UNITS / name)
    return parser


def test_systemd_finds_nothing_wrong_with_the_units(installed: Path) -> None:
    units = sorted(path for path in installed.iterdir() if path.is_file())
    assert [path.name for path in units] == [
        "caddy.service", "php-fpm.service", "realtimed-ws.socket", "realtimed.service", "realtimed.socket",
    ]  # fmt: skip
    assert run("systemd-analyze", "verify", *units) == ""
    with (installed / "caddy.service.d" / "realtimed.conf").open("a") as drop_in:
        drop_in.write("SuplementaryGroups=x\n")
    assert "SuplementaryGroups" in run("systemd-analyze", "verify", *units), "drop-ins are looked at"


def test_the_service_is_locked_up(installed: Path) -> None:
    report = run("systemd-analyze", "security", "--offline=yes", "--no-pager", installed / "realtimed.service")
    score = re.search(r"Overall exposure level for realtimed.service: ([\d.]+)", report)
    assert score is not None, report
    assert float(score[1]) <= 0.5


def test_the_sockets_are_where_everyone_looks() -> None:
    control, ws = unit("realtimed.socket")["Socket"], unit("realtimed-ws.socket")["Socket"]
    config = Config()
    assert Path(control["ListenStream"]) == config.socket
    assert [Path(ws["ListenStream"])] == [address.path for address in config.websocket]
    assert (control["FileDescriptorName"], ws["FileDescriptorName"]) == ("control", "websocket")
    assert [each["SocketMode"] for each in (control, ws)] == ["0660", "0660"]
    assert [each["SocketGroup"] for each in (control, ws)] == ["realtime", "realtime-ws"]
    assert unit("realtimed.service")["Service"]["Sockets"] == "realtimed.socket realtimed-ws.socket"
    groups = unit("caddy.service.d/realtimed.conf")["Service"]["SupplementaryGroups"].split()
    assert ws["SocketGroup"] in groups
    assert control["SocketGroup"] not in groups, "Caddy cannot broadcast"


def test_caddy_runs_in_tests_with_the_settings_of_its_unit() -> None:
    assert unit("caddy.service.d/realtimed.conf")["Service"]["Environment"] == f"GODEBUG={GO_SETTINGS}"


def test_the_groups_are_made_and_php_is_in_the_publishers(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tmp_path / "etc" / name).touch()
    (tmp_path / "etc" / "passwd").write_text("www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n")
    (tmp_path / "etc" / "group").write_text("www-data:x:33:\n")
    run("systemd-sysusers", f"--root={tmp_path}", UNITS / "sysusers.d" / "realtimed.conf")
    groups = dict(re.findall(r"^([\w-]+):x:\d+:(.*)$", (tmp_path / "etc" / "group").read_text(), re.MULTILINE))
    assert groups == {"www-data": "", "realtime": "www-data", "realtime-ws": ""}


def test_the_configuration_file_is_made_and_kept(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    snippet = UNITS / "tmpfiles.d" / "realtimed.conf"
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", snippet)
    file = tmp_path / "etc" / "realtimed.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    result = subprocess.run([REALTIMED, "--config", file, "--check"], capture_output=True, text=True, check=True)
    assert result.stdout == "The configuration is valid.\n"
    file.write_text("drain = 5\n")
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", snippet)
    assert file.read_text() == "drain = 5\n"
