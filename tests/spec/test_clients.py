"""Section 9 of docs/protocol.md: who does as it says loses nothing, and its numbers are those of app/realtime.js."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from realtimed.config.settings import Config
from realtimed.websocket.frames import CloseCode
from tests.kit.clients import closing, websocket
from tests.kit.patience import PATIENCE
from tests.kit.peers import Browser, Opening
from tests.kit.stack import APP, ROOT, running_daemon
from tests.load.returning import FIRST_DELAY, LONGEST_DELAY, full_jitter

SCRIPT = (APP / "realtime.js").read_text()
SECTION = (ROOT / "docs" / "protocol.md").read_text().partition("\n## 9. ")[2]


def clause(number: int) -> str:
    """Return the text of a clause of section 9."""
    return SECTION.partition(f"\n9.{number} ")[2].partition(f"\n9.{number + 1} ")[0]


def in_script(name: str) -> float:
    """Return a number of app/realtime.js."""
    match = re.search(rf"\b{name}(?: =|:) ([\d_]+)", SCRIPT)
    assert match is not None, name
    return float(match[1])


@dataclass
class Follower:
    """A client of one channel that keeps what 9.1 says."""

    channel: str
    epoch: str = ""
    offset: int = 0
    messages: list[str] = field(default_factory=list)
    missed: int = 0

    async def subscribe(self, browser: Browser) -> None:
        since = {"epoch": self.epoch, "offset": self.offset} if self.epoch else None
        await browser.say("subscribe", self.channel, since=since)

    async def hear(self, browser: Browser, last: str) -> None:
        """Take what comes until the message `last`, or the answer with this name."""
        while True:
            event = await browser.event()
            if event["event"] == "subscribed" and not event.get("recovered"):
                self.missed += event.get("recovered") is False
                self.epoch, self.offset = event["epoch"], event["offset"]
            elif event["event"] == "message" and event["offset"] > self.offset:
                self.offset = event["offset"]
                self.messages.append(event["data"])
            if last in (event["event"], event.get("data")):
                return


@pytest.mark.parametrize("absent", [5, 150])
async def test_9_1_who_keeps_its_position_has_everything_or_knows(
    open_peers: Opening, channel: str, absent: int
) -> None:
    peers = await open_peers()
    sender, follower = await peers.publisher(), Follower(channel)
    for life in range(3):
        browser = await peers.enveloped()
        await follower.subscribe(browser)
        await follower.hear(browser, "subscribed")
        for number in range(3):
            await sender.call("broadcast", channel, f"{life}/{number}")
        await follower.hear(browser, f"{life}/2")
        await browser.say("unsubscribe", channel)
        await follower.hear(browser, "unsubscribed")
        for number in range(absent):
            await sender.call("broadcast", channel, f"{life} missed {number}")
    missed = [[f"{life} missed {number}" for number in range(absent)] if absent == 5 else [] for life in range(2)]
    heard = [[f"{life}/{number}" for number in range(3)] for life in range(3)]
    assert follower.messages == [*heard[0], *missed[0], *heard[1], *missed[1], *heard[2]]
    assert follower.missed == (0 if absent == 5 else 2)


async def test_9_2_an_overlap_is_dropped_by_its_offsets(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser, follower = await peers.publisher(), await peers.enveloped(), Follower(channel)
    await follower.subscribe(browser)
    await follower.hear(browser, "subscribed")
    for number in range(3):
        await sender.call("broadcast", channel, str(number))
    await browser.say("unsubscribe", channel)  # its three messages are on their way, and not handed over yet
    await follower.subscribe(browser)
    seen = [event for event in await browser.until("subscribed") if event["event"] == "message"]
    assert [event["offset"] for event in seen] == [1, 2, 3]
    follower.offset, follower.messages = 3, ["0", "1", "2"]
    await sender.call("broadcast", channel, "last")
    await follower.hear(browser, "last")
    assert follower.messages == ["0", "1", "2", "last"], "the replay has brought the first three again"
    await browser.nothing_more()


def test_9_3_tries_are_spread_over_the_whole_range() -> None:
    assert "`min(20 s, 0.5 s × 2ⁿ)`" in clause(3)
    assert "lasted for 10 s" in clause(3)
    assert (in_script("minDelay"), in_script("maxDelay"), in_script("LASTING")) == (500, 20_000, 10_000)
    assert (FIRST_DELAY, LONGEST_DELAY) == (0.5, 20)
    chance = random.Random(9)
    for failures, top in ((0, 0.5), (3, 4.0), (6, 20.0), (1000, 20.0)):
        delays = [full_jitter(failures, chance) for _ in range(1000)]
        assert 0 <= min(delays) < 0.02 * top
        assert 0.98 * top < max(delays) <= top


async def test_9_4_the_advice_is_in_the_goodbye_and_in_the_reason(runtime_dir: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
            websocket(daemon.websocket_socket) as plain,
        ):
            await client.get_message()
            daemon.process.terminate()
            advice = json.loads(await client.get_message())["retry_after_ms"]
            assert await closing(client) == (4503, f"restarting, come back in {advice} ms")
            code, reason = await closing(plain)
    read = re.search(r"/(come back in .*?)/\.exec", SCRIPT)
    assert read is not None
    said = re.search(read[1], reason)
    assert said is not None, "what the client for JavaScript looks for is in the reason"
    assert (code, int(said[1]) > 0) == (4503, True)


async def test_9_5_a_ping_tells_whether_the_connection_works(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    await browser.ask("subscribe", channel)
    await browser.say("ping")
    await sender.call("broadcast", channel, "x")
    assert {(await browser.event())["event"] for _ in range(2)} == {"pong", "message"}
    assert "10 s later" in clause(5)
    assert in_script("answerTimeout") == 10_000
    assert in_script("LONGEST_SILENCE") < Config().silence_timeout * 1000


def test_9_6_every_close_code_says_what_to_do() -> None:
    rows = re.findall(r"^\| ([\d, ]+?)(?: and all others)? \| (.+) \|$", clause(6), re.MULTILINE)
    told = {int(code): what for codes, what in rows for code in codes.split(", ")}
    assert set(CloseCode) <= set(told)
    final = re.findall(r"^  \[(\d{4}), '", SCRIPT.partition("const FINAL")[2].partition("]);")[0], re.MULTILINE)
    assert {code for code, what in told.items() if what.startswith("stay away")} == set(map(int, final))
    for code, word in ((4408, "come back"), (4409, "whole 20 s"), (4503, "9.4"), (1006, "come back")):
        assert word in told[code]


async def test_9_7_the_rate_stays_within_the_limits_of_the_daemon(open_sockets: Opening) -> None:
    assert (
        "no more than 48 requests at once and 40\na second after that, and have no more than 48 unanswered" in clause(7)
    )
    assert (in_script("burst"), in_script("rate")) == (48, 40)
    assert Config().inbound_rate >= 40
    browser = await (await open_sockets()).enveloped()
    for _ in range(2):  # the first of them, and as many that were held up on the way
        for number in range(48):
            await browser.say("ping", id=number)
        assert [(await browser.event())["id"] for _ in range(48)] == list(range(48))


def test_9_8_the_events_of_a_browser_are_those_that_are_heeded() -> None:
    heeded = set(re.findall(r"\[window(?:\.document)?, '(\w+)', this", SCRIPT))
    named = set(re.findall(r"`(\w+)`", clause(8))) - {"persisted"}
    assert named == heeded


async def test_9_9_answers_are_told_apart_by_their_ids(open_peers: Opening, channel: str) -> None:
    peers = await open_peers()
    sender, browser = await peers.publisher(), await peers.enveloped()
    for number in range(1, 4):
        await sender.call("broadcast", channel, str(number))
    start = {"epoch": (await browser.ask("subscribe", channel, id=1))["epoch"], "offset": 0}
    await browser.ask("unsubscribe", channel, id=2)
    await browser.say("subscribe", channel, id=3)
    await browser.say("unsubscribe", channel, id=4)
    await browser.say("subscribe", channel, id=5, since=start)
    await browser.say("subscribe", channel, id=6, since={**start, "offset": 2})
    events = [await browser.event() for _ in range(8)]
    assert [event.get("id") or event["offset"] for event in events] == [3, 4, 5, 1, 2, 3, 6, 3]
    await sender.call("broadcast", channel, "new")
    assert (await browser.event())["offset"] == 4, "it is one subscription: a new message comes once"
    await browser.nothing_more()
