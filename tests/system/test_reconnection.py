"""The connection between a page in Chromium and the daemon fails, in many ways, and nothing is lost.

All tests here block, as Playwright's interface does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from playwright.sync_api import BrowserContext, Page, expect

from tests.kit.plug import Plug, running_plug
from tests.kit.site import Site, messages, open_page, panel, running_site
from tests.kit.stack import free_port


class Network:
    """What is between the browser and Caddy."""

    def __init__(self, plug: Plug, portal: BlockingPortal) -> None:
        self._plug = plug
        self._portal = portal

    def pull(self) -> None:
        self._portal.call(self._plug.pull)

    def put_back(self) -> None:
        self._portal.call(self._plug.put_back)


@pytest.fixture(scope="module")
def site_and_network() -> Iterator[tuple[Site, Network]]:
    port = free_port()
    origin = f"http://localhost:{port}"
    with (
        running_site({"ALLOWED_ORIGINS": origin}) as running,
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(running_plug(port, running.port)) as plug,
    ):
        running.origin = origin
        yield running, Network(plug, portal)


@pytest.fixture
def site(site_and_network: tuple[Site, Network]) -> Site:
    """Give the whole stack; browsers reach it through the network."""
    return site_and_network[0]


@pytest.fixture
def network(site_and_network: tuple[Site, Network]) -> Iterator[Network]:
    network = site_and_network[1]
    yield network
    network.put_back()


def returns(page: Page, channel: str) -> list[str]:
    """What the panel says of the times that the connection came back."""
    return panel(page, channel).locator(".resumed, .gap").all_text_contents()


def test_a_network_that_is_gone_for_a_while(troubled_context: BrowserContext, site: Site, network: Network) -> None:
    page = open_page(troubled_context, site, "cut", "quiet")
    site.broadcast("cut", "before")
    expect(messages(page, "cut")).to_have_text(["before"])
    network.pull()
    for name in ("cut", "quiet"):
        expect(panel(page, name)).to_have_attribute("data-state", "pending")
    expect(page.locator("#countdown")).to_have_text("next try in 1 s")
    for number in range(1, 4):
        site.broadcast("cut", f"missed {number}")
    network.put_back()
    expect(messages(page, "cut")).to_have_text(["before", "missed 1", "missed 2", "missed 3"])
    expect(panel(page, "cut").locator(".replayed .offset")).to_have_text(["2", "3", "4"])
    site.broadcast("cut", "after")
    site.broadcast("quiet", "after")
    expect(messages(page, "cut")).to_have_text(["before", "missed 1", "missed 2", "missed 3", "after"])
    expect(messages(page, "quiet")).to_have_text(["after"])
    assert returns(page, "cut") == ["Connected again: 3 missed messages came in."]
    assert returns(page, "quiet") == ["Connected again, nothing missed."]
    expect(panel(page, "cut").locator(".replayed")).to_have_count(3)


def test_a_browser_that_is_offline(troubled_context: BrowserContext, site: Site, network: Network) -> None:
    page = open_page(troubled_context, site, "tunnel")
    troubled_context.set_offline(True)
    network.pull()
    expect(page.locator("#state")).to_have_text("This browser is offline")
    site.broadcast("tunnel", "missed")
    network.put_back()
    troubled_context.set_offline(False)
    expect(messages(page, "tunnel")).to_have_text(["missed"])
    assert returns(page, "tunnel") == ["Connected again: 1 missed message came in."]


def test_more_is_missed_than_history_holds(troubled_context: BrowserContext, site: Site, network: Network) -> None:
    page = open_page(troubled_context, site, "far")
    network.pull()
    expect(panel(page, "far")).to_have_attribute("data-state", "pending")
    for number in range(150):
        site.broadcast("far", f"lost {number}")
    network.put_back()
    expect(panel(page, "far").locator(".gap")).to_contain_text("history no longer reaches back")
    site.broadcast("far", "after")
    expect(messages(page, "far")).to_have_text(["after"])
    expect(panel(page, "far").locator(".offset")).to_have_text(["151"])


def test_a_page_that_was_frozen(troubled_context: BrowserContext, site: Site, network: Network) -> None:
    page = open_page(troubled_context, site, "ice")
    session = troubled_context.new_cdp_session(page)
    session.send("Page.setWebLifecycleState", {"state": "frozen"})
    network.pull()
    network.put_back()
    for number in range(1, 4):
        site.broadcast("ice", f"missed {number}")
    session.send("Page.setWebLifecycleState", {"state": "active"})
    expect(messages(page, "ice")).to_have_text(["missed 1", "missed 2", "missed 3"])
    assert returns(page, "ice") == ["Connected again: 3 missed messages came in."]


PAGE_WITHOUT_A_DEMO = "style.css"
"""Shown as text, and without the demo's Cache-Control: no-store, which keeps a page out of the cache of pages."""

WATCH = """async () => {
  const { Realtime } = await import('/realtime.js');
  window.said = [];
  const realtime = new Realtime('/ws');
  addEventListener('pageshow', ({ persisted }) => window.said.push(['shown', persisted]));
  await new Promise(resolve => realtime.subscribe('back', message => window.said.push([message]), {
    onSubscribed({ recovered }) {
      window.said.push(['subscribed', recovered]);
      resolve();
    },
  }));
}"""


def test_back_to_a_page_that_the_browser_has_kept(troubled_context: BrowserContext, site: Site) -> None:
    page = troubled_context.new_page()
    page.goto(f"{site.origin}/{PAGE_WITHOUT_A_DEMO}")
    page.evaluate(WATCH)
    site.broadcast("back", "1")
    page.wait_for_function("window.said.length === 2")
    page.goto(f"{site.origin}/realtime.js")
    assert page.evaluate("window.said") is None
    for number in (2, 3):
        site.broadcast("back", str(number))
    page.go_back(wait_until="commit")  # a page that was kept is not loaded again
    page.wait_for_function("window.said.length === 6")
    site.broadcast("back", "4")
    page.wait_for_function("window.said.length > 6")
    assert page.evaluate("window.said") == [
        ["subscribed", None], ["1"], ["shown", True], ["subscribed", True], ["2"], ["3"], ["4"],
    ]  # fmt: skip


def test_by_hand(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "hand")
    page.get_by_role("button", name="Disconnect").click()
    expect(page.locator("#state")).to_have_text("Disconnected")
    expect(page.get_by_role("button", name="Disconnect")).to_be_hidden()
    site.broadcast("hand", "missed")
    page.get_by_role("button", name="Connect now").click()
    expect(messages(page, "hand")).to_have_text(["missed"])
    assert returns(page, "hand") == ["Connected again: 1 missed message came in."]


# What follows ends a part of the stack, so it has one of its own.


def test_caddy_is_killed(troubled_context: BrowserContext) -> None:
    with running_site() as site:
        tabs = [open_page(troubled_context, site, "news") for _ in range(2)]
        site.kill_caddy()
        for tab in tabs:
            expect(panel(tab, "news")).to_have_attribute("data-state", "pending")
        for number in range(1, 4):
            site.broadcast("news", f"missed {number}")
        site.start_caddy()
        for tab in tabs:
            expect(messages(tab, "news")).to_have_text(["missed 1", "missed 2", "missed 3"])
            assert returns(tab, "news") == ["Connected again: 3 missed messages came in."]


def test_the_daemon_is_killed(troubled_context: BrowserContext) -> None:
    with running_site() as site:
        page = open_page(troubled_context, site, "news")
        site.broadcast("news", "before")
        expect(messages(page, "news")).to_have_text(["before"])
        site.kill_daemon()
        expect(panel(page, "news")).to_have_attribute("data-state", "pending")
        site.start_daemon()
        expect(panel(page, "news")).to_have_attribute("data-state", "live")
        site.broadcast("news", "after")
        expect(messages(page, "news")).to_have_text(["before", "after"])
        expect(panel(page, "news").locator(".offset")).to_have_text(["1", "1"])
        expect(panel(page, "news").locator(".gap")).to_contain_text("history no longer reaches back")
