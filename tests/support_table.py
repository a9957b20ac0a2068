"""The table of docs/support.md as values, and the disks that its columns stand for."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hvsnap.capture.facts import Mode
from hvsnap.capture.support import ImageTraits, Way
from tests.guest.domain import make_image

DOCUMENT = Path(__file__).parents[1] / "docs" / "support.md"
COLUMNS = ("qcow2", "raw", "qcow2 on a backing file", "qcow2 with a data file", "LUKS")
WAYS = {
    "libvirt redirect": Way(Mode.REDIRECT, bare=False),
    "libvirt offline": Way(Mode.OFFLINE, bare=False),
    "bare fleece": Way(Mode.FLEECE, bare=True),
    "bare redirect": Way(Mode.REDIRECT, bare=True),
    "bare offline": Way(Mode.OFFLINE, bare=True),
}
TRAITS = dict.fromkeys(COLUMNS, ImageTraits()) | {
    "LUKS": ImageTraits(encrypted=True, secret=True),
}
"""What the rules see of each column's images; libvirt names the secret of one."""

PLAIN = COLUMNS[:4]


@dataclass(frozen=True)
class Cell:
    """One cell: ``test`` is the letter of the test that runs it, ``note`` the number of the rule that refuses it."""

    way: str
    group: bool
    column: str
    test: str = ""
    note: int = 0


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def cells() -> list[Cell]:
    """Return all cells; raises for a table of another form."""
    head, *rows = _rows(DOCUMENT.read_text())
    if tuple(head[2:]) != COLUMNS:
        raise ValueError(head)
    found = []
    for way, disks, *row in rows:
        for column, cell in zip(COLUMNS, row, strict=True):
            refused = re.fullmatch(r"refused \((\d+)\)", cell)
            group = {"one": False, "group": True}[disks]
            note = int(refused[1]) if refused else 0
            found.append(Cell(way, group, column, "" if refused else cell, note))
    return found


def notes() -> dict[int, str]:
    """Return the words by which each numbered refusal is known."""
    return {int(number): words for number, words in re.findall(r"^(\d+)\. `([^`]+)`", DOCUMENT.read_text(), re.M)}


def tests() -> dict[str, str]:
    """Return which test each letter stands for."""
    return dict(re.findall(r"^- ([A-Z]): `([^`]+)`", DOCUMENT.read_text(), re.M))


def supported(way: str, *, group: bool) -> list[str]:
    """Return the columns that the table calls supported."""
    return [cell.column for cell in cells() if (cell.way, cell.group) == (way, group) and cell.test]


def refused(way: str) -> dict[str, str]:
    """Return the columns that the table calls refused, and by which words."""
    return {cell.column: notes()[cell.note] for cell in cells() if cell.way == way and cell.note}


def matrix(*ways: str) -> set[tuple[str, bool, str]]:
    """Return the supported cells of some ways, but for LUKS: way, whether as a group, column."""
    return {(way, group, column) for way in ways for group in (False, True) for column in supported(way, group=group)
            if column in PLAIN}  # fmt: skip


def one_of_each(random: Random, columns: dict[str, str]) -> list[str]:
    """Return disks at random, at least one of each column; ``columns`` says which column a disk is of."""
    chosen = {random.choice([name for name, one in columns.items() if one == column]) for column in PLAIN
              if column in columns.values()}  # fmt: skip
    return [name for name in columns if name in chosen or random.random() < 0.5]


def plain_image(directory: Path, column: str, size: int) -> Path:
    """Make an image of a column but LUKS's; its backing file holds something."""
    path = directory / f"disk{COLUMNS.index(column)}.{'raw' if column == 'raw' else 'qcow2'}"
    if column == "raw":
        return make_image(path, str(size), "raw")
    if column == "qcow2 on a backing file":
        below = make_image(directory / "below.qcow2", str(size - 70_000 // 512 * 512))
        fill = ["-c", "write -P 0x77 123456 1500000", "-c", "write -P 0x78 2M 300000"]
        subprocess.run(["qemu-io", "-f", "qcow2", *fill, str(below)], check=True, stdout=subprocess.DEVNULL)
        return make_image(path, str(size), "qcow2", "-b", str(below), "-F", "qcow2")
    if column == "qcow2 with a data file":
        return data_file_image(path, size)
    return make_image(path, str(size))


def data_file_image(path: Path, size: int) -> Path:
    """Make a qcow2 image whose data is in a raw file beside it."""
    data = path.parent / f"{path.name}.data"
    make_image(path, str(size), "qcow2", "-o", f"data_file={data},data_file_raw=on")
    data.chmod(0o666)  # libvirt 9.0 hands the image to QEMU's user, and knows nothing of the file
    return path
