"""The line between a process and its successor: messages, open files, and all the ways in which it fails."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtimed.process.line import EndOfLineError, Kind, Line, pieces
from realtimed.process.portions import HandOverError
from tests.kit.patience import LONG_PATIENCE


@pytest.fixture
def ends() -> Iterator[tuple[Line, Line]]:
    ours, theirs = socket.socketpair()
    lines = Line(ours, "the new process", LONG_PATIENCE), Line(theirs, "the old process", LONG_PATIENCE)
    yield lines
    for line in lines:
        line.close()


def open_files(count: int) -> list[int]:
    first = os.open("/dev/null", os.O_RDONLY)
    return [first, *(os.dup(first) for _ in range(count - 1))]


def close(files: list[int]) -> None:
    for each in files:
        os.close(each)


@pytest.mark.parametrize("count", [0, 1, 249, 250, 251, 1000])
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_message_arrives_whole_with_its_files(ends: tuple[Line, Line], size: int, count: int) -> None:
    data, files = os.urandom(size), open_files(count) if count else []
    sender = threading.Thread(target=ends[0].send, args=(Kind.FIRST, data, files))
    sender.start()
    kind, portion = ends[1].receive()
    sender.join()
    assert (kind, portion.data, len(portion.descriptors)) == (Kind.FIRST, data, count)
    assert all(os.path.sameopenfile(files[0], each) for each in portion.descriptors)
    assert not any(os.get_inheritable(each) for each in portion.descriptors)
    close([*files, *portion.descriptors])


def test_messages_keep_their_order_and_their_files(ends: tuple[Line, Line]) -> None:
    files = open_files(2)
    ends[0].send(Kind.FIRST, b"a", files[:1])
    ends[0].send(Kind.PREPARE)
    ends[0].send(Kind.REST, b"b", files)
    received = [ends[1].receive() for _ in range(3)]
    assert [kind for kind, _ in received] == [Kind.FIRST, Kind.PREPARE, Kind.REST]
    assert [len(portion.descriptors) for _, portion in received] == [1, 0, 2]
    close([*files, *(each for _, portion in received for each in portion.descriptors)])


def test_a_process_with_too_few_open_files_says_so(ends: tuple[Line, Line]) -> None:
    files = open_files(200)
    ends[0].send(Kind.FIRST, b"data", files)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 50, hard))
    try:
        with pytest.raises(
            HandOverError, match=r"of 200 open files only .* arrived: its limit of open files is too low"
        ):
            ends[1].receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(Path("/proc/self/fd").iterdir())) == before  # what has arrived was closed
    close(files)


def test_the_end_of_the_other_process_is_noticed(ends: tuple[Line, Line]) -> None:
    first = next(pieces(Kind.FIRST, b"data"))
    assert ends[0].send_some(first) == len(first[0])
    ends[0].close()
    with pytest.raises(EndOfLineError, match="the old process has ended"):  # in the middle of a message
        ends[1].receive()
    with pytest.raises(EndOfLineError, match="the old process has gone"):
        ends[1].send(Kind.READY)


def test_what_the_other_process_says_of_its_failure_is_the_error(ends: tuple[Line, Line]) -> None:
    ends[0].send(Kind.FAILED, "there is no such file: ü".encode())
    with pytest.raises(HandOverError, match="there is no such file: ü"):
        ends[1].expect(Kind.HELLO)


def test_another_message_than_the_expected_one_is_an_error(ends: tuple[Line, Line]) -> None:
    ends[0].send(Kind.READY)
    with pytest.raises(HandOverError, match="has said READY in place of GO"):
        ends[1].expect(Kind.GO)


def test_an_unknown_kind_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\xfe" + bytes(12))
        with pytest.raises(HandOverError, match="kind 254, which is unknown"):
            Line(theirs, "the old process", LONG_PATIENCE).receive()


def test_nobody_waits_longer_than_the_patience() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Line(ours, "the new process", 0.01)
        with pytest.raises(HandOverError, match=r"the new process has said nothing for 0\.01 s"):
            line.receive()
        with pytest.raises(HandOverError, match=r"the new process has read nothing for 0\.01 s"):
            line.send(Kind.FIRST, bytes(10_000_000))


def test_a_kernel_buffer_that_is_full_takes_nothing(ends: tuple[Line, Line]) -> None:
    piece = bytes(10_000_000), ()
    assert 0 < ends[0].send_some(piece) < len(piece[0])
    while ends[0].send_some(piece):
        pass


def test_the_kernel_says_who_has_sent(ends: tuple[Line, Line]) -> None:
    ends[1].learn_credentials()
    ends[0].send(Kind.HELLO, b"hello")
    assert ends[1].sender() == (os.getpid(), os.geteuid())
    assert ends[1].expect(Kind.HELLO).data == b"hello"  # it was only looked at
