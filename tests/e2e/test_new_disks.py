"""New disks where they are wanted, and what becomes of them: pools, devices, guests; back to their origin; released."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import libvirt
import numpy as np
import pytest

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from hvsnap.errors import HvsnapError
from tests.conftest import short_directory
from tests.e2e.oracle import BLOCK, Replica, check_same, converted, load
from tests.e2e.rig import DoctoredDaemon, Rig, TestDisk
from tests.e2e.scenarios import write
from tests.faults.killing_daemon import Order
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

MIB = 1 << 20
SIZE = 6 * MIB + 512 * 77


@pytest.fixture(scope="module")
def rig(libvirtd: Libvirtd) -> Iterator[Rig]:
    """A guest with one snapshot of each of its two disks, and a storage pool beside."""
    directory = short_directory()
    disks = [
        DiskSpec(make_image(directory / "a.qcow2", str(SIZE))),
        DiskSpec(make_image(directory / "b.raw", str(SIZE), "raw"), "raw", "scsi"),
    ]
    guest = Guest(libvirtd, directory, directory.name, disks, agent=False).define().start()
    daemon = DoctoredDaemon(directory, libvirtd.uri)
    try:
        rig = Rig(guest, daemon.start(), directory)  # type: ignore[arg-type]
        for number, disk in enumerate(rig.disks):
            rig.do(disk, write(0, 20 * BLOCK, 10 + number), write(SIZE - 700, 700, 20 + number))
        rig.capture(rig.disks)
        (directory / "pool").mkdir()
        xml = f"<pool type='dir'><name>{guest.name}</name><target><path>{directory}/pool</path></target></pool>"
        libvirt.open(libvirtd.uri).storagePoolDefineXML(xml, 0).create(0)
        yield rig
    finally:
        daemon.stop()
        guest.remove()
        shutil.rmtree(directory, ignore_errors=True)


def ask(rig: Rig, path: Path | str, **options: Any) -> wire.Task:
    """Make a disk of the first disk's snapshot; return the task at its end."""
    body = wire.DiskCreate(snapshot=next(iter(rig.disks[0].states)), path=str(path), **options)
    with rig.daemon.client() as client:
        return rig.daemon.task(client.post("/disks", wire.Task, body))


def made(rig: Rig, path: Path | str, **options: Any) -> wire.DiskCreated:
    task = ask(rig, path, **options)
    assert isinstance(task.result, wire.DiskCreated), (task.error, rig.daemon.log.read_text()[-3000:])
    return task.result


def refused(rig: Rig, code: str, path: Path | str, **options: Any) -> str:
    with pytest.raises(DaemonError) as caught:
        ask(rig, path, **options)
    assert (caught.value.error.code, bool(caught.value.hint)) == (code, True), caught.value.message
    return caught.value.message


def wanted(rig: Rig) -> np.ndarray[Any, Any]:
    return next(iter(rig.disks[0].states.values()))


def post(rig: Rig, call: str, answer: Any, body: Any) -> Any:
    with rig.daemon.client() as client:
        return client.post(f"/disks/{call}", answer, body)


def attached(rig: Rig, target: str) -> list[wire.GuestDisk]:
    with rig.daemon.client() as client:
        (guest,) = [one for one in client.get("/guests", wire.GuestList).guests if one.name == rig.guest.name]
    return [disk for disk in guest.disks if disk.target == target]


def test_s7_1_a_volume_of_a_pool_is_attached_goes_back_to_its_origin_and_is_released(rig: Rig) -> None:
    pool, guest = rig.guest.name, rig.guest
    told = made(rig, "new.qcow2", pool=pool, attach={"guest": guest.name, "target": "sdc"})
    assert (told.path, told.attached) == (f"{rig.scratch}/pool/new.qcow2", f"{guest.name}/sdc")
    check_same(converted(Path(told.path), "qcow2", rig.scratch), wanted(rig), "the volume")
    volume = libvirt.open(guest.libvirtd.uri).storagePoolLookupByName(pool).storageVolLookupByName("new.qcow2")
    assert (volume.path(), volume.info()[1]) == (told.path, SIZE)
    assert guest.active
    assert rig.sources().count(told.path) == 2  # as it runs and as it is defined
    assert [(disk.id, disk.path) for disk in attached(rig, "sdc")] == [(told.disk, told.path)]

    disk = TestDisk("sdc", DiskSpec(Path(told.path), "qcow2", "scsi"), Replica(wanted(rig).copy()))
    rig.disks.append(disk)
    rig.do(disk, write(3 * BLOCK, BLOCK, 1), write(SIZE - 5, 5, 2))
    rig.capture([disk])
    rig.do(disk, write(7 * BLOCK + 9, 2 * BLOCK, 3))
    with pytest.raises(DaemonError, match="is running"):
        post(rig, f"{guest.name}/sdc/reinit", wire.RollbackAnswer, wire.Reinit())
    guest.destroy()
    before = rig.present(disk)
    answer = post(rig, f"{guest.name}/sdc/reinit", wire.RollbackAnswer, wire.Reinit())
    task = rig.daemon.task(answer.task)
    assert isinstance(task.result, wire.Reinitialised), task.error
    assert task.result.written_bytes <= 5 * BLOCK  # what was written since, and no more
    check_same(rig.present(disk), wanted(rig), "the disk back at its origin")
    assert task.result.safety_snapshot is not None
    disk.states[task.result.safety_snapshot] = before
    rig.replace(disk)
    (after,) = rig.capture([disk])
    assert after.method == "bitmap"  # it has seen what was written to bring the disk back
    rig.check_snapshots(disk)

    with pytest.raises(DaemonError, match="attached to its guest"):
        post(rig, f"{told.disk}/release", wire.DiskReleased, wire.DiskRelease())
    guest.domain().detachDeviceFlags(
        f"<disk><source file='{told.path}'/><target dev='sdc' bus='scsi'/></disk>", libvirt.VIR_DOMAIN_AFFECT_CONFIG
    )
    rig.disks.remove(disk)
    refused(rig, "refused", told.path, force=True)  # its chain still stands for it
    plan = post(rig, f"{told.disk}/release", wire.DiskReleased, wire.DiskRelease(dry_run=True))
    assert (plan.kept, plan.disk.released, plan.disk.origin) == (3, False, next(iter(rig.disks[0].states)))
    assert post(rig, f"{told.disk}/release", wire.DiskReleased, wire.DiskRelease()).disk.released
    rig.check_snapshots(disk)  # manual ones stay
    made(rig, told.path, force=True)
    check_same(converted(Path(told.path), "qcow2", rig.scratch), wanted(rig), "the image, written over")


def test_f29_nothing_that_is_there_or_in_use_is_written_over(rig: Rig) -> None:
    rig.guest.start()
    image, directory = rig.disks[0].spec.path, rig.scratch
    file = directory / "there.raw"
    file.write_bytes(b"\xff" * BLOCK)
    (directory / "link").symlink_to(file)
    child = directory / "child.qcow2"
    make_image(directory / "base.qcow2", str(SIZE))
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", "-F", "qcow2", "-b", "base.qcow2", str(child)], check=True)
    files = sorted(os.listdir(directory))
    refused(rig, "target-exists", file, format="raw")
    for force in (False, True):
        refused(rig, "target-exists", directory / "link", format="raw", force=force)
        refused(rig, "target-exists", directory / "gates", force=force)
    assert "belongs to" in refused(rig, "refused", image, force=True)
    (directory / "same.qcow2").hardlink_to(image)
    assert "belongs to" in refused(rig, "refused", directory / "same.qcow2", force=True)
    (directory / "same.qcow2").unlink()
    for name in ("base.qcow2", "child.qcow2"):
        used = ["qemu-io", "-f", "qcow2", "-r", str(child)]
        with subprocess.Popen(used, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"length\n")
            process.stdin.flush()
            process.stdout.readline()
            refused(rig, "busy", directory / name, force=True)
            process.stdin.close()
    attach = {"guest": rig.guest.name, "target": "vda"}
    refused(rig, "target-exists", directory / "new", attach=attach)
    refused(rig, "bad-request", directory / "new", attach=attach | {"target": "hda"})
    refused(rig, "guest-unknown", directory / "new", attach=attach | {"guest": "nobody"})
    refused(rig, "not-found", "new", pool="nowhere")
    refused(rig, "bad-request", "a/new", pool=rig.guest.name)
    assert sorted(os.listdir(directory)) == files
    assert file.read_bytes() == b"\xff" * BLOCK

    file.chmod(0o640)
    made(rig, file, format="raw", force=True)
    check_same(load(file), wanted(rig), "the file, written over")
    assert file.stat().st_mode & 0o777 == 0o640
    # A guest of this machine type runs out of PCI slots: the disk stays, and what became of it is told.
    for target in ("vds", "vdt", "vdu", "vdv", "vdw"):
        slotless = ask(rig, directory / f"{target}.raw", format="raw", attach=attach | {"target": target})
        if slotless.error is not None:
            break
    assert slotless.error is not None
    assert f"{target}.raw was made, but could not be attached as {target}: libvirt: " in slotless.error.message
    assert slotless.error.hint.startswith("it is there")
    check_same(load(directory / f"{target}.raw"), wanted(rig), "the disk that is not attached")
    assert attached(rig, target) == []
    rig.guest.destroy()
    task = ask(rig, directory / "new", attach={"guest": rig.guest.name, "target": "vdx"})
    assert isinstance(task.result, wire.DiskCreated), task.error
    assert task.result.attached == f"{rig.guest.name}/vdx"
    assert [one.path for one in attached(rig, "vdx")] == [str(directory / "new")]


def test_s7_1_a_block_device_holds_the_disk_and_zeroes_and_nothing_of_what_was_on_it(rig: Rig) -> None:
    file = make_image(rig.scratch / "device", str(2 * SIZE), "raw")
    file.write_bytes(b"\xff" * (2 * SIZE))
    small = make_image(rig.scratch / "small", str(SIZE // 2), "raw")
    loops = [
        subprocess.run(["losetup", "--find", "--show", str(one)], check=True, capture_output=True, text=True)
        for one in (file, small)
    ]
    device, too_small = (Path(loop.stdout.strip()) for loop in loops)
    try:
        assert "block device" in refused(rig, "target-exists", device, format="raw")
        refused(rig, "no-space", too_small, format="raw", force=True)
        holder = os.open(device, os.O_RDWR | os.O_EXCL)  # as a mount has it
        refused(rig, "busy", device, format="raw", force=True)
        os.close(holder)
        with subprocess.Popen(["sleep", "60"], stdin=device.open("rb")) as reader:
            assert str(reader.pid) in refused(rig, "busy", device, format="raw", force=True)
            reader.kill()
        assert file.read_bytes() == b"\xff" * (2 * SIZE)

        link = rig.scratch / "by-name"
        link.symlink_to(device)
        made(rig, link, format="raw", force=True)
        found = np.frombuffer(device.read_bytes(), np.uint8)
        check_same(found[:SIZE], wanted(rig), "the device")
        assert not found[SIZE:].any()
        made(rig, device, force=True)
        check_same(converted(device, "qcow2", rig.scratch), wanted(rig), "qcow2 on the device")
    finally:
        for one in (device, too_small):
            subprocess.run(["losetup", "--detach", str(one)], check=True)


def killed_at(rig: Rig, control: Path, order: Order, action: Callable[[], object]) -> None:
    """Do an action of which the daemon dies, and start the next one, which settles what is left."""
    order.write(control)
    with contextlib.suppress(HvsnapError, httpx.HTTPError, RuntimeError):
        action()
    rig.daemon.wait_dead(20)
    control.unlink()
    rig.daemon.start(str(control))
    rig.daemon.settled()


def test_f29_killed_while_it_makes_a_volume_the_daemon_leaves_a_whole_one_or_none(rig: Rig) -> None:
    rig.guest.start()
    rig.daemon.stop()
    control = rig.scratch / "control"
    rig.daemon.start(str(control))
    path = rig.scratch / "pool" / "lost.qcow2"
    points = [("nbd.finish", "before"), ("rename(pool/.lost.qcow2.*.hvsnap)", "after")]
    attach = {"guest": rig.guest.name, "target": "sdd"}
    for number, (name, side) in enumerate(points):
        order = Order("kill", name, 1, side, id=str(number))
        killed_at(rig, control, order, lambda: ask(rig, "lost.qcow2", pool=rig.guest.name, attach=attach))
        volumes = libvirt.open(rig.guest.libvirtd.uri).storagePoolLookupByName(rig.guest.name).listVolumes()
        whole = (name, side) == points[-1]
        assert [one for one in volumes if "lost" in one] == ["lost.qcow2"] * whole
        assert path.exists() == whole
        assert [disk.path for disk in attached(rig, "sdd")] == [str(path)] * whole  # as it was asked for
    check_same(converted(path, "qcow2", rig.scratch), wanted(rig), "the volume")


def test_s7_3_killed_while_it_writes_the_next_daemon_brings_the_disk_back_to_its_origin(rig: Rig) -> None:
    control, path = rig.scratch / "control", rig.scratch / "pool" / "lost.qcow2"
    rig.guest.destroy()
    disk = TestDisk("sdd", DiskSpec(path, "qcow2", "scsi"), Replica(wanted(rig).copy()))
    rig.do(disk, write(2 * BLOCK, 7 * BLOCK, 1))
    (first,) = rig.daemon.snapshot(rig.guest.name, ["sdd"])
    disk.states[first.id] = rig.present(disk)
    rig.do(disk, write(30 * BLOCK, 2 * BLOCK, 2))
    body = wire.Reinit(safety_snapshot=False)

    def back() -> None:
        rig.daemon.task(post(rig, f"{rig.guest.name}/sdd/reinit", wire.RollbackAnswer, body).task)

    killed_at(rig, control, Order("kill", "nbd.finish", 1, "before", id="reinit"), back)
    check_same(rig.present(disk), wanted(rig), "the disk back at its origin")
    rig.replace(disk)
    (second,) = rig.daemon.snapshot(rig.guest.name, ["sdd"])
    disk.states[second.id] = wanted(rig)
    rig.check_snapshots(disk)
