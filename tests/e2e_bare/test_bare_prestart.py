"""``hvsnap recover --image`` before a launcher starts a redirected guest that died: its newest data is in its image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvsnap import wire
from tests.e2e.oracle import check_same, converted
from tests.e2e.scenarios import write
from tests.e2e_bare.conftest import MakeRig
from tests.e2e_bare.rig import BareRig, a_disk

MIB = 1 << 20


def recover(rig: BareRig, image: Path) -> subprocess.CompletedProcess[str]:
    entry = "import sys; from hvsnap.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", entry, "--config", str(rig.daemon.config), "recover", "--image", str(image)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def died_redirected(make_rig: MakeRig, workdir: Path, *, daemon_dies: bool) -> BareRig:
    """Return a guest that died with its newest writes in overlays, as did the daemon if asked for."""
    rig = make_rig([a_disk(workdir), a_disk(workdir, "vdb", image_format="raw")], "redirect")
    for disk in rig.disks:
        rig.do(disk, write(0, 3 * MIB, 6))
    rig.capture(rig.disks, group=True)
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name, group=True, consistency="crash")
        gate.reached(made[0].id)
        for disk in rig.disks:
            rig.do(disk, write(2 * MIB, 2 * MIB, 7))
            rig._human(rig._device(disk), "flush")
        assert rig.left_behind() != []
        if daemon_dies:
            rig.daemon.kill()
        rig.guest.kill()
        if not daemon_dies:
            # The launcher comes at once; the daemon is in the middle of reading.
            done = recover(rig, rig.disks[0].spec.path)
            assert done.returncode == 0, done.stderr
    return rig


def then_all_is_well(rig: BareRig) -> None:
    for disk in rig.disks:
        rig.check_disk(disk, "before the guest's start")
    rig.check_on_images()
    rig.guest.start()
    for disk in rig.disks:
        rig.check_disk(disk, "after the guest's start")
    rig.capture(rig.disks, group=True)
    for disk in rig.disks:
        rig.check_snapshots(disk)


def test_without_a_daemon_the_newest_data_is_merged(make_rig: MakeRig, workdir: Path) -> None:
    """FAULTS 5."""
    rig = died_redirected(make_rig, workdir, daemon_dies=True)
    with pytest.raises(AssertionError):
        rig.check_disk(rig.disks[0], "the image alone is stale")
    done = recover(rig, rig.disks[0].spec.path)
    assert done.returncode == 0, done.stderr
    link = workdir / "link.raw"
    link.symlink_to(rig.disks[1].spec.path)
    again = recover(rig, link)  # the same capture, by another name of its other image: nothing is open any more
    assert again.returncode == 0, again.stderr
    rig.daemon.start()
    then_all_is_well(rig)


def test_a_daemon_at_work_gives_way_to_the_guests_start(make_rig: MakeRig, workdir: Path) -> None:
    rig = died_redirected(make_rig, workdir, daemon_dies=False)
    then_all_is_well(rig)


def test_what_cannot_be_merged_keeps_the_guest_from_starting(make_rig: MakeRig, workdir: Path) -> None:
    rig = died_redirected(make_rig, workdir, daemon_dies=True)
    (overlay,) = workdir.glob("vda.qcow2.*.overlay")
    lost = overlay.rename(workdir / "lost")
    overlay.write_bytes(b"no qcow2 at all")
    done = recover(rig, rig.disks[0].spec.path)
    assert done.returncode == 1
    assert "cannot be settled yet" in done.stderr
    lost.rename(overlay)
    assert recover(rig, rig.disks[0].spec.path).returncode == 0
    rig.daemon.start()
    then_all_is_well(rig)


def test_an_image_that_nobody_captured_is_ready(make_rig: MakeRig, workdir: Path) -> None:
    rig = make_rig([a_disk(workdir)])
    assert recover(rig, workdir / "no-such.qcow2").returncode == 0
    rig.daemon.stop()
    assert recover(rig, rig.disks[0].spec.path).returncode == 0


def test_a_guest_started_on_its_stale_image_is_left_alone_and_told(make_rig: MakeRig, workdir: Path) -> None:
    """Its launcher did not ask first: nothing that was written to either is touched, until somebody decides."""
    rig = died_redirected(make_rig, workdir, daemon_dies=True)
    stale = [converted(disk.spec.path, disk.spec.format, workdir) for disk in rig.disks]
    rig.guest.start()
    rig.daemon.start()
    with rig.daemon.client() as client:
        (found,) = [one for one in client.get("/doctor", wire.DoctorReport).findings if one.check == "journal"]
        assert found.severity == "warning"
        (told,) = client.post("/recover", wire.Recovery).operations
        assert told.outcome == "still-open"
        assert "the two have parted" in told.detail
    overlays = sorted(workdir.glob("*.overlay"))
    assert len(overlays) == 2
    for disk, image in zip(rig.disks, stale, strict=True):
        check_same(converted(disk.spec.path, disk.spec.format, workdir), image, "the image that the guest is on")
        rig.replace(disk)
    for overlay in overlays:
        overlay.unlink()
    with rig.daemon.client() as client:
        assert [one.outcome for one in client.post("/recover", wire.Recovery).operations] == ["undone"]
    rig.capture(rig.disks, group=True)
    for disk in rig.disks:
        rig.check_snapshots(disk)
