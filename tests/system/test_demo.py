"""The demo in a real Chromium, on the real daemon, PHP and Caddy.

All tests here block: Playwright's blocking interface keeps an event loop of its own in this thread.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, WebSocketRoute, expect

import realtimed
from tests.kit.blocking import daemon_in_thread
from tests.kit.launcher import processes_in
from tests.kit.patience import PATIENCE
from tests.kit.site import Site, messages, open_page, panel, running_site
from tests.kit.stack import APP, ROOT, find_php, free_port


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_site() as running:
        yield running


def send(page: Page, channel: str, message: str) -> None:
    """Fill in the form and press its button."""
    page.get_by_label("Channel", exact=True).fill(channel)
    page.get_by_label("Message", exact=True).fill(message)
    page.get_by_role("button", name="Broadcast").click()


def outcome(page: Page) -> Locator:
    return page.locator("#outcome")


# The whole way, as README tells it.


def test_every_way_to_broadcast_reaches_every_tab(troubled_context: BrowserContext) -> None:
    port = free_port()
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tests.kit.stack"],
        cwd=ROOT,
        env={**os.environ, "SERVER_ADDRESS": f":{port}", "ALLOWED_ORIGINS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with launcher:
        try:
            assert launcher.stdout is not None
            guide = ""
            while "Ctrl-C" not in guide:
                line = launcher.stdout.readline()
                assert line, guide
                guide += line
            address = re.search(r"http://\S+", guide)
            control = re.search(r"REALTIME_SOCKET=(\S+)", guide)
            assert address is not None
            assert control is not None
            environment = {**os.environ, "REALTIME_SOCKET": control[1]}

            tabs = [troubled_context.new_page(), troubled_context.new_page()]
            for tab in tabs:
                tab.goto(address[0])
                expect(tab.locator("#state")).to_have_text(re.compile("Connected"))
                expect(panel(tab, "news")).to_have_attribute("data-state", "live")

            send(tabs[0], "news", "from the form")
            expect(outcome(tabs[0])).to_have_text("Reached 2 clients · news #1")
            php = f"require '{APP / 'realtime.php'}'; broadcast('news', 'from PHP');"
            python = "from realtimed import broadcast; broadcast('news', 'from Python')"
            for command in (
                [str(find_php()), "-r", php],
                [sys.executable, "-m", "realtimed.cli.realtimectl", "broadcast", "news", "from the shell"],
                [sys.executable, "-c", python],
            ):
                subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=PATIENCE)
            send(tabs[1], "news", "from the other form")

            for tab in tabs:
                expect(messages(tab, "news")).to_have_text(
                    ["from the form", "from PHP", "from the shell", "from Python", "from the other form"]
                )
                expect(panel(tab, "news").locator(".offset")).to_have_text(["1", "2", "3", "4", "5"])

            launcher.send_signal(signal.SIGINT)
            for tab in tabs:
                expect(tab.locator("#state")).to_have_text("Not connected")
            assert launcher.wait(PATIENCE) == 0
        finally:
            launcher.kill()
    directory = Path(control[1]).parent
    assert processes_in(directory) == []
    assert not directory.exists()


# The page.


COOKIE: Final = "name=M\u00fcller"


def test_a_cookie_that_is_not_ascii_keeps_nobody_out(context: BrowserContext, site: Site) -> None:
    first = context.new_page()
    first.goto(site.origin)
    first.evaluate("cookie => { document.cookie = cookie }", COOKIE)
    page = open_page(context, site, "news")
    assert COOKIE in page.evaluate("document.cookie")
    site.broadcast("news", "hello")
    expect(messages(page, "news")).to_have_text(["hello"])


ASK: Final = """port => new Promise(resolve => {
    const socket = new WebSocket(`ws://localhost:${port}/ws`);
    socket.onopen = () => resolve('open');
    socket.onclose = event => resolve(event.code);
})"""


def test_nor_does_it_where_no_proxy_takes_it_away(
    troubled_context: BrowserContext, site: Site, runtime_dir: Path
) -> None:
    """Cookies know no ports: here the browser sends it to the daemon itself."""
    port = free_port()
    with daemon_in_thread(runtime_dir, "--websocket", f"127.0.0.1:{port}"):
        page = troubled_context.new_page()
        page.goto(f"{site.origin}/realtime.js")  # a document without a content security policy
        page.evaluate("cookie => { document.cookie = cookie }", COOKIE)
        assert page.evaluate(ASK, port) == "open"


def test_messages_are_shown_as_text(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "xss")
    attacks = [
        "<script>document.title = 'attacked'</script>",
        "<img src=x onerror=\"document.title = 'attacked'\">",
        "&lt;b&gt; 'quoted' \"twice\" \u202e",
    ]
    for attack in attacks:
        send(page, "xss", attack)
    expect(messages(page, "xss")).to_have_text(attacks)
    assert page.locator(".message *").count() == 0
    assert page.title() == "realtimed: broadcast to every browser"


def test_bytes_are_shown(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "binary")
    site.broadcast("binary", b"\x00\xff")
    expect(messages(page, "binary")).to_have_text(["2 bytes: 00 ff"])


def test_channels_come_and_go(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "come", "stay")
    with page.expect_websocket() as opened:
        page.reload()
    expect(panel(page, "come")).to_have_attribute("data-state", "live")
    page.get_by_label("Watch another channel").fill("go/1,2;3")
    page.get_by_role("button", name="Subscribe", exact=True).click()
    expect(panel(page, "go/1,2;3")).to_have_attribute("data-state", "live")
    with opened.value.expect_event("framereceived", lambda frame: '"unsubscribed"' in str(frame)):
        page.get_by_role("button", name="Unsubscribe from come").click()
    site.broadcast("come", "nobody is watching")
    site.broadcast("stay", "one")
    site.broadcast("go/1,2;3", "two")
    expect(messages(page, "stay")).to_have_text(["one"])
    expect(messages(page, "go/1,2;3")).to_have_text(["two"])
    expect(panel(page, "come")).to_have_count(0)
    expect(page.get_by_label("Watch another channel")).to_be_focused()

    page.reload()
    expect(page.locator(".panel h3")).to_have_text(["stay", "go/1,2;3"])


def test_a_channel_that_does_not_work_says_why(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "news")
    page.get_by_label("Watch another channel").fill("a b")
    page.get_by_label("Watch another channel").press("Enter")
    expect(page.locator("#refusal")).to_contain_text("'a b' is not a channel name")
    expect(page.locator(".panel h3")).to_have_text(["news"])
    page.get_by_label("Watch another channel").fill("news")
    page.get_by_label("Watch another channel").press("Enter")
    expect(page.locator("#refusal")).to_have_text("You are watching “news” already.")
    expect(page.locator(".panel h3")).to_have_text(["news"])


def test_more_channels_than_a_client_may_have(context: BrowserContext, site: Site) -> None:
    names = [f"crowd-{number}" for number in range(128)]
    page = open_page(context, site, *names)
    page.get_by_label("Watch another channel").fill("crowd-128")
    page.get_by_label("Watch another channel").press("Enter")
    expect(page.locator("#refusal")).to_contain_text("128")
    expect(page.locator(".panel")).to_have_count(128)


def test_the_code_says_what_the_form_does(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "quotes")
    said = 'it\'s a \\ "test" of $HOME & ü'
    page.get_by_label("Channel", exact=True).fill("quotes")
    page.get_by_label("Message", exact=True).fill(said)
    environment = {**os.environ, "REALTIME_SOCKET": str(site.control_socket)}
    php, python, shell = (page.locator(f"#code-{language}").text_content() for language in ("php", "python", "shell"))
    realtimectl = f'realtimectl() {{ "{sys.executable}" -m realtimed.cli.realtimectl "$@"; }}; '
    page.get_by_label("Message", exact=True).fill("-n")
    dashed = page.locator("#code-shell").text_content()
    for command in (
        [str(find_php()), "-r", f"require '{APP / 'realtime.php'}'; {php}"],
        [sys.executable, "-c", f"from realtimed import broadcast\n{python}"],
        ["sh", "-c", f"{realtimectl}{shell}"],
        ["sh", "-c", f"{realtimectl}{dashed}"],
    ):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=PATIENCE)
    expect(messages(page, "quotes")).to_have_text([said, said, said, "-n"])


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_width_scrolls_sideways(width: int, context: BrowserContext, site: Site) -> None:
    channel = f"a-channel-with-a-very-long-name-that-cannot-be-broken/{width}"
    page = open_page(context, site, "news", channel)
    page.set_viewport_size({"width": width, "height": 740})
    send(page, channel, "W" * 500)
    expect(messages(page, channel)).to_have_text(["W" * 500])
    expect(outcome(page)).to_contain_text("Reached")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_newest_message_is_in_sight_and_old_ones_make_room(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "flood")
    with realtimed.Client(site.control_socket) as client:
        client.broadcast_each(("flood", f"message {number}") for number in range(1000))
    expect(messages(page, "flood").last).to_have_text("message 999")
    expect(messages(page, "flood").last).to_be_in_viewport()
    expect(messages(page, "flood")).to_have_count(200)


# Broadcasting by the form, when something is wrong.


def test_a_refused_broadcast_says_why(troubled_context: BrowserContext, site: Site) -> None:
    page = open_page(troubled_context, site, "news")
    send(page, "a b", "hello")
    expect(outcome(page)).to_contain_text("'a b' is not a channel name")
    send(page, "news", "x" * 70_000)
    expect(outcome(page)).to_contain_text("message_too_large")
    send(page, "empty", "now it works")
    expect(outcome(page)).to_have_text("Reached nobody: no client watches this channel · empty #1")


@contextmanager
def holding_a_broadcast(page: Page) -> Iterator[None]:
    """Hold the next request of the form up, until the block is left."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/send.php", hold, times=1)
    yield
    while not held:
        page.evaluate("0")  # Playwright takes events while it waits for something
    held.pop().continue_()


def test_the_form_says_that_a_broadcast_is_pending(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "pending")
    send(page, "pending", "before")
    expect(outcome(page)).to_have_text("Reached 1 client · pending #1")
    with holding_a_broadcast(page):
        send(page, "pending", "one")
        expect(outcome(page)).to_have_text("Broadcasting…")
        expect(outcome(page)).to_have_class("pending")
        expect(page.locator("#send")).to_have_attribute("aria-busy", "true")
        send(page, "pending", "two")
        expect(outcome(page)).to_have_text("Broadcasting 2 messages…")
    expect(outcome(page)).to_have_text("Reached 1 client · pending #3")
    expect(outcome(page)).to_have_class("done")
    expect(page.locator("#send")).to_have_attribute("aria-busy", "false")
    expect(messages(page, "pending")).to_have_text(["before", "one", "two"])


def test_the_form_gives_up_in_time(troubled_context: BrowserContext, site: Site) -> None:
    page = open_page(troubled_context, site, "deadline")
    send(page, "deadline", "before")
    expect(outcome(page)).to_have_text("Reached 1 client · deadline #1")
    page.route("**/send.php", lambda _: None)  # as if PHP had no worker free
    began = time.monotonic()
    send(page, "deadline", "one")
    send(page, "deadline", "two")
    expect(outcome(page)).to_have_text("Not broadcast: what was before it took too long.", timeout=PATIENCE * 1000)
    assert 9.5 < time.monotonic() - began < 15
    send(page, "deadline", "three")
    expect(outcome(page)).to_have_text(
        "No answer within 10 s: it may have been broadcast or not. Has PHP-FPM a worker free?", timeout=PATIENCE * 1000
    )
    expect(outcome(page)).to_have_class("failed")
    page.unroute("**/send.php")
    send(page, "deadline", "four")
    expect(outcome(page)).to_have_text("Reached 1 client · deadline #2")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 500, "body": "oh"}, "It may have been broadcast or not: the web server says 500."),
        ({"status": 404, "body": "oh"}, "Not broadcast: the web server says 404."),
        ({"status": 200, "body": "oh"}, "It may have been broadcast or not: the web server says 200."),
        (
            {"status": 200, "body": "oh", "content_type": "application/json"},
            "It may have been broadcast or not: the answer is not JSON. PHP’s error log may say why.",
        ),
        (None, "No answer: the web server cannot be reached."),
    ],
)
def test_whatever_goes_wrong_is_shown(
    answer: dict[str, Any] | None, said: str, troubled_context: BrowserContext, site: Site
) -> None:
    page = open_page(troubled_context, site, "trouble")
    page.route("**/send.php", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    send(page, "trouble", "hello")
    expect(outcome(page)).to_have_text(said)
    expect(outcome(page)).to_have_class("failed")
    expect(page.locator("#send")).to_have_attribute("aria-busy", "false")


def test_a_failure_is_not_hidden_by_the_success_after_it(troubled_context: BrowserContext, site: Site) -> None:
    page = open_page(troubled_context, site, "run")
    with holding_a_broadcast(page):
        send(page, "a b", "one")
        send(page, "run", "two")
    expect(messages(page, "run")).to_have_text(["two"])
    expect(page.locator("#send")).to_have_attribute("aria-busy", "false")
    expect(outcome(page)).to_contain_text("'a b' is not a channel name")
    send(page, "run", "three")
    expect(outcome(page)).to_have_text("Reached 1 client · run #2")


def test_messages_show_when_they_were_sent(context: BrowserContext, site: Site) -> None:
    """The server is played here, so that its clock can be: the page is to show nothing of its own."""
    asked: list[dict[str, Any]] = []
    now = int(time.time() * 1000)
    times = [now - 49 * 3_600_000, now - 1, now + 1, None]

    def serve(socket: WebSocketRoute) -> None:
        def answer(text: str | bytes) -> None:
            request = json.loads(text)
            asked.append(request)
            say("subscribed", channel="sent", id=request["id"], epoch="e1", offset=42)
            for offset, published in enumerate(times, start=41):
                stamp = {} if published is None else {"time": published}
                say("message", channel="sent", offset=offset, data=str(offset), **stamp)

        def say(event: str, **fields: object) -> None:
            socket.send(json.dumps({"event": event, **fields}))

        socket.on_message(answer)
        say("welcome", client="c-1", heartbeat=25)

    page = context.new_page()
    page.route_web_socket("**/ws", serve)
    page.goto(f"{site.origin}/?channel=sent")
    expect(messages(page, "sent")).to_have_text(["41", "42", "43", "44"])
    (request,) = asked
    assert (request["action"], request["channel"], request["last"]) == ("subscribe", "sent", 20)
    assert "since" not in request
    expect(panel(page, "sent").locator("li.replayed .message")).to_have_text(["41", "42"])
    shown = panel(page, "sent").locator("time")
    stamps = shown.evaluate_all("found => found.map(each => [Date.parse(each.dateTime), each.textContent])")
    assert [stamp for stamp, _ in stamps[:3]] == times[:3]
    assert abs(stamps[3][0] - time.time() * 1000) < PATIENCE * 1000, "where the server does not say, when it came"
    assert re.fullmatch(r"\S+ \d\d:\d\d:\d\d", stamps[0][1]), "on another day, with the date"
    assert shown.nth(0).get_attribute("title") != ""


def test_a_page_opens_with_the_last_messages(context: BrowserContext, site: Site) -> None:
    for number in range(1, 31):
        site.broadcast("opening", str(number))
    page = open_page(context, site, "opening")
    expect(messages(page, "opening")).to_have_text([str(number) for number in range(11, 31)])
    expect(panel(page, "opening").locator("li.replayed")).to_have_count(20)
    site.broadcast("opening", "new")
    expect(messages(page, "opening").last).to_have_text("new")
    expect(panel(page, "opening").locator("li.replayed")).to_have_count(20)


def test_only_its_own_form_may_broadcast(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "csrf")
    own = {"channel": "csrf", "message": "forged"}
    token = page.locator("[name=token]").get_attribute("value")
    assert token is not None
    fields: list[dict[str, str | float | bool]] = [
        {**own},
        {**own, "token": ""},
        {**own, "token": token[:-1]},
        {**own, "token[]": token},
    ]
    for form in fields:
        answer = page.request.post(f"{site.origin}/send.php", form=form, headers={"Accept": "application/json"})
        assert answer.status == 403
        assert "Load the page again" in answer.json()["error"]
    stranger = context.browser
    assert stranger is not None
    other = stranger.new_context()
    assert other.request.post(f"{site.origin}/send.php", form={**own, "token": token}).status == 403
    other.close()
    send(page, "csrf", "genuine")
    expect(messages(page, "csrf")).to_have_text(["genuine"])


def test_the_form_does_not_expire_while_it_is_used(context: BrowserContext, site: Site) -> None:
    page = open_page(context, site, "unexpired")
    (cookie,) = context.cookies()
    session = site.sessions / f"sess_{cookie['value']}"
    ten_minutes_ago = time.time() - 600
    os.utime(session, (ten_minutes_ago, ten_minutes_ago))
    send(page, "unexpired", "hello")
    expect(messages(page, "unexpired")).to_have_text(["hello"])
    assert session.stat().st_mtime > ten_minutes_ago + 300


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"channel": "news"}, 422),
        ({"message": "hello"}, 422),
        ({"channel[]": "news", "message": "hello"}, 422),
        ({"channel": "a b", "message": "hello"}, 422),
        ({"channel": "news", "message": "x" * 9_000_000}, 413),
    ],
)
def test_statuses(form: dict[str, str | float | bool], status: int, context: BrowserContext, site: Site) -> None:
    page = context.new_page()
    page.goto(site.origin)
    token = page.locator("[name=token]").get_attribute("value") or ""
    for accepted in ("application/json", "text/html"):
        answer = page.request.post(
            f"{site.origin}/send.php", form={**form, "token": token}, headers={"Accept": accepted}
        )
        assert answer.status == status
        assert answer.headers["content-type"] == f"{accepted}; charset=utf-8"


def test_methods(context: BrowserContext, site: Site) -> None:
    answer = context.request.get(f"{site.origin}/send.php")
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"
    assert context.request.get(f"{site.origin}/page.php").status == 404


def test_headers(context: BrowserContext, site: Site) -> None:
    page = context.new_page()
    answer = page.goto(site.origin)
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "no-store" in answer.headers["cache-control"]
    (cookie,) = context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Lax"


def until_it_has_a_certificate(port: int) -> None:
    """Wait until a TLS handshake for localhost succeeds: Caddy is ready before it has made its certificates."""
    anyone = ssl.create_default_context()
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    give_up_at = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.create_connection(("localhost", port)) as plain:
                anyone.wrap_socket(plain, server_hostname="localhost").close()
            return
        except ssl.SSLError:
            if time.monotonic() > give_up_at:
                raise


def test_over_https(browser: Browser) -> None:
    https_port, http_port = free_port(), free_port()
    origin = f"https://localhost:{https_port}"
    options = f"local_certs\nskip_install_trust\nhttps_port {https_port}\nhttp_port {http_port}"
    with running_site({"SERVER_ADDRESS": origin, "ALLOWED_ORIGINS": origin, "CADDY_GLOBAL_OPTIONS": options}) as site:
        site.origin = origin
        until_it_has_a_certificate(https_port)
        context = browser.new_context(ignore_https_errors=True)
        page = open_page(context, site, "news")
        send(page, "news", "hello")
        expect(messages(page, "news")).to_have_text(["hello"])
        (cookie,) = context.cookies()
        assert cookie["secure"]
        context.close()


def test_the_form_works_without_javascript(browser: Browser, context: BrowserContext, site: Site) -> None:
    watching = open_page(context, site, "plain")
    without = browser.new_context(java_script_enabled=False)
    page = without.new_page()
    page.goto(site.origin)
    send(page, "plain", "<b>hello</b>")
    expect(outcome(page)).to_have_text("Reached 1 client · plain #1")
    expect(messages(watching, "plain")).to_have_text(["<b>hello</b>"])
    page.reload()
    expect(outcome(page)).to_be_empty()
    send(page, "<i>plain</i>", "hello")
    expect(page.get_by_role("heading", name="Not broadcast")).to_be_visible()
    expect(page.locator(".trouble")).to_contain_text("'<i>plain</i>' is not a channel name")
    page.get_by_role("link", name="Back").click()
    expect(outcome(page)).to_be_empty()
    without.close()


# When the connection is lost, or never comes to be.

RECORD_STATES: Final = """() => {
  const connection = document.getElementById('connection');
  window.said = [];
  new MutationObserver(() => window.said.push(connection.textContent))
    .observe(connection, { childList: true, subtree: true });
}"""
"""Keeps all that is said of the connection: some of it may be there for a moment only."""


def test_it_comes_back_after_a_restart_of_the_daemon(troubled_context: BrowserContext) -> None:
    with running_site() as site:
        tabs = [open_page(troubled_context, site, "news", "sport") for _ in range(2)]
        site.broadcast("news", "before")
        for tab in tabs:
            expect(messages(tab, "news")).to_have_text(["before"])
            tab.evaluate(RECORD_STATES)
        site.stop_daemon()
        for tab in tabs:
            tab.wait_for_function(
                "window.said.some(text => /The server is restarting\\s+next try in [123] s/.test(text))"
            )
            expect(panel(tab, "news")).to_have_attribute("data-state", "pending")
        site.start_daemon()
        for tab in tabs:
            expect(panel(tab, "news")).to_have_attribute("data-state", "live")
            expect(panel(tab, "sport")).to_have_attribute("data-state", "live")
            expect(panel(tab, "news").locator(".gap")).to_have_count(1)
        site.broadcast("news", "after")
        for tab in tabs:
            expect(messages(tab, "news")).to_have_text(["before", "after"])


def test_it_says_that_the_daemon_is_down(troubled_context: BrowserContext) -> None:
    with running_site() as site:
        page = open_page(troubled_context, site, "news")
        site.stop_daemon()
        send(page, "news", "hello")
        expect(outcome(page)).to_contain_text(re.compile(r"no daemon at .*realtime\.sock", re.IGNORECASE))
        expect(page.get_by_role("alert").first).to_contain_text("realtimed does not answer (502)")
        site.start_daemon()
        expect(page.locator("#state")).to_have_text(re.compile("Connected"))
        expect(page.get_by_role("alert").first).to_be_hidden()
        expect(page.get_by_role("button", name="Connect now")).to_be_hidden()


def test_it_says_that_its_origin_is_refused(troubled_context: BrowserContext) -> None:
    with running_site({"ALLOWED_ORIGINS": "http://other.example"}) as site:
        page = troubled_context.new_page()
        page.goto(site.origin)
        expect(page.get_by_role("alert").first).to_contain_text(f'WebSockets from "{site.origin}" are not allowed here')
        expect(page.get_by_role("alert").first).to_contain_text("ALLOWED_ORIGINS")


def test_a_client_sent_away_stays_away(troubled_context: BrowserContext) -> None:
    with running_site() as site:
        page = open_page(troubled_context, site, "news")
        with realtimed.Client(site.control_socket) as client:
            (connected,) = client.clients()
            client.disconnect(connected.id, 4403, "no more of this")
        expect(page.locator("#state")).to_have_text("Disconnected by the server")
        expect(page.get_by_role("alert").first).to_contain_text("not allowed here (4403, no more of this)")
        page.get_by_role("button", name="Connect now").click()
        expect(panel(page, "news")).to_have_attribute("data-state", "live")
        expect(page.get_by_role("alert").first).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str, browser: Browser, site: Site) -> None:
    # WCAG 2.2, 1.4.3: a contrast of 4.5 to 1.
    opened = browser.new_context(
        color_scheme="light" if scheme == "light" else "dark", viewport={"width": 360, "height": 740}
    )
    channel = f"contrast-{scheme}"
    page = open_page(opened, site, channel)
    send(page, "a b", "hello")
    expect(outcome(page)).to_have_class("failed")
    page.get_by_role("button", name="Disconnect").click()
    site.broadcast(channel, "missed")
    page.get_by_role("button", name="Connect now").click()
    expect(panel(page, channel).locator(".replayed")).to_have_count(1)
    measured = page.evaluate(MEASURE_CONTRASTS)
    assert len(measured) > 10
    assert {text: contrast for text, contrast in measured.items() if contrast < 4.5} == {}
    opened.close()


MEASURE_CONTRASTS: Final = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => parse(colour).slice(0, 3)
    .map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = element => {
    for (; element !== null; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (parse(colour)[3] !== 0) {
        return colour;
      }
    }
  };
  const found = {};
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].filter(node => node.nodeType === Node.TEXT_NODE && node.data.trim() !== '');
    if ((own.length > 0 || element.value) && element.checkVisibility()) {
      const [dark, light] = [getComputedStyle(element).color, ground(element)].map(luminance).sort((a, b) => a - b);
      found[element.value || own[0].data.trim()] = (light + 0.05) / (dark + 0.05);
    }
  }
  return found;
}"""
