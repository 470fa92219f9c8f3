"""The fuzzers' invariants hold for all that was kept in their corpora, and for some thousand inputs made from it."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import TARGETS, checker, corpus
from tests.fuzz.frames import CLOSE, PONG, TEXT, expected, messages_of
from tests.fuzz.mutations import mutations, repeated
from tests.kit.budget import LARGEST
from tests.kit.stack import ROOT

SEED = 6455

COUNTS = {
    "wire": 2000,
    "protocols": 1000,
    "inbound": 250,
    "handshake": 400,
    "control": 400,
    "desync": 500,
    "switching": 1000,
}
"""About a second for each."""


@pytest.mark.parametrize("target", TARGETS)
def test_the_invariant_holds(target: str) -> None:
    check = checker(target)
    for data in [*corpus(target), *mutations(corpus(target), SEED, COUNTS[target])]:
        try:
            check(data)
        except Exception as error:
            error.add_note(f"The input was {data[:2000]!r}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_small(target: str) -> None:
    kept = [len(data) for data in corpus(target)]
    assert len(kept) < 200
    assert max(kept) <= LARGEST
    assert sum(kept) < 200_000


def test_the_same_seed_makes_the_same_inputs() -> None:
    assert list(mutations([b"abc", b"def"], 1, 50)) == list(mutations([b"abc", b"def"], 1, 50))


def test_some_inputs_repeat_a_run_as_often_as_there_is_room() -> None:
    large = [data for data in mutations([b"abc", b"def"], 1, 200) if len(data) > LARGEST - 16]
    assert 1 < len(large) < 20
    source = random.Random(1)
    for data in (b"", b"a", b"abc" * 10_000):
        assert len(repeated(data, source)) <= LARGEST
    assert {repeated(b"a", source) for _ in range(20)} >= {b"a" * LARGEST, b" " * (LARGEST - 1) + b"a"}


def masked(first: int, payload: bytes) -> bytes:
    return bytes([first, 0x80 | len(payload)]) + b"\0\0\0\0" + payload


@pytest.mark.parametrize(
    ("sent", "events", "codes"),
    [
        (b"", [], {None}),
        (masked(0x81, b"a"), [(TEXT, b"a")], {None}),
        (masked(0x01, "ä".encode()[:1]) + masked(0x89, b"p") + masked(0x80, "ä".encode()[1:]),
         [(PONG, b"p"), (TEXT, "ä".encode())], {None}),
        (masked(0x81, b"\xff"), [], {1007}),
        (masked(0x81, b"\xc3"), [], {1007}),
        (masked(0xC1, b"a"), [], {1002}),
        (masked(0x83, b"a"), [], {1002}),
        (masked(0x80, b"a"), [], {1002}),
        (masked(0x01, b"a") + masked(0x81, b"b"), [], {1002}),
        (masked(0x09, b"a"), [], {1002}),
        (b"\x81\x01a", [], {1002}),
        (masked(0x88, b"\x03\xe8bye"), [], {1000}),
        (masked(0x88, b""), [], {1005}),
        (masked(0x88, b"\x03"), [], {1002}),
        (masked(0x88, b"\x03\xed"), [], {1002}),
        (masked(0x88, b"\x03\xe8\xff"), [], {1007}),
        (masked(0x81, b"abc")[:-1], [], {None}),
    ],
)  # fmt: skip
def test_the_model_of_frames_reads_the_rfc(
    sent: bytes, events: list[tuple[int, bytes]], codes: set[int | None]
) -> None:
    model = expected(sent)
    assert (model.events, model.codes) == (events, codes)


def test_a_servers_frames_are_told_apart() -> None:
    assert list(messages_of(b"\x81\x01a\x88\x02\x03\xe8")) == [(TEXT, b"a"), (CLOSE, b"\x03\xe8")]
    for wrong in (b"\x81\x02a", b"\x01\x01a", b"\xc1\x01a", b"\x81\x81\0\0\0\0a"):
        with pytest.raises(AssertionError):
            list(messages_of(wrong))


def fuzz(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=where, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_fuzzer_says_what_it_has_done_and_ends(tmp_path: Path) -> None:
    ended = fuzz(tmp_path, "protocols", "--megabytes", "0.02")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "inputs/s" in ended.stdout
    assert not list(tmp_path.glob("fuzz-*"))


def test_a_fuzzer_goes_on_until_it_has_checked_enough(tmp_path: Path) -> None:
    ended = fuzz(tmp_path, "desync", "--blind", "--until", "frames=2000")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    frames = re.search(r"(\d+) frames", ended.stdout)
    assert frames is not None
    assert int(frames[1]) >= 2000
    ended = fuzz(tmp_path, "desync", "--blind", "--until", "frames=1000000", "--megabytes", "0.01")
    assert ended.returncode == 1, "it was not enough"
