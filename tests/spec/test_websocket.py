"""Section 2 of docs/protocol.md: handshakes and frames, over real sockets."""

from __future__ import annotations

import json
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from wsproto.events import CloseConnection, Event, Ping, Pong, TextMessage

from realtimed.rpc.wire import encode_request
from tests.kit.clients import (
    REQUEST,
    accepted_head,
    closing,
    handshake_of,
    http_answer,
    publisher,
    raw_client,
    subscribe,
    websocket,
)
from tests.kit.patience import PATIENCE
from tests.kit.stack import Daemon

KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.mark.parametrize("path", ["/ws", "/WS", "//ws", "/%77s", "http://localhost/ws", "HTTPS://x:443/ws?y"])
async def test_2_1_1_all_spellings_of_the_path_lead_there(shared: Daemon, path: str) -> None:
    with trio.fail_after(PATIENCE):
        async with websocket(shared.websocket_socket, resource=path, subprotocols=["realtime.v1"]) as client:
            assert json.loads(await client.get_message())["event"] == "welcome"


@pytest.mark.parametrize("path", ["/", "/nope", "/ws/", "/ws/more", "/wss"])
async def test_2_1_2_any_other_path_is_accepted_and_closed_with_4404(shared: Daemon, path: str) -> None:
    with trio.fail_after(PATIENCE):
        async with websocket(shared.websocket_socket, resource=path, subprotocols=["realtime.v1"]) as client:
            assert await closing(client) == (4404, f"no such path: '{path}'; WebSockets are served at /ws")


@pytest.mark.parametrize(("slashes", "code"), [(1022, 1000), (1023, 4404)])
async def test_2_1_2_so_is_one_of_more_than_1024_bytes(shared: Daemon, slashes: int, code: int) -> None:
    with trio.fail_after(PATIENCE):
        async with websocket(shared.websocket_socket, resource="/" * slashes + "ws") as client:
            if code == 1000:
                await client.aclose()
            assert (await closing(client))[0] == code


@pytest.mark.parametrize("query", ["?", "?token=1", "?/nope"])
async def test_2_1_3_a_query_is_ignored(shared: Daemon, query: str) -> None:
    with trio.fail_after(PATIENCE):
        async with websocket(shared.websocket_socket, resource=f"/ws{query}", subprotocols=["realtime.v1"]) as client:
            assert json.loads(await client.get_message())["event"] == "welcome"


async def test_2_2_1_the_first_known_subprotocol_is_spoken(shared: Daemon) -> None:
    head = await accepted_head(
        shared.websocket_socket,
        REQUEST.replace(KEY, KEY + b"Sec-WebSocket-Protocol: graphql-ws, realtime.v1, realtime.v1\r\n"),
    )
    assert re.findall("sec-websocket-protocol: *(.*)", head) == ["realtime.v1"]


@pytest.mark.parametrize("offered", [b"", b"Sec-WebSocket-Protocol: graphql-ws, realtime.v2\r\n"])
async def test_2_2_2_without_a_known_one_it_is_plain(shared: Daemon, offered: bytes) -> None:
    request = REQUEST.replace(KEY, KEY + offered)
    assert "sec-websocket-protocol" not in await accepted_head(shared.websocket_socket, request)
    with trio.fail_after(PATIENCE):
        async with await trio.open_unix_socket(shared.websocket_socket) as stream:
            await stream.send_all(request + b"\x81\x82\x00\x00\x00\x00{}")
            answer = b""
            while b"missing required field" not in answer:
                answer += await stream.receive_some()
            assert b"\r\n\r\n\x88" in answer, "there is no welcome, and a mistake closes"


async def test_2_3_1_clients_are_pinged_once_a_heartbeat(lively: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(lively.websocket_socket) as client:
            began = trio.current_time()
            received = b""
            while len(received) < 6:
                received += await client.stream.receive_some()
            assert received == b"\x89\x00" * 3
            assert trio.current_time() - began > 0.15


async def test_2_3_2_whatever_the_client_sends_is_a_sign_of_life(lively: Daemon) -> None:
    signs: list[Event] = [Pong(), Ping(), TextMessage(data=subscribe("news"))]
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(raw_client(lively.websocket_socket)) for _ in signs]
            began = trio.current_time()
            while trio.current_time() - began < 1:
                for client, sign in zip(clients, signs, strict=True):
                    await client.send(sign)
                await clients[0].stream.receive_some()  # the next ping: a tenth of a second later
            for client in clients:
                await client.send(Ping(payload=b"still there"))
                received = b""
                while b"\x8a\x0bstill there" not in received:
                    received += await client.stream.receive_some()
                assert b"\x88" not in received


async def test_2_3_3_the_silent_are_closed_with_4408(lively: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(lively.websocket_socket) as silent:
            began = trio.current_time()
            *pings, close = await silent.events_until_eof()
            assert trio.current_time() - began >= 0.5
            assert pings == [Ping(payload=b"")] * len(pings)
            assert close == CloseConnection(code=4408, reason="nothing heard from you for 0.5 s")


async def test_2_4_no_extension_is_negotiated(shared: Daemon) -> None:
    offer = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-else\r\n"
    head = await accepted_head(shared.websocket_socket, REQUEST.replace(KEY, KEY + offer))
    assert "sec-websocket-extensions" not in head


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST.replace(b"GET", b"POST"),
        REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        REQUEST.replace(b"/ws", b"ws"),
        REQUEST.replace(KEY, b""),
        REQUEST.replace(KEY, KEY + KEY),
        REQUEST.replace(KEY, b"Sec-WebSocket-Key: short\r\n"),
        REQUEST.replace(b"Host: localhost\r\n", b""),
        REQUEST.replace(b"Connection: Upgrade\r\n", b""),
        REQUEST.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        b"\x16\x03\x01 this is TLS\r\n\r\n",
    ],
)
async def test_2_5_1_what_is_no_valid_handshake_gets_400(shared: Daemon, request_: bytes) -> None:
    assert (await http_answer(shared.websocket_socket, request_)).startswith("HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize("sent", [b"\r", REQUEST[:40]])
async def test_2_5_2_half_a_request_gets_408(strict: Daemon, sent: bytes) -> None:
    answer = await http_answer(strict.websocket_socket, sent)
    assert answer.startswith("HTTP/1.1 408 Request Timeout\r\n")
    assert "handshake-timeout, is 0.2 s" in answer


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /ws HTTP/1.0\r\n\r\n",
        REQUEST.replace(b"Version: 13", b"Version: 8"),
    ],
)
async def test_2_5_3_what_is_no_websocket_of_version_13_gets_426(shared: Daemon, request_: bytes) -> None:
    answer = await http_answer(shared.websocket_socket, request_)
    assert answer.startswith("HTTP/1.1 426 Upgrade Required\r\n")
    assert "\r\nUpgrade: websocket\r\n" in answer
    assert ("Sec-WebSocket-Version: 13\r\n" in answer) is (b"Version: 8" in request_)


@pytest.mark.parametrize(("more", "status"), [(0, "101"), (1, "431")])
async def test_2_5_4_a_head_above_16_kib_gets_431(shared: Daemon, more: int, status: str) -> None:
    padding = b"X: " + b"a" * (16 * 1024 + more - len(REQUEST) - 5) + b"\r\n"
    request = REQUEST.replace(KEY, KEY + padding)
    assert len(request) == 16 * 1024 + more
    if status == "101":
        await accepted_head(shared.websocket_socket, request)
    else:
        assert (await http_answer(shared.websocket_socket, request)).startswith("HTTP/1.1 431 ")


@pytest.mark.parametrize(("count", "status"), [(256, "101"), (257, "431")])
async def test_2_5_4_more_than_256_headers_get_431(shared: Daemon, count: int, status: str) -> None:
    request = REQUEST.replace(KEY, KEY + b"a:\r\n" * (count - 5))
    assert request.count(b"\r\n") - 2 == count
    if status == "101":
        await accepted_head(shared.websocket_socket, request)
    else:
        answer = await http_answer(shared.websocket_socket, request)
        assert answer.startswith("HTTP/1.1 431 ")
        assert "256 headers" in answer


async def test_2_5_5_beyond_max_connections_there_is_503(narrow: Daemon) -> None:
    daemon = narrow
    with trio.fail_after(PATIENCE):
        async with publisher(daemon.control_socket) as asking:
            while (await asking.call("stats"))["clients"]:
                pass
            async with raw_client(daemon.websocket_socket), raw_client(daemon.websocket_socket):
                answer = await http_answer(daemon.websocket_socket, REQUEST)
                assert answer.startswith("HTTP/1.1 503 Service Unavailable\r\n")
                assert "\r\nRetry-After: 5\r\n" in answer
                assert "max-connections, is 2" in answer
            while (await asking.call("stats"))["clients"]:
                pass
            await accepted_head(daemon.websocket_socket, REQUEST)


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST.replace(b"GET", b"POST"),
        b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 20_000,
        REQUEST[:40],
    ],
    ids=["400", "426", "431", "408"],
)
async def test_2_5_6_every_refusal_says_why_in_a_sentence(strict: Daemon, request_: bytes) -> None:
    head, _, body = (await http_answer(strict.websocket_socket, request_)).partition("\r\n\r\n")
    assert "Content-Type: text/plain; charset=utf-8" in head
    assert re.search(r"^Connection: .*close", head, re.MULTILINE)
    assert f"Content-Length: {len(body.encode())}" in head
    assert re.fullmatch(r"[A-Z].*[.)]\n", body, re.DOTALL)


async def answers_at_once(path: Path, number: int) -> list[str]:
    """Send this many handshakes at once; return the statuses, all of which come while all are connected."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await trio.open_unix_socket(path)) for _ in range(number)]
        statuses = []

        async def shake_hands(stream: trio.SocketStream) -> None:
            await stream.send_all(REQUEST)
            answer = b""
            while b"\r\n" not in answer:
                answer += await stream.receive_some()
            statuses.append(answer[9:12].decode())

        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(shake_hands, stream)
        return statuses


async def test_2_5_7_of_many_at_once_no_more_than_max_connections_are_let_in(ten: Daemon) -> None:
    daemon = ten
    with trio.fail_after(PATIENCE):
        async with publisher(daemon.control_socket) as asking:
            for _ in range(2):
                before = await asking.call("stats")
                statuses = await answers_at_once(daemon.websocket_socket, 300)
                assert statuses.count("101") == 10
                assert statuses.count("503") == 290
                after = await asking.call("stats")
                assert after["connections"] - before["connections"] == 10
                over = "handshakes_over_limit"
                assert after[over]["max_connections"] - before[over]["max_connections"] == 290
                while (await asking.call("stats"))["clients"]:
                    pass


async def test_2_5_8_an_address_with_half_of_max_connections_gets_503(ten: Daemon) -> None:
    daemon, path, address = ten, ten.websocket_socket, "203.0.113.7"
    with trio.fail_after(PATIENCE):
        async with publisher(daemon.control_socket) as asking:
            while (await asking.call("stats"))["clients"]:
                pass
            async with AsyncExitStack() as stack:
                for _ in range(4):
                    await stack.enter_async_context(raw_client(path, address))
                await stack.enter_async_context(raw_client(path, "203.0.113.8"))
                async with raw_client(path, address):
                    for _ in range(3):
                        answer = await http_answer(path, handshake_of(address))
                        assert answer.startswith("HTTP/1.1 503 Service Unavailable\r\n")
                        assert "\r\nRetry-After: 5\r\n" in answer
                        assert "of one address, max-connections-per-address, is 5 connections." in answer
                    await accepted_head(path, handshake_of("203.0.113.9"))
                while (await asking.call("stats"))["clients"] > 5:
                    pass
                await accepted_head(path, handshake_of(address))
            assert (await asking.call("stats"))["handshakes_over_limit"]["max_connections_per_address"] == 3
            assert (await asking.call("info"))["limits"]["max_connections_per_address"] == 5
    lines = [line for line in daemon.log.splitlines() if "refused" in line and address in line]
    assert len(lines) == 1, "it is said once"
    assert "WARNING address refused address=203.0.113.7 reason='The limit of one address, max-" in lines[0]


async def test_2_5_9_an_address_with_too_many_handshakes_gets_503(slow_going: Daemon) -> None:
    path = slow_going.websocket_socket
    with trio.fail_after(PATIENCE):
        for address in ("203.0.113.7", "203.0.113.8"):
            for _ in range(2):
                await accepted_head(path, handshake_of(address))
            answer = await http_answer(path, handshake_of(address))
            assert answer.startswith("HTTP/1.1 503 Service Unavailable\r\n")
            assert re.search("\r\nRetry-After: [45]\r\n", answer)
            assert "of one address, handshakes-per-address, is 0.2 a second." in answer
        async with publisher(slow_going.control_socket) as asking:
            assert (await asking.call("stats"))["handshakes_over_limit"]["handshakes_per_address"] == 2
            assert (await asking.call("info"))["limits"]["handshakes_per_address"] == 0.2


@pytest.mark.parametrize(
    ("first", "second", "third"),
    [
        ("203.0.113.1", "203.0.113.9, 203.0.113.1", "203.0.113.2"),
        ("203.0.113.3", "::ffff:203.0.113.3", "::203.0.113.3"),
        ("2001:db8:1:2::1", "2001:DB8:1:2:ffff::", "2001:db8:1:3::1"),
    ],
)
async def test_2_5_10_the_address_is_what_the_proxy_says(one_each: Daemon, first: str, second: str, third: str) -> None:
    path = one_each.websocket_socket
    with trio.fail_after(PATIENCE):
        async with raw_client(path, first):
            assert "503" in await http_answer(path, handshake_of(second))
            await accepted_head(path, handshake_of(third))


async def test_2_5_10_a_zone_is_no_part_of_the_address(one_each: Daemon) -> None:
    path = one_each.websocket_socket
    with trio.fail_after(PATIENCE):
        async with publisher(one_each.control_socket) as asking, raw_client(path, "fe80::1%eth1"):
            addresses = [client["address"] for client in await asking.call("clients")]
            assert "fe80::1" in addresses
            assert "503" in await http_answer(path, handshake_of("fe80::2%eth0"))


@pytest.mark.parametrize("address", ["", "unknown"])
async def test_2_5_11_without_an_address_there_is_no_limit_of_one(
    one_each: Daemon, slow_going: Daemon, address: str
) -> None:
    with trio.fail_after(PATIENCE):
        for path in (one_each.websocket_socket, slow_going.websocket_socket):
            async with raw_client(path, address), raw_client(path, address), raw_client(path, address):
                await accepted_head(path, handshake_of(address))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"Foo : bar", "Foo"),
        (b"Foo", "Foo"),
        (b": bar", ""),
        (b"F\xffo: bar", "F\\xffo"),
        (b"Foo: bar\r\n folded", "Foo"),
        (b"Foo: b\rar", "Foo"),
        (b"Foo: b\nar", "Foo"),
        (b"Foo: b\0r", "Foo"),
        (b"Foo: b\x1br", "Foo"),
        (b"Content-Length: 5", "Content-Length"),
        (b"Content-Length: 0\r\nContent-Length: 0", "Content-Length"),
        (b"Transfer-Encoding: chunked", "Transfer-Encoding"),
    ],
)
async def test_2_5_12_a_head_is_read_strictly_and_the_bad_header_is_named(
    shared: Daemon, line: bytes, name: str
) -> None:
    answer = await http_answer(shared.websocket_socket, REQUEST.replace(KEY, KEY + line + b"\r\n"))
    head, _, sentence = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 Bad Request\r\n")
    assert name in sentence
    assert re.fullmatch(r"[A-Z].*\.\n", sentence)


async def test_2_5_12_a_length_of_0_is_none(shared: Daemon) -> None:
    await accepted_head(shared.websocket_socket, REQUEST.replace(KEY, KEY + b"Content-Length: 0\r\n"))


async def test_2_5_13_bytes_above_0x7f_are_allowed_where_nobody_reads(shared: Daemon) -> None:
    unread = b"Cookie: name=J\xfcrgen\r\nUser-Agent: \xe2\x80\xa6\r\nOrigin: http://\xff\r\n"
    await accepted_head(shared.websocket_socket, REQUEST.replace(KEY, KEY + unread))


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST.replace(b"GET", b"G\xcbT"),
        REQUEST.replace(b"/ws", b"/w\xff"),
        REQUEST.replace(KEY, KEY + b"F\xffo: bar\r\n"),
        *(
            REQUEST.replace(KEY, KEY + name + b": \xff\r\n")
            for name in (
                b"Host", b"Connection", b"Upgrade", b"Content-Length", b"Transfer-Encoding", b"X-Forwarded-For",
                b"Sec-WebSocket-Key", b"Sec-WebSocket-Version", b"Sec-WebSocket-Protocol",
            )
        ),
    ],
)  # fmt: skip
async def test_2_5_13_bytes_above_0x7f_are_refused_where_they_are_read(shared: Daemon, request_: bytes) -> None:
    assert (await http_answer(shared.websocket_socket, request_)).startswith("HTTP/1.1 400 Bad Request\r\n")


async def test_2_6_1_a_message_is_one_frame(shared: Daemon, channel: str) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(shared.websocket_socket) as client, publisher(shared.control_socket) as sender:
            await client.send(TextMessage(data=subscribe(channel)))
            while channel not in await sender.call("channels"):
                pass
            for message in ("hi", "x" * 300, b"\xff"):
                await sender.call("broadcast", channel, message)
            expected = b"\x81\x02hi" + b"\x81\x7e\x01\x2c" + b"x" * 300 + b"\x82\x01\xff"
            received = b""
            while len(received) < len(expected):
                received += await client.stream.receive_some()
            assert received == expected


async def test_2_6_2_a_client_may_send_fragments(shared: Daemon, channel: str) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(shared.websocket_socket) as client, publisher(shared.control_socket) as sender:
            action = subscribe(channel)
            fragments = [TextMessage(data=action[at], message_finished=False) for at in range(20)]
            await client.send(*fragments, TextMessage(data=action[20:]))
            while channel not in await sender.call("channels"):
                pass


async def test_2_6_3_a_ping_is_answered_with_its_payload(shared: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(shared.websocket_socket) as client:
            for payload in (b"", b"x" * 125):
                await client.send(Ping(payload=payload))
                client.frames.receive_data(await client.stream.receive_some(200))
                assert list(client.frames.events()) == [Pong(payload=payload)]


async def test_2_6_4_frames_may_come_right_behind_the_request(shared: Daemon, channel: str) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            raw_client(shared.websocket_socket) as template,
            await trio.open_unix_socket(shared.websocket_socket) as stream,
            publisher(shared.control_socket) as asking,
        ):
            await stream.send_all(REQUEST + template.frames.send(TextMessage(data=subscribe(channel))))
            while channel not in await asking.call("channels"):
                pass


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_2_7_1_a_close_is_answered_with_its_code(shared: Daemon, code: int) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(shared.websocket_socket) as client:
            await client.send(CloseConnection(code=code, reason="bye"))
            assert await client.close_code() == code


async def test_2_7_2_a_close_is_the_last_frame_and_behind_what_was_published(shared: Daemon, channel: str) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(shared.websocket_socket) as client, publisher(shared.control_socket) as sender:
            await client.send(TextMessage(data=subscribe(channel)))
            while channel not in await sender.call("channels"):
                pass
            name = next(each["id"] for each in await sender.call("clients") if each["channels"] == [channel])
            commands = [("broadcast", [channel, "last"]), ("disconnect", [name]), ("broadcast", [channel, "late"])]
            await sender.stream.send_all(b"".join(encode_request(1, *command) for command in commands))
            await client.send(*[Ping()] * 3)
            received = b""
            while b"\x88" not in received:
                received += await client.stream.receive_some()
            await client.stream.send_all(b"\x88\x80mask")
            received += b"".join([bytes(data) async for data in client.stream])
    assert received.replace(b"\x8a\x00", b"").startswith(b"\x81\x04last\x88")
    assert received.endswith(b"disconnected by an administrator")


async def test_2_7_3_who_does_not_answer_a_close_is_hung_up_on(strict: Daemon) -> None:
    with trio.fail_after(PATIENCE):
        async with raw_client(strict.websocket_socket) as client:
            began = trio.current_time()
            await client.send(TextMessage(data="not JSON"))
            assert await client.close_code() == 4400
            assert trio.current_time() - began >= 0.2
