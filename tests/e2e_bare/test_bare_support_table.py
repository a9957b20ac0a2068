"""Every cell of docs/support.md for bare guests: captured at once and alone, running and off, compared, or refused."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from hvsnap.cli.client import DaemonError
from tests import support_table
from tests.e2e.rig import TestDisk
from tests.e2e.test_support_table import SEED, SIZE, run_cells
from tests.e2e_bare.conftest import MakeRig
from tests.e2e_bare.rig import BareRig
from tests.guest.bare import BareDisk
from tests.guest.luks import Secret, make_luks, opened_luks, passphrase_file


class LuksDisk(BareDisk):
    """A disk whose image QEMU opens with a secret of its command line."""

    @property
    def opened(self) -> tuple[list[str], str]:
        return opened_luks(self.path, Secret("", passphrase_file(self.path.parent)))


def check_refused(rig: BareRig, columns: dict[str, TestDisk], way: str) -> None:
    """Try the cells that the table calls refused."""
    before = rig.daemon.status().snapshots
    for column, words in support_table.refused(way).items():
        with pytest.raises(DaemonError) as caught:
            rig.daemon.begin(rig.guest.name, [columns[column].target])
        assert (caught.value.error.code, caught.value.error.exit_status) == ("refused", 4)
        assert words in caught.value.error.message
    assert rig.daemon.status().snapshots == before


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_bare_cells(make_rig: MakeRig, workdir: Path, sealed: dict[str, str], mode: str, emulator: str) -> None:
    print(f"seed {SEED}")
    random = Random(f"{mode} {SEED}")
    disks = [
        BareDisk(support_table.plain_image(workdir, column, SIZE), "raw" if column == "raw" else "qcow2", f"vd{letter}")
        for column, letter in zip(support_table.PLAIN, "abcd", strict=True)
    ]
    secret = Secret("", passphrase_file(workdir))
    by_key = ",encrypt.format=luks,encrypt.key-secret=key"
    luks = LuksDisk(make_luks(workdir / "luks.qcow2", str(SIZE), secret), id="luks", node_extra=by_key)
    rig = make_rig([*disks, luks], mode, extra=secret.object, tables=sealed, qemu=[emulator])
    columns = dict(zip(support_table.COLUMNS, rig.disks, strict=True))
    for way in (f"bare {mode}", "bare offline"):
        # QEMU 7.2 aborts at times when its monitor is made to write to a raw disk while an overlay is merged.
        run_cells(rig, columns, way, random, storm=mode == "fleece")
        check_refused(rig, columns, way)
        if rig.guest.active:
            rig.guest.quit()
    for column, disk in columns.items():
        ways = [way for way in (f"bare {mode}", "bare offline") if column not in support_table.refused(way)]
        assert len(disk.states) == 2 * len(ways)
        if ways:
            rig.check_snapshots(disk)
            rig.roll_back(disk, random.choice(list(disk.states)), safety_snapshot=False)
