"""Several disks of a bare guest at one instant, with a guest that really writes to them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hvsnap import wire
from tests import support_table
from tests.e2e.oracle import instant_in_log, load, logged_operation
from tests.e2e_bare.rig import BareRig, DoctoredDaemon
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import wait_for


def counter(rig: BareRig, snapshot_id: str) -> int:
    return int.from_bytes(rig.restored(snapshot_id)[:8].tobytes(), "little")


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_group_is_one_instant_and_a_log_of_writes_ends_in_one(
    make_bare: Callable[..., BareGuest],
    make_daemon: Callable[..., DoctoredDaemon],
    guest_image: GuestImage,
    workdir: Path,
    mode: str,
) -> None:
    """``pingpong`` counts on two disks in turn: at any one instant the first is as far as the second, or one ahead."""
    disks = [
        BareDisk(make_image(workdir / "a.qcow2", "8M"), id="vda"),
        BareDisk(make_image(workdir / "b.raw", "8M", "raw"), "raw", id="vdb", style="drive"),
        BareDisk(support_table.data_file_image(workdir / "c.qcow2", 8 << 20), id="vdc"),
    ]
    guest = make_bare(disks, guest_image).start()
    rig = BareRig(guest, make_daemon(guest, mode=mode), workdir)
    guest.spawn("stress random /dev/vdc 77 0 200000")
    guest.run("(stress pingpong /dev/vda /dev/vdb 100 > /dev/null 2>&1 &)")
    wait_for(lambda: len(guest.logged()) > 20, "20 operations")
    ids: list[str] = []
    measured: set[str] = set()
    for number in range(4):
        group = rig.daemon.snapshot(
            guest.name, ["vda", "vdb"], group=True, consistency="app" if number % 2 else "crash"
        )
        assert {snapshot.consistency for snapshot in group} == {"app" if number % 2 else "crash"}
        assert len({snapshot.group for snapshot in group}) == 1
        measured |= {snapshot.target for snapshot in group if snapshot.impact is not None}
        first, second = (counter(rig, next(s.id for s in group if s.target == t)) for t in ("vda", "vdb"))
        assert first - second in (0, 1), (first, second)
        assert first > 0
        ids += [snapshot.id for snapshot in rig.daemon.snapshot(guest.name, ["vdc"], consistency="crash")]
    assert measured == {"vda", "vdb"}  # what the guest felt: QEMU's counters are found for both kinds of disks
    guest.run("pkill stress; sleep 0.3; sync")
    log = [logged_operation(line) for line in guest.logged()]
    images = [rig.restored(snapshot_id) for snapshot_id in ids]
    initial = images[0] * 0
    instants = [instant_in_log(image, initial, log) for image in images]
    assert instants == sorted(instants)
    assert instants[-1] > 0
    rig.check_on_images()


def test_frozen_file_systems_are_in_the_snapshot_whole(
    make_bare: Callable[..., BareGuest],
    make_daemon: Callable[..., DoctoredDaemon],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    raw = workdir / "fs.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(raw), "16M"], check=True)
    guest = make_bare([BareDisk(raw, "raw")], guest_image).start()
    rig = BareRig(guest, make_daemon(guest), workdir)
    guest.run("mount /dev/vda /mnt && echo written > /mnt/file")
    (snapshot,) = rig.daemon.snapshot(guest.name, consistency="app")
    guest.run("echo after > /mnt/after")  # it is thawed
    restored = workdir / "restored.raw"
    rig.restored(snapshot.id).tofile(restored)
    done = subprocess.run(["debugfs", "-R", "cat file", str(restored)], capture_output=True, text=True)
    assert done.stdout == "written\n"
    # Frozen before: the journal has nothing to replay.
    assert "needs_recovery" not in subprocess.run(
        ["dumpe2fs", "-h", str(restored)], capture_output=True, text=True
    ).stdout  # fmt: skip
    assert load(restored).size == 16 << 20


MERGES = int(os.environ.get("HVSNAP_MERGES", "4"))


def test_overlays_are_merged_again_and_again_while_the_guest_writes(
    make_bare: Callable[..., BareGuest],
    make_daemon: Callable[..., DoctoredDaemon],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    """Through its own devices, by two programs for each disk: QEMU's monitor is no stand-in for that (docs/support.md).

    ``HVSNAP_MERGES=N`` merges N overlays into each disk.
    """
    disks = [
        BareDisk(support_table.data_file_image(workdir / "a.qcow2", 16 << 20), id="vda"),
        BareDisk(make_image(workdir / "b.raw", "16M", "raw"), "raw", id="vdb"),
    ]
    guest = make_bare(disks, guest_image).start()
    rig = BareRig(guest, make_daemon(guest, mode="redirect"), workdir)
    for disk in rig.disks:
        for length in (4096, 262144):
            turn = f"stress random /dev/{disk.target} $((i=i+7)) 200 {length}"
            guest.run(f"(while [ ! -e /tmp/stop ]; do {turn}; done > /dev/null 2>&1 &)")
    older: list[str] = []
    for _ in range(MERGES):
        made = rig.daemon.snapshot(guest.name, group=True, consistency="crash")
        assert guest.active
        if older:  # a chain has an end
            with rig.daemon.client() as client:
                client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=older))
        older = [one.id for one in made]
    guest.run("touch /tmp/stop; while ps | grep -q [s]tress; do usleep 50000; done; sync")
    for disk in rig.disks:
        rig.replace(disk)
    rig.capture(rig.disks, group=True)
    for disk in rig.disks:
        rig.check_snapshots(disk)
