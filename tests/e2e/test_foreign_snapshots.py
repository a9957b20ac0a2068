"""External snapshots that somebody else makes of a disk and keeps: it stays the same disk, with the same chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import libvirt

from hvsnap import wire
from tests.e2e.oracle import BLOCK, Operation
from tests.e2e.rig import Rig, TestDisk
from tests.e2e.scenarios import sha256, write
from tests.guest.domain import DiskSpec, make_image
from tests.guest.libvirtd import wait_for

MIB = 1 << 20
SIZE = 6 * MIB + 512 * 33


def put_overlay(rig: Rig, disk: TestDisk, path: Path) -> None:
    """As ``virsh snapshot-create-as --disk-only`` does."""
    xml = f"""<domainsnapshot><name>{path.stem}</name><disks><disk name='{disk.target}' snapshot='external'>
    <source file='{path}'/></disk></disks></domainsnapshot>"""
    rig.guest.domain().snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    disk.spec = replace(disk.spec, path=path)


def merge_down(rig: Rig, disk: TestDisk, path: Path) -> None:
    """As ``virsh blockcommit --active --pivot`` does."""
    domain = rig.guest.domain()
    domain.blockCommit(disk.target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    wait_for(lambda: (job := domain.blockJobInfo(disk.target)) and job["cur"] == job["end"], "the end of the commit")
    wait_for(lambda: "<mirror type='file' file" not in domain.XMLDesc() or "ready='yes'" in domain.XMLDesc(), "ready")
    domain.blockJobAbort(disk.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    disk.spec = replace(disk.spec, path=path)


def test_a_disk_is_the_same_under_a_foreign_overlay_and_after_its_merge(
    make_rig: Callable[..., Rig], workdir: Path
) -> None:
    base = make_image(workdir / "a.qcow2", str(SIZE))
    rig = make_rig([DiskSpec(base)])
    (disk,) = rig.disks
    rig.do(disk, write(0, 20 * BLOCK, 1))
    (first,) = rig.capture([disk])
    rig.do(disk, write(3 * BLOCK, BLOCK, 2))

    put_overlay(rig, disk, workdir / "over.qcow2")
    rig.do(disk, write(5 * BLOCK, 2 * BLOCK, 3), Operation("unmap", 9 * BLOCK, BLOCK))
    (second,) = rig.capture([disk])
    assert (second.disk, second.parent, second.kind, second.method) == (first.disk, first.id, "incremental", "rescan")
    assert "the image is another," in second.reason  # although libvirt has put a bitmap of that name there
    rig.do(disk, write(11 * BLOCK, 9, 4))
    (third,) = rig.capture([disk])
    assert (third.disk, third.method) == (first.disk, "bitmap")

    rig.guest.destroy()  # its definition names the overlay alone
    frozen = sha256(base)
    (fourth,) = rig.capture([disk])
    assert (fourth.disk, fourth.method) == (first.disk, "bitmap")
    rig.roll_back(disk, first.id)
    assert sha256(base) == frozen, "a rollback writes to a disk's own image, never to what that builds on"
    rig.guest.start()

    rig.do(disk, write(13 * BLOCK, BLOCK, 5))
    merge_down(rig, disk, base)
    rig.do(disk, write(15 * BLOCK, BLOCK, 6))
    (fifth,) = rig.capture([disk])
    assert (fifth.disk, fifth.parent, fifth.method) == (first.disk, first.id, "rescan")
    (sixth,) = rig.capture([disk])
    assert (sixth.disk, sixth.method) == (first.disk, "bitmap")
    rig.check_snapshots(disk)
    with rig.daemon.client() as client:
        (chain,) = client.get("/chains", wire.ChainList).chains
    assert (chain.disk, chain.path) == (first.disk, str(base))
