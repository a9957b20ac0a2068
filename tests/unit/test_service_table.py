"""docs/service-table.md: every rule with what does it and what shows it, and nothing in it that does not exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from hvsnap.cli import grammar

ROOT = Path(__file__).parents[2]
SERVICE = (ROOT / "docs" / "service.md").read_text()
ABSENT = "Not there yet"


@cache
def marks() -> dict[str, str]:
    """Return each rule of sections 2 to 12 and how much of it is there: ●, ◐ or ○; ● for those without a mark."""
    found: dict[str, str] = {}
    section, number = 0, 0
    for line in SERVICE.splitlines():
        if heading := re.match(r"## (\d+)\.", line):
            section, number = int(heading[1]), 0
        elif section in range(2, 10) and (rule := re.match(r"(\d+)\. ([●◐○]) ", line)):
            found[f"{section}.{rule[1]}"] = rule[2]
        elif section == 10 and line.startswith(("●", "◐", "○")):
            found["10"] = line[0]
        elif section == 11 and line.startswith("| ") and not line.startswith(("| promise", "| ---")):
            number += 1
            found[f"11.{number}"] = "●"
    return found | {"12": "●"}


def rows() -> list[tuple[str, str, list[str]]]:
    """Return rule, what does it, and the tests that show it."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "service-table.md").read_text().splitlines()
        if re.match(r"\| \d", line)
    ]
    return [(rule, does, re.findall(r"`([^`]+)`", tests)) for rule, does, tests in cells]


def test_no_rule_is_left_out_and_none_made_up() -> None:
    assert len(marks()) > 45
    assert {rule for rule, _does, _tests in rows()} == set(marks())


@pytest.mark.parametrize(("rule", "does", "tests"), rows(), ids=lambda one: one if isinstance(one, str) else "")
def test_a_rule_is_shown_by_tests_that_exist_or_says_that_it_is_not_there(
    rule: str, does: str, tests: list[str]
) -> None:
    assert (ABSENT in does) == (marks()[rule] == "○"), "docs/service.md says otherwise"
    assert tests or ABSENT in does
    for test in tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def test_the_commands_and_settings_of_the_table_exist() -> None:
    commands = grammar.root().commands
    known = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    for rule, does, _tests in rows():
        for code in re.findall(r"`([a-z]+-?[a-z]*(?: --[a-z -]+)?)`", does):
            name, *options = code.split()
            if "-" in name or options:
                assert name in commands, (rule, code)
            assert {one for one in options if one.startswith("--")} <= known, (rule, code)


def test_tests_that_are_named_for_a_rule_name_one_that_exists() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        for section, number in re.findall(r"def test_s(\d+)_(\d+)_", path.read_text()):
            assert f"{section}.{number}" in marks(), path
