"""docs/support.md against the rules of the code: each cell, each refusal's words, each test that is named."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

from hvsnap.capture.facts import Mode
from hvsnap.capture.support import ImageTraits, Way, refusal
from hvsnap.errors import Refused
from tests import support_table
from tests.support_table import COLUMNS, TRAITS, WAYS, Cell

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_cell_once() -> None:
    found = [(cell.way, cell.group, cell.column) for cell in support_table.cells()]
    assert sorted(found) == sorted(itertools.product(WAYS, (False, True), COLUMNS))


@pytest.mark.parametrize("cell", support_table.cells(), ids=lambda cell: f"{cell.way}, {cell.column}, {cell.group}")
def test_a_cell_is_what_the_rules_say(cell: Cell) -> None:
    why = refusal("disk vda", WAYS[cell.way], TRAITS[cell.column], sealed=True)
    assert (why is None) == bool(cell.test), why
    if why is not None:
        assert support_table.notes()[cell.note] in why.message


@pytest.mark.parametrize("named", support_table.tests().values())
def test_a_test_that_the_table_names_is_there(named: str) -> None:
    file, _, function = named.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_letter_stands_for_a_test() -> None:
    assert {cell.test for cell in support_table.cells() if cell.test} == set(support_table.tests())


LIBVIRT, BARE = Way(Mode.REDIRECT, bare=False), Way(Mode.FLEECE, bare=True)


@pytest.mark.parametrize(
    ("note", "way", "image", "sealed"),
    [
        (1, BARE, ImageTraits(encrypted=True), True),
        (2, LIBVIRT, ImageTraits(encrypted=True, secret=True), False),
        (2, BARE, ImageTraits(encrypted=True), False),
        (3, LIBVIRT, ImageTraits(encrypted=True), True),
        (4, LIBVIRT, ImageTraits(encrypted=True, encrypted_below=True, secret=True), True),
        (4, BARE, ImageTraits(encrypted_below=True), False),
    ],
)
def test_every_refusal_is_in_the_document(note: int, way: Way, image: ImageTraits, sealed: bool) -> None:
    why = refusal("disk vda", way, image, sealed=sealed)
    assert isinstance(why, Refused)
    assert why.hint
    assert support_table.notes()[note] in why.message
