"""A capture is interrupted by what happens on a host: SIGTERM, libvirtd's restart, a guest that is shut down, rebooted,
saved, resized, loses a disk, whose agent hangs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from random import Random
from xml.etree import ElementTree

import libvirt
import numpy as np
import pytest

from hvsnap.hypervisor import domain_xml
from tests.e2e.oracle import check_same, converted
from tests.faults.crash_rig import EVERY, SIZE, CrashRig, Rigs, chosen, some, thinned
from tests.faults.killing_daemon import Order
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for

pytestmark = pytest.mark.timeout(0 if EVERY else 300)
SEED = int(os.environ.get("E2E_SEED", "20260714"))


@pytest.fixture(scope="module")
def rigs(libvirtd: Libvirtd, guest_image: GuestImage) -> Iterator[Rigs]:
    made = Rigs(lambda: CrashRig(libvirtd, guest_image, formats=("qcow2",), capture="freeze_timeout_s = 1.0"))
    yield made
    made.close()


def new_since(rig: CrashRig, known: set[str]) -> list[str]:
    return [one for one in rig.snapshots() if one not in known]


# -- SIGTERM --------------------------------------------------------------------------------------


def test_sigterm_anywhere_in_a_capture_leaves_the_guest_safe(rigs: Rigs) -> None:
    """Within 30 s the daemon ends in good order, the guest is on its own image, and nothing is left to recover.

    FAULTS 4.
    """
    random = Random(SEED)
    with rigs.lent() as rig:
        rig.write_on()
        points = rig.trace(lambda: rig.capture(rig.disks))
        rig.stop_writing()
        rig.check([])
        orders = [Order("hold", name, nth, side) for name, nth, side in thinned(points) if side == "before"]
        for order in chosen(orders, 4, random):
            known = set(rig.snapshots())
            rig.write_on()
            held = rig.order(order)
            reached = rig.control.with_suffix(f".reached-{held}")
            with contextlib.suppress(TimeoutError):
                rig.begin_in_background(rig.disks)
                wait_for(reached.exists, "the point", 4)
            began = time.monotonic()
            rig.daemon.terminate()
            time.sleep(0.1)
            rig.disarm()
            rig.let_go(held)
            assert rig.daemon.wait_dead(30) == 0, order
            assert time.monotonic() - began < 30
            rig.check_definitions()
            assert not rig.query("SELECT * FROM operations"), order
            rig.check_nothing_left()
            rig.daemon.start(str(rig.control))
            rig.stop_writing()
            rig.check(new_since(rig, known))


# -- libvirtd -------------------------------------------------------------------------------------


LIBVIRTD_DIES = [("freeze", "after"), ("bitmap_add", "before"), ("nbd.start", "after"), ("commit_pivot", "before"),
                 ("commit_start", "after"), ("bitmap_remove", "before")]  # fmt: skip


@pytest.mark.parametrize(("point", "side"), some(LIBVIRTD_DIES, 3))
def test_libvirtd_killed_in_a_capture(rigs: Rigs, point: str, side: str) -> None:
    """The capture goes on when it is back, or is given up; the guest never stops writing. FAULTS 19."""
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        with rig.held_at(point, side) as held:
            with rig.slow_commits() if point == "commit_start" else contextlib.nullcontext():
                rig.begin(rig.disks)
                rig.reached(held)
            with rig.libvirtd.down():
                rig.disarm()
                rig.let_go(held)
                rig.written(20)
                time.sleep(0.5)
        began = time.monotonic()
        if point == "commit_start":
            rig.hurry()
        rig.daemon.settled(60)
        assert time.monotonic() - began < 20  # it does not wait for its next look in half a minute
        rig.written(10)
        rig.stop_writing()
        rig.check(new_since(rig, known))


# -- the guest goes away, or comes back -----------------------------------------------------------


STOPPED_AT = [("nbd.start", "after"), ("commit_pivot", "before"), ("image.create_overlay", "before")]
STOPS = [(*at, how) for how in ("shutdown", "destroy", "reboot") for at in STOPPED_AT]


@pytest.mark.parametrize(("point", "side", "how"), some(STOPS, 4))
def test_guest_stops_in_a_capture(rigs: Rigs, point: str, side: str, how: str) -> None:
    """Shut down, powered off, rebooted from inside: the snapshot is finished or failed, and the disk is whole.

    FAULTS 20.
    """
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        rig.written(20)
        with rig.held_at(point, side) as held:
            rig.begin(rig.disks)
            rig.reached(held)
            rig.stop_writing()
            rig.guest.qemu_io(0, "flush")
            if how == "shutdown":
                rig.guest.shutdown()
            elif how == "destroy":
                rig.guest.destroy()
            else:
                rig.reboot()
            rig.check_disks()
        rig.daemon.settled(60)
        if how != "reboot":
            rig.check_off()
            rig.check_disks()
            rig.boot()
        rig.check(new_since(rig, known), method="any")


@pytest.mark.parametrize("kind", some(["managed", "file"], 1))
def test_guest_saved_in_a_capture_goes_on_when_it_is_restored(rigs: Rigs, kind: str) -> None:
    """What is kept of it names the overlay, so the overlay waits for it; nothing is written to its disk meanwhile.

    FAULTS 20.
    """
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        file = rig.directory / "saved"
        with rig.held_at("nbd.start", "after") as held:
            rig.begin(rig.disks)
            rig.reached(held)
            domain = rig.guest.domain()
            if kind == "managed":
                domain.managedSave(0)
            else:
                domain.save(str(file))
        rig.daemon.ended([rig.daemon.info(one) for one in new_since(rig, known)])
        time.sleep(2)
        assert rig.daemon.status().open_operations == 1
        assert rig.daemon.info(new_since(rig, known)[0]).state == "accomplished"
        rig.guest._disconnect()
        if kind == "managed":
            rig.guest.domain().create()
        else:
            libvirt.open(rig.libvirtd.uri).restore(str(file))
            file.unlink()
        rig.written(10)  # it goes on in the middle of what it did
        rig.answer_again()
        began = time.monotonic()
        rig.daemon.settled(60)
        assert time.monotonic() - began < 20
        rig.stop_writing()
        rig.check(new_since(rig, known), method="any")


def test_rollback_of_a_saved_guest_is_refused(rigs: Rigs) -> None:
    """FAULTS 27."""
    with rigs.lent() as rig:
        target = rig.snapshots()[-1]
        domain = rig.guest.domain()
        domain.managedSave(0)
        rig.guest._disconnect()
        with pytest.raises(Exception, match="is saved"):
            rig.daemon.roll_back(f"{rig.guest.name}/vda", target)
        (made,) = rig.daemon.snapshot(rig.guest.name, ["vda"])
        assert made.consistency == "crash"
        assert "saved" in made.reason
        domain.create()
        rig.answer_again()
        rig.check([made.id], method="any")


# -- the disk -------------------------------------------------------------------------------------


def test_disk_unplugged_in_a_capture_is_whole(rigs: Rigs) -> None:
    """Its image has all that was written, also what went to the overlay; plugged in again it goes on with its chain.

    FAULTS 20.
    """
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        (disk,) = rig.disks
        rig.write_on()
        rig.written(20)
        with rig.held_at("nbd.start", "after") as held:
            rig.begin(rig.disks)
            rig.reached(held)
            rig.written(20)
            rig.stop_writing()
            root = ElementTree.fromstring(rig.guest.domain().XMLDesc(0))
            element = domain_xml.find_disk(root, disk.target)
            xml = ElementTree.tostring(element, encoding="unicode")
            rig.guest.domain().detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            wait_for(lambda: str(disk.path) not in rig.guest.domain().XMLDesc(0), "the unplugging", 20)
        rig.daemon.settled(60)
        assert not [name for name in os.listdir(rig.directory) if name.endswith(".overlay")]
        for one in disk.log:
            disk.replica.apply(one)
        disk.replica.check(converted(disk.path, disk.format, rig.directory), "the unplugged disk")
        source = element.find("source")
        assert source is not None
        source.set("file", str(disk.path))
        for name in ("backingStore", "alias", "address"):
            for stale in element.findall(name):
                element.remove(stale)
        for stale in source.findall("*"):
            source.remove(stale)
        xml = ElementTree.tostring(element, encoding="unicode")
        rig.guest.domain().attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        wait_for(lambda: rig.guest.run("cat /proc/partitions").count(disk.target) == 1, "the plugging in", 20)
        (snapshot,) = new_since(rig, known)
        assert rig.daemon.info(snapshot).state == "accomplished"
        disk.check_instant(np.frombuffer(rig.daemon.restored(snapshot, rig.directory), np.uint8))
        (made,) = rig.daemon.snapshot(rig.guest.name, [disk.target])
        assert made.method == "bitmap"
        restored = np.frombuffer(rig.daemon.restored(made.id, rig.directory), np.uint8)
        check_same(restored, disk.replica.data, "the next snapshot")
        rig.retire()  # its disks are in another order now


def test_disk_resized_in_a_capture(rigs: Rigs) -> None:
    """The snapshot has the size of its instant; the next one rescans, and covers the tail. FAULTS 20."""
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        (disk,) = rig.disks
        rig.write_on()
        rig.written(20)
        with rig.held_at("nbd.start", "after") as held:
            rig.begin(rig.disks)
            rig.reached(held)
            rig.stop_writing()
            rig.guest.domain().blockResize(disk.target, SIZE + 65536 * 5, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            rig.guest.qemu_io(0, f"write -P 7 {SIZE} 65536")
        rig.daemon.settled(60)
        (snapshot,) = new_since(rig, known)
        info = rig.daemon.info(snapshot)
        assert info.state == "accomplished"
        assert info.size_bytes == SIZE
        disk.check_instant(np.frombuffer(rig.daemon.restored(snapshot, rig.directory), np.uint8))
        for one in disk.log:
            disk.replica.apply(one)
        disk.replica.resize(SIZE + 65536 * 5)
        disk.replica.data[SIZE : SIZE + 65536] = 7
        rig.guest.qemu_io(0, "flush")
        disk.replica.check(converted(disk.path, disk.format, rig.directory), "the resized disk")
        (made,) = rig.daemon.snapshot(rig.guest.name, [disk.target])
        assert made.method == "rescan"
        assert "resized" in made.reason
        restored = np.frombuffer(rig.daemon.restored(made.id, rig.directory), np.uint8)
        check_same(restored, disk.replica.data, "the next snapshot")
        rig.retire()


# -- the agent ------------------------------------------------------------------------------------


def test_agent_that_hangs_makes_a_snapshot_crash_consistent(rigs: Rigs) -> None:
    """FAULTS 18."""
    with rigs.lent() as rig:
        rig.write_on()
        rig.guest.run("killall -STOP qemu-ga")
        began = time.monotonic()
        (made,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vda"], consistency="auto"))
        assert time.monotonic() - began < 15
        assert made.state == "accomplished"
        assert made.consistency == "crash"
        assert made.reason
        rig.guest.run("killall -CONT qemu-ga")
        rig.daemon.settled(60)
        rig.stop_writing()
        rig.check([made.id])


@pytest.mark.parametrize("point", some(["freeze", "switch_to_overlays"], 1))
def test_daemon_killed_between_freeze_and_thaw_while_the_agent_hangs(rigs: Rigs, point: str) -> None:
    """The guest stays frozen as long as its agent hangs; then it is thawed by the daemon that was started meanwhile.

    FAULTS 18.
    """
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        with rig.held_at(point, "after") as held:
            rig.begin(rig.disks)
            rig.reached(held)
            rig.guest.run("killall -STOP qemu-ga")
            rig.daemon.kill()
        rig.daemon.start(str(rig.control))
        assert rig.daemon.status().open_operations > 0
        rig.guest.run("killall -CONT qemu-ga")
        rig.daemon.settled(60)
        rig.stop_writing()
        rig.check(new_since(rig, known))


def test_frozen_guest_is_thawed_by_the_next_start(rigs: Rigs) -> None:
    """FAULTS 18."""
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        with rig.held_at("switch_to_overlays", "before") as held:
            rig.begin(rig.disks)
            rig.reached(held)
            assert rig.fsfreeze_status() == "frozen"
            rig.daemon.kill()
        rig.restart()
        assert rig.fsfreeze_status() == "thawed"
        rig.stop_writing()
        rig.check(new_since(rig, known))
