"""One matcher for all patterns: what it matches, and that it never takes long."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtimed.errors import RefusedError
from realtimed.hub.history import History, Retention
from realtimed.hub.names import Marks, Pattern, check_pattern


def fits(pattern: str, name: str) -> bool:
    """Match as simply as can be: a star takes nothing, or a character and goes on."""
    states = {0}
    for character in name:
        states |= {at + 1 for at in states if pattern[at : at + 1] == "*"}
        while more := {at + 1 for at in states if pattern[at : at + 1] == "*"} - states:
            states |= more
        states = {at if pattern[at] == "*" else at + 1 for at in states if pattern[at : at + 1] in ("*", character)}
    return any(not pattern[at:].strip("*") for at in states)


PATTERNS = st.text("ab:*", min_size=1, max_size=12)
NAMES = st.text("ab:", min_size=1, max_size=12)


@given(PATTERNS, NAMES)
@example("a*a", "a")
@example("ab*ba", "aba")
@example("*", "a")
@example("***", "a")
@example("a", "aa")
@example("*a", "ba")
@example("a*b*", "ab")
def test_a_star_stands_for_any_characters_or_none(pattern: str, name: str) -> None:
    assert Pattern(pattern).matches(name) == fits(pattern, name)


@given(st.lists(st.tuples(PATTERNS, st.integers(0, 3), st.booleans()), max_size=30), st.lists(NAMES, max_size=5))
def test_marks_are_those_of_all_patterns_that_match(changes: list[tuple[str, int, bool]], names: list[str]) -> None:
    marks, model = Marks(), dict[str, int]()
    for pattern, place, add in changes:
        bit = 1 << place
        if add:
            marks.add(pattern, bit)
            model[pattern] = model.get(pattern, 0) | bit
        elif model.get(pattern, 0) & bit:
            marks.remove(pattern, bit)
            model[pattern] &= ~bit
    assert len(marks) == sum(map(bool, model.values()))
    for name in names:
        search = marks.search(name)
        while not search.over:
            assert search.step(1) <= 0
        expected = 0
        for pattern, bits in model.items():
            if fits(pattern, name):
                expected |= bits
        assert search.bits == expected
    for pattern, bits in model.items():
        if bits:
            marks.remove(pattern, bits)
    assert len(marks) == 0
    assert marks.lookups == 0


def test_the_beginning_of_a_name_leaves_few_patterns_to_try() -> None:
    marks = Marks()
    for number in range(2000):
        marks.add(f"user:{number}:*", 1)
        marks.add(f"*:{number}", 1)
        marks.add(f"room:{number}", 1)
    assert marks.search("user:77:inbox").step(100) > 80
    assert marks.search("x:77").step(100) > 80
    assert marks.search("room:77").bits == 1


HARD = {
    "stars": ("*a" * 99 + "*b", "a" * 200),
    "the example of old": ("*a*a*a*b", "a" * 200),
    "no end": ("*a" * 99 + "*", "a" * 199 + "b"),
    "long pieces": ("*" + "a" * 99 + "b*", "a" * 200),
    "pieces that begin alike": ("*aaab" * 40, "a" * 200),
    "stars alone": ("*" * 200, "a" * 200),
    "a long pattern of the configuration": ("*a" * 100_000, "a" * 200),
    "many stars of the configuration": ("*" * 1_000_000 + "b", "a" * 200),
}


@pytest.mark.parametrize(("pattern", "name"), HARD.values(), ids=list(HARD))
def test_no_pattern_takes_long(pattern: str, name: str) -> None:
    history = History(limit=1, clock=float, default=Retention(1, 1), rules=[(pattern, Retention(2, 2))])
    began = time.process_time()
    for _ in range(200):
        history.retention(name)
    assert time.process_time() - began < 0.05, "a quarter of a millisecond each"


@pytest.mark.parametrize("pattern", ["", "a b", "chat:?", "[ab]", "x" * 201, "é*", 7, None, ["a"], "a\n", b"a"])
def test_what_no_peer_may_use(pattern: object) -> None:
    with pytest.raises(RefusedError) as refusal:
        check_pattern(pattern)
    assert refusal.value.code == "invalid_channel"


def test_what_a_peer_may_use() -> None:
    assert check_pattern("chat:*") == "chat:*"
    assert check_pattern("*" * 200) == "*" * 200
