"""The rule of the house: imports point one way, and some rooms know neither trio nor a socket."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import realtimed

PACKAGE = Path(realtimed.__file__).parent

# Each storey may import from those before it, and from its own.
STOREYS = (
    {"errors", "paths", "units", "values", "config", "logs", "log_output", "histogram", "head", "turns"},
    {"frames", "patterns", "history", "replays"},
    {"watch", "channel"},
    {"rounds", "backlog"},
    {"hub"},
    {
        "admission",
        "protocols",
        "request",
        "snapshot",
        "state",
        "stream",
        "uring",
        "listener",
        "accepting",
        "socket_files",
        "fanout",
        "lag",
        "garbage",
        "metrics",
        "control.walker",
        "control.wire",
        "reload",
        "open_files",
        "systemd",
    },
    {"session", "control", "endpoint"},
    {"drain"},
    {"daemon"},
    {"cli", "__main__"},
)
# What talks to a daemon from another process stands apart: it knows the wire and the errors.
CLIENT_SIDE = {
    "__init__",
    "control.client",
    "control.aclient",
    "control.calls",
    "control.connection",
    "control.feed",
    "control.line",
    "control.results",
}

WITHOUT_TRIO = (
    "errors",
    "paths",
    "units",
    "values",
    "config",
    "logs",
    "log_output",
    "histogram",
    "head",
    "request",
    "metrics",
    "frames",
    "patterns",
    "history",
    "replays",
    "watch",
    "channel",
    "rounds",
    "hub",
    "admission",
    "protocols",
    "control.answers",
    "control.commands",
    "control.idempotency",
    "control.listing",
    "control.walker",
    "control.wire",
    *CLIENT_SIDE,
)
ONLY_USERS = {
    "trio_websocket": {"session"},
    "msgpack": {"control.wire", "control.answers"},
    "typer": {"cli"},
    "rich": {"cli"},
    "prometheus_client": {"metrics"},
    "h11": {"endpoint"},
}

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def storey_of(module: str) -> int:
    """Return the storey of the most specific room the module belongs to."""
    rooms = [(len(room), number) for number, storey in enumerate(STOREYS) for room in storey if is_in(module, room)]
    assert rooms, f"{module} is in no storey: give it its place in this test"
    return max(rooms)[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    for imported in imports(MODULES[module]):
        if not is_in(imported, "realtimed") or imported == "realtimed":
            continue
        target = imported.removeprefix("realtimed.")
        if module in CLIENT_SIDE:
            assert target in CLIENT_SIDE | {"errors", "paths", "control.wire"}, f"a client imports {target}"
        elif not (is_in(module, "cli") and target in CLIENT_SIDE):
            assert storey_of(target) <= storey_of(module), f"{module} imports {target} from above"


def test_session_and_control_do_not_know_each_other() -> None:
    for module, path in MODULES.items():
        for imported in imports(path):
            assert not (module == "session" and is_in(imported, "realtimed.control")), module
            assert not (is_in(module, "control") and is_in(imported, "realtimed.session")), module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_core_does_not_know_trio(module: str) -> None:
    if any(is_in(module, room) for room in WITHOUT_TRIO) and module != "control.server":
        assert not [name for name in imports(MODULES[module]) if name.split(".")[0] in ("trio", "socket", "anyio")] or (
            module in CLIENT_SIDE
        )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_library_has_one_user(module: str) -> None:
    for name in imports(MODULES[module]):
        for library, users in ONLY_USERS.items():
            if name.split(".")[0] == library:
                assert any(is_in(module, user) for user in users), f"{module} imports {library}"
