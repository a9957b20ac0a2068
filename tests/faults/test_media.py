"""Devices that fail: the store's, the source's, the overlay's. A snapshot fails then; a guest's write never does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import pytest

from hvsnap import wire
from hvsnap.errors import HvsnapError
from tests.conftest import short_directory
from tests.faults.crash_rig import EVERY, MIB, CrashRig, Rigs, chosen, some
from tests.faults.killing_daemon import Order
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for
from tests.strace import injected

pytestmark = pytest.mark.timeout(0 if EVERY else 300)
SEED = int(os.environ.get("E2E_SEED", "20260714"))


@pytest.fixture(scope="module")
def rigs(libvirtd: Libvirtd, guest_image: GuestImage) -> Iterator[Rigs]:
    made = Rigs(lambda: CrashRig(libvirtd, guest_image, formats=("qcow2",)))
    yield made
    made.close()


def attempt(rig: CrashRig) -> str:
    """Try to make a snapshot while the guest writes, and return its state once all is settled."""
    (made,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vda"]))
    rig.daemon.settled(60)
    return made.state


# -- the store ------------------------------------------------------------------------------------


def test_store_that_fails_once_fails_the_snapshot_and_nothing_else(rigs: Rigs) -> None:
    """An error of fsync, link or mkdir is final for its file; the next snapshot writes a new one. FAULTS 11."""
    with rigs.lent() as rig:
        rig.write_on()
        points = rig.trace(lambda: rig.capture(rig.disks))
        rig.stop_writing()
        rig.check([])
        calls = [one for one in points if one[0].startswith(("fsync(", "link(", "mkdir(")) and one[2] == "before"]
        calls = [one for one in calls if "/store" in one[0] or "packs" in one[0] or "manifests" in one[0]]
        assert len(calls) >= 4
        orders = [Order("fail", name, nth, "before") for name, nth, _side in calls]
        failed = 0
        for order in chosen(orders, 3, Random(SEED)):
            known = set(rig.snapshots())
            rig.write_on()
            rig.order(order)
            failed += attempt(rig) == "failed"
            rig.disarm()
            rig.stop_writing()
            rig.check([one for one in rig.snapshots() if one not in known])
        assert failed >= 1  # a directory that is known to be durable is not synced again


@pytest.mark.parametrize("nth", some([3, 1, 6], 1))
def test_kernel_that_cannot_sync_once(rigs: Rigs, nth: int) -> None:
    """The n-th fsync or fdatasync of the whole daemon fails, its catalog's included. FAULTS 11."""
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        with (
            injected(rig.daemon.pid, f"fsync,fdatasync:error=EIO:when={nth}"),
            contextlib.suppress(HvsnapError),  # it may be the request's own transaction
        ):
            attempt(rig)
        rig.stop_writing()
        rig.check([one for one in rig.snapshots() if one not in known])


@pytest.mark.parametrize("nth", some([7, 1, 2, 4, 12, 20, 33, 50], 2))
def test_killed_in_a_system_call(rigs: Rigs, nth: int) -> None:
    """The n-th write or sync of a file by its offset, which is SQLite's way to write, is the daemon's last call.

    FAULTS 1.
    """
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        rig.write_on()
        with (
            injected(rig.daemon.pid, f"pwrite64,fsync,fdatasync:signal=SIGKILL:when={nth}"),
            contextlib.suppress(HvsnapError, httpx.HTTPError, RuntimeError),
        ):
            attempt(rig)
        rig.daemon.kill()
        rig.restart()
        rig.stop_writing()
        rig.check([one for one in rig.snapshots() if one not in known])


# -- the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "once"), some([("bitmap", "on"), ("bitmap", "off"), ("full", "off"), ("full", "on")], 2)
)
def test_unreadable_sector_fails_the_snapshot(rigs: Rigs, method: str, once: str) -> None:
    """Never zeroes in its place; the next snapshot, once the disk can be read, misses nothing. FAULTS 8."""
    with rigs.lent() as rig:
        if method == "full":
            rig.fresh_daemon()
        known = set(rig.snapshots())
        rig.write_on()
        rig.written(30)
        rig.guest.qemu_io(0, "flush")
        bad = rig.control.with_suffix(".bad")
        # read_aio is what guests' data is read with; a qcow2's own tables are read by other events.
        bad.write_text(
            f"file.inject-error.0.event=read_aio,file.inject-error.0.errno=5,file.inject-error.0.once={once}"
        )
        (made,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vda"]))
        rig.daemon.settled(60)
        bad.unlink()
        assert made.state == "failed"
        assert "read" in made.error
        rig.stop_writing()
        rig.check([one for one in rig.snapshots() if one not in known])


# -- the devices of overlays and images -----------------------------------------------------------


@contextlib.contextmanager
def small_device(size: str) -> Iterator[Path]:
    """A file system of its own; QEMU sees it if it is there before its libvirtd."""
    place = short_directory()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "hvsnap-test", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


@pytest.fixture(scope="module")
def small_place(guest_image: GuestImage) -> Iterator[CrashRig]:
    """A guest whose overlays are on a file system of 11 MiB, less than its disk; half of that is kept free."""
    directory = short_directory()
    with small_device("11m") as place, Libvirtd(directory) as libvirtd:
        capture = f'overlay_dir = "{place}"\nspace_reserve_bytes = {6 * MIB}'
        with CrashRig(libvirtd, guest_image, formats=("qcow2",), capture=capture) as rig:
            rig.place = place
            rig.capture(rig.disks)
            yield rig
    shutil.rmtree(directory, ignore_errors=True)


def fill(path: Path) -> None:
    """Leave nothing of a file system."""
    with path.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(4096)):
            pass


def test_overlay_that_grows_too_large_gives_the_snapshot_up(small_place: CrashRig) -> None:
    """FAULTS 9."""
    rig = small_place
    known = set(rig.snapshots())
    rig.write_on()
    with rig.held_at("nbd.start", "after"):
        (made,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vda"]), 60)
        assert made.state == "failed"
        assert "left for the guest's writes" in made.error
        rig.daemon.settled(60)
    rig.written(20)
    rig.stop_writing()
    rig.check([one for one in rig.snapshots() if one not in known])
    assert not os.listdir(rig.place)


def test_guest_that_was_stopped_by_a_full_overlay_device_goes_on(small_place: CrashRig) -> None:
    """Somebody else filled the device: QEMU stops the guest at its first write; merged, it goes on where it was.

    FAULTS 9.
    """
    rig = small_place
    known = set(rig.snapshots())
    with rig.held_at("nbd.start", "after") as held:
        begun = rig.daemon.begin(rig.guest.name, ["vda"])
        rig.reached(held)
        fill(rig.place / "filler")
        rig.write_on(wait=False)
        (made,) = rig.daemon.ended(begun, 60)
        assert made.state == "failed"
        rig.daemon.settled(60)
    (rig.place / "filler").unlink()
    rig.written(20)
    rig.stop_writing()
    rig.check([one for one in rig.snapshots() if one not in known])


def test_merge_onto_a_full_device_waits_for_room(guest_image: GuestImage) -> None:
    """Image and overlay are on the same file system, and somebody filled it: no endless loop, and nothing is lost.

    FAULTS 9.
    """
    directory = short_directory()
    with small_device("40m") as place, Libvirtd(directory) as libvirtd:
        capture = "space_reserve_bytes = 65536"
        with CrashRig(libvirtd, guest_image, formats=("qcow2",), images=place, capture=capture) as rig:
            with rig.held_at("nbd.start", "after") as held:
                begun = rig.daemon.begin(rig.guest.name, ["vda"])
                rig.reached(held)
                rig.write_on()
                rig.written(100)
                fill(place / "filler")
                rig.daemon.ended(begun, 60)
            wait_for(lambda: "has failed" in rig.daemon.log.read_text(), "the end of the attempts", 150)
            assert rig.daemon.status().open_operations == 1
            (place / "filler").unlink()
            with rig.daemon.client() as client:
                client.post("/recover", wire.Recovery)
            rig.daemon.settled(60)
            rig.written(20)
            rig.stop_writing()
            rig.check(rig.snapshots())
    shutil.rmtree(directory, ignore_errors=True)
