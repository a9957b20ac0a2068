"""Random lives of disks: whatever happens to them, every snapshot restores to the copy kept of its instant.

Each disk's life is a sequence of its own; nine share a guest, whose power cycles they share, too. The copies are made
by qemu-img of the frozen images, and compared with replicas that the same operations were applied to. Together the
lives come by every cell of docs/support.md that libvirt's guests have, but for LUKS.
A failure names its seed: ``E2E_SEED=N`` runs that one alone.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from hvsnap.cli.client import DaemonError
from hvsnap.wire import Chain
from tests import support_table
from tests.e2e.rig import Rig, TestDisk
from tests.guest.domain import DiskSpec, make_image

MIB = 1 << 20
SEEDS = [int(os.environ["E2E_SEED"])] if "E2E_SEED" in os.environ else [11, 12, 13]
ROUNDS = 5
NATIVE = "discard='unmap' cache='none' io='native'"
ODD_NAME = "an odd, n=m:é'&\" %s name"


def make_disks(random: Random, directory: Path) -> list[DiskSpec]:
    """Make nine disks of all kinds; no size is a multiple of a block."""
    sizes = [random.randrange(3 * MIB, 9 * MIB) // 512 * 512 for _ in range(9)]
    sizes = [size + 512 if size % 65536 == 0 else size for size in sizes]
    template = make_image(directory / "template.qcow2", str(sizes[2] - 70_000 // 512 * 512))
    fill = ["-c", f"write -P 0x77 {random.randrange(MIB)} 1500000", "-c", f"write -P 0x78 {2 * MIB} 300000"]
    subprocess.run(["qemu-io", "-f", "qcow2", *fill, str(template)], check=True, stdout=subprocess.DEVNULL)
    on_template = ("-b", str(template), "-F", "qcow2")

    (directory / ODD_NAME).mkdir(mode=0o755)

    def disk(number: int, image_format: str = "qcow2", *options: str, **spec: object) -> DiskSpec:
        place = directory / ODD_NAME if number == 5 else directory
        path = make_image(place / f"disk{number}.{image_format}", str(sizes[number]), image_format, *options)
        if number == 0:
            path = path.rename(directory / "behind-a-link.qcow2")
            (directory / "disk0.qcow2").symlink_to(path)
            path = directory / "disk0.qcow2"
        return DiskSpec(path, image_format, **spec)  # type: ignore[arg-type]

    clusters = random.choice(["512", "4k", "2M"])
    return [
        disk(0),
        disk(1, "qcow2", "-o", f"cluster_size={clusters}"),
        disk(2, "qcow2", *on_template, driver="discard='unmap' copy_on_read='on'"),
        disk(3, "qcow2", *on_template, "-o", "extended_l2=on,cluster_size=128k"),  # it is longer than the template
        disk(4, "raw"),
        disk(5, bus="scsi", serial="with-a-serial"),
        disk(6, "qcow2", "-o", random.choice(["compat=0.10", "preallocation=metadata"]), driver=NATIVE),
        disk(7, iothread=True),
        DiskSpec(support_table.data_file_image(directory / "disk8.qcow2", sizes[8])),
    ]


TARGETS = ("vda", "vdb", "vdc", "vdd", "vde", "sdf", "vdg", "vdh", "vdi")
COLUMNS = dict.fromkeys(TARGETS, "qcow2") | dict.fromkeys(("vdc", "vdd"), "qcow2 on a backing file")
COLUMNS |= {"vde": "raw", "vdi": "qcow2 with a data file"}
"""Which column of docs/support.md each disk is of."""

LIVED: dict[int, set[tuple[str, bool, str]]] = {}
"""The cells that each seed's life has come by."""


def capture(rig: Rig, random: Random, cells: set[tuple[str, bool, str]], *, group: bool, stormy: bool) -> None:
    """Make snapshots of disks of every column; in a storm the guest writes until it is back on its images."""
    names = support_table.one_of_each(random, COLUMNS)
    disks = [disk for disk in rig.disks if disk.target in names]
    way = "libvirt redirect" if rig.guest.active else "libvirt offline"
    rig.capture(disks, lambda: delete_some(rig, random), random if stormy else None, group=group)
    cells |= {(way, group, COLUMNS[disk.target]) for disk in disks}
    for disk in disks:
        rig.check_disk(disk, "after a capture")


def life(rig: Rig, random: Random, seed: int) -> set[tuple[str, bool, str]]:
    """Let a guest and its disks live for some rounds, and return the cells that they have come by."""
    cells: set[tuple[str, bool, str]] = set()
    off = random.randrange(ROUNDS)
    for number in range(ROUNDS):
        for disk in rig.disks:
            rig.random_operations(random, disk, random.randrange(8))
        if number == off or random.random() < 0.2:
            power_cycle(rig, random, cells, group=seed % 2 == 0)
        capture(rig, random, cells, group=(number + seed) % 2 == 0, stormy=random.random() < 0.7)
        delete_some(rig, random)
    return cells


def delete_some(rig: Rig, random: Random) -> None:
    """Delete snapshots here and there, heads too; one that a running capture builds on is refused, and stays."""
    for disk in rig.disks:
        if len(disk.states) > 1 and random.random() < 0.2:
            try:
                rig.delete(disk, random.choice(list(disk.states)))
            except DaemonError as error:
                if error.error.code != "snapshot-in-use":
                    raise


def power_cycle(rig: Rig, random: Random, cells: set[tuple[str, bool, str]], *, group: bool) -> None:
    """Switch the guest off, well or badly; write to, capture and roll back disks of a guest that is off; start it."""
    for disk in rig.disks:
        rig.flush(disk)  # what a guest did not flush may be lost with its QEMU
    if random.random() < 0.5:
        rig.guest.kill()
    else:
        rig.guest.destroy()
    for disk in random.sample(rig.disks, 3):
        rig.check_disk(disk, "after the guest's end")
        rig.random_operations(random, disk, random.randrange(3))
    capture(rig, random, cells, group=group, stormy=False)
    for disk in random.sample(rig.disks, 4):
        if disk.states:
            wanted = random.choice(list(disk.states))
            rig.roll_back(disk, wanted, safety_snapshot=random.random() < 0.5)
            rig.random_operations(random, disk, random.randrange(2))
    rig.guest.start()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_snapshot_of_a_random_life_restores_to_its_instant(
    seed: int, make_rig: Callable[..., Rig], workdir: Path
) -> None:
    print(f"seed {seed}")
    random = Random(seed)
    rig = make_rig(make_disks(random, workdir))
    assert [disk.target for disk in rig.disks] == list(COLUMNS)
    LIVED[seed] = life(rig, random, seed)
    for disk in rig.disks:
        rig.check_snapshots(disk, image_format=random.choice(("raw", "qcow2")))
        check_listed(rig, disk)


def test_lives_came_by_every_cell_of_the_table() -> None:
    if set(LIVED) != set(SEEDS) or len(SEEDS) < 2:
        pytest.skip("not all lives were lived in this process, or not to their end")
    assert set.union(*LIVED.values()) == support_table.matrix("libvirt redirect", "libvirt offline")


def check_listed(rig: Rig, disk: TestDisk) -> None:
    """Compare what the chain lists with the snapshots that were made and not deleted."""
    with rig.daemon.client() as client:
        name = f"{rig.guest.name}/{disk.target}"
        listed = {node.snapshot.id for node in client.get(f"/chains/{name}", Chain).nodes} if disk.states else set()
    assert listed == set(disk.states)
