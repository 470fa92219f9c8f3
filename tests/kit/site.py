"""The demo's site as tests use it: the whole stack, whose parts may fail, and what a page of it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from anyio.from_thread import BlockingPortal, start_blocking_portal
from playwright.sync_api import BrowserContext, Locator, Page, expect

import realtimed
from tests.kit.stack import Caddy, Daemon, free_port, running_caddy, running_daemon, running_php_fpm, runtime_directory

__all__ = ["Site", "messages", "open_page", "panel", "running_site"]


class Site:
    """The whole stack, whose daemon and Caddy may be stopped, killed and started."""

    def __init__(self, directory: Path, portal: BlockingPortal, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.origin = f"http://localhost:{self.port}"
        self.control_socket = directory / "realtime.sock"
        self.sessions = directory / "php-sessions"
        self._directory = directory
        self._portal = portal
        self._environment = environment
        self._daemon: Daemon
        self._caddy: Caddy
        self._end_of_daemon = ExitStack()
        self._end_of_caddy = ExitStack()

    def start_daemon(self) -> Daemon:
        running = self._portal.wrap_async_context_manager(running_daemon(self._directory))
        self._daemon = self._end_of_daemon.enter_context(running)
        return self._daemon

    def stop_daemon(self) -> None:
        self._end_of_daemon.close()

    def kill_daemon(self) -> None:
        """End the daemon without a goodbye to anybody."""
        self._daemon.process.kill()
        self._end_of_daemon.close()

    def start_caddy(self) -> Caddy:
        """Start Caddy, at the same address each time."""
        own = {"SERVER_ADDRESS": f":{self.port}", "ALLOWED_ORIGINS": self.origin}
        running = running_caddy(self._directory, environment={**own, **self._environment})
        self._caddy = self._end_of_caddy.enter_context(self._portal.wrap_async_context_manager(running))
        return self._caddy

    def stop_caddy(self) -> None:
        self._end_of_caddy.close()

    def kill_caddy(self) -> None:
        """End Caddy without a goodbye to anybody."""
        self._caddy.process.kill()
        self._end_of_caddy.close()

    def broadcast(self, channel: str, message: str | bytes) -> None:
        with realtimed.Client(self.control_socket) as client:
            client.broadcast(channel, message)


@contextmanager
def running_site(environment: Mapping[str, str] | None = None) -> Iterator[Site]:
    """Run daemon, PHP and Caddy; `environment` is Caddy's."""
    with ExitStack() as stack:
        directory = stack.enter_context(runtime_directory())
        portal = stack.enter_context(start_blocking_portal("trio"))
        site = Site(directory, portal, environment or {})
        daemon = site.start_daemon()
        stack.callback(site.stop_daemon)
        php = running_php_fpm(directory, {"REALTIME_SOCKET": str(daemon.control_socket)})
        stack.enter_context(portal.wrap_async_context_manager(php))
        site.start_caddy()
        stack.callback(site.stop_caddy)
        yield site


def open_page(context: BrowserContext, site: Site, *channels: str) -> Page:
    """Open the demo, and wait until it is subscribed to the channels."""
    page = context.new_page()
    page.goto(f"{site.origin}/?" + "&".join(f"channel={channel}" for channel in channels))
    for channel in channels:
        expect(panel(page, channel)).to_have_attribute("data-state", "live")
    return page


def panel(page: Page, channel: str) -> Locator:
    return page.locator(f'.panel[data-channel="{channel}"]')


def messages(page: Page, channel: str) -> Locator:
    return panel(page, channel).locator(".message")
