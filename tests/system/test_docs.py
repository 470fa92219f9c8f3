"""The documentation says what is true: settings, codes, methods, counters and commands are those of the program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from realtimed.config.settings import SETTINGS
from realtimed.http.metrics import METRICS
from realtimed.hub.publication import Ending
from realtimed.websocket.frames import CLOSE_REASONS, CloseCode
from tests.kit.clients import publisher
from tests.kit.stack import ROOT, Daemon

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_documented_as_the_help_shows_it(setting: object) -> None:
    table = re.findall(
        r"^\| `(--\S+) (\S+)` \| `(\S+)` \| (.+?) \| (.+?) \|$", read("docs/operations.md"), re.MULTILINE
    )
    rows = {row[0]: row for row in table}
    assert set(rows) == {each.option for each in SETTINGS.values()}
    each = next(known for known in SETTINGS.values() if known is setting)
    assert rows[each.option] == (
        each.option,
        each.metavar,
        each.variable,
        each.shown_default or "–",
        each.help,
    )


def test_every_close_code_is_documented() -> None:
    documented = {int(code) for code in re.findall(r"\b(\d{4})\b", read("docs/protocol.md").partition("## 5.")[2])}
    assert set(CloseCode) - {CloseCode.NORMAL, CloseCode.GOING_AWAY} <= documented


def test_every_ending_is_documented() -> None:
    listed = read("docs/operations.md").partition("Whatever the protocol, log, statistics")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", listed)) - {"ended", "realtimed_endings_total"} == {
        ending.value for ending in Ending
    }


async def test_every_method_and_counter_is_documented(daemon: Daemon) -> None:
    async with publisher(daemon.control_socket) as asking:
        stats = await asking.call("stats")
        refusal = await asking.call("no such method")
        info = await asking.call("info")
    operations, protocol = read("docs/operations.md"), read("docs/protocol.md")
    assert [name for name in stats if f"`{name}`" not in operations] == []
    methods = refusal["message"].partition("the methods are ")[2].split(", ")
    assert len(methods) == 14
    assert [name for name in methods if f"| `{name}` |" not in protocol] == []
    assert [name for name in info if f'"{name}"' not in protocol] == []


def test_every_metric_is_documented_with_its_help() -> None:
    rows = re.findall(
        r"^\| `(realtimed_\w+?)(?:_total|_info)?` \| (?:gauge|counter|histogram|info) \| (.+) \|$",
        read("docs/operations.md"),
        re.MULTILINE,
    )
    assert rows == [(name, help) for name, (help, _) in METRICS.items()]


def test_every_close_code_is_explained_with_its_reason() -> None:
    rows = re.findall(r"^\| (\d{4}) \| `(\w+)` \| .+ \|$", read("docs/operations.md"), re.MULTILINE)
    assert {int(code): reason for code, reason in rows} == CLOSE_REASONS


def test_every_check_of_the_doctor_is_documented() -> None:
    source = read("realtimed/cli/doctor/checks.py") + read("realtimed/cli/doctor/permissions.py")
    checks = set(re.findall(r'check(?:, patient)? = "([^"]+)"', source))
    assert len(checks) == 13
    rows = re.findall(
        r"^\| `([^`]+)` \| [^|]+ \|$", read("docs/operations.md").partition("### In the browser")[0], re.MULTILINE
    )
    assert checks <= set(rows)


def test_every_variable_of_the_caddyfile_is_documented() -> None:
    variables = set(re.findall(r"\{\$([A-Z_]+)", read("caddy/Caddyfile")))
    documented = set(re.findall(r"^\| `([A-Z_]+)` \|", read("docs/operations.md"), re.MULTILINE))
    assert variables == documented


def test_the_commands_of_the_readme_exist() -> None:
    realtimectl = Path(sys.executable).parent / "realtimectl"
    commands = set(re.findall(r"^ +realtimectl (\w+)", read("README.md"), re.MULTILINE))
    assert {"broadcast", "tail", "channels", "clients", "top", "doctor"} <= commands
    for command in commands:
        subprocess.run([realtimectl, command, "--help"], check=True, capture_output=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = document if not file else document.parent / file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def commands(document: Path) -> list[str]:
    """Return the lines of a document that are to be pasted into a shell."""
    return [
        line.strip().partition("  #")[0].strip()
        for line in document.read_text().splitlines()
        if line.startswith("    ") and not line.lstrip().startswith(("//", "#"))
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_pip_installs_goes_into_a_virtual_environment(document: Path) -> None:
    """Debian 12 and later refuse everything else (PEP 668)."""
    environments: set[str] = set()
    active = False
    for line in commands(document):
        if made := re.search(r"python3 -m venv (\S+)$", line):
            environments.add(made[1])
        if activated := re.match(r"\. (\S+)/bin/activate$", line):
            active = activated[1] in environments
        if pip := re.match(r"(?:(\S+)/bin/)?pip install ", line):
            assert active if pip[1] is None else pip[1] in environments, line


def test_the_readme_teaches_how_to_install() -> None:
    """The test above has something to look at."""
    lines = commands(ROOT / "README.md")
    assert "pip install '.[caddy]'" in lines
    assert "/opt/realtimed/bin/pip install ." in commands(ROOT / "docs" / "operations.md")


def test_the_first_screen_says_that_channels_are_open() -> None:
    first_screen = read("README.md").splitlines()[:24]
    assert any("Every visitor may subscribe to every channel" in line for line in first_screen)


SOURCES = [*DOCUMENTS, *sorted((ROOT / "app").glob("*.*")), *sorted((ROOT / "realtimed").rglob("*.py"))]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_example_broadcasts_what_is_meant_for_one_user(source: Path) -> None:
    """As long as every visitor may subscribe to every channel, such an example would publish secrets."""
    call = r"(?:broadcast\w*\(|\[|realtimectl broadcast (?:--\S+ \S+ )*|subscribe\()\s*[\"'`]?"
    private = r"(?:users?|orders?|invoices?|accounts?|customers?|carts?|payments?|private|inbox)\b[^\n]*"
    assert re.findall(call + private, source.read_text()) == []
