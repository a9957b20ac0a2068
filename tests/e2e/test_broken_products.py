"""Each class of bug once on purpose: the oracle sees it. The same scenarios pass with the product as it is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import scenarios
from tests.e2e.oracle import Mismatch
from tests.e2e.rig import Rig, TestDisk
from tests.guest.domain import DiskSpec, make_image

MIB = 1 << 20
SIZE = str(4 * MIB + 512 * 77)


def template_of(rig: Rig) -> Path:
    return rig.scratch / "template.qcow2"


# fault → the kind of disk and the scenario that shows it
SHOWN_BY: dict[str, tuple[int, Callable[[Rig, TestDisk], None]]] = {
    "zero_skipped": (0, scenarios.zeroed),
    "dirty_bit_dropped": (0, scenarios.few_blocks_changed),
    "short_block_dropped": (0, scenarios.odd_end),
    "bitmap_after_switch": (0, scenarios.written_during),
    "commit_while_reading": (1, scenarios.written_during),
    "carry_forgotten": (0, scenarios.head_deleted),
    "bitmap_ignored_in_rollback": (0, scenarios.rolled_back),
    "digest_unchecked": (0, scenarios.damaged_store),
    "commit_into_lowest": (2, lambda rig, disk: scenarios.on_template(rig, disk, template_of(rig))),
}


@pytest.fixture
def disks(workdir: Path) -> list[DiskSpec]:
    """Return a qcow2, a raw one, and one on a template."""
    template = make_image(workdir / "template.qcow2", SIZE)
    fill = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x55 0 2M", str(template)]
    subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
    return [
        DiskSpec(make_image(workdir / "plain.qcow2", SIZE)),
        DiskSpec(make_image(workdir / "plain.raw", SIZE, "raw"), "raw"),
        DiskSpec(make_image(workdir / "on-template.qcow2", SIZE, "qcow2", "-b", str(template), "-F", "qcow2")),
    ]


@pytest.mark.parametrize("fault", list(SHOWN_BY))
def test_the_oracle_sees_a_broken_product(fault: str, disks: list[DiskSpec], make_rig: Callable[..., Rig]) -> None:
    number, scenario = SHOWN_BY[fault]
    rig = make_rig(disks, fault=fault)
    if fault == "commit_into_lowest":
        rig.settle_timeout_s = 2.0  # the guest ends up where hvsnap rightly refuses to go on
    with pytest.raises(Mismatch):
        scenario(rig, rig.disks[number])
