"""Random lives of a bare guest's disks: every snapshot restores to the copy kept of its instant.

FAULTS 6, 7, 20, 21 for bare guests. A failure names its seed: ``E2E_SEED=N`` runs that one alone.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from random import Random

import pytest

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
    sizes = [random.randrange(3 * MIB, 9 * MIB) // 512 * 512 for _ in range(6)]
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
    ]


def power_cycle(rig: BareRig, random: Random) -> None:
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
    if random.random() < 0.5:
        rig.capture([disk for disk in rig.disks if random.random() < 0.5] or rig.disks[:1])
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
    for _ in range(ROUNDS):
        for disk in rig.disks:
            rig.random_operations(random, disk, random.randrange(8))
        if random.random() < 0.35:
            power_cycle(rig, random)
        disks = [disk for disk in rig.disks if random.random() < 0.75] or rig.disks[:1]
        storm = random if random.random() < 0.7 else None
        rig.capture(disks, lambda: delete_some(rig, random), storm, group=random.random() < 0.5)
        for disk in disks:
            rig.check_disk(disk, "after a capture")
    for disk in rig.disks:
        rig.check_snapshots(disk)
