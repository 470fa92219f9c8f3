"""The HTTP endpoint in memory: what it answers, and its limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from realtimed.http.routes import Routes
from realtimed.http.server import Endpoint
from tests.kit.budget import allowed


def endpoint(obstacle: str | None = None) -> Endpoint:
    return Endpoint(Routes(lambda: obstacle, lambda: b"a_metric 1\n"))


@asynccontextmanager
async def asking(server: Endpoint) -> AsyncIterator[trio.abc.Stream]:
    """Connect; at the end the server has let go of the connection."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, theirs)
        yield ours
        await ours.aclose()


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def answer(sent: bytes, server: Endpoint | None = None) -> tuple[int, bytes, bytes]:
    """Send bytes; return the status, the head and the body of the answer, after which the server hangs up."""
    async with asking(server or endpoint()) as stream:
        await stream.send_all(sent)
        head, _, body = (await everything(stream)).partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def get(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("target", "status", "body"),
    [
        ("/healthz", 200, b"ok\n"),
        ("/readyz", 200, b"ready\n"),
        ("/readyz?verbose", 200, b"ready\n"),
        ("/metrics", 200, b"a_metric 1\n"),
        ("/", 404, b"There are /healthz, /readyz and /metrics.\n"),
        ("/metrics/", 404, b"There are /healthz, /readyz and /metrics.\n"),
    ],
)
async def test_pages(target: str, status: int, body: bytes) -> None:
    assert (await answer(get(target)))[::2] == (status, body)


async def test_an_obstacle_is_named() -> None:
    assert (await answer(get("/readyz"), endpoint("stopping")))[::2] == (503, b"not ready: stopping\n")


async def test_head_has_no_body() -> None:
    status, head, body = await answer(get("/metrics", "HEAD"))
    assert (status, body) == (200, b"")
    assert b"\r\nContent-Length: 11\r\n" in head


async def test_one_request_a_connection() -> None:
    _, head, body = await answer(get("/healthz") * 10)
    assert b"\r\nConnection: close" in head
    assert body == b"ok\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_other_methods_are_refused(method: str) -> None:
    status, head, _ = await answer(get("/metrics", method))
    assert status == 405
    assert b"\r\nAllow: GET, HEAD" in head


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"This is no HTTP request. "),
        (b"GET /metrics\r\n\r\n", b"This is no HTTP request. "),
        (b"GET /me\x1btrics HTTP/1.1\r\nHost: x\r\n\r\n", b"The target of a request is visible ASCII"),
        (b"GET /metrics HTTP/1.1\nHost: x\n\n", b"The request line has a CR or LF in it"),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n", b"The header 'X' has a control character in its value"),
        (
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nX:" + b" " * 8000 + b"\0\r\n\r\n",
            b"The header 'X' has a control character in its value",
        ),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX" + b" " * 8000 + b": y\r\n\r\n", b"The header 'X' has a space"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"That is not a request that can be read: Missing mandatory Host: header."),
        (
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
            b"That is not a request that can be read: Found multiple Host: headers.",
        ),
        (
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"That is not a request that can be read: conflicting Content-Length headers.",
        ),
    ],
)
async def test_bad_requests(sent: bytes, sentence: bytes) -> None:
    status, _, body = await answer(sent)
    assert status == 400
    assert body.startswith(sentence)


async def test_a_head_with_thousands_of_blanks_that_is_not_refused_is_answered_in_time() -> None:
    server = endpoint()
    sent = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a" + b" " * 8000 + b"\xff" + b" \t" * 50 + b"\r\n\r\n"
    began = time.process_time()
    assert (await answer(sent, server))[0] == 200
    assert time.process_time() - began < 4 * allowed(len(sent))


async def test_a_head_that_does_not_end_is_too_large() -> None:
    assert (await answer(b"GET / HTTP/1.1\r\nX: " + b"x" * 9000))[0] == 431


@pytest.mark.parametrize("pieces", [[], [b"GET"], [b"GET /metrics HTTP/1.1\r\n"] + [b"a: b\r\n"] * 30])
async def test_a_request_has_a_deadline_however_it_dawdles(
    pieces: list[bytes],
    autojump_clock: MockClock,  # noqa: ARG001  (pytest-trio runs the test with it)
) -> None:
    async with asking(endpoint()) as stream, trio.open_nursery() as nursery:

        async def dawdle() -> None:
            for piece in pieces:
                await stream.send_all(piece)
                await trio.sleep(1)

        nursery.start_soon(dawdle)
        began = trio.current_time()
        said = await everything(stream)
        assert trio.current_time() - began == pytest.approx(5)
        nursery.cancel_scope.cancel()
    assert said.startswith(b"HTTP/1.1 408 ")
    assert said.endswith(b"A request may take 5 s to arrive.\n")


async def test_an_answer_has_a_deadline(autojump_clock: MockClock) -> None:  # noqa: ARG001
    ours, theirs = lockstep_stream_pair()  # nothing is sent until it is received
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint().serve, theirs)
        await ours.send_all(get("/metrics"))
        began = trio.current_time()
        await wait_all_tasks_blocked()
        await trio.sleep(6)
        with pytest.raises(trio.ClosedResourceError):
            await theirs.send_all(b"x")
        assert trio.current_time() - began == pytest.approx(6)
    await ours.aclose()


async def test_a_peer_that_hangs_up_is_nobodys_business() -> None:
    server = endpoint()
    for sent in (b"", b"GET", get("/metrics")):
        async with asking(server) as stream:
            if sent:
                await stream.send_all(sent)


async def test_connections_are_bounded_and_the_next_wait(autojump_clock: MockClock) -> None:  # noqa: ARG001
    server = endpoint()
    async with trio.open_nursery() as nursery:
        peers = []
        for number in range(16):
            assert await server.places() == 16 - number
            ours, theirs = memory_stream_pair()
            peers.append(ours)
            nursery.start_soon(server.serve, theirs)
        with trio.move_on_after(1) as patience:
            await server.places()
        assert patience.cancelled_caught
        await peers[3].aclose()
        with trio.fail_after(1):
            assert await server.places() == 1
        await trio.sleep(5)  # the silent ones are sent away
        assert await server.places() == 16


async def test_connections_are_paced(autojump_clock: MockClock) -> None:  # noqa: ARG001
    server = endpoint()
    began = trio.current_time()
    for _ in range(200):
        assert await server.places() == 16
        assert (await answer(get("/healthz"), server))[0] == 200
    assert trio.current_time() - began == pytest.approx(1.99)


async def test_pages_of_metrics_take_a_twentieth_of_the_time_at_most(mock_clock: MockClock) -> None:
    made = 0

    def make() -> bytes:
        nonlocal made
        made += 1
        mock_clock.jump(0.010)
        return f"page {made}".encode()

    server = Endpoint(Routes(lambda: None, make))
    began = trio.current_time()
    pages = set()
    for _ in range(1000):
        pages.add((await answer(get("/metrics"), server))[2])
        mock_clock.jump(0.001)
    elapsed = trio.current_time() - began
    assert made == len(pages) >= 4
    assert made * 0.010 / elapsed <= 1 / 20 + 0.02
    mock_clock.jump(1)
    assert (await answer(get("/metrics"), server))[2] == f"page {made}".encode(), "and the newest is a new one"
