"""docs/faults.md: every fault with tests that exist and that name it, and no test that names another."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"FAULTS (\d+(?:, \d+)*)")


def rows() -> dict[int, tuple[str, str, list[str]]]:
    """Return of each fault what goes wrong, what becomes of it, and the tests that show it."""
    found = {}
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
        if re.match(r"\| \d", line):
            number, wrong, outcome, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            found[int(number)] = (wrong, outcome, re.findall(r"`([^`]+)`", tests))
    return found


def named_in(text: str | None) -> set[int]:
    return {int(number) for found in NAMED.findall(text or "") for number in found.split(", ")}


@cache
def named(file: Path) -> dict[str, set[int]]:
    """Return which faults each test of a file names: in its docstring, in its module's, or in its own name."""
    tree = ast.parse(file.read_text())
    whole = named_in(ast.get_docstring(tree))
    tests = [one for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {
        one.name: whole | named_in(ast.get_docstring(one)) | {int(n) for n in re.findall(r"^test_f(\d+)_", one.name)}
        for one in tests
        if one.name.startswith("test_")
    }


def test_faults_are_numbered_without_a_gap() -> None:
    assert list(rows()) == list(range(1, 32))


@pytest.mark.parametrize("number", rows())
def test_a_fault_is_shown_by_tests_that_name_it(number: int) -> None:
    wrong, outcome, tests = rows()[number]
    assert wrong
    assert outcome
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        there = named(ROOT / "tests" / file)
        assert name in there, test
        assert number in there[name], f"{test} does not name FAULTS {number}"


def test_no_test_names_a_fault_that_there_is_not() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name, numbers in named(path).items():
            assert numbers <= set(rows()), (path, name)


def test_words_that_name_nothing_are_told_from_those_that_do() -> None:
    assert named_in("What happens: FAULTS 9, 19, 20.") == {9, 19, 20}
    assert named_in("FAULTS 4.\n\nand FAULTS 31, but not 5") == {4, 31}
    assert named_in(None) == named_in("no FAULTS at all") == set()
