"""What happens to a bare guest and its disks around captures: FAULTS 9, 19, 20."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvsnap import wire
from tests.e2e.oracle import Operation, check_same, load
from tests.e2e.scenarios import write
from tests.e2e_bare.conftest import MakeRig
from tests.e2e_bare.rig import QUICK, BareRig, a_disk, guests
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import make_image
from tests.guest.libvirtd import wait_for
from tests.strace import injected

MIB = 1 << 20
NOBODY = 65534


# -- what happens in the middle -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_guest_shut_down_in_a_capture_leaves_nothing_half(make_rig: MakeRig, workdir: Path, mode: str) -> None:
    rig = make_rig([a_disk(workdir)], mode)
    disk = rig.disks[0]
    rig.do(disk, write(0, 2 * MIB, 6))
    rig.capture(rig.disks)
    rig.do(disk, write(MIB, 2 * MIB, 7))
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name)
        gate.reached(made[0].id)
        rig.do(disk, write(2 * MIB, 2 * MIB, 8))
        rig.guest.quit()
    (ended,) = rig.daemon.ended(made)
    rig.daemon.settled()
    # A redirected image stays readable without its guest; a fleeced one's instant is gone with QEMU.
    assert ended.state == ("failed" if mode == "fleece" else "accomplished")
    rig.check_on_images()
    rig.check_disk(disk, "after the guest's end")
    rig.guest.start()
    (snapshot,) = rig.capture(rig.disks)
    assert snapshot.method == "bitmap"
    rig.check_snapshots(disk)


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_daemon_told_to_end_in_a_capture_leaves_the_guest_safe(make_rig: MakeRig, workdir: Path, mode: str) -> None:
    """FAULTS 4."""
    rig = make_rig([a_disk(workdir)], mode)
    rig.do(rig.disks[0], write(0, 2 * MIB, 6))
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name, consistency="crash")
        gate.reached(made[0].id)
        rig.do(rig.disks[0], write(MIB, 2 * MIB, 7))
        start = time.monotonic()
        assert rig.daemon.stop() == 0
        assert time.monotonic() - start < 30
    rig.check_on_images()
    rig.check_disk(rig.disks[0], "after the daemon's end")
    rig.daemon.start()
    assert rig.daemon.info(made[0].id).error == "the daemon was stopped"
    rig.capture(rig.disks)
    rig.check_snapshots(rig.disks[0])


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_disk_grown_in_a_capture_is_whole_then_and_later(make_rig: MakeRig, workdir: Path, mode: str) -> None:
    rig = make_rig([a_disk(workdir)], mode)
    disk = rig.disks[0]
    rig.do(disk, write(0, 8 * MIB, 6))

    def grow() -> None:
        rig.qmp("block_resize", **{"node-name": rig.guest.root_node(), "size": 12 * MIB})
        disk.replica.resize(12 * MIB)
        rig.do(disk, write(9 * MIB, MIB, 12), write(MIB, MIB, 13))

    rig.capture(rig.disks, grow)
    rig.do(disk, write(11 * MIB, MIB, 14))
    (snapshot,) = rig.capture(rig.disks)
    assert (snapshot.method, snapshot.size_bytes) == ("rescan", 12 * MIB)
    rig.check_snapshots(disk)


def test_a_disk_unplugged_in_a_fleece_can_be_let_go_of(make_rig: MakeRig, workdir: Path) -> None:
    rig = make_rig([a_disk(workdir, "sda", bus="scsi"), a_disk(workdir, "sdb", bus="scsi")])
    disk = rig.disks[0]
    rig.do(disk, write(0, 4 * MIB, 6))
    before = rig.present(disk)
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name, ["sda"])
        gate.reached(made[0].id)
        rig.qmp("device_del", id="sda")
        wait_for(lambda: len(rig.qmp("query-block")) == 1, "the unplugging")
    (ended,) = rig.daemon.ended(made)
    rig.daemon.settled()
    assert ended.state == "accomplished"
    check_same(rig.restored(ended.id), before, "the unplugged disk's snapshot")
    assert rig.left_behind() == []
    rig.qmp("blockdev-del", **{"node-name": "sda-drive"})
    assert [disk.target for disk in guests(rig.daemon)[0].disks] == ["sdb"]


def test_somebody_elses_snapshot_in_a_fleece_stays(make_rig: MakeRig, workdir: Path) -> None:
    rig = make_rig([a_disk(workdir)])
    disk = rig.disks[0]
    rig.do(disk, write(0, 4 * MIB, 6))
    overlay = workdir / "theirs.qcow2"
    base = ["-b", str(disk.spec.path), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, str(overlay)], check=True)
    before = rig.present(disk)
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name)
        gate.reached(made[0].id)
        file = {"driver": "file", "filename": str(overlay)}
        rig.qmp("blockdev-add", **{"driver": "qcow2", "node-name": "theirs", "backing": None, "file": file})
        rig.qmp("blockdev-snapshot", node="vda-drive", overlay="theirs")
        rig.do(disk, write(MIB, MIB, 7))
    (ended,) = rig.daemon.ended(made)
    rig.daemon.settled()
    assert ended.state == "accomplished"
    check_same(rig.restored(ended.id), before, "the snapshot under theirs")
    assert rig.left_behind() == []
    assert rig.guest.root_node() == "theirs"


def test_a_save_to_a_file_fails_in_a_fleece_and_the_guest_goes_on(make_rig: MakeRig, workdir: Path) -> None:
    """QEMU cannot hand its images over while an instant is held in it; afterwards it can."""
    rig = make_rig([a_disk(workdir)])
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name)
        gate.reached(made[0].id)
        assert saved(rig, workdir) == "failed"
        assert rig.qmp("query-status")["running"]
    assert rig.daemon.ended(made)[0].state == "accomplished"
    rig.daemon.settled()
    assert saved(rig, workdir) == "completed"


def test_a_guest_migrated_away_in_a_capture_keeps_its_overlay_until_it_ends(
    make_rig: MakeRig, make_bare: Callable[..., BareGuest], workdir: Path
) -> None:
    """FAULTS 20: its disk is the overlay, wherever it runs: locked, so not merged, and never taken for a stray one."""
    rig = make_rig([a_disk(workdir)], "redirect")
    disk = rig.disks[0]
    rig.do(disk, write(0, 2 * MIB, 6))
    rig.capture(rig.disks)
    rig.do(disk, write(MIB, 2 * MIB, 7))
    frozen = rig.present(disk)
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name)
        gate.reached(made[0].id)
        rig.do(disk, write(3 * MIB, MIB, 8))
        (overlay,) = workdir.glob("*.overlay")
        away = make_bare([BareDisk(overlay)], extra=["-incoming", f"unix:{workdir}/incoming"]).start()
        rig.qmp("migrate", uri=f"unix:{workdir}/incoming")
        wait_for(lambda: rig.qmp("query-migrate").get("status") == "completed", "the end of the migration")
        wait_for(lambda: away.qmp("query-status")["running"], "the guest to go on elsewhere")
        rig.guest.quit()
    (ended,) = rig.daemon.ended(made)
    assert ended.state == "accomplished"
    check_same(rig.restored(ended.id), frozen, "the snapshot of a guest that went away")
    away.qemu_io(f"write -P 9 {5 * MIB} {MIB}")
    wait_for(lambda: rig.daemon.status().captures == 0, "the end of the attempts to merge", 60)
    with rig.daemon.client() as client:
        (told,) = client.post("/recover", wire.Recovery).operations
        assert told.outcome == "still-open"
        assert overlay.exists()
        assert away.qmp("query-status")["running"]
        away.quit()
        (told,) = client.post("/recover", wire.Recovery).operations
        assert told.outcome != "still-open"
    rig.daemon.settled()
    disk.replica.data[5 * MIB : 6 * MIB] = 9
    rig.check_on_images()
    rig.check_disk(disk, "with what was written elsewhere")
    rig.guest.start()
    rig.capture(rig.disks)
    rig.check_snapshots(disk)


def saved(rig: BareRig, workdir: Path) -> str:
    rig.qmp("migrate", uri=f"exec:cat > {workdir}/saved")
    wait_for(lambda: rig.qmp("query-migrate").get("status") in ("completed", "failed"), "the end of the save")
    return str(rig.qmp("query-migrate")["status"])


def test_a_qemu_that_hangs_is_told_and_left_alone(make_rig: MakeRig, workdir: Path) -> None:
    rig = make_rig([a_disk(workdir)])
    os.kill(rig.guest.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        rig.daemon.status()  # the daemon itself answers
        assert time.monotonic() - start < 10
    finally:
        os.kill(rig.guest.pid, signal.SIGCONT)
    rig.capture(rig.disks)


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_qcow2_header_in_a_raw_disk_of_a_bare_guest_stays_bytes(
    make_rig: MakeRig, workdir: Path, mode: str
) -> None:  # fmt: skip
    """FAULTS 31: whoever probed the image would read the file of the host that the header names."""
    secret = workdir / "secret"
    secret.write_bytes(b"secret of the host" * 5000)
    evil = make_image(workdir / "evil.qcow2", "8M", "qcow2", "-b", str(secret), "-F", "raw")
    rig = make_rig([a_disk(workdir, image_format="raw")], mode)
    disk = rig.disks[0]
    rig.do(disk, write(0, 8 * MIB, 1), Operation("write", 0, evil.stat().st_size, load(evil)))
    rig.capture(rig.disks, lambda: rig.do(disk, write(5 * MIB, 5, 2)))
    rig.check_disk(disk, "a raw disk with a header")
    rig.guest.quit()
    (offline,) = rig.capture(rig.disks)
    rig.do(disk, write(0, 10, 3))
    rig.roll_back(disk, offline.id)
    rig.check_snapshots(disk)
    rig.guest.start()
    rig.capture(rig.disks)
    rig.check_snapshots(disk)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_qemu_started_in_an_offline_capture_is_refused_and_the_snapshot_is_right(
    make_rig: MakeRig, workdir: Path, image_format: str
) -> None:
    rig = make_rig([a_disk(workdir, image_format=image_format)])
    rig.do(rig.disks[0], write(0, 3 * MIB, 6))
    rig.guest.quit()

    def start() -> None:
        with pytest.raises(RuntimeError, match="lock"):
            rig.guest.start()

    rig.capture(rig.disks, start)
    rig.guest.start()
    rig.do(rig.disks[0], write(MIB, MIB, 7))
    rig.capture(rig.disks)
    rig.check_snapshots(rig.disks[0])


# -- devices that cannot be read, or are slow ------------------------------------------------------


@contextlib.contextmanager
def bad_device(workdir: Path) -> Iterator[tuple[Path, Path]]:
    """A file that cannot be read while another one is there; gives both."""
    backing, place, bad = workdir / "backing", workdir / "fuse", workdir / "bad"
    backing.write_bytes(bytes(8 * MIB))
    place.mkdir()
    source = ["nbdkit", "-s", "--filter=error", "file", str(backing), "error-pread=EIO", "error-pread-rate=100%"]
    command = ["nbdfuse", str(place / "vda.raw"), "--command", *source, f"error-file={bad}"]
    serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for((place / "vda.raw").exists, "the device")
        yield place / "vda.raw", bad
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        serving.wait(20)


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_an_unreadable_sector_fails_the_snapshot_of_a_bare_guest(make_rig: MakeRig, workdir: Path, mode: str) -> None:
    """FAULTS 8: never zeroes in its place; once it can be read, nothing is missed, and the guest was not disturbed."""
    with bad_device(workdir) as (path, bad):
        capture = f'overlay_dir = "{workdir}"\n{QUICK}'
        rig = make_rig([BareDisk(path, "raw")], mode, capture)
        disk = rig.disks[0]
        rig.do(disk, write(0, 3 * MIB, 6))
        rig.capture(rig.disks)
        rig.do(disk, write(MIB, 3 * MIB, 7))
        rig.flush(disk)
        bad.touch()
        ended = rig.failed(rig.daemon.begin(rig.guest.name))
        assert "read" in ended.error
        rig.do(disk, write(5 * MIB, MIB, 8))
        bad.unlink()
        assert rig.qmp("query-status")["status"] == "running"
        rig.check_on_images()
        rig.check_disk(disk, "after a capture that could not read it")
        rig.capture(rig.disks)
        rig.check_snapshots(disk)
        rig.guest.quit()


SLOW_S = 0.05


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_slow_device_of_overlays_and_scratch_images_costs_time_alone(
    make_rig: MakeRig, workdir: Path, mode: str
) -> None:
    """FAULTS 9: every write of QEMU takes its time; the guest's succeed, and the snapshot is right."""
    rig = make_rig([a_disk(workdir)], mode)
    disk = rig.disks[0]
    rig.do(disk, write(0, 2 * MIB, 6))

    def write_slowly() -> None:
        start = time.monotonic()
        for number in range(4):
            rig.do(disk, write(number * MIB, MIB // 2, 7 + number))  # raises if the guest's device saw an error
        assert time.monotonic() - start > SLOW_S

    slow = f"pwrite64,pwritev,pwritev2,fdatasync:delay_enter={int(SLOW_S * 1e6)}"
    with injected(rig.guest.pid, slow):
        rig.capture(rig.disks, write_slowly)
    rig.check_disk(disk, "after writes that took long")
    rig.capture(rig.disks)
    rig.check_snapshots(disk)


# -- a scratch image that finds no space ----------------------------------------------------------


@pytest.fixture
def small_place() -> Iterator[Path]:
    """A file system of 3 MiB."""
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


@pytest.mark.parametrize("reserve", [0, 2 * MIB])
def test_a_full_scratch_gives_the_snapshot_up_and_never_a_write_of_the_guest(
    make_rig: MakeRig, workdir: Path, small_place: Path, reserve: int
) -> None:
    """With a reserve the watch gives up first; without one QEMU does, at the very write that found no space."""
    capture = f'overlay_dir = "{small_place}"\nspace_reserve_bytes = {reserve}'
    rig = make_rig([a_disk(workdir, size="16M")], capture=capture)
    disk = rig.disks[0]
    rig.do(disk, write(0, 16 * MIB, 6))
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name, consistency="crash")
        gate.reached(made[0].id)
        for number in range(16):
            rig.do(disk, write(number * MIB, MIB, 20 + number))  # raises if the guest's device saw an error
        assert rig.qmp("query-status")["status"] == "running"
        if reserve:  # nothing is read yet: it is the watch that gives up
            rig.daemon.ended(made)
    ended = rig.failed(made)
    assert ("bytes left" if reserve else "scratch") in ended.error
    rig.check_on_images()
    rig.check_disk(disk, "after the scratch was full")
    rig.daemon.configure(capture="space_reserve_bytes = 1000000", **_tables(rig))
    rig.daemon.stop()
    rig.daemon.start()
    rig.capture(rig.disks)
    rig.check_snapshots(disk)


def _tables(rig: BareRig) -> dict[str, str]:
    return {f"hypervisor.qmp.{rig.guest.name}": rig.guest.table().partition("\n")[2]}
