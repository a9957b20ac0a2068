"""The kill loop's one number: how it is shared out, and that the loops use it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults import rounds

TESTS = Path(__file__).parents[1]


def test_an_ordinary_run_makes_at_least_sixty() -> None:
    assert rounds.ORDINARY >= 60
    assert f"`make test` makes {rounds.ORDINARY} rounds" in (TESTS.parent / "docs" / "contributing.md").read_text()
    assert {rounds.share(part, rounds.ORDINARY) for part in rounds.PARTS} == set(rounds.PARTS.values())


@pytest.mark.parametrize("wanted", [1, 60, 500])
def test_so_many_are_made_as_are_asked_for(wanted: int) -> None:
    made = sum(rounds.share(part, wanted) for part in rounds.PARTS)
    assert wanted <= made < wanted + len(rounds.PARTS)


def test_none_means_every_point() -> None:
    assert {rounds.share(part, 0) for part in rounds.PARTS} == {rounds.ALL}


def test_every_part_has_a_loop() -> None:
    text = "".join(path.read_text() for path in TESTS.rglob("test_*.py") if path.parent.name in ("faults", "e2e_bare"))
    for part in rounds.PARTS:
        words = part.replace("bare fleece", "bare {mode}").replace("bare redirect", "bare {mode}")
        assert f'"{words}"' in text or f'"{re.sub(", (daemon|QEMU)$", ", {victim}", words)}"' in text, part


def test_the_end_of_a_run_tells_how_many_there_were_and_of_which_seed() -> None:
    noted: list[tuple[str, object]] = [("other", 1)]
    for kills in (3, 4):
        rounds.told(lambda *one: noted.append(one), "bare fleece, QEMU", kills)
    rounds.told(lambda *one: noted.append(one), "libvirt redirect, QEMU", 2)
    line = rounds.summary(noted, {"E2E_SEED": "7"})
    assert line.startswith("kill loop: 9 rounds, E2E_SEED 7 (7 bare fleece, QEMU, 2 libvirt redirect, QEMU)")
    assert rounds.summary([("other", 1)]) == ""
