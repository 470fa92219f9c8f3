"""What peers do wrong, against the real daemon: each gets its error, and nobody else notices.

Every test has a witness: a client and a publisher that were there before and have to be served as before. And each has
a budget of the daemon's processor time, which is more than that of one bad input only where there are many.
"""

from __future__ import annotations

import json
import random
import re
import socket
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from benchmarks.machine import resident_bytes
from realtimed.rpc.wire import encode_notification, encode_request
from realtimed.websocket.frames import CloseCode
from tests.kit.budget import LARGEST, allowed
from tests.kit.clients import REQUEST, closing, publisher, raw_client, subscribe, undisturbed, websocket
from tests.kit.sockets import RESET_AT_CLOSE
from tests.kit.stack import Daemon, running_daemon

MIB = 2**20
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


def untroubled(daemon: Daemon, sent: int = LARGEST) -> AbstractAsyncContextManager[None]:
    """Fail if `sent` bytes disturb a bystander, or take more processor time than they may."""
    return undisturbed(daemon, budget=allowed(sent))


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        ("hello", CloseCode.BAD_MESSAGE, "not JSON"),
        ("[1, 2]", CloseCode.BAD_MESSAGE, "Expected `object`"),
        ('{"action":"subscribe"}', CloseCode.BAD_MESSAGE, "missing required field `channel`"),
        ('{"action":"dance","channel":"news"}', CloseCode.BAD_MESSAGE, "got 'dance'"),
        (subscribe("no spaces"), CloseCode.BAD_MESSAGE, "'no spaces' is not a channel name"),
        (subscribe("x" * 201), CloseCode.BAD_MESSAGE, "is not a channel name"),
        (b"\x00\x01", CloseCode.BAD_MESSAGE, "binary frame"),
        ("x" * (16 * 1024 + 1), CloseCode.MESSAGE_TOO_BIG, "max-inbound, is 16384 bytes"),
        ("ä" * (8 * 1024 + 1), CloseCode.MESSAGE_TOO_BIG, "max-inbound, is 16384 bytes"),
    ],
)
async def test_a_bad_message_closes_with_a_code_and_a_reason(
    daemon: Daemon, message: str | bytes, code: int, reason: str
) -> None:
    async with untroubled(daemon), websocket(daemon.websocket_socket) as client:
        await client.send_message(message)
        closed_with, because = await closing(client)
        assert closed_with == code
        assert reason in because
    assert f"code={code:d}" in daemon.log


async def test_the_largest_allowed_message_is_read(daemon: Daemon) -> None:
    async with untroubled(daemon), websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client:
        await client.get_message()
        await client.send_message(json.dumps({"action": "ping"}).ljust(16 * 1024))
        assert await client.get_message() == '{"event":"pong"}'


async def test_the_channel_above_the_limit_is_refused(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--inbound-burst", "200") as daemon,
        untroubled(daemon, 129 * 1024),
        websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as client,
    ):
        await client.get_message()
        answers = []
        for number in range(129):
            await client.send_message(subscribe(f"c{number}", id=number))
            answers.append(json.loads(await client.get_message()))
        assert [answer["event"] for answer in answers] == ["subscribed"] * 128 + ["error"]
        assert answers[-1]["code"] == "too_many_channels"
        assert "128" in answers[-1]["message"]


async def test_a_thousand_messages_at_once_are_too_many(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--close-timeout", "0.2") as daemon,
        untroubled(daemon, 1000 * 100),
        raw_client(daemon.websocket_socket) as client,
    ):
        await client.send(*[TextMessage(data=subscribe("news"))] * 1000)
        events = await client.events_until_eof()
        [close] = [event for event in events if isinstance(event, CloseConnection)]
        assert close.code == CloseCode.TOO_MANY
        assert close.reason is not None
        assert "50 frames a second" in close.reason


async def test_endless_fragments_do_not_fill_the_memory(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--close-timeout", "0.2") as daemon,
        untroubled(daemon, 5000 * 6),
        raw_client(daemon.websocket_socket) as client,
    ):
        await client.send(*[TextMessage(data="", message_finished=False)] * 5000)
        assert await client.close_code() == CloseCode.TOO_MANY


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 426 Upgrade Required\r\n"),
        (b"GET /ws HTTP/1.0\r\n\r\n", b"HTTP/1.1 426 Upgrade Required\r\n"),
        (REQUEST.replace(b"GET", b"POST"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"Version: 13", b"Version: 8"), b"HTTP/1.1 426 Upgrade Required\r\n"),
        (REQUEST.replace(KEY, b""), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + KEY), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, b"Sec-WebSocket-Key: short\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, b"Sec-WebSocket-Key: !!!\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"Host: localhost\r\n", b""), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"Connection: Upgrade\r\n", b""), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"X: " + b"a" * 17_000 + b"\r\n"), b"HTTP/1.1 431 "),
        (b"GET /\xff HTTP/1.1\r\nUpgrade: websocket\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"X: a" + b" " * 15_700 + b"b\r\n" + KEY), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"X:" + b" " * 15_700 + b"\0\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"websocket", b"websocket, " + b" " * 15_700 + b", x", 1).replace(KEY, b""), b"HTTP/1.1 400 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: a" + b" " * 15_700 + b"b\r\n\r\n", b"HTTP/1.1 426 Upgrade Required\r\n"),
        (REQUEST.replace(KEY, KEY + b"a:\r\n" * 3_900), b"HTTP/1.1 431 "),
        (REQUEST.replace(b"\r\n", b"\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"Foo : bar\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"Foo: \0\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"Foo\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b": bar\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"F\xffo: bar\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"Content-Length: 1\r\nContent-Length: 2\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(KEY, KEY + b"Transfer-Encoding: chunked\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"Host: localhost\r\n", b"Host: localhost\r\n folded\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"Host: localhost\r\n", b"Host: localhost\nX: y\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (REQUEST.replace(b"Host: localhost\r\n", b"Host: localhost\rX: y\r\n"), b"HTTP/1.1 400 Bad Request\r\n"),
        (b"GET [ HTTP/9.9\r\nUpgrade: websocket\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"\x16\x03\x01 this is TLS\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"GET /" + b"a" * 20_000, b"HTTP/1.1 431 Request Header Fields Too Large\r\n"),
    ],
)
async def test_what_is_no_websocket_handshake_gets_an_http_answer(daemon: Daemon, sent: bytes, answered: bytes) -> None:
    async with untroubled(daemon), await trio.open_unix_socket(daemon.websocket_socket) as stream:
        await stream.send_all(sent)
        answer = b"".join([data async for data in stream])
        assert answer.startswith(answered), answer
        assert answer.endswith((b".\n", b".)\n")), "every refusal says why, in a sentence"


async def test_an_accepted_handshake_with_thousands_of_blanks_stops_nobody(daemon: Daemon) -> None:
    blanks = b" " * 15_700
    requests = (
        REQUEST.replace(KEY, KEY + b"X: a" + blanks + b"b\r\n"),
        REQUEST.replace(b"websocket", b"websocket, " + blanks + b", x", 1),
        REQUEST.replace(KEY, KEY + b"Cookie: \xff" + blanks + b"\xff\r\n"),
    )
    async with untroubled(daemon):
        for request in requests:
            async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
                await stream.send_all(request)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 101 ")


async def test_half_a_handshake_has_a_deadline(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--handshake-timeout", "0.2") as daemon,
        untroubled(daemon),
        await trio.open_unix_socket(daemon.websocket_socket) as half,
        await trio.open_unix_socket(daemon.websocket_socket) as silent,
    ):
        await half.send_all(REQUEST[:40])
        for stream in (half, silent):
            answer = b"".join([data async for data in stream])
            assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert b"handshake-timeout, is 0.2 s" in answer


async def test_a_host_that_is_no_name_is_nobodys_business(daemon: Daemon) -> None:
    async with untroubled(daemon), await trio.open_unix_socket(daemon.websocket_socket) as stream:
        await stream.send_all(REQUEST.replace(b"Host: localhost", b"Host: xn--zzzzzz"))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("sent", [b"", b"GET /ws", REQUEST])
async def test_hanging_up_during_the_handshake_leaves_nothing(daemon: Daemon, sent: bytes) -> None:
    async with untroubled(daemon, 50 * LARGEST), publisher(daemon.control_socket) as asking:
        for _ in range(50):
            async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
                await stream.send_all(sent) if sent else None
        while (await asking.call("stats"))["clients"] > 1:
            pass


async def test_a_hasty_client_may_send_before_it_is_answered(daemon: Daemon) -> None:
    async with untroubled(daemon), raw_client(daemon.websocket_socket) as template:
        hasty = template.frames.send(TextMessage(data=subscribe("hasty")))
        async with await trio.open_unix_socket(daemon.websocket_socket) as stream:
            await stream.send_all(REQUEST + hasty)
            async with publisher(daemon.control_socket) as asking:
                while "hasty" not in await asking.call("channels"):
                    pass


async def test_a_tcp_reset_in_mid_frame(runtime_dir: Path) -> None:
    async with running_daemon(runtime_dir, "--websocket", "127.0.0.1:0") as daemon, untroubled(daemon, 20 * LARGEST):
        match = re.search(r"127\.0\.0\.1:(\d+)", daemon.log)
        assert match is not None
        async with publisher(daemon.control_socket) as asking:
            for _ in range(20):
                sock = socket.create_connection(("127.0.0.1", int(match[1])))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                sock.sendall(REQUEST)
                assert sock.recv(12) == b"HTTP/1.1 101"
                sock.sendall(b"\x81\xfe\x01\x00mask half a frame")
                sock.close()
            while (await asking.call("stats"))["clients"] > 1:
                pass


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (b"\x81\x05hello", 1002),  # not masked
        (b"\xf1\x80mask", 1002),  # reserved bits
        (b"\x83\x80mask", 1002),  # reserved opcode
        (b"\x09\x80mask", 1002),  # a fragmented ping
        (b"\x89\xfe\x00\x7e", 1002),  # a ping of 126 bytes
        (b"\x80\x80mask", 1002),  # a continuation of nothing
        (b"\x81\x82\x00\x00\x00\x00\xff\xff", 1007),  # not UTF-8
        (b"\x88\x81maskx", 1002),  # half a close code
    ],
)
async def test_what_breaks_the_websocket_protocol_is_closed_with_its_code(
    runtime_dir: Path, frames: bytes, code: int
) -> None:
    async with (
        running_daemon(runtime_dir, "--close-timeout", "0.2") as daemon,
        untroubled(daemon),
        raw_client(daemon.websocket_socket) as client,
    ):
        await client.stream.send_all(frames)
        assert await client.close_code() == code


async def test_pings_while_the_server_closes_are_no_trouble(daemon: Daemon) -> None:
    async with untroubled(daemon), raw_client(daemon.websocket_socket) as client:
        await client.send(TextMessage(data="not JSON"), *[Ping(payload=b"x")] * 50)
        with trio.move_on_after(0.5):  # it goes on after the Close as well
            for _ in range(40):  # with those before no more than a client may send at once, should all arrive together
                await client.send(Ping(payload=b"y"))
        await client.send(CloseConnection(code=1000))
        assert await client.close_code() == CloseCode.BAD_MESSAGE


async def test_frames_behind_a_close_are_no_trouble(daemon: Daemon) -> None:
    async with untroubled(daemon), raw_client(daemon.websocket_socket) as client:
        close = client.frames.send(CloseConnection(code=1000, reason="bye"))
        ping_and_text = b"\x89\x80mask" + b"\x81\x80mask"
        await client.stream.send_all(close + ping_and_text * 10)
        assert await client.close_code() == 1000


async def test_pongs_nobody_asked_for_are_ignored(daemon: Daemon) -> None:
    async with untroubled(daemon), raw_client(daemon.websocket_socket) as client:
        await client.send(*[Pong(payload=b"?")] * 20, Ping(payload=b"!"))
        data = await client.stream.receive_some(100)
        client.frames.receive_data(data)
        assert list(client.frames.events()) == [Pong(payload=b"!")]


# The control socket.


async def test_bytes_that_are_not_msgpack_end_the_connection_after_an_error(daemon: Daemon) -> None:
    async with untroubled(daemon), publisher(daemon.control_socket) as bad:
        await bad.stream.send_all(encode_request(1, "ping", []) + b"\xc1\xc1")
        assert (await bad.answer()).result == "pong"
        last = await bad.answer()
        assert last.id is None
        assert isinstance(last.error, dict)
        assert last.error["code"] == "protocol_error"
        assert "not MessagePack" in last.error["message"]
        assert await bad.stream.receive_some() == b""


@pytest.mark.parametrize("sent", [b"\x90", b"GET / HTTP/1.1\r\n\r\n", b"\x93\x00\x01\x02", b"\x94\x00\xff\xa4ping\x90"])
async def test_msgpack_that_is_no_rpc_ends_the_connection_after_an_error(daemon: Daemon, sent: bytes) -> None:
    async with untroubled(daemon), publisher(daemon.control_socket) as bad:
        await bad.stream.send_all(sent)
        last = await bad.answer()
        assert isinstance(last.error, dict)
        assert "not MessagePack-RPC" in last.error["message"]
        assert await bad.stream.receive_some() == b""


@pytest.mark.parametrize(
    ("method", "params", "code", "says"),
    [
        ("dance", [], "unknown_method", "the methods are broadcast"),
        ("broadcast", [], "invalid_params", "broadcast takes [channel, message, key?]"),
        ("broadcast", ["news", 5], "invalid_params", "a message is str or bin, not int"),
        ("broadcast", [5, "x"], "invalid_channel", "5 is not a channel name"),
        ("broadcast", [["news"], "x"], "invalid_channel", "is not a channel name"),
        ("broadcast", ["no spaces", "x"], "invalid_channel", "'no spaces' is not a channel name"),
        ("broadcast", ["news", "x" * 65537], "message_too_large", "the limit, max-message, is 65536"),
        ("broadcast", ["news", b"x" * 2_000_000], "message_too_large", "max-message, is 65536"),
        ("broadcast_many", ["news", "x"], "invalid_params", "[[channel, …], message, key?]"),
        ("broadcast_many", [["news", "no spaces"], "x"], "invalid_channel", "'no spaces'"),
        ("channels", [5], "invalid_params", "channels takes [prefix?]"),
        ("disconnect", ["c-1", 999], "invalid_params", "3000 to 4999"),
        ("disconnect", ["c-1", 4000, 5], "invalid_params", "[client id, code?, reason?]"),
        ("subscribe", [""], "invalid_channel", "'' is not a channel name"),
        ("ping", [1], "invalid_params", "ping takes []"),
    ],
)
async def test_a_bad_command_gets_its_error_and_the_connection_goes_on(
    daemon: Daemon, method: str, params: list[object], code: str, says: str
) -> None:
    async with untroubled(daemon), publisher(daemon.control_socket) as bad:
        error = await bad.call(method, *params)
        assert error["code"] == code
        assert says in error["message"]
        assert await bad.call("ping") == "pong"


async def test_invalid_utf8_is_refused_and_the_connection_goes_on(daemon: Daemon) -> None:
    async with untroubled(daemon), publisher(daemon.control_socket) as bad:
        await bad.stream.send_all(b"\x94\x00\x07\xa9broadcast\x92\xa4news\xa3a\xffb")
        answer = await bad.answer()
        assert answer.id == 7
        assert isinstance(answer.error, dict)
        assert answer.error["code"] == "invalid_utf8"
        assert await bad.call("ping") == "pong"


async def test_a_refused_notification_is_counted_and_logged(daemon: Daemon) -> None:
    async with untroubled(daemon), publisher(daemon.control_socket) as bad:
        await bad.stream.send_all(encode_notification("broadcast", ["no\x1bspaces", "x"]))
        assert (await bad.call("stats"))["commands_refused"] == 1
        assert "notification refused code=invalid_channel" in daemon.log
        assert "\x1b" not in daemon.log


async def test_a_hundred_megabytes_are_refused_without_being_kept(daemon: Daemon) -> None:
    async with untroubled(daemon, 100 * MIB), publisher(daemon.control_socket) as bad:
        before = resident_bytes(daemon.process.pid)
        size = 100 * MIB
        await bad.stream.send_all(b"\x94\x00\x05\xa9broadcast\x92\xa4news\xdb" + size.to_bytes(4, "big"))
        answer = await bad.answer()  # at once: the length says enough
        assert answer.id == 5
        assert isinstance(answer.error, dict)
        assert answer.error["code"] == "message_too_large"
        for _ in range(100):
            await bad.stream.send_all(b"x" * MIB)
        assert await bad.call("ping") == "pong"
        assert resident_bytes(daemon.process.pid) - before < 5 * MIB


async def test_half_a_message_and_then_silence_has_a_deadline(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--command-timeout", "0.2") as daemon,
        untroubled(daemon),
        publisher(daemon.control_socket) as bad,
    ):
        assert await bad.call("ping") == "pong"
        await bad.stream.send_all(encode_request(1, "broadcast", ["news", "hello"])[:-3])
        last = await bad.answer()
        assert isinstance(last.error, dict)
        assert last.error["code"] == "timeout"
        assert "command-timeout, is 0.2 s" in last.error["message"]
        assert await bad.stream.receive_some() == b""


async def test_an_idle_publisher_has_no_deadline(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--command-timeout", "0.1") as daemon,
        untroubled(daemon),
        publisher(daemon.control_socket) as idle,
    ):
        assert await idle.call("ping") == "pong"
        for _ in range(2):  # the deadline passes for one who is in the middle of a command
            async with publisher(daemon.control_socket) as slow:
                await slow.stream.send_all(b"\x94")
                assert (await slow.answer()).id is None
        assert await idle.call("ping") == "pong"


async def test_a_publisher_that_reads_no_answers_is_held_back_and_cut(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--backlog-timeout", "0.5") as daemon,
        untroubled(daemon, MIB),
        publisher(daemon.control_socket) as bad,
    ):
        before = resident_bytes(daemon.process.pid)
        flood = encode_request(1, "info", []) * 1000

        async def send_without_end() -> None:
            while True:
                await bad.stream.send_all(flood)

        with pytest.raises(trio.BrokenResourceError):
            await send_without_end()
        assert resident_bytes(daemon.process.pid) - before < 30 * MIB
    assert "it does not read its answers" in daemon.log


async def test_bad_input_of_every_kind_over_and_over_leaves_the_memory_flat(runtime_dir: Path) -> None:
    noise = random.Random(1)

    async def round_of_mistakes() -> None:
        for message in ("not JSON", "x" * 20_000, subscribe("no spaces")):
            async with websocket(daemon.websocket_socket) as client:
                await client.send_message(message)
                await closing(client)
        async with raw_client(daemon.websocket_socket) as raw:
            await raw.stream.send_all(noise.randbytes(2000))
            await raw.events_until_eof()
        async with publisher(daemon.control_socket) as bad:
            await bad.call("broadcast", "news", "x" * 500_000)
            await bad.stream.send_all(b"\xc1" * 1000)
            await bad.answer()

    # Who is told goodbye and does not answer is waited for as long as the close-timeout.
    async with running_daemon(runtime_dir, "--close-timeout", "0.05") as daemon, untroubled(daemon, 140 * 500_000):
        for _ in range(40):
            await round_of_mistakes()
        before = resident_bytes(daemon.process.pid)
        for _ in range(100):
            await round_of_mistakes()
        assert resident_bytes(daemon.process.pid) - before < 2 * MIB


async def test_an_unfinished_binary_message_is_measured_as_well(runtime_dir: Path) -> None:
    async with (
        running_daemon(runtime_dir, "--close-timeout", "0.2") as daemon,
        untroubled(daemon),
        raw_client(daemon.websocket_socket) as client,
    ):
        part = BytesMessage(data=b"x" * 4000, message_finished=False)
        await client.send(part, part, part, part, part)
        assert await client.close_code() == CloseCode.MESSAGE_TOO_BIG
