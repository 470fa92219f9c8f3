"""Whose pages may open WebSockets: ALLOWED_ORIGINS, through the real Caddy and the real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from realtimed.cli.doctor.origins import mistakes
from tests.kit.clients import publisher
from tests.kit.handshakes import handshake
from tests.kit.stack import Caddy, Daemon, PartFailedError, running_caddy

SPELLINGS = ["/ws", "/WS", "//ws", "/%77s", "/wS?x=1", "/./ws", "/x/../ws", "/%2e/ws", "///%57%53"]
"""Ways to write the WebSocket's path. Nobody needs most of them; no one may get around the policy by them."""

MANY = " ".join(f"https://site-{number}.example" for number in range(50))


@pytest.mark.parametrize("allowed", ["http://a.example", "http://a.example http://b.example:8080", MANY])
async def test_allowed_origins_connect_and_no_others(allowed: str, runtime_dir: Path, daemon: Daemon) -> None:
    environment = {"ALLOWED_ORIGINS": allowed}
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=environment) as caddy:
        origins = allowed.split()
        for spelling in SPELLINGS:
            for origin in {origins[0], origins[-1]}:
                assert (await handshake(caddy.port, spelling, origin)).status == 101, (spelling, origin)
            connected = await connections(daemon)
            for refused in ([], ["http://evil.example"], [origins[0], origins[0]], [origins[0], "http://evil.example"]):
                assert (await handshake(caddy.port, spelling, *refused)).status == 403, (spelling, refused)
            assert await connections(daemon) == connected


async def test_origins_are_compared_exactly(runtime_dir: Path, daemon: Daemon) -> None:
    environment = {"ALLOWED_ORIGINS": "http://a.example https://b.example:8443"}
    near_misses = [
        "",
        "null",
        "*",
        "https://a.example",
        "http://a.example:80",
        "http://a.example/",
        "HTTP://A.EXAMPLE",
        "http://a.example.evil.example",
        "http://evil.example/http://a.example",
        "http://a.example http://b.example:8443",
        "http://a.example,http://a.example",
        "https://b.example",
        "{env.ALLOWED_ORIGINS}",
    ]
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=environment) as caddy:
        for origin in near_misses:
            assert (await handshake(caddy.port, "/ws", origin)).status == 403, origin


NAMELESS = [
    # ALLOWED_ORIGINS, and whether a request without an Origin header gets in
    ("none", True),
    ("none http://a.example", True),
    ("http://a.example none", True),
    ("http://a.example  none  http://b.example", True),
    ("http://a.example", False),
    ("http://none", False),
    ("none.example", False),
    ("http://a.example,none", False),
    ("NONE", False),
    ("null", False),
    ("*", False),
    (None, False),
]


@pytest.mark.parametrize(("allowed", "let_in"), NAMELESS)
async def test_who_sends_no_origin_gets_in_by_the_word_none_alone(
    allowed: str | None, let_in: bool, runtime_dir: Path, daemon: Daemon
) -> None:
    variables = {"ALLOWED_ORIGINS": allowed}
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy:
        for spelling in SPELLINGS:
            assert (await handshake(caddy.port, spelling)).status == (101 if let_in else 403), spelling
        connected = await connections(daemon)
        for refused in (
            [""],
            ["", ""],
            ["http://evil.example"],
            ["http://a.example", "http://a.example"],
            ["https://none"],
        ):
            assert (await handshake(caddy.port, "/ws", *refused)).status == 403, refused
        assert (await handshake(caddy.port, "/ws", "null")).status == (101 if allowed == "null" else 403)
        assert await connections(daemon) == connected + (allowed == "null")


async def test_with_none_pages_have_to_be_named_as_before(runtime_dir: Path, daemon: Daemon) -> None:
    variables = {"ALLOWED_ORIGINS": "none http://a.example"}
    async with running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, environment=variables) as caddy:
        assert (await handshake(caddy.port, "/ws", "http://a.example")).status == 101
        for page in ("http://b.example", "null", "http://a.example/", "http://a.example:80"):
            assert (await handshake(caddy.port, "/ws", page)).status == 403, page


async def test_a_refusal_says_what_to_do(caddy_alone: Caddy) -> None:
    foreign = await handshake(caddy_alone.port, "/ws", "http://evil.example")
    assert 'from "http://evil.example"' in foreign.body
    assert "ALLOWED_ORIGINS" in foreign.body
    assert foreign.headers["content-type"] == "text/plain; charset=utf-8"
    nameless = await handshake(caddy_alone.port, "/ws")
    assert "Origin" in nameless.body
    assert "let in by the word none in it" in nameless.body


async def test_without_the_variable_the_demo_is_allowed(runtime_dir: Path, daemon: Daemon) -> None:
    async with running_caddy(
        runtime_dir, websocket_socket=daemon.websocket_socket, environment={"ALLOWED_ORIGINS": None}
    ) as caddy:
        assert (await handshake(caddy.port, "/ws", "http://localhost:8080")).status == 101
        assert (await handshake(caddy.port, "/ws", "http://127.0.0.1:8080")).status == 101
        assert (await handshake(caddy.port, "/ws", "http://localhost:8081")).status == 403


async def test_an_empty_variable_allows_nobody(runtime_dir: Path) -> None:
    with pytest.raises(PartFailedError, match="vars matcher"):
        async with running_caddy(runtime_dir, environment={"ALLOWED_ORIGINS": ""}):
            pass


async def connections(daemon: Daemon) -> int:
    """Return how many WebSockets the daemon has seen, open and refused ones."""
    async with publisher(daemon.control_socket) as control:
        stats = await control.call("stats")
        return int(stats["connections"]) + int(stats["handshakes_refused"])


# What no browser sends.


@pytest.mark.parametrize(
    ("entry", "why", "instead"),
    [
        ("https://A.example", "in lower case", "https://a.example"),
        ("HTTPS://a.example", "in lower case", "https://a.example"),
        ("https://a.example/", "ends with host and port", "https://a.example"),
        ("https://a.example/page", "ends with host and port", "https://a.example"),
        ("https://a.example?x=1", "ends with host and port", "https://a.example"),
        ("https://A.example:443/", "ends with host and port", "https://a.example"),
        ("https://a.example:443", "implies port 443: leave it out", "https://a.example"),
        ("http://a.example:80", "implies port 80: leave it out", "http://a.example"),
        ("https://a.example:", "implies port 443", "https://a.example"),
        ("http://a.example:08080", "this port", "http://a.example:8080"),
        ("https://a.example:0", "from 1 to 65535", None),
        ("https://a.example:65536", "from 1 to 65535", None),
        ("https://a.example:https", "from 1 to 65535", None),
        ("a.example", "begins with its scheme", "https://a.example or http://a.example"),
        ("localhost:8080", "begins with its scheme", "https://localhost:8080 or http://localhost:8080"),
        ("https:a.example", "begins with http:// or https://", None),
        ("https://a.example.", "another way", "https://a.example"),
        ("https://m\u00fcller.example", "another way", "https://xn--mller-kva.example"),
        ("https://stra\u00dfe.example", "another way", "https://xn--strae-oqa.example"),
        ("https://user@a.example", "no user", "https://a.example"),
        ("http://127.1:8080", "another way", "http://127.0.0.1:8080"),
        ("http://0x7f.0.0.1", "another way", "http://127.0.0.1"),
        ("http://[0:0:0:0:0:0:0:1]:8080", "another way", "http://[::1]:8080"),
        ("http://[::ffff:127.0.0.1]", "another way", "http://[::ffff:7f00:1]"),
        ("http://::1", "no host has such a name", None),
        ("http://[::1%eth0]", "no host has such a name", None),
        ("http://1.2.3.4.5", "no host has such a name", None),
        ("https://", "no host has such a name", None),
        ("https://a..example", "no host has such a name", None),
        ("https://a%2eexample", "no host has such a name", None),
        ("https://" + "\u00fc" * 200 + ".example", "no host has such a name", None),
        ("https://" + "a" * 400, "no origin is that long", None),
        ("*", "no wildcards", None),
        ("https://*.a.example", "no wildcards", None),
        ("https://a.example,https://b.example", "separated by spaces", None),
        ("'https://a.example'", "no origin has quotes", None),
        ("wss://a.example", "that of the page", "https://a.example"),
        ("ws://a.example:80/ws", "that of the page", "http://a.example"),
        ("file:///x", "a page that is a file", None),
        ("None", "the word is written none", None),
        ("NULL", "the word is written null", None),
        ("Capacitor://localhost", "not an origin", None),
        ("\x1b[31m", "no host has such a name", None),
    ],
)
def test_a_wrong_entry_is_named_with_what_browsers_send(entry: str, why: str, instead: str | None) -> None:
    [mistake] = mistakes(f"https://right.example {entry} none")
    assert (mistake.entry, mistake.instead) == (entry, instead)
    assert why in mistake.why
    assert str(mistake).isprintable()
    if instead is not None:
        assert list(mistakes(instead.replace(" or ", " "))) == []


@pytest.mark.parametrize(
    "entry",
    [
        "https://a.example", "http://a.example:8080", "https://a.example:80", "http://a.example:443", "http://localhost",
        "http://127.0.0.1:8080", "http://[::1]:8080", "https://xn--mller-kva.example", "https://under_score.example",
        "chrome-extension://abcdef", "capacitor://localhost", "null", "none", "",
    ],
)  # fmt: skip
def test_what_browsers_and_applications_send_is_right(entry: str) -> None:
    assert list(mistakes(entry)) == []


@pytest.mark.parametrize("between", ["\t", "\n", "\r", " \t "])
def test_other_white_space_than_spaces_separates_nothing(between: str) -> None:
    [mistake] = mistakes(f"http://localhost:8080{between}none")
    assert mistake.why == "origins are separated by spaces, and by nothing else"
