"""The manual page: made from the commands, up to date, and to the liking of two programs that show it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from hvsnap import errors
from hvsnap.cli import grammar, manual
from hvsnap.cli.complaints import INTERRUPTED
from tests.unit.test_cli_docs import kinds

PAGE = manual.PLACE


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == manual.page(), "run: python -m hvsnap.cli.manual"


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_finds_nothing_wrong() -> None:
    done = subprocess.run(["mandoc", "-Tlint", "-Wwarning", str(PAGE)], capture_output=True, text=True)
    assert [
        line for line in done.stdout.splitlines() if "missing date" not in line
    ] == []  # it changes with commands only


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_shows_every_command_with_its_options_and_example() -> None:
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(PAGE)],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "MANWIDTH": "200", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(re.sub(".\b", "", done.stdout).replace("‐", "-").split())
    for name, command in grammar.root().commands.items():
        assert f" {name} " in shown
        assert " ".join(re.findall(r"\[bold\](.*)\[/bold\]", command.epilog)[0].replace("\\[", "[").split()) in shown
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else []:
                assert option in shown, (name, option)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    assert set(manual.EXIT_STATUS) == {0, INTERRUPTED} | kinds(errors.HvsnapError)
