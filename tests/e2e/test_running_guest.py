"""A guest that really runs, and writes while its disks are captured."""

from __future__ import annotations

import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from hvsnap import wire
from tests.conftest import short_directory
from tests.e2e.oracle import (
    Bytes,
    Mismatch,
    Operation,
    Replica,
    check_same,
    converted,
    instant_in_log,
    logged_operation,
)
from tests.e2e.rig import DoctoredDaemon, Rig, TestDisk
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for

MIB = 1 << 20
SIZE = 8 * MIB + 512 * 33
SEED = 20260501


@pytest.fixture(scope="module")
def rig(libvirtd: Libvirtd, guest_image: GuestImage) -> Iterator[Rig]:
    """A booted guest: a qcow2 and a raw disk to write to, and one with an ext4."""
    directory = short_directory()
    ext4 = directory / "ext4.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0", str(ext4), "24M"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(ext4), str(directory / "c.qcow2")], check=True)
    specs = [
        DiskSpec(make_image(directory / "a.qcow2", str(SIZE))),
        DiskSpec(make_image(directory / "b.raw", str(SIZE), "raw"), "raw"),
        DiskSpec(directory / "c.qcow2"),
    ]
    guest = Guest(libvirtd, directory, directory.name, specs, guest_image).define()
    daemon = DoctoredDaemon(directory, libvirtd.uri, capture="freeze_timeout_s = 1.0")
    try:
        guest.start()
        guest.run("mount /dev/vdc /mnt")
        yield Rig(guest, daemon.start(), directory)
    finally:
        guest.remove()
        daemon.stop()
        shutil.rmtree(directory)


class Stress:
    """Random operations in the guest, one after the other, for as long as the context lasts; :attr:`log` then."""

    def __init__(self, guest: Guest, target: str, seed: int) -> None:
        self.log: list[Operation] = []
        self._guest, self._target, self._seed = guest, target, seed
        self._stop = threading.Event()
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=f"stress-{target}")

    def __enter__(self) -> Stress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure:
            raise self._failure[0]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._seed += 1
                lines = self._guest.run(f"stress random /dev/{self._target} {self._seed} 300 131072").splitlines()
                assert len(lines) == 300
                self.log += [logged_operation(line) for line in lines]
        except BaseException as error:
            self._failure.append(error)


def wipe(rig: Rig, disk: TestDisk) -> Bytes:
    """Make a disk all zeroes, and return that."""
    rig.guest.run(f"dd if=/dev/zero of=/dev/{disk.target} bs=64k 2>/dev/null; sync") if rig.present(disk).any() else ""
    disk.replica = Replica(rig.present(disk))
    return disk.replica.data


@pytest.mark.parametrize("number", [0, 1], ids=["qcow2", "raw"])
def test_snapshots_of_a_writing_guest_are_instants_of_its_log(rig: Rig, number: int) -> None:
    """Each holds every operation acknowledged before its instant, none begun after it, and the next ones follow on."""
    disk = rig.disks[number]
    initial = wipe(rig, disk)
    with Stress(rig.guest, disk.target, SEED + 1000 * number) as stress:
        taken = [rig.daemon.snapshot(rig.guest.name, [disk.target], consistency="crash")[0] for _ in range(4)]
    log = stress.log
    instants = [instant_in_log(rig.restored(snapshot.id), initial, log) for snapshot in taken]
    assert instants == sorted(instants)
    assert instants[0] < instants[-1]
    assert instant_in_log(rig.present(disk), initial, log) == len(log)
    rig.check_on_images()


def counter(data: Bytes) -> int:
    value: int = struct.unpack("<Q", data[:8].tobytes())[0]
    return value


def check_one_instant(rig: Rig, snapshots: Sequence[wire.Snapshot]) -> int:
    """Raise :class:`Mismatch` unless two disks hold the same instant of the counter that is written to both in turn."""
    first, second = (counter(rig.restored(snapshot.id)) for snapshot in snapshots)
    if first - second not in (0, 1):
        raise Mismatch(f"the counters are at {first} and {second}")
    return first


def test_disks_of_a_group_hold_the_same_instant(rig: Rig) -> None:
    names = [disk.target for disk in rig.disks[:2]]
    rig.guest.spawn("stress pingpong /dev/vda /dev/vdb 100")
    groups = [rig.daemon.snapshot(rig.guest.name, names, group=True, consistency="crash") for _ in range(3)]
    # The broken way: one after the other. The same check must see it.
    apart = [rig.daemon.snapshot(rig.guest.name, [name], consistency="crash")[0] for name in names]
    rig.guest.run("killall stress")  # fails if it does not run any more
    counters = [check_one_instant(rig, group) for group in groups]
    assert 0 < counters[0] < counters[1] < counters[2]
    assert len({snapshot.group for group in groups for snapshot in group}) == 3
    with pytest.raises(Mismatch, match="the counters are at"):
        check_one_instant(rig, apart)


def test_trimmed_file_system_restores_and_costs_nothing(rig: Rig) -> None:
    """FAULTS 21."""
    disk = rig.disks[2]
    guest = rig.guest
    guest.run("dd if=/dev/urandom of=/mnt/big bs=64k count=64 2>/dev/null; umount /mnt")
    rig.replace(disk)
    rig.capture([disk], consistency="crash")
    guest.run("mount -o discard /dev/vdc /mnt; rm /mnt/big; sync; umount /mnt")
    rig.replace(disk)
    (made,) = rig.capture([disk], consistency="crash")
    assert made.changed_bytes >= 3 * MIB  # the file's blocks are recorded as zero
    assert made.read_bytes < 1 * MIB
    rig.check_snapshots(disk)
    guest.run("mount /dev/vdc /mnt")


# -- what the file systems were told --------------------------------------------------------------


def restored_ext4(rig: Rig, snapshot: wire.Snapshot) -> Path:
    path = rig.scratch / "restored.ext4"
    rig.restored(snapshot.id).tofile(path)
    return path


def needs_recovery(image: Path) -> bool:
    shown = subprocess.run(["dumpe2fs", "-h", str(image)], check=True, capture_output=True, text=True).stdout
    return "needs_recovery" in shown


def contents(image: Path, name: str) -> bytes:
    return subprocess.run(["debugfs", "-R", f"cat /{name}", str(image)], check=True, capture_output=True).stdout


def test_app_consistency_holds_what_the_guest_had_not_written_out(rig: Rig) -> None:
    rig.guest.run("echo not synced > /mnt/file")
    (frozen,) = rig.daemon.snapshot(rig.guest.name, ["vdc"], consistency="app")
    assert (frozen.consistency, frozen.reason) == ("app", "")
    image = restored_ext4(rig, frozen)
    assert not needs_recovery(image)
    assert contents(image, "file") == b"not synced\n"
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, stdout=subprocess.DEVNULL)
    rig.guest.run("echo thawed > /mnt/file2; sync")
    (crash,) = rig.daemon.snapshot(rig.guest.name, ["vdc"], consistency="crash")
    assert crash.consistency == "crash"
    image = restored_ext4(rig, crash)
    assert needs_recovery(image)
    assert contents(image, "file2") == b"thawed\n"


def test_hanging_agent_means_a_crash_consistent_snapshot_or_none(rig: Rig) -> None:
    rig.guest.run("kill -STOP $(cat /run/ga.pid)")
    try:
        (auto,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vdc"], consistency="auto"))
        assert auto.consistency == "crash"
        assert "could not be frozen" in auto.reason
        rig.guest.run("echo alive > /mnt/file3; sync")
        (app,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vdc"], consistency="app"))
        assert app.state == "failed"
        assert "could not be frozen" in app.error
        assert "--consistency crash" in app.error
        wait_for(lambda: rig.daemon.status().captures == 0, "settling")
        rig.check_on_images()
        # The agent may still do what it was asked: the thaw that it did not confirm is remembered.
        assert rig.daemon.status().open_operations == 1
        rig.daemon.kill()
        rig.daemon.start()
        assert rig.daemon.status().open_operations == 1
    finally:
        rig.guest.run("kill -CONT $(cat /run/ga.pid)")
    rig.daemon.settled()
    rig.guest.run("echo alive > /mnt/file4; sync")
    (late,) = rig.daemon.snapshot(rig.guest.name, ["vdc"], consistency="app")
    assert late.consistency == "app"
    rig.guest.run("echo alive > /mnt/file4; sync")


def test_disks_captured_side_by_side_do_not_thaw_each_other(rig: Rig) -> None:
    made = rig.daemon.snapshot(rig.guest.name, consistency="app")
    assert [snapshot.consistency for snapshot in made] == ["app"] * 3


@pytest.mark.parametrize("consistency", ["auto", "app"])
def test_guest_is_thawed_at_the_deadline_while_the_switch_hangs(rig: Rig, consistency: str) -> None:
    """FAULTS 18."""
    with rig.daemon.gate("switch") as gate:
        made = rig.daemon.begin(rig.guest.name, ["vdc"], consistency=consistency)
        gate.reached(rig.guest.uuid)
        # Writing waits as long as the file system is frozen, so that this returns when the guest was thawed.
        rig.guest.run("echo thawed > /mnt/file5; sync", timeout_s=15)
        gate.open()
        (ended,) = rig.daemon.ended(made)
        rig.daemon.settled()
    if consistency == "app":
        assert ended.state == "failed"
        assert "the freeze ended" in ended.error
    else:
        assert (ended.state, ended.consistency) == ("accomplished", "crash")
        assert "the freeze ended" in ended.reason
    rig.check_on_images()


def test_shut_down_guest_lost_nothing(
    make_guest: Callable[..., Guest], make_daemon: Callable[..., DoctoredDaemon], guest_image: GuestImage, workdir: Path
) -> None:
    """Captured while it writes, and shut down from inside while it is captured: all that it wrote is in its image."""
    image = make_image(workdir / "a.qcow2", str(SIZE))
    guest, daemon = make_guest([DiskSpec(image)], guest_image).start(), make_daemon()
    with daemon.gate("read") as gate:
        made = daemon.begin(guest.name, consistency="crash")
        gate.reached(made[0].id)
        log = [logged_operation(line) for line in guest.run("stress random /dev/vda 5 200 131072").splitlines()]
        guest.shutdown()
        gate.open()
        (ended,) = daemon.ended(made)
        daemon.settled()
    assert ended.state == "accomplished"
    check_same(converted(image, "qcow2", workdir), final(log), "the image of a guest that was shut down")
    assert not daemon_restored(daemon, ended, workdir).any()


def final(log: Sequence[Operation]) -> Bytes:
    replica = Replica(np.zeros(SIZE, np.uint8))
    for one in log:
        replica.apply(one)
    return replica.data


def daemon_restored(daemon: DoctoredDaemon, snapshot: wire.Snapshot, scratch: Path) -> Bytes:
    path = scratch / "restored"
    assert daemon.create_disk(snapshot.id, path, "raw").state == "accomplished"
    return np.fromfile(path, np.uint8)
