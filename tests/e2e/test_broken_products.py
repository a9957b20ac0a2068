"""Each class of bug once on purpose: the oracle sees it. The same scenarios pass with the product as it is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import short_directory
from tests.e2e import scenarios
from tests.e2e.oracle import Mismatch
from tests.e2e.rig import DoctoredDaemon, Rig, TestDisk
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

MIB = 1 << 20
SIZE = str(4 * MIB + 512 * 77)


def template_of(rig: Rig) -> Path:
    return rig.scratch / "template.qcow2"


# fault → the kind of disk and the scenario that shows it; the one that leaves its guest on the template comes last
SHOWN_BY: dict[str, tuple[str, Callable[[Rig, TestDisk], None]]] = {
    "zero_skipped": ("qcow2", scenarios.zeroed),
    "dirty_bit_dropped": ("qcow2", scenarios.few_blocks_changed),
    "short_block_dropped": ("qcow2", scenarios.odd_end),
    "bitmap_after_switch": ("qcow2", scenarios.written_during),
    "commit_while_reading": ("raw", scenarios.written_during),
    "carry_forgotten": ("qcow2", scenarios.head_deleted),
    "bitmap_ignored_in_rollback": ("qcow2", scenarios.rolled_back),
    "offline_lock_missing": ("raw", scenarios.started_while_read),
    "digest_unchecked": ("qcow2", scenarios.damaged_store),
    "commit_into_lowest": ("template", lambda rig, disk: scenarios.on_template(rig, disk, template_of(rig))),
}


@pytest.fixture(scope="module")
def guest(libvirtd: Libvirtd) -> Iterator[Guest]:
    """A guest with a disk for each fault."""
    directory = short_directory()
    template = make_image(directory / "template.qcow2", SIZE)
    fill = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x55 0 2M", str(template)]
    subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
    options = {"qcow2": (), "raw": (), "template": ("-b", str(template), "-F", "qcow2")}
    specs = []
    for fault, (kind, _scenario) in SHOWN_BY.items():
        image_format = "raw" if kind == "raw" else "qcow2"
        specs.append(DiskSpec(make_image(directory / fault, SIZE, image_format, *options[kind]), image_format))
    guest = Guest(libvirtd, directory, directory.name, specs, agent=False).define()
    try:
        yield guest.start()
    finally:
        guest.remove()
        shutil.rmtree(directory)


@pytest.mark.parametrize("fault", list(SHOWN_BY))
def test_the_oracle_sees_a_broken_product(fault: str, guest: Guest, workdir: Path) -> None:
    daemon = DoctoredDaemon(workdir, guest.libvirtd.uri, fault).start()
    try:
        guest.start()  # a fault found in a guest that was off leaves it so
        rig = Rig(guest, daemon, guest.disks[0].path.parent)
        if fault == "commit_into_lowest":
            rig.settle_timeout_s = 2.0  # the guest ends up where hvsnap rightly refuses to go on
        with pytest.raises(Mismatch):
            SHOWN_BY[fault][1](rig, rig.disks[list(SHOWN_BY).index(fault)])
    finally:
        daemon.kill()
