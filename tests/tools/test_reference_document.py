"""docs/reference.md names files and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT)))
FILES = sorted(set(re.findall(r"`((?!vllm/v1/|tests/)(?:\w+/)*\w+\.py)`", DOCUMENT)))


@pytest.mark.parametrize("path", sorted({path for path, _ in TESTS}))
def test_its_tests_exist(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {name for one, name in TESTS if one == path} <= defined


def test_its_files_exist() -> None:
    assert len(FILES) > 10
    assert not [path for path in FILES if not (ROOT / "src" / "paceline" / path).exists()]


def test_every_statement_stands_beside_a_test() -> None:
    statements = DOCUMENT[DOCUMENT.index("## Statements") :]
    rows = [line for line in statements.splitlines() if line.startswith("| ") and "---" not in line]
    heads = [row for row in rows if "shown by |" in row]
    assert len(rows) > 20
    assert not [row for row in rows if row not in heads and "::test_" not in row]
