"""The Python clients, the one that blocks and the one that awaits, through one suite, against the real daemon."""

from __future__ import annotations

import inspect
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

import realtimed
import realtimed.client.calls as calls
from realtimed import AsyncClient, ChannelInfo, ChannelMessage, Client, NoDaemonError, Position, Receipt, RefusedError
from realtimed.client.batch import Batch, request_ids
from realtimed.rpc.wire import Decoder, Request, Response
from tests.kit.blocking import Opener, daemon_in_thread, offsets, untimed
from tests.kit.clients import closing, subscribe, websocket
from tests.kit.fake_daemon import receipt
from tests.kit.patience import until
from tests.kit.python import run_python
from tests.kit.stack import Daemon


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


# What the daemon does for a client.


@pytest.mark.parametrize("message", ["", "hello", "Grüße, 世界 🎉", "\0", b"", b"\x00\xff", "x" * 65536, b"x" * 65536])
def test_a_broadcast_reaches_a_subscriber_as_it_was_sent(daemon: Daemon, connect: Opener, message: str | bytes) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("news") as subscription:
        sent = client.broadcast("news", message)

        assert sent == Receipt(recipients=1, epoch=subscription.positions["news"].epoch, offset=1)
        assert untimed(next(subscription)) == ChannelMessage("news", message, 1)


def test_a_broadcast_nobody_watches_has_no_recipients(daemon: Daemon, connect: Opener) -> None:
    assert connect(daemon.control_socket).broadcast("nobody", "hello").recipients == 0


def test_broadcast_many_gives_a_receipt_for_each_channel(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("a", "b") as subscription:
        receipts = client.broadcast_many(("b", "nobody", "a"), b"hello")

        assert [each.recipients for each in receipts] == [1, 0, 1]
        assert [untimed(next(subscription)) for _ in range(2)] == [
            ChannelMessage("b", b"hello", 1),
            ChannelMessage("a", b"hello", 1),
        ]


def test_broadcast_many_sends_to_all_channels_or_to_none(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("a") as subscription:
        with pytest.raises(RefusedError) as refused:
            client.broadcast_many(["a", "not a channel"], "hello")
        client.broadcast("a", "later")

        assert refused.value.code == "invalid_channel"
        assert next(subscription).message == "later"


def test_broadcast_each_says_of_every_message_what_became_of_it(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("a") as subscription:
        outcomes = client.broadcast_each(
            [("a", "one"), ("not a channel", "x"), ("a", "\ud800"), ("a", b"two"), ("a", "x" * 65537), ("a", "three")]
        )

        assert offsets(outcomes) == [1, "invalid_channel", "invalid_utf8", 2, "message_too_large", 3]
        assert [next(subscription).message for _ in range(3)] == ["one", b"two", "three"]


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 1), (20_000, 20), (100, 65536)])
def test_broadcast_each_sends_any_number_of_any_size(daemon: Daemon, connect: Opener, count: int, size: int) -> None:
    client = connect(daemon.control_socket, timeout=30)

    outcomes = client.broadcast_each(("bulk", "x" * size) for _ in range(count))

    assert len(outcomes) == count
    assert all(isinstance(outcome, Receipt) for outcome in outcomes)


def test_channels_are_those_with_subscribers(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("fruit:apple", "fruit:pear", "meat") as subscription:
        client.broadcast("fruit:pear", "hello")
        pear = ChannelInfo(1, subscription.positions["fruit:pear"].epoch, 1, history=0)

        assert set(client.channels()) == {"fruit:apple", "fruit:pear", "meat"}
        assert client.channels("fruit:p") == {"fruit:pear": pear}


def test_clients_are_listed_and_can_be_disconnected(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with (
        start_blocking_portal("trio") as portal,
        portal.wrap_async_context_manager(websocket(daemon.websocket_socket)) as connection,
    ):
        portal.call(connection.send_message, subscribe("news"))
        until(lambda: "news" in client.channels())
        [found] = [each for each in client.clients() if each.channels]

        assert (found.protocol, found.channels, found.pending) == ("plain", ["news"], 0)
        assert abs(found.connected_since - time.time()) < 60
        assert client.disconnect(found.id, 4000, "enough")
        assert portal.call(closing, connection) == (4000, "enough")
    until(lambda: not client.disconnect(found.id))


def test_stats_info_and_ping(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    client.ping()

    assert client.info()["version"] == realtimed.__version__
    assert client.info()["limits"]["max_message"] == 65536
    before = client.stats()
    client.broadcast("news", "hello")
    assert client.stats()["publications"] == before["publications"] + 1


@pytest.mark.parametrize(
    ("channel", "message", "code"),
    [
        ("", "hello", "invalid_channel"),
        ("not a channel", "hello", "invalid_channel"),
        ("news", "x" * 65537, "message_too_large"),
        ("news", b"x" * 10_000_000, "message_too_large"),
        ("news", "half a surrogate pair: \ud83c", "invalid_utf8"),
        ("\udcff", "hello", "invalid_utf8"),
    ],
    ids=["no channel", "bad channel", "too large", "much too large", "bad text", "bad text as channel"],
)
def test_what_is_refused_raises_and_leaves_the_client_usable(
    daemon: Daemon, connect: Opener, channel: str, message: str | bytes, code: str
) -> None:
    client = connect(daemon.control_socket)
    with pytest.raises(RefusedError) as refused:
        client.broadcast(channel, message)

    assert refused.value.code == code
    assert code in str(refused.value)
    assert client.broadcast("news", "hello").offset == 1


def test_a_subscription_knows_where_it_began(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with client.subscribe("news") as first:
        client.broadcast("news", "before")
        with client.subscribe("sport", "news", "sport") as second:
            client.broadcast_many(["news", "sport"], "after")

            assert list(second.positions) == ["sport", "news"]
            assert second.positions["news"] == Position(first.positions["news"].epoch, 1)
            assert second.positions["sport"].offset == 0
            assert [untimed(next(second)) for _ in range(2)] == [
                ChannelMessage("news", "after", 2),
                ChannelMessage("sport", "after", 1),
            ]


def test_a_subscription_to_a_bad_channel_is_refused(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    with pytest.raises(RefusedError, match="invalid_channel"), client.subscribe("news", "not a channel"):
        pass
    with pytest.raises(ValueError, match="at least one channel"), client.subscribe():
        pass


def test_receive_returns_none_when_nothing_comes_in_time(daemon: Daemon) -> None:
    with Client(daemon.control_socket) as client, client.subscribe("news") as subscription:
        assert subscription.receive(0) is None
        assert subscription.receive(0.01) is None
        client.broadcast("news", "hello")
        assert untimed(subscription.receive(10)) == ChannelMessage("news", "hello", 1)


def test_one_client_serves_many_at_once(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket, timeout=30)
    taken: list[int] = []

    def publish(number: int) -> None:
        for _ in range(50):
            assert client.broadcast(f"of:{number}", "hello").recipients == number % 2
            taken.append(client.broadcast("all", "hello").offset)

    with client.subscribe("all", *(f"of:{number}" for number in range(1, 8, 2))):
        threads = [threading.Thread(target=publish, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(taken) == list(range(1, 401))


def test_a_client_outlives_its_daemon(runtime_dir: Path, connect: Opener) -> None:
    with daemon_in_thread(runtime_dir) as daemon:
        client = connect(daemon.control_socket)
        first = client.info()["pid"]
        with client.subscribe("news") as subscription:
            daemon.process.terminate()
            with pytest.raises(NoDaemonError, match="hung up"):
                next(subscription)
    with pytest.raises(NoDaemonError):
        client.broadcast("news", "hello")
    with daemon_in_thread(runtime_dir):
        second = client.info()["pid"]
    with daemon_in_thread(runtime_dir):
        assert len({first, second, client.info()["pid"]}) == 3


def test_a_closed_client_opens_again(daemon: Daemon, connect: Opener) -> None:
    client = connect(daemon.control_socket)
    client.ping()
    client.close()
    client.close()
    client.ping()


def test_a_batch_has_a_bounded_number_in_flight_and_keeps_the_order() -> None:
    batch = Batch((calls.broadcast("news", str(number)) for number in range(100)), request_ids(), in_flight=10)
    decoder = Decoder(2**20)
    order = []
    waiting: list[Request] = []
    while not batch.done:
        for message in decoder.feed(batch.requests()):
            assert isinstance(message, Request)
            waiting.append(message)
            order.append(message.params[1])
        assert 1 <= len(waiting) == batch.unanswered <= 10
        request = waiting.pop(len(waiting) // 2)
        batch.answer(Response(request.id, None, receipt(request.id)))

    assert order == [str(number) for number in range(100)]
    assert offsets(batch.results()) == list(range(100))


# What the package promises.


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        public = {name: each for name, each in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
        return {
            name: signature.replace(return_annotation=None)
            for name, each in public.items()
            if name not in ("close", "aclose", "after_fork")
            for signature in [inspect.signature(each)]
        }

    assert methods(Client) == methods(AsyncClient)


IMPORTS = """
import sys

import realtimed
from realtimed import {name}

allowed = set({allowed})
unwanted = {{"anyio", "trio", "trio_websocket", "typer", "asyncio", "msgspec", "realtimed.daemon", "realtimed.cli",
    "realtimed.config", "realtimed.control", "realtimed.hub.hub", "realtimed.net", "realtimed.websocket"}}
print(sorted(unwanted & sys.modules.keys() - allowed))
"""


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("Client", []),
        ("broadcast", []),
        ("RefusedError", []),
        ("__version__", []),
        ("AsyncClient", ["anyio", "asyncio"]),
    ],
)
def test_a_client_imports_no_more_than_it_needs(name: str, allowed: list[str]) -> None:
    assert run_python(IMPORTS.format(name=name, allowed=allowed)) == "[]\n"


def test_the_package_exports_what_it_says() -> None:
    for name in realtimed.__all__:
        assert getattr(realtimed, name) is not None
    assert dir(realtimed) == sorted(realtimed.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        getattr(realtimed, "Cleint")  # noqa: B009
    assert realtimed.__version__ == version("realtimed")
