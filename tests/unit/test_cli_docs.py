"""docs/cli.md says what the command line does: every command, option, exit code and schema, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvsnap import errors, wire
from hvsnap.cli import grammar
from hvsnap.cli.complaints import INTERRUPTED

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
COMPLETION = {"--install-completion", "--show-completion"}


def section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


@pytest.mark.parametrize("name", grammar.names())
def test_every_command_is_shown_with_an_example_and_all_its_options(name: str) -> None:
    assert f"$ hvsnap {name}" in PAGE
    command = grammar.root().commands[name]
    for option in (one for parameter in command.params for one in parameter.opts if one.startswith("--")):
        assert f"`{option}" in PAGE, option


def test_no_other_command_or_option_is_spoken_of() -> None:
    assert set(re.findall(r"^\$ hvsnap ([a-z][a-z-]+)", PAGE, re.MULTILINE)) == set(grammar.names())
    groups = [grammar.root(), *grammar.root().commands.values()]
    parameters = [parameter for group in groups for parameter in group.params]
    known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    assert told - known - {"--help", "--unix-socket"} == set()
    assert told >= COMPLETION


def kinds(error: type[errors.HvsnapError]) -> set[int]:
    return {error.exit_status}.union(*(kinds(below) for below in error.__subclasses__()))


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Errors and exit codes"), re.MULTILINE)}
    assert told == {0, INTERRUPTED} | kinds(errors.HvsnapError)


def test_the_schemas_exist_and_every_command_has_one() -> None:
    rows = [row for row in section("JSON").splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])}
    assert named == set(grammar.names())
    schemas = {name for row in rows for name in re.findall(r"`([A-Z]\w+)`", row.split("|")[2])}
    assert len(schemas) > 10
    for name in schemas:
        assert issubclass(getattr(wire, name), wire.Answer)
