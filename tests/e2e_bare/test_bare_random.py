"""Random lives of a bare guest's disks: every snapshot restores to the copy kept of its instant.

FAULTS 6, 7, 20, 21 for bare guests. Together the lives come by every cell of docs/support.md that bare guests have. A
failure names its seed: ``E2E_SEED=N`` runs that one alone.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests import support_table
from tests.e2e.rig import TestDisk
from tests.e2e.test_random_sequences import delete_some
from tests.e2e_bare.conftest import MakeRig
from tests.e2e_bare.rig import BareRig
from tests.guest.bare import BareDisk
from tests.guest.domain import make_image

MIB = 1 << 20
SEEDS = [int(os.environ["E2E_SEED"])] if "E2E_SEED" in os.environ else [21]
ROUNDS = 4


def make_disks(random: Random, directory: Path) -> list[BareDisk]:
    """Make disks of all kinds; no size is a multiple of a block."""
    sizes = [random.randrange(3 * MIB, 9 * MIB) // 512 * 512 for _ in range(7)]
    sizes = [size + 512 if size % 65536 == 0 else size for size in sizes]
    template = make_image(directory / "template.qcow2", str(sizes[1] - 70_000 // 512 * 512))
    fill = ["-c", f"write -P 0x77 {random.randrange(MIB)} 1500000", "-c", f"write -P 0x78 {2 * MIB} 300000"]
    subprocess.run(["qemu-io", "-f", "qcow2", *fill, str(template)], check=True, stdout=subprocess.DEVNULL)

    def disk(number: int, name: str, image_format: str = "qcow2", *options: str, **spec: object) -> BareDisk:
        path = make_image(directory / f"disk{number}.{image_format}", str(sizes[number]), image_format, *options)
        return BareDisk(path, image_format, id=name, **spec)  # type: ignore[arg-type]

    return [
        disk(0, "vda"),
        disk(1, "vdb", "qcow2", "-b", str(template), "-F", "qcow2"),
        disk(2, "vdc", "raw"),
        disk(3, "vdd", style="drive"),
        disk(4, "sda", bus="scsi", serial="with-a-serial"),
        disk(5, "vde", style="drive", node_extra=",cache=none,aio=native"),
        BareDisk(support_table.data_file_image(directory / "disk6.qcow2", sizes[6]), id="vdf"),
    ]


COLUMNS = dict.fromkeys(("vda", "vdb", "vdc", "vdd", "sda", "vde", "vdf"), "qcow2") | {
    "vdb": "qcow2 on a backing file", "vdc": "raw", "vdf": "qcow2 with a data file"}  # fmt: skip
"""Which column of docs/support.md each disk is of."""

LIVED: dict[str, set[tuple[str, bool, str]]] = {}
"""The cells that the life in each mode has come by."""


def merges(disk: TestDisk) -> bool:
    """Whether QEMU 7.2's monitor may write to a disk while its overlay is merged (docs/support.md)."""
    return COLUMNS[disk.target].startswith("qcow2") and "data file" not in COLUMNS[disk.target]


def capture(rig: BareRig, random: Random, mode: str, *, group: bool, stormy: bool) -> None:
    """Make snapshots of disks of every column that can be captured so."""
    way = f"bare {mode}" if rig.guest.active else "bare offline"
    can = support_table.supported(way, group=group)
    names = support_table.one_of_each(random, {name: one for name, one in COLUMNS.items() if one in can})
    disks = [disk for disk in rig.disks if disk.target in names]
    storm = random if stormy else None
    rig.capture(
        disks, lambda: delete_some(rig, random), storm, lambda disk: mode == "fleece" or merges(disk), group=group
    )
    LIVED[mode] |= {(way, group, COLUMNS[disk.target]) for disk in disks}
    for disk in disks:
        rig.check_disk(disk, "after a capture")


def power_cycle(rig: BareRig, random: Random, mode: str) -> None:
    """End QEMU, well or badly; write to, capture and roll back disks of a guest that is off; start it."""
    if random.random() < 0.5:
        rig.guest.quit()
    else:
        for disk in rig.disks:
            rig.flush(disk)
        rig.guest.kill()
    for disk in rig.disks:
        rig.check_disk(disk, "after the guest's end")
        rig.random_operations(random, disk, random.randrange(3))
    capture(rig, random, mode, group=mode == "redirect", stormy=False)
    for disk in rig.disks:
        if disk.states and random.random() < 0.4:
            rig.roll_back(disk, random.choice(list(disk.states)), safety_snapshot=random.random() < 0.5)
    rig.guest.start()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_whatever_happens_to_a_bare_guest_its_snapshots_restore(
    make_rig: MakeRig, workdir: Path, mode: str, seed: int
) -> None:
    random = Random(f"{mode} {seed}")
    rig = make_rig(make_disks(random, workdir), mode)
    LIVED[mode] = set()
    off = random.randrange(ROUNDS)
    for number in range(ROUNDS):
        for disk in rig.disks:
            rig.random_operations(random, disk, random.randrange(8))
        if number == off or random.random() < 0.2:
            power_cycle(rig, random, mode)
        capture(rig, random, mode, group=number % 2 == 0, stormy=random.random() < 0.7)
    for disk in rig.disks:
        rig.check_snapshots(disk)


def test_lives_came_by_every_cell_of_the_table() -> None:
    if set(LIVED) != {"fleece", "redirect"}:
        pytest.skip("not all lives were lived in this process")
    assert set.union(*LIVED.values()) == support_table.matrix("bare fleece", "bare redirect", "bare offline")
