"""Every cell of docs/support.md for guests of libvirt: captured at once and alone, running and off, compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests import support_table
from tests.e2e.rig import Rig, TestDisk
from tests.e2e.test_luks import LuksSpec
from tests.guest.domain import DiskSpec
from tests.guest.libvirtd import Libvirtd
from tests.guest.luks import keep_secret, make_luks

SIZE = (4 << 20) + 512 * 77
SEED = int(os.environ.get("E2E_SEED", "31"))


def run_cells(rig: Rig, columns: dict[str, TestDisk], way: str, random: Random, *, storm: bool = True) -> None:
    """Capture the disks of a way's supported cells, each alone and all as a group.

    They are written to while their images are frozen, and, in a ``storm``, until the guest is back on them, too.
    """
    for group in (False, True):
        disks = [columns[column] for column in support_table.supported(way, group=group)]
        assert disks, way
        for disk in disks:
            rig.random_operations(random, disk, 3)

        def meanwhile(disks: list[TestDisk] = disks) -> None:
            for disk in disks:
                rig.random_operations(random, disk, 3)

        rig.capture(disks, meanwhile if rig.guest.active else lambda: None, random if storm else None, group=group)
        for disk in disks:
            rig.check_disk(disk, f"{way} after a capture")


def test_libvirt_cells(
    libvirtd: Libvirtd, sealed: dict[str, str], make_rig: Callable[..., Rig], workdir: Path, emulator: str
) -> None:
    print(f"seed {SEED}")
    random = Random(SEED)
    secret = keep_secret(libvirtd.uri, workdir)
    specs = [
        DiskSpec(support_table.plain_image(workdir, column, SIZE), "raw" if column == "raw" else "qcow2")
        for column in support_table.PLAIN
    ]
    specs.append(LuksSpec(make_luks(workdir / "luks.qcow2", str(SIZE), secret), secret=secret))
    rig = make_rig(specs, emulator=emulator, **sealed)
    columns = dict(zip(support_table.COLUMNS, rig.disks, strict=True))
    run_cells(rig, columns, "libvirt redirect", random)
    for disk in rig.disks:
        rig.flush(disk)
    rig.guest.destroy()
    run_cells(rig, columns, "libvirt offline", random)
    for disk in rig.disks:
        assert len(disk.states) == 4
        rig.check_snapshots(disk)
        rig.roll_back(disk, random.choice(list(disk.states)), safety_snapshot=False)
