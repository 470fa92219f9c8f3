"""docs/protocol.md and its tests: every clause has a test that bears its number, and no test names another.

The tests are in the files beside this one, `test_*.py`. Most run twice: in memory, and against a daemon.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.kit.stack import ROOT

HERE = Path(__file__)
CLAUSE = re.compile(r"^(?:\| )?(\d+(?:\.\d+)+) ", re.MULTILINE)
HEADING = re.compile(r"^#{2,3} (\d+(?:\.\d+)*)\.? ", re.MULTILINE)
NUMBERED = re.compile(r"test_(\d+(?:_\d+)+)_[a-z]")


def order(number: str) -> list[int]:
    return list(map(int, number.split(".")))


def clauses() -> list[str]:
    """Return the numbers of all clauses, in the order in which they stand."""
    return CLAUSE.findall((ROOT / "docs" / "protocol.md").read_text())


def names_of_tests() -> list[str]:
    """Return the name of every test in the files that belong to the specification."""
    files = set(HERE.parent.glob("test_*.py")) - {HERE}
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [name for name in functions if name.startswith("test_")]


def test_clauses_are_numbered_once_and_in_order() -> None:
    headings = HEADING.findall((ROOT / "docs" / "protocol.md").read_text())
    for numbers in (clauses(), headings):
        assert len(numbers) > 9
        assert numbers == sorted(set(numbers), key=order)
    assert not set(clauses()) & set(headings), "a clause that has parts is a heading"
    nested = {tuple(order(number)[:2]) for number in clauses() if number.count(".") > 1}
    assert nested <= {tuple(order(number)) for number in headings}, "parts of a clause stand under its heading"


def test_numbers_follow_each_other() -> None:
    everything = {*clauses(), *HEADING.findall((ROOT / "docs" / "protocol.md").read_text())}
    for number in everything - {"1"}:
        *parents, last = order(number)
        assert last == 1 or ".".join(map(str, [*parents, last - 1])) in everything, f"nothing comes before {number}"


def test_every_clause_has_a_test_and_every_test_a_clause() -> None:
    names = names_of_tests()
    assert [name for name in names if NUMBERED.match(name) is None] == [], "a test names its clause"
    assert len(names) == len(set(names)), "two tests with one name"
    tested = {match[1].replace("_", ".") for name in names if (match := NUMBERED.match(name)) is not None}
    assert sorted(set(clauses()) - tested, key=order) == [], "clauses without a test"
    assert sorted(tested - set(clauses()), key=order) == [], "tests of clauses that do not exist"


def test_references_lead_to_clauses() -> None:
    document = (ROOT / "docs" / "protocol.md").read_text()
    known = {*clauses(), *HEADING.findall(document)}
    referred = set(re.findall(r"\((\d(?:\.\d+)+)\)|see (\d(?:\.\d+)+)|in (\d(?:\.\d+)+)[.,]", document))
    assert len(referred) > 5
    assert {number for numbers in referred for number in numbers if number} <= known
    for path in (*ROOT.glob("realtimed/**/*.py"), *ROOT.glob("app/*.php"), *ROOT.glob("tests/**/*.py")):
        for number in re.findall(r"docs/protocol\.md`*,? (\d(?:\.\d+)*)", path.read_text()):
            assert number in known, f"{path.name} refers to {number}"
