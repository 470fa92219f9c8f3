"""The PHP client in the real PHP, against the real daemon."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from realtimed import ChannelMessage, Client
from tests.kit.blocking import daemon_in_thread, untimed
from tests.kit.fake_daemon import listening
from tests.kit.php import CLIENT, Php, PhpError, denied, literal, open_sockets, php_output, running_php
from tests.kit.stack import ROOT, Daemon


def test_the_file_is_valid_php_and_prints_nothing() -> None:
    assert php_output("-l", str(CLIENT)).startswith("No syntax errors")
    assert php_output(str(CLIENT)) == ""


# What the daemon does for a client.


@pytest.mark.parametrize("message", ["", "hello", "Grüße, 世界 🎉", "\0", "42", "x" * 65536])
def test_a_text_reaches_a_subscriber_as_it_was_sent(php: Php, observer: Client, message: str) -> None:
    with observer.subscribe("news") as subscription:
        sent = php.run(f'return $client->broadcast("news", {literal(message)});')

        epoch = subscription.positions["news"].epoch
        assert sent == {"recipients": 1, "epoch": epoch, "offset": 1, "repeated": False}
        assert untimed(next(subscription)) == ChannelMessage("news", message, 1)


@pytest.mark.parametrize("message", [b"", b"text", b"\x00\xff\xfe", bytes(range(256)) * 256])
def test_bytes_reach_a_subscriber_as_they_were_sent(php: Php, observer: Client, message: bytes) -> None:
    with observer.subscribe("news") as subscription:
        sent = php.run(f'return $client->broadcastBinary("news", {literal(message)});')

        assert sent["recipients"] == 1
        assert untimed(next(subscription)) == ChannelMessage("news", message, 1)


def test_broadcast_many_gives_a_receipt_for_each_channel(php: Php, observer: Client) -> None:
    with observer.subscribe("a", "42") as subscription:
        receipts = php.run('return $client->broadcastMany([7 => "42", 9 => "nobody", 11 => "a"], "hello");')

        assert [each["recipients"] for each in receipts] == [1, 0, 1]
        assert [untimed(next(subscription)) for _ in range(2)] == [
            ChannelMessage("42", "hello", 1),
            ChannelMessage("a", "hello", 1),
        ]


def test_broadcast_many_sends_to_all_channels_or_to_none(php: Php, observer: Client) -> None:
    with observer.subscribe("a") as subscription:
        with pytest.raises(PhpError) as refused:
            php.run('return $client->broadcastMany(["a", "not a channel"], "hello");')
        php.run('return $client->broadcast("a", "later");')

        assert refused.value.code == "invalid_channel"
        assert next(subscription).message == "later"


def test_channels_are_those_with_subscribers_and_their_names_can_be_broadcast_to(php: Php, observer: Client) -> None:
    with observer.subscribe("room:1", "room:2", "42") as subscription:
        found = php.run('return $client->channels("room:");')

        assert list(found) == ["room:1", "room:2"]
        assert found["room:1"] == {
            "channel": "room:1",
            "subscribers": 1,
            "epoch": subscription.positions["room:1"].epoch,
            "offset": 0,
            "history": 0,
        }
        assert set(php.run("return $client->channels();")) == {"room:1", "room:2", "42"}
        receipts = php.run('return $client->broadcastMany(array_keys($client->channels()), "hello");')
        assert [each["recipients"] for each in receipts] == [1, 1, 1]


def test_the_daemon_tells_about_itself(php: Php) -> None:
    assert php.run("return $client->ping();") is None
    assert php.run("return $client->info();")["limits"]["max_message"] == 65536
    assert isinstance(php.run("return $client->stats();"), dict)


def test_any_method_can_be_called(php: Php) -> None:
    assert php.run('return $client->call("ping");') == "pong"
    assert php.run('return $client->call("disconnect", ["nobody"]);') == {"disconnected": 0}
    assert php.run('return $client->call("broadcast", [1 => "x", 3 => new Realtime\\Bytes("y")]);')["offset"] == 1
    with pytest.raises(PhpError) as refused:
        php.run('return $client->call("fly");')
    assert (refused.value.kind, refused.value.code) == ("RefusedException", "unknown_method")


@pytest.mark.parametrize(
    ("channel", "message", "code"),
    [
        ("not a channel", "hello", "invalid_channel"),
        ("", "hello", "invalid_channel"),
        ("x" * 201, "hello", "invalid_channel"),
        (b"\xff", "hello", "invalid_channel"),
        ("news", b"\xff", "invalid_utf8"),
        ("news", b"\xed\xa0\x80", "invalid_utf8"),
        ("news", "x" * 65537, "message_too_large"),
        ("news", "x" * 2**23, "message_too_large"),
    ],
)
def test_a_refusal_is_the_daemon_s_own_and_harms_no_later_call(
    php: Php, channel: str | bytes, message: str | bytes, code: str
) -> None:
    with pytest.raises(PhpError) as refused:
        php.run(f"return $client->broadcast({literal(channel)}, {literal(message)});")

    assert (refused.value.kind, refused.value.code) == ("RefusedException", code)
    assert refused.value.message.endswith(f" ({code})")
    assert php.run("return $client->ping();") is None


def test_calls_share_one_connection(runtime_dir: Path) -> None:
    with daemon_in_thread(runtime_dir) as daemon, running_php(daemon.control_socket) as php:
        broadcasts = "for ($i = 0; $i < 100; $i++) { $receipt = $client->broadcast('news', (string) $i); }"
        php.run(broadcasts + "return $receipt->offset;")
        assert open_sockets(php) == 1
        php.run("return $client->close();")
        assert open_sockets(php) == 0
        assert php.run("return $client->ping();") is None


def test_a_large_message_and_a_large_answer_take_many_reads_and_writes(runtime_dir: Path) -> None:
    size, count = 5 * 2**20, 20_000
    limits = ("--max-message", str(size), "--max-backlog", str(4 * size), "--max-channels", str(count))
    with (
        daemon_in_thread(runtime_dir, *limits) as daemon,
        Client(daemon.control_socket) as observer,
        running_php(daemon.control_socket) as php,
    ):
        with observer.subscribe("news") as subscription:
            php.run(f'return $client->broadcast("news", str_repeat("0123456789abcdef", {size // 16}));')
            assert next(subscription).message == "0123456789abcdef" * (size // 16)
        with observer.subscribe(*map("channel-{}".format, range(count))):
            assert php.run("return count($client->channels());") == count


@pytest.mark.parametrize("where", ["putenv('REALTIME_SOCKET=%s')", "$_SERVER['REALTIME_SOCKET'] = '%s'"])
@pytest.mark.parametrize("function", ["broadcast", "\\Realtime\\broadcast"])
def test_the_functions_find_the_daemon_through_realtime_socket(
    shared_daemon: Daemon, observer: Client, where: str, function: str
) -> None:
    with running_php("/nowhere") as php, observer.subscribe("news") as subscription:
        php.run(f"{where % shared_daemon.control_socket}; return 0;")
        result = php.run(f'return {function}("news", "hello");')

        assert next(subscription).message == "hello"
        assert (result is None) == (function == "broadcast")


def test_realtime_socket_may_come_from_the_environment_or_a_dotenv_file() -> None:
    default = "return Realtime\\Client::defaultSocket();"
    with running_php("/nowhere", environment={"REALTIME_SOCKET": "/of/the/environment"}) as php:
        assert php.run("$_ENV['REALTIME_SOCKET'] = '/of/dotenv'; " + default) == "/of/the/environment"
        assert php.run("return (new Realtime\\Client())->socket;") == "/of/the/environment"
        assert php.run("putenv('REALTIME_SOCKET'); unset($_SERVER['REALTIME_SOCKET']); " + default) == "/of/dotenv"
        assert php.run("unset($_ENV['REALTIME_SOCKET']); " + default) == "/run/realtime.sock"


def test_a_global_broadcast_of_somebody_else_is_left_alone() -> None:
    code = f"function broadcast() {{ return 'theirs'; }} require '{CLIENT}'; echo broadcast();"
    assert php_output("-r", code) == "theirs"


def test_no_extension_is_needed(shared_daemon: Daemon, runtime_dir: Path) -> None:
    with running_php(shared_daemon.control_socket, "-n") as php:
        assert php.run('return $client->broadcast("nobody", "hello")->recipients;') == 0
    with daemon_in_thread(runtime_dir) as daemon, denied(daemon.control_socket) as user:
        copy = shutil.copy(CLIENT, runtime_dir)
        with running_php(daemon.control_socket, "-n", client=copy, user=user) as php, pytest.raises(PhpError) as error:
            php.run("return $client->ping();")
        assert "may not write to this socket" in error.value.message


@pytest.mark.parametrize("timeout", ["0.0", "-1.0", "NAN"])
def test_a_timeout_is_a_number_above_0(php: Php, timeout: str) -> None:
    attempt = f"try {{ new Realtime\\Client(null, {timeout}); }} catch (ValueError $e) {{ return $e->getMessage(); }}"
    assert "timeout must be above 0 seconds" in php.run(attempt)


def test_a_timeout_may_be_infinite(shared_daemon: Daemon) -> None:
    with running_php(shared_daemon.control_socket) as php:
        assert php.run(f'return (new Realtime\\Client("{shared_daemon.control_socket}", INF))->ping();') is None


# The function in the README, for those who want no file.


def readme_function() -> str:
    section = (ROOT / "README.md").read_text("utf-8").partition("### Without any file\n")[2]
    found = re.search(r"```php\n(.*?)```", section, re.DOTALL)
    assert found, "the README has no PHP in a section 'Without any file'"
    return found[1]


def run_readme_function(path: Path, channel: str | bytes, message: str | bytes, timeout: float = 5) -> str:
    """Call it in a fresh PHP; return the text of what it throws, or nothing. Any other output fails the test."""
    function = readme_function().replace(", 5)", f", {timeout:g})")
    code = (
        f"try {{ broadcast({literal(channel)}, {literal(message)}); }}"
        "catch (RuntimeException $error) { echo $error->getMessage(); }"
    )
    return php_output(
        input=f"<?php declare(strict_types=1);\n{function}\n{code}",
        env={**os.environ, "REALTIME_SOCKET": str(path)},
    )


@pytest.mark.parametrize("channel", ["news", "x" * 200])
@pytest.mark.parametrize("message", ["", "Grüße, 世界 🎉", "x" * 255, "x" * 65536])
def test_the_readme_s_function_broadcasts(shared_daemon: Daemon, observer: Client, channel: str, message: str) -> None:
    with observer.subscribe(channel) as subscription:
        assert run_readme_function(shared_daemon.control_socket, channel, message) == ""
        assert untimed(next(subscription)) == ChannelMessage(channel, message, 1)


@pytest.mark.parametrize(
    ("channel", "message", "text"),
    [
        ("not a channel", "hello", "invalid_channel message 'not a channel' is not a channel name"),
        ("x" * 70_000, "hello", "invalid_channel"),
        ("news", b"\xff", "invalid_utf8"),
        ("news", "x" * 65537, "the limit, max-message, is 65536"),
    ],
)
def test_the_readme_s_function_throws_what_the_daemon_says(
    shared_daemon: Daemon, channel: str, message: str | bytes, text: str
) -> None:
    assert text in run_readme_function(shared_daemon.control_socket, channel, message)


def test_the_readme_s_function_throws_if_there_is_no_daemon(path: Path) -> None:
    assert os.strerror(errno.ENOENT) in run_readme_function(path, "news", "hello")


def test_the_readme_s_function_waits_no_longer_than_its_timeout(path: Path) -> None:
    with listening(path, backlog=1):
        assert "no answer" in run_readme_function(path, "news", "hello", timeout=1)
