"""A folder is a rule: who may import whom, and which libraries (see docs/architecture.md). Tests have one kit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import realtimed

PACKAGE = Path(realtimed.__file__).parent
TESTS = Path(__file__).parent
KIT = TESTS / "kit"

# What each part of the package may import, beside itself and `errors` and `text`, which all may.
MAY_IMPORT = {
    "errors": set(),
    "text": {"errors"},
    "rpc": set(),
    "hub": {"process.portions"},
    "config": {"hub.names", "rpc.address", "process.logs"},
    "process": set(),
    "net": {"hub", "config", "process"},
    "broker": {"hub", "config", "process"},
    "websocket": {"net", "hub", "config", "process", "rpc.defaults"},
    "control": {"net", "broker", "hub", "config", "process", "rpc"},
    "http": {"net", "hub", "config", "process", "control.commands"},
    "client": {"rpc", "hub.position"},
    "state": {"hub", "process"},
    "stats": {"websocket", "control", "net", "hub", "config", "process"},
    "core": {"stats", "websocket", "control", "http", "net", "broker", "hub", "config", "process"},
    "upgrade": {"net", "config", "process"},
    "daemon": {"core", "upgrade", "websocket", "control", "hub.channel", "net", "config", "process", "state"},
    "cli": {"client", "rpc.address", "config", "process", "daemon"},
    "__main__": {"cli"},
    "__init__": {"client", "hub.position"},
}
PURE = {"errors", "text", "rpc", "hub"}
NOT_PURE = {"trio", "socket", "asyncio", "anyio", "threading", "time", "logging"}
ONLY_USERS = {
    "trio_websocket": "websocket",
    "h11": "http",
    "prometheus_client": "http",
    "typer": "cli",
    "rich": "cli",
    "anyio": "client",
}

TOP_LEVEL = (
    "__init__.py", "__main__.py", "broker", "cli", "client", "config", "control", "core.py", "daemon.py", "errors.py",
    "http", "hub", "net", "process", "py.typed", "rpc", "state.py", "stats.py", "text.py", "upgrade.py", "websocket",
)  # fmt: skip
MODULE_LINES = 400
FUNCTION_LINES = 50

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports, as `realtimed.package.module`."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("realtimed.") in MODULES else str(node.module)


def part(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    allowed = MAY_IMPORT[part(module)] | {part(module), "errors", "text"}
    for name in imports(module):
        target = name.removeprefix("realtimed.")
        if name.startswith("realtimed."):
            assert any(target == each or target.startswith(each + ".") for each in allowed), f"{module} → {target}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_library_has_its_place(module: str) -> None:
    for name in map(part, imports(module)):
        assert part(module) == ONLY_USERS.get(name, part(module)), f"{module} imports {name}"
        assert part(module) not in PURE or name not in NOT_PURE, f"{module} imports {name}"


def test_the_top_level_is_what_docs_name() -> None:
    assert tuple(sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")) == TOP_LEVEL


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_and_functions_are_short(module: str) -> None:
    source = MODULES[module].read_text()
    assert len(source.splitlines()) <= MODULE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, node.name


# Tests: what two of them need is in tests/kit, once.


def own_members(node: ast.ClassDef) -> set[str]:
    """Return the names of a class's methods and fields, those of its base classes not included."""
    names = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            names.add(each.attr)
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            names.add(each.target.id)
    return names


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_what_tests_share_is_in_the_kit_once(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in names]
            assert not any(".test_" in module for module in modules), "no test module is imported"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and path != KIT / "patience.py":
            assert node.id.strip("_") not in ("PATIENCE", "LONG_PATIENCE"), "how long tests wait stands once"
        elif isinstance(node, ast.ClassDef) and path != KIT / "subscribers.py":
            is_fake = not node.bases and ({"channels", "write"} <= own_members(node) or node.name == "Listener")
            assert not is_fake, f"{node.name} is a second fake subscriber"
