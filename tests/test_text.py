"""What peers, files and variables say, as it is shown: escaped, cut, and in no time however large or deep it is."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtimed.text import printable, quoted
from tests.kit.budget import LARGEST, within_budget

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner)
        | st.tuples(inner, inner)
    ),
)


@given(VALUES, st.integers(10, 300))
@example(2**52, 10)
def test_what_is_short_is_shown_as_python_shows_it_and_else_its_beginning(value: object, limit: int) -> None:
    whole, shown = repr(value), quoted(value, limit)
    assert shown == whole or shown.endswith("…")
    assert len(shown) <= 4 * limit + 4
    if not isinstance(value, (str, bytes)):
        assert shown == (whole if len(whole) <= limit + 2 else whole[:limit] + "…")


def nested(depth: int) -> object:
    value: object = "a"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (nested(100_000), "[" * 60 + "…"),
        ({"a": nested(100_000)}, "{'a': " + "[" * 54 + "…"),
        (["a"] * 1_000_000, "['a', " + "'a', " * 10 + "'a',…"),
        (dict.fromkeys(range(1_000_000)), "{0: None, 1: None, 2: None, 3: None, 4: None, 5: None, 6: No…"),
        (["x" * 10_000_000], "['" + "x" * 58 + "…"),
        ("x" * 10_000_000, "'" + "x" * 60 + "'…"),
        (16**10_000 - 1, "0x" + "f" * 58 + "…"),
        (-(2**40_003), "-0x8" + "0" * 56 + "…"),
        ([16**10_000 - 1], "[0x" + "f" * 57 + "…"),
    ],
    ids=[
        "deep",
        "deep in a map",
        "a long list",
        "a large map",
        "a long str inside",
        "a long str",
        "int",
        "-int",
        "[int]",
    ],
)
def test_large_values_are_cut_within_the_budget(value: object, shown: str) -> None:
    assert within_budget(lambda: quoted(value), LARGEST) == shown


def test_no_text_has_power_over_a_terminal() -> None:
    assert printable("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\n\\u202eb"
    assert printable("ä b") == "ä b"
    assert quoted("\x1b\n") == "'\\x1b\\n'"
