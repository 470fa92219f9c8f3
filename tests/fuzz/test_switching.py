"""The fuzzer of the answer to handshakes: most of its heads are let pass, and it finds what is wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from realtimed.net.head import Head
from realtimed.websocket.handshake import switching_protocols
from tests.fuzz import corpus, switching
from tests.fuzz.switching import TALLY, check, generate, head_of

SEED = 6455


def test_heads_made_at_random_are_let_pass() -> None:
    source, before = random.Random(SEED), TALLY.copy()
    for _ in range(3000):
        check(generate(source))
    counted = Counter(TALLY)
    counted.subtract(before)
    assert counted["heads"] + counted["refused"] == 3000
    assert counted["heads"] > 2000
    assert counted["answers"] > counted["heads"], "some offer a subprotocol"
    assert counted["answers"] > counted["answers to the client's own request"] > 1500


def test_heads_made_at_random_differ() -> None:
    source = random.Random(SEED)
    heads = [head_of(generate(source)) for _ in range(300)]
    assert len({tuple(line.partition(b":")[0] for line in head.split(b"\r\n")) for head in heads}) > 200
    for part in (b"\xff", b"keep-alive", b"h2c", b"SEC-WEBSOCKET", b"upgrade\r\n", b"\t", b"realtime.v1", b"//%77s"):
        assert any(part.lower() in head.lower() for head in heads), part


def check_corpus() -> None:
    for data in corpus("switching"):
        check(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer.replace(b"websocket", b"WebSocket"),
        lambda answer: answer.replace(b"-Protocol: ", b"-Protocol:"),
        lambda answer: answer.replace(b"Switching", b"switching"),
        lambda answer: answer + b"\0",
    ],
)
def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> None:
    def wrong(head: Head, subprotocol: str) -> bytes:
        return change(switching_protocols(head, subprotocol))

    monkeypatch.setattr(switching, "switching_protocols", wrong)
    with pytest.raises(AssertionError):
        check_corpus()
