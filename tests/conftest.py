"""Fixtures that many tests share: the real parts, each in a directory of the test's own."""

from __future__ import annotations

import gc
import re
import resource
import shutil
import signal
import time
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.kit.blocking import FLAVOURS, Opener, opener
from tests.kit.budget import allowed, within_budget
from tests.kit.patience import PATIENCE
from tests.kit.peers import Daemons, Opening, opening, running_daemons
from tests.kit.stack import Caddy, Daemon, PhpFpm, running_caddy, running_daemon, running_php_fpm, runtime_directory

OPEN_FILES_NEEDED = 8192
"""What the largest test opens: a thousand WebSockets, each a socket of the test, two of Caddy and one of the daemon."""

CHROMIUM_OPTIONS = (
    "--no-sandbox",  # it does not start as root otherwise
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

ON_BAD_INPUT = re.compile(
    r"_(bad|garbage(?!_collector)|hostile|invalid|malformed|mistakes?|nonsense|refused|wrong)(_|$)"
)
"""Names of tests that have a budget of processor time; see `tests.kit.budget`."""

AUTOMATIC = {"many_open_files", "heeded_interrupts", "autojump_clock", "mock_clock", "request"}
"""Fixtures that do not stand in the way of that."""

SLACK = 4
"""How much larger the budget is of a test that runs an event loop of its own, and is not repeated."""

LOG_LINES_SHOWN = 100
"""How much of each part's log is shown below a test that failed."""


@pytest.fixture(scope="session", autouse=True)
def many_open_files() -> None:
    """Raise the soft limit of open files, which many systems set to 1024; child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES_NEEDED:
        if hard != resource.RLIM_INFINITY and hard < OPEN_FILES_NEEDED:
            pytest.exit(f"The tests need {OPEN_FILES_NEEDED} open files, and the hard limit is {hard}: see ulimit -Hn")
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_NEEDED, hard))


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupts() -> None:
    """Heed Ctrl-C even if the tests run in the background, where a shell lets child processes ignore it too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Give a directory for sockets and logs, with a path short enough for a Unix socket."""
    with runtime_directory() as directory:
        yield directory


@pytest.fixture
async def daemon(runtime_dir: Path) -> AsyncIterator[Daemon]:
    async with running_daemon(runtime_dir) as running:
        yield running


@pytest.fixture(scope="session")
def daemons() -> Iterator[Daemons]:
    """Run daemons that many tests share, each when it is first asked for."""
    with running_daemons() as running:
        yield running


@pytest.fixture(params=["memory", "daemon"])
async def open_peers(request: pytest.FixtureRequest, daemons: Daemons) -> AsyncIterator[Opening]:
    """Give a function that opens peers with the given settings, in memory and over sockets."""
    async with opening(daemons if request.param == "daemon" else None) as opened:
        yield opened


@pytest.fixture
async def open_sockets(daemons: Daemons) -> AsyncIterator[Opening]:
    """Give a function that opens peers with the given settings, over sockets."""
    async with opening(daemons) as opened:
        yield opened


@pytest.fixture(params=FLAVOURS)
def connect(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Open clients of each flavour, all of which are called as if they blocked."""
    with opener(request.param) as opening:
        yield opening


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    """Give a channel that no other test uses."""
    return "".join(each if each.isalnum() else "-" for each in request.node.name)


@pytest.fixture
async def php_fpm(runtime_dir: Path, daemon: Daemon) -> AsyncIterator[PhpFpm]:
    """Run PHP-FPM whose pages broadcast through `daemon`."""
    async with running_php_fpm(runtime_dir, {"REALTIME_SOCKET": str(daemon.control_socket)}) as running:
        yield running


@pytest.fixture
async def caddy(runtime_dir: Path, daemon: Daemon, php_fpm: PhpFpm) -> AsyncIterator[Caddy]:
    """Run Caddy in front of `daemon` and `php_fpm`; the allowed origin is http://localhost with its port."""
    async with running_caddy(
        runtime_dir, websocket_socket=daemon.websocket_socket, php_socket=php_fpm.socket
    ) as running:
        yield running


@pytest.fixture
async def caddy_alone(runtime_dir: Path, daemon: Daemon) -> AsyncIterator[Caddy]:
    """Run Caddy in front of `daemon`, without PHP."""
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run the system's Chromium, or Playwright's if there is none.

    A test that uses it must block: Playwright's blocking interface keeps an event loop of its own in this thread.
    """
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=CHROMIUM_OPTIONS,
            ignore_default_args=["--disable-back-forward-cache"],
            timeout=PATIENCE * 1000,
        )
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Give a browser that was never here before, and in which nothing may go wrong unnoticed."""
    opened = browser.new_context()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("weberror", lambda error: complaints.append(str(error.error)))
    yield opened
    opened.close()
    assert complaints == []


@pytest.fixture
def troubled_context(browser: Browser) -> Iterator[BrowserContext]:
    """Give a browser whose console may show failed connections."""
    opened = browser.new_context()
    yield opened
    opened.close()


def is_on_bad_input(test: pytest.Function) -> bool:
    """Return whether a test is of what reads bad input, and nothing but its parameters goes into it.

    Hypothesis's tests have their budget in them, if at all: one call makes a hundred inputs. Against a daemon, tests
    measure that daemon's time instead.
    """
    parameters = test.callspec.params if hasattr(test, "callspec") else {}
    return (
        ON_BAD_INPUT.search(test.name.partition("[")[0]) is not None
        and set(test.fixturenames) <= {*parameters, *AUTOMATIC}
        and not hasattr(test.obj, "hypothesis")
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Give tests of bad input a budget of processor time."""
    if not is_on_bad_input(pyfuncitem):
        return (yield)
    gc.disable()  # it would have to do with the garbage of all tests before
    began = time.process_time()
    try:
        result = yield
    finally:
        gc.enable()
    took = time.process_time() - began
    parameters: dict[str, object] = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
    size = sum(len(value) for value in parameters.values() if isinstance(value, (str, bytes)))
    if pyfuncitem.get_closest_marker("trio") is not None:
        assert took <= SLACK * allowed(size), f"{took:.3f} s of processor time"
    elif took > allowed(size):
        within_budget(lambda: pyfuncitem.obj(**parameters), size)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the parts have logged below a test that failed."""
    report = yield
    directory = item.funcargs.get("runtime_dir") if isinstance(item, pytest.Function) else None
    if report.failed and isinstance(directory, Path):
        for log in sorted(directory.glob("*.log")):
            lines = log.read_text("utf-8", "replace").splitlines()
            report.sections.append((f"end of {log.name}", "\n".join(lines[-LOG_LINES_SHOWN:])))
    return report
