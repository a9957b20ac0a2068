"""What stands in the way of a rollback is met before its disk is touched; a cancelled one has touched nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from tests.e2e.oracle import BLOCK, check_same
from tests.e2e.rig import Rig, TestDisk
from tests.e2e.scenarios import sha256, write
from tests.e2e.test_block_devices import DeviceSpec, device
from tests.guest.domain import DiskSpec, make_image
from tests.guest.libvirtd import wait_for

MIB = 1 << 20
SIZE = str(8 * MIB)

__all__ = ["device"]


@pytest.fixture
def small(workdir: Path) -> Iterator[Path]:
    """A file system of 12 MiB, which libvirtd does not see."""
    place = workdir / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=0755", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def begin(rig: Rig, disk: TestDisk, snapshot: str) -> wire.Task:
    with rig.daemon.client() as client:
        body = wire.Rollback(snapshot=snapshot, safety_snapshot=False)
        answer = client.post(f"/disks/{rig.guest.name}/{disk.target}/rollback", wire.RollbackAnswer, body)
    assert answer.task is not None
    return answer.task


def refused(rig: Rig, disk: TestDisk, snapshot: str) -> wire.Error:
    """Try a rollback that fails, and check that nothing is left of it; return why."""
    before = rig.present(disk)
    task = rig.daemon.roll_back(f"{rig.guest.name}/{disk.target}", snapshot, safety_snapshot=False)
    assert task.error is not None
    check_same(rig.present(disk), before, "a disk whose rollback was refused")
    assert rig.daemon.status().open_operations == 0
    assert not list((rig.daemon.directory / "state" / "guard").glob("*.rollback"))
    return task.error


def cancel(rig: Rig, disk: TestDisk, wanted: str) -> None:
    """Cancel it while it looks; it cannot be cancelled any more once it writes."""
    before = sha256(disk.spec.path)
    with rig.daemon.gate("verify") as gate:
        task = begin(rig, disk, wanted)
        gate.reached(wanted)
        with rig.daemon.client() as client:
            client.post(f"/tasks/{task.id}/cancel", wire.Task)
        ended = rig.daemon.task(task)
    assert (ended.state, sha256(disk.spec.path)) == ("cancelled", before)
    with rig.daemon.gate("written") as gate:
        task = begin(rig, disk, wanted)
        gate.reached(wanted)
        with rig.daemon.client() as client, pytest.raises(DaemonError, match="cannot be cancelled any more"):
            client.post(f"/tasks/{task.id}/cancel", wire.Task)
        gate.open()
        assert rig.daemon.task(task).state == "accomplished"
    check_same(rig.present(disk), disk.states[wanted], "the disk after all")


def test_a_rollback_is_refused_or_cancelled_before_its_disk_is_touched(
    make_rig: Callable[..., Rig], workdir: Path, small: Path, device: Path
) -> None:
    (workdir / "overlays").mkdir(mode=0o755)
    specs = [
        DiskSpec(make_image(workdir / "a.qcow2", SIZE)),
        DeviceSpec(device, "raw"),
        DiskSpec(make_image(workdir / "c.raw", SIZE, "raw"), "raw"),
    ]
    rig = make_rig(specs, capture=f'parallel = 8\noverlay_dir = "{workdir / "overlays"}"')
    first, block, tight = rig.disks
    for disk in rig.disks:
        rig.do(disk, write(0, 6 * MIB, 1))
    wanted = {one.target: one.id for one in rig.capture(rig.disks)}
    rig.do(first, write(MIB, 3 * BLOCK, 2), write(7 * MIB, BLOCK, 3))
    rig.do(block, write(MIB, BLOCK, 4))
    rig.guest.destroy()

    # Somebody builds on the image: a guest of another name, which is off.
    clone = make_image(workdir / "clone.qcow2", SIZE, "qcow2", "-b", str(first.spec.path), "-F", "qcow2")
    xml = rig.guest.domain().XMLDesc().replace(rig.guest.uuid, "0b5a1d7e-0000-4000-8000-0000000000aa")
    xml = xml.replace(f"<name>{rig.guest.name}</name>", "<name>clone</name>").replace(str(first.spec.path), str(clone))
    domain = rig._connection.defineXML(xml)
    error = refused(rig, first, wanted["vda"])
    domain.undefine()
    clone.unlink()
    assert error.code == "refused"
    assert f"clone/vda builds on {first.spec.path}" in error.message

    # The file system that the image is on by now has no room for what would come back.
    tight.spec.path.unlink()
    tight.spec.path.symlink_to(make_image(small / "c.raw", SIZE, "raw"))
    (small / "ballast").write_bytes(bytes(8 * MIB))
    error = refused(rig, tight, wanted["vdc"])
    assert (error.code, "would grow by" in error.message) == ("no-space", True)
    (small / "ballast").unlink()
    rig.roll_back(tight, wanted["vdc"], safety_snapshot=False)

    # A program writes to the device, which no lock of QEMU's shows.
    holder = os.open(device, os.O_RDWR)
    watcher = subprocess.Popen(["sleep", "600"], pass_fds=[holder])
    os.close(holder)
    try:
        error = refused(rig, block, wanted["vdb"])
    finally:
        watcher.kill()
        watcher.wait()
    assert (error.code, f"process {watcher.pid}" in error.message) == ("busy", True)
    rig.roll_back(block, wanted["vdb"], safety_snapshot=False)

    cancel(rig, first, wanted["vda"])


def test_a_rollback_whose_disk_is_gone_for_good_is_given_up_and_writes_to_nobodys_image(
    make_rig: Callable[..., Rig], workdir: Path
) -> None:
    rig = make_rig([DiskSpec(make_image(workdir / "a.qcow2", SIZE)), DiskSpec(make_image(workdir / "b.qcow2", SIZE))])
    disk = rig.disks[0]
    rig.do(disk, write(0, 20 * BLOCK, 1))
    (wanted,) = rig.capture([disk])
    rig.do(disk, write(0, 20 * BLOCK, 2))
    rig.guest.destroy()
    with rig.daemon.gate("written") as gate:
        begin(rig, disk, wanted.id)
        gate.reached(wanted.id)
        rig.daemon.kill()
    rig.guest.domain().undefine()
    disk.spec.path.unlink()
    make_image(disk.spec.path, SIZE)  # somebody else's, by now
    theirs = sha256(disk.spec.path)
    rig.daemon.start()
    wait_for(lambda: rig.daemon.status().open_operations == 0, "the end of the rollback")
    assert sha256(disk.spec.path) == theirs
    assert not list((rig.daemon.directory / "state" / "guard").iterdir())
    assert "its image is gone" in rig.daemon.log.read_text()


def test_a_rollback_that_a_full_device_has_stopped_goes_on_when_there_is_room(
    make_rig: Callable[..., Rig], workdir: Path, small: Path
) -> None:
    """Somebody else takes the room while what will be written is verified; nobody has to ask for another try."""
    rig = make_rig([DiskSpec(make_image(workdir / "a.raw", SIZE, "raw"), "raw")])
    (disk,) = rig.disks
    rig.do(disk, write(0, 6 * MIB, 1))
    (wanted,) = rig.capture([disk])
    rig.guest.destroy()
    disk.spec.path.unlink()
    disk.spec.path.symlink_to(make_image(small / "a.raw", SIZE, "raw"))
    with rig.daemon.gate("verify") as gate:
        task = begin(rig, disk, wanted.id)
        gate.reached(wanted.id)
        (small / "ballast").write_bytes(bytes(8 * MIB))
    ended = rig.daemon.task(task)
    assert ended.error is not None
    assert ended.error.code == "no-space"
    markers = rig.daemon.directory / "state" / "guard"
    assert list(markers.glob("*.rollback"))
    with rig.daemon.client() as client:
        (left,) = client.post("/recover", wire.Recovery).operations
    assert (left.outcome, rig.daemon.status().open_operations) == ("still-open", 1)
    (small / "ballast").unlink()
    wait_for(lambda: rig.daemon.status().open_operations == 0, "the end of the rollback", 90.0)
    assert not list(markers.glob("*.rollback"))
    check_same(rig.present(disk), disk.states[wanted.id], "the disk rolled back")
