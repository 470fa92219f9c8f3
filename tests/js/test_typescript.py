"""The types of app/realtime.js: made from it, and what a program in TypeScript needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tests.js.typescript import DECLARATIONS, compiled, declarations
from tests.kit.stack import ROOT

EXAMPLE: Final = ROOT / "tests" / "js" / "example.ts"


def test_the_declarations_are_what_the_compiler_makes_of_the_script() -> None:
    assert DECLARATIONS.read_text() == declarations(), "`make types` writes them anew"


def test_an_example_of_the_whole_interface_compiles() -> None:
    assert compiled("--noEmit", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess", EXAMPLE) == ""


def test_the_example_uses_all_there_is() -> None:
    declared = DECLARATIONS.read_text()
    names = {
        *re.findall(r"^export (?:class|type) (\w+)", declared, re.MULTILINE),
        *re.findall(r"^    (?:get )?(\w+)(?:<.*?>)?\??[:(]", declared, re.MULTILINE),
    } - {"constructor", "detail"}
    assert {"Realtime", "RealtimeError", "subscribe", "since", "last", "time", "retryIn", "burst"} <= names
    example = EXAMPLE.read_text()
    assert [name for name in sorted(names) if re.search(rf"\b{name}\b", example) is None] == []


MISTAKES: Final = [
    "realtime.subscribe(7, () => {});",
    "realtime.subscribe('news');",
    "realtime.subscribe('news', (message: number) => {});",
    "realtime.subscribe('news', () => {}, { since: 0 });",
    "realtime.subscribe('news', () => {}, { since: { offset: 1 } });",
    "realtime.subscribe('news', () => {}, { last: '20' });",
    "realtime.subscribe('news', () => {}, { latest: 20 });",
    "realtime.subscribe('news', (message, source) => source.time.toFixed());",
    "realtime.addEventListener('sate', () => {});",
    "realtime.addEventListener('state', event => event.detail.channel);",
    "realtime.state = 'connected';",
    "if (realtime.state === 'open') {}",
    "new Realtime('/ws', { minDelay: '1 s' });",
]


def test_mistakes_are_found(tmp_path: Path) -> None:
    program = tmp_path / "mistakes.mts"
    script = DECLARATIONS.with_name("realtime.js")
    head = [f"import {{ Realtime }} from '{script}';", "const realtime = new Realtime();"]
    program.write_text("\n".join([*head, *MISTAKES, "realtime.subscribe('news', () => {});"]))
    found = re.findall(r"mistakes\.mts\((\d+),", compiled("--noEmit", program))
    assert sorted({int(line) for line in found}) == list(range(3, 3 + len(MISTAKES)))
