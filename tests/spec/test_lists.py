"""Section 6.11 of docs/protocol.md from 6.11.17 on: many channels in one command, and lists page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from realtimed.control.commands import COMMANDS, Context, call
from realtimed.control.idempotency import KeyedReceipts
from realtimed.control.steps import Steps, Whole
from realtimed.errors import RefusedError
from realtimed.hub.hub import Hub
from tests.kit.clients import Publisher, publisher, subscribe, websocket
from tests.kit.patience import PATIENCE
from tests.kit.peers import Opening
from tests.kit.stack import Daemon, running_daemon


def collected(steps: Steps) -> object:
    """Take all steps and return the result."""
    elements: list[object] = []
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            whole: Whole = end.value
            break
        elements += step or ()
    result = dict(zip(elements[::2], elements[1::2], strict=True)) if whole.pairs else elements
    if whole.name == "":
        return result
    return {**whole.fields, whole.name: result} if whole.name is not None else dict(whole.fields)


async def all_pages(asking: Any, method: str, **options: object) -> list[dict[str, Any]]:
    pages = [await asking.call(method, options)]
    while pages[-1]["next"] is not None:
        pages.append(await asking.call(method, {**options, "after": pages[-1]["next"]}))
    return pages


@asynccontextmanager
async def twelve_clients(runtime_dir: Path) -> AsyncIterator[tuple[Daemon, Publisher, AsyncExitStack]]:
    """Have twelve clients, the odd ones from another address, each on a channel of its own and on one of three."""
    with trio.fail_after(PATIENCE):
        async with (
            running_daemon(runtime_dir) as daemon,
            publisher(daemon.control_socket) as asking,
            AsyncExitStack() as stack,
        ):
            for number in range(12):
                headers = [("X-Forwarded-For", f"203.0.113.{number % 2}")]
                client = await stack.enter_async_context(websocket(daemon.websocket_socket, headers=headers))
                await client.send_message(subscribe(f"own:{number}"))
                await client.send_message(subscribe(f"shared:{number % 3}"))
            while (await asking.call("stats"))["subscriptions"] < 24:
                pass
            yield daemon, asking, stack


async def test_6_11_17_broadcast_many_takes_5000_channels(open_peers: Opening, channel: str) -> None:
    sender = await (await open_peers()).publisher()
    names = [f"{channel}-{number}" for number in range(5001)]
    for key in ((), ("k",)):
        with pytest.raises(RefusedError, match="names 5001 channels; the limit is 5000 a command") as refused:
            await sender.call("broadcast_many", names, "x", *key)
        assert refused.value.code == "too_many_channels"
    assert (await sender.call("history", names[0]))["offset"] == 0
    receipts = await sender.call("broadcast_many", names[:5000], "x", "k")
    assert [receipt["offset"] for receipt in receipts] == [1] * 5000
    again = await sender.call("broadcast_many", names[:5000], "x", "k")
    assert again == [{**receipt, "repeated": True} for receipt in receipts]
    assert (await sender.call("history", names[4999]))["messages"] == [[1, "x"]]


async def test_6_11_17_two_that_come_together_with_one_key_are_carried_out_once(
    open_peers: Opening, channel: str
) -> None:
    peers = await open_peers()
    names = [f"{channel}-{number}" for number in range(5000)]
    senders = [await peers.publisher() for _ in range(3)]
    answers: list[Any] = []

    async def send(sender: Any) -> None:
        answers.append(await sender.call("broadcast_many", names, "x", "k"))

    async with trio.open_nursery() as nursery:
        for sender in senders:
            nursery.start_soon(send, sender)
    assert sorted("repeated" in each[0] for each in answers) == [False, True, True]
    assert {receipt["offset"] for each in answers for receipt in each} == {1}


async def test_6_11_18_with_a_map_a_list_comes_in_pages(runtime_dir: Path) -> None:
    async with twelve_clients(runtime_dir) as (_, asking, _):
        whole = await asking.call("clients")
        pages = await all_pages(asking, "clients", limit=5)
        assert [len(page["clients"]) for page in pages] == [5, 5, 2]
        assert [client for page in pages for client in page["clients"]] == whole
        assert await asking.call("clients", {}) == {"next": None, "clients": whole}
        channels = await asking.call("channels")
        pages = await all_pages(asking, "channels", limit=4)
        assert [len(page["channels"]) for page in pages] == [4, 4, 4, 3]
        assert {name: each for page in pages for name, each in page["channels"].items()} == channels
        assert await asking.call("channels", {}) == {"next": None, "channels": channels}


async def test_6_11_18_a_page_of_much_ends_sooner(open_peers: Opening) -> None:
    peers = await open_peers()
    sender = await peers.publisher()
    for number in range(100):
        browser = await peers.browser()
        for place in range(100):
            await browser.say("subscribe", f"much:{number}-{place}-".ljust(200, "x"))
    with trio.fail_after(PATIENCE):
        while (await sender.call("channels", {"prefix": "much:", "count": True}))["count"] < 10_000:
            pass
    pages = await all_pages(sender, "channels", prefix="much:", limit=10**6)
    assert 1500 < len(pages[0]["channels"]) < 8000
    assert len({name for page in pages for name in page["channels"]}) == 10_000


@pytest.mark.parametrize("method", ["clients", "channels"])
@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": True}, {"after": -1}, {"after": "x"}, {"count": 1}, {"colour": "red"}, {1: 2}]
)
async def test_6_11_18_what_is_no_option_is_refused(
    open_peers: Opening, method: str, options: dict[object, object]
) -> None:
    sender = await (await open_peers()).publisher()
    with pytest.raises(RefusedError, match=r"cannot be|there is no option .*; there are limit, after, count, ") as no:
        await sender.call(method, options)
    assert no.value.code == "invalid_params"


async def test_6_11_19_next_leads_to_the_next_page_and_is_nil_on_the_last(runtime_dir: Path) -> None:
    async with twelve_clients(runtime_dir) as (_, asking, _):
        first = await asking.call("clients", {"limit": 11})
        assert isinstance(first["next"], int)
        last = await asking.call("clients", {"limit": 1, "after": first["next"]})
        assert (len(last["clients"]), last["next"]) == (1, None)
        assert (await asking.call("clients", {"limit": 12}))["next"] is None
        assert (await asking.call("clients", {"after": 2**63})) == {"next": None, "clients": []}


async def test_6_11_20_who_is_there_all_the_time_is_told_once_whoever_comes_and_goes(runtime_dir: Path) -> None:
    async with twelve_clients(runtime_dir) as (daemon, asking, stack):
        there = await asking.call("clients")
        page = await asking.call("clients", {"limit": 6})
        told = page["clients"]
        gone = [there[0], there[5], there[8]]  # the last of the page among them
        for client in gone:
            await asking.call("disconnect", client["id"])
        late = await stack.enter_async_context(websocket(daemon.websocket_socket))
        await late.send_message(subscribe("own:0"))  # a channel that was there, and is made again
        while (await asking.call("stats"))["clients"] != 10:
            pass
        told += (await asking.call("clients", {"after": page["next"]}))["clients"]
        ids = [client["id"] for client in told]
        assert len(ids) == len(set(ids))
        assert {client["id"] for client in there if client not in gone} <= set(ids)
        assert ids[:6] == [client["id"] for client in there[:6]]
        assert [client["connected_since"] for client in told] == sorted(client["connected_since"] for client in told)


async def test_6_11_21_filters_select(runtime_dir: Path) -> None:
    async with twelve_clients(runtime_dir) as (_, asking, _):
        whole = await asking.call("clients")
        odd = [client for client in whole if client["address"] == "203.0.113.1"]
        second = [client for client in whole if "shared:2" in client["channels"]]
        assert (len(odd), len(second)) == (6, 4)
        assert (await asking.call("clients", {"address": "203.0.113.1"}))["clients"] == odd
        assert (await asking.call("clients", {"channel": "shared:2"}))["clients"] == second
        both = await asking.call("clients", {"channel": "shared:2", "address": "203.0.113.1"})
        assert both["clients"] == [client for client in odd if client in second]
        assert (await asking.call("clients", {"channel": "nobody's"}))["clients"] == []
        pages = await all_pages(asking, "clients", address="203.0.113.1", limit=4)
        assert [client for page in pages for client in page["clients"]] == odd
        assert (await asking.call("channels", {"prefix": "shared:"}))["channels"] == await asking.call(
            "channels", "shared:"
        )


async def test_6_11_22_count_tells_how_many_fit(runtime_dir: Path) -> None:
    async with twelve_clients(runtime_dir) as (_, asking, _):
        assert await asking.call("clients", {"count": True}) == {"count": 12}
        assert await asking.call("clients", {"count": True, "channel": "shared:1"}) == {"count": 4}
        assert await asking.call("clients", {"count": True, "address": "203.0.113.1", "limit": 1}) == {"count": 6}
        assert await asking.call("channels", {"count": True, "prefix": "own:"}) == {"count": 12}
        assert len((await asking.call("channels", {"count": False, "prefix": "own:"}))["channels"]) == 12


def test_6_11_22_commands_need_no_connection() -> None:
    hub = Hub(max_message=100, max_channels=10)
    context = Context(
        hub, hub.publish, {}, lambda *_: False, dict, dict, KeyedReceipts(300, lambda: 0.0), lambda _: None
    )
    receipts = collected(call(context, "broadcast_many", [["a", "b"], "x"]))  # type: ignore[arg-type]
    assert isinstance(receipts, list)
    assert len(receipts) == 2
    assert collected(call(context, "clients", [{"count": True}])) == {"count": 0}  # type: ignore[arg-type]
    assert collected(call(context, "channels", [])) == {}  # type: ignore[arg-type]
    assert call(context, "ping", []) == "pong"
    for name in COMMANDS:
        if name in ("subscribe", "unsubscribe", "watch", "unwatch"):
            with pytest.raises(RefusedError, match="needs a connection"):
                call(context, name, ["news"])
