"""Style that can be checked is a test: lengths, docstrings, who imports whom, no sleeping in tests, no dead file."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.cli import ELSEWHERE
from paceline.engines.registry import OURS
from tests.pace import stretched

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MIN_FILE_LINES = 40

# A shorter file has a reason. An `__init__.py` of one line makes a folder a package.
SMALL = {
    "src/paceline/__init__.py": "the version, which a small process loads and nothing else",
    "src/paceline/__main__.py": "a program: what starts before anything is imported",
    "src/paceline/errors.py": "raised by every package: must import none of them",
    "src/paceline/core/limits.py": "all that a coordinator under vLLM needs of the core before it is bound",
    "src/paceline/core/routing/__init__.py": "the table of policies by name",
}

# DESIGN.md, section 7: what a package may import of ours. `paceline` itself holds the version and nothing else.
MAY_IMPORT = {
    "paceline.core": {"paceline.core"},
    "paceline.engines": {"paceline.engines", "paceline.core", "paceline.errors", "paceline.log"},
    "paceline.sim": {"paceline.sim", "paceline.engines", "paceline.core", "paceline.errors", "paceline.log"},
    "paceline.check": {
        "paceline.check", "paceline.sim", "paceline.core", "paceline.errors", "paceline.console", "paceline.log",
        "paceline.report",
    },
    "paceline.net": {
        "paceline.net", "paceline.process", "paceline.engines", "paceline.core", "paceline.settings", "paceline.errors",
        "paceline.log",
    },
    "paceline.top": {
        "paceline.top", "paceline.operate", "paceline.control", "paceline.engines", "paceline.core", "paceline.errors",
        "paceline.log", "paceline",
    },
    "paceline.process": {
        "paceline.process", "paceline.net", "paceline.core", "paceline.errors", "paceline", "paceline.log",
    },
    "paceline.vllm": {
        "paceline.vllm", "paceline.net", "paceline.process", "paceline.core", "paceline.errors", "paceline.log",
    },
    "paceline.server": {
        "paceline.server", "paceline.net", "paceline.process", "paceline.engines", "paceline.core", "paceline.settings",
        "paceline.errors", "paceline", "paceline.log",
    },
}  # fmt: skip

SMALL_PROCESSES = [
    "paceline.net.coordinator",
    "paceline.coordinator_cli",
    "paceline.vllm.main",
    "paceline.vllm.process",
]
SMALL_PROCESS_MAY_LOAD = {"zmq", "msgspec", "typing_extensions", "paceline"}
LARGE = {"numpy", "uvicorn", "starlette", "typer", "rich"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}
SOURCE_AND_EXAMPLES = [*FILES, *sorted((ROOT / "examples").rglob("*.py"))]
REST = [path for folder in ("tools", "bench", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every function of a file: where it is, and its lines."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield f"{short(path)}: {node.name}", node.end_lineno - node.lineno + 1


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it: `from a import b` is a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            found |= modules
            if node.module and modules != names:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] == "paceline"}


def within(name: str, allowed: set[str]) -> bool:
    """Whether a module is one of `allowed` or, but for `paceline` itself, inside one."""
    return name in allowed or any(name.startswith(f"{one}.") for one in allowed - {"paceline"})


def loaded_by(*names: str) -> set[str]:
    """All modules with a file of their own that a fresh interpreter loads for these, beside what it begins with."""
    program = f"""
import importlib, json, sys
before = set(sys.modules)
for name in {list(names)!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        # An engine whose package is not installed here; nothing of ours may be missing.
        if (error.name or "").startswith("paceline"):
            raise
print(json.dumps([name for name in set(sys.modules) - before if getattr(sys.modules[name], "__file__", None)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=stretched(60)
    )
    return set(json.loads(done.stdout))


# Lengths ------------------------------------------------------------------------------------------


def test_no_long_file() -> None:
    lines = {short(path): length(path) for path in [*SOURCE_AND_EXAMPLES, *REST]}
    assert not {where: count for where, count in lines.items() if count > MAX_FILE_LINES}


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_a_short_file_has_a_reason() -> None:
    short_ones = {short(path): lines for path in FILES if 1 < (lines := length(path)) < MIN_FILE_LINES}
    assert not short_ones.keys() - SMALL.keys()


@pytest.mark.parametrize(
    "files", [SOURCE_AND_EXAMPLES, pytest.param(REST, marks=pytest.mark.slow)], ids=["src", "rest"]
)
def test_no_long_function(files: list[Path]) -> None:
    lines = dict(one for path in files for one in functions(path))
    assert not {where: count for where, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_every_module_says_what_it_is() -> None:
    assert not [short(path) for path in SOURCE_AND_EXAMPLES if not ast.get_docstring(tree_of(path))]


# Dependencies point inward ------------------------------------------------------------------------


def test_every_package_has_its_rule() -> None:
    assert {name for name in PACKAGES if name.count(".") == 1} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("package", sorted(PACKAGES & MAY_IMPORT.keys()))
def test_package_imports_only_what_it_may(package: str) -> None:
    inside = [name for name in MODULES if within(name, {package})]
    assert inside
    wrong = {
        name: sorted(outside)
        for name in inside
        if (outside := {one for one in imports(MODULES[name]) if not within(one, MAY_IMPORT[package])})
    }
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("package", sorted(PACKAGES & MAY_IMPORT.keys()))
def test_package_loads_only_what_it_may(package: str) -> None:
    # What it imports imports in turn; importing a module loads the packages around it, `paceline` first.
    allowed = set(MAY_IMPORT[package])
    while wider := {two for one in allowed for two in MAY_IMPORT.get(one, ())} - allowed:
        allowed |= wider
    loaded = loaded_by(*(name for name in MODULES if within(name, {package})))
    ours = {name for name in loaded if name.split(".")[0] == "paceline"}
    assert package in ours
    assert not {name for name in ours if not within(name, allowed | {"paceline"})}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PROCESSES)
def test_small_process_loads_little(name: str) -> None:
    top = {module.split(".")[0] for module in loaded_by(name)}
    assert "zmq" in top
    assert not top & LARGE
    assert not top - SMALL_PROCESS_MAY_LOAD - sys.stdlib_module_names
    # Each of these takes milliseconds, of some 70, that a coordinator has no use for.
    assert not {module for module in loaded_by(name) if module.startswith("paceline.core.routing")}
    assert not top & {"dataclasses", "hashlib"}


def test_a_coordinator_under_vllm_is_bound_before_the_rest_is_imported() -> None:
    loaded = loaded_by("paceline.vllm.main")
    ours = {name for name in loaded if name.startswith("paceline.core.")}
    assert ours <= {"paceline.core.limits"}
    assert not loaded & {"msgspec", "logging", "multiprocessing", "pathlib", "shutil", "tempfile"}


# Tests --------------------------------------------------------------------------------------------


def test_no_test_sleeps() -> None:
    asleep = [
        f"{short(path)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if "sleep(" in path.read_text(encoding="utf-8")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) == "sleep"
        and waits(node)
    ]
    assert not asleep, "wait for a condition, with a deadline"


def waits(call: ast.Call) -> bool:
    """Whether a call's first argument is a number above 0, as it stands."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)][:1]
    return any(isinstance(one, ast.Constant) and isinstance(one.value, int | float) and one.value > 0 for one in values)


# Dead files ---------------------------------------------------------------------------------------


def entry_points() -> set[str]:
    """Modules that something starts by name: pyproject, `--engine`, `paceline COMMAND`, and what runs as a program."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project.get("scripts", {}), *project.get("entry-points", {}).values(), OURS]
    named = {target.partition(":")[0] for group in groups for target in group.values()}
    programs = {name for name, path in MODULES.items() if path.name == "__main__.py" or runs_itself(tree_of(path))}
    # The command line imports what a command needs once it runs.
    return named | programs | {f"paceline.{module}" for module, _ in ELSEWHERE.values()}


def runs_itself(tree: ast.Module) -> bool:
    """Whether a file ends in `if __name__ == "__main__":`."""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


def test_no_dead_file() -> None:
    imported = {one for name, path in MODULES.items() for one in imports(path) if one != name}
    # What only bench/ uses lives in bench/.
    dead = sorted(MODULES.keys() - PACKAGES - imported - entry_points())
    assert not dead


def test_no_empty_package() -> None:
    assert all(any(name.startswith(f"{package}.") for name in MODULES) for package in PACKAGES)


def test_entry_points_exist() -> None:
    assert entry_points() <= MODULES.keys()
