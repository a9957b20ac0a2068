"""What cannot be done is refused in one line, with a code and a next step, and changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import libvirt
import numpy as np
import pytest

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from tests.conftest import short_directory
from tests.e2e.oracle import BLOCK, Operation
from tests.e2e.rig import DoctoredDaemon, Rig
from tests.e2e.scenarios import write
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

MIB = 1 << 20
SIZE = 4 * MIB + 512


@pytest.fixture(scope="module")
def rig(libvirtd: Libvirtd) -> Iterator[Rig]:
    """A guest whose disks have a snapshot each, and one that cannot be captured."""
    directory = short_directory()
    specs = [
        DiskSpec(make_image(directory / "a.qcow2", str(SIZE))),
        DiskSpec(make_image(directory / "b.raw", str(SIZE), "raw"), "raw"),
        DiskSpec(make_image(directory / "c.qcow2", str(SIZE)), extra="<readonly/>"),
    ]
    guest = Guest(libvirtd, directory, directory.name, specs, agent=True).define()
    daemon = DoctoredDaemon(directory, libvirtd.uri)
    try:
        rig = Rig(guest.start(), daemon.start(), directory)
        for disk in rig.disks[:2]:
            rig.do(disk, write(0, 20 * BLOCK, 1))
        rig.capture(rig.disks[:2])
        yield rig
    finally:
        guest.remove()
        daemon.stop()
        shutil.rmtree(directory)


@contextlib.contextmanager
def unchanged(rig: Rig, *, failed: int = 0) -> Iterator[None]:
    """Check that the guest, its images and the daemon are as they were, but for ``failed`` more failed snapshots."""

    def look() -> dict[str, Any]:
        with rig.daemon.client() as client:
            snapshots = client.get("/snapshots", wire.SnapshotList).snapshots
        accomplished = {snapshot.id for snapshot in snapshots if snapshot.state == "accomplished"}
        status = rig.daemon.status()
        return {
            "accomplished": accomplished,
            "others": len(snapshots) - len(accomplished),
            "open": (status.open_operations, status.captures, status.tasks),
            "bitmaps": {disk.target: rig.bitmaps(disk) for disk in rig.disks},
            "sources": sorted(rig.sources()),
            "files": sorted(name for name in os.listdir(rig.scratch) if not name.startswith("pattern")),
        }

    before = look()
    yield
    rig.daemon.settled(rig.settle_timeout_s)
    rig.check_on_images()
    before["others"] += failed
    assert look() == before


def check_refused(error: DaemonError, code: str, exit_status: int) -> None:
    assert (error.error.code, error.error.exit_status) == (code, exit_status)
    assert error.message
    assert "\n" not in error.message + error.hint
    assert error.hint, f"no hint: {error.message}"


Call = Callable[[Any, Rig], object]


def creation(**options: Any) -> Call:
    def call(client: Any, rig: Rig) -> object:
        body = wire.SnapshotCreate(**{"guest": rig.guest.name, **options})
        return client.post("/snapshots", wire.SnapshotList, body)

    return call


def new_disk(path: str, snapshot: str = "") -> Call:
    def call(client: Any, rig: Rig) -> object:
        made = snapshot or next(iter(rig.disks[0].states))
        body = wire.DiskCreate(snapshot=made, path=path.replace("DIR", str(rig.scratch)))
        return client.post("/disks", wire.Task, body)

    return call


def rollback(disk: int, snapshot_of: int | str, **options: Any) -> Call:
    def call(client: Any, rig: Rig) -> object:
        made = snapshot_of if isinstance(snapshot_of, str) else next(iter(rig.disks[snapshot_of].states))
        body = wire.Rollback(snapshot=made, **options)
        return client.post(f"/disks/{rig.guest.name}/{rig.disks[disk].target}/rollback", wire.RollbackAnswer, body)

    return call


def deletion(*ids: str) -> Call:
    return lambda client, _rig: client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=list(ids)))


REFUSED: dict[str, tuple[Call, str, int]] = {
    "unknown guest": (creation(guest="nobody"), "guest-unknown", 3),
    "empty guest": (creation(guest=""), "guest-unknown", 3),
    "unknown disk": (creation(disks=["vdz"]), "disk-unknown", 3),
    "disk of nobody": (creation(disks=["d-aaaaaaaaaaaa"]), "disk-unknown", 3),
    "one disk unknown": (creation(disks=["vda", "../b.raw"]), "disk-unknown", 3),
    "disk that cannot be captured": (creation(disks=["vdc"]), "no-eligible-disk", 4),
    "name begins with a digit": (creation(name="1st"), "bad-request", 2),
    "name of one letter": (creation(name="a"), "bad-request", 2),
    "name too long": (creation(name="a" * 129), "bad-request", 2),
    "name of the system": (creation(name="auto_20260501_1"), "bad-request", 2),
    "name that is an address": (creation(name="https://example.org"), "bad-request", 2),
    "name with a line end": (creation(name="two\nlines"), "bad-request", 2),
    "name with a slash": (creation(name="a/b"), "bad-request", 2),
    "description too long": (creation(description="x" * 257), "bad-request", 2),
    "too many tags": (creation(tags={f"k{n}": "v" for n in range(21)}), "bad-request", 2),
    "unknown snapshot": (new_disk("DIR/new", "s-aaaaaaaaaaaa"), "snapshot-unknown", 3),
    "snapshot that is a path": (new_disk("DIR/new", "../../etc/passwd"), "snapshot-unknown", 3),
    "target is a file": (new_disk("DIR/a.qcow2"), "target-exists", 4),
    "target is a directory": (new_disk("DIR"), "target-exists", 4),
    "target is relative": (new_disk("new.qcow2"), "bad-request", 2),
    "target in no directory": (new_disk("DIR/missing/new"), "bad-request", 2),
    "target below a file": (new_disk("DIR/a.qcow2/new"), "bad-request", 2),
    "target is a device": (new_disk("/dev/hvsnap"), "bad-request", 2),
    "target in the store": (new_disk("DIR/state/store/new"), "bad-request", 2),
    "rollback of a running guest": (rollback(0, 0), "guest-running", 4),
    "rollback to another disk's": (rollback(0, 1), "refused", 4),
    "rollback to nothing": (rollback(0, "s-aaaaaaaaaaaa"), "snapshot-unknown", 3),
    "rollback of an unknown disk": (
        lambda client, rig: client.post(
            "/disks/vdz/rollback", wire.RollbackAnswer, wire.Rollback(snapshot=next(iter(rig.disks[0].states)))
        ),
        "disk-unknown",
        3,
    ),
    "deleting nothing known": (deletion("s-aaaaaaaaaaaa"), "snapshot-unknown", 3),
    "cancelling what has ended": (
        lambda client, rig: client.post(f"/snapshots/{next(iter(rig.disks[0].states))}/cancel", wire.Snapshot),
        "refused",
        4,
    ),
}


def test_requests_that_cannot_be_met_are_refused_and_change_nothing(rig: Rig) -> None:
    """FAULTS 27, 29."""
    with unchanged(rig), rig.daemon.client() as client:
        for what, (call, code, exit_status) in REFUSED.items():
            with pytest.raises(DaemonError) as caught:
                call(client, rig)
            try:
                check_refused(caught.value, code, exit_status)
            except AssertionError as error:
                raise AssertionError(f"{what}: {caught.value.error}") from error


def test_dangling_link_as_target_is_refused(rig: Rig) -> None:
    """FAULTS 29."""
    link = rig.scratch / "link"
    link.symlink_to(rig.scratch / "elsewhere")
    with unchanged(rig), rig.daemon.client() as client, pytest.raises(DaemonError) as caught:
        new_disk("DIR/link")(client, rig)
    check_refused(caught.value, "target-exists", 4)
    link.unlink()


def test_guest_without_disks_that_can_be_captured_is_refused(rig: Rig) -> None:
    bare = Guest(rig.guest.libvirtd, rig.scratch, "bare", [rig.disks[2].spec], agent=False).define()
    try:
        with unchanged(rig), rig.daemon.client() as client, pytest.raises(DaemonError) as caught:
            creation(guest="bare")(client, rig)
        check_refused(caught.value, "no-eligible-disk", 4)
    finally:
        bare.remove()


def test_second_capture_of_a_busy_disk_is_refused_and_the_first_goes_on(rig: Rig) -> None:
    disk = rig.disks[0]

    def meanwhile() -> None:
        with rig.daemon.client() as client:
            for call in (creation(disks=["vda"]), creation()):
                with pytest.raises(DaemonError) as caught:
                    call(client, rig)
                check_refused(caught.value, "capture-running", 5)
                assert "vda" in caught.value.message
            (running,) = client.get("/snapshots", wire.SnapshotList, state="progressing").snapshots
            for snapshot_id in (running.id, running.parent):
                with pytest.raises(DaemonError) as caught:
                    deletion(snapshot_id)(client, rig)
                check_refused(caught.value, "snapshot-in-use", 4)
            with pytest.raises(DaemonError) as caught:
                new_disk("DIR/new", running.id)(client, rig)
            check_refused(caught.value, "refused", 4)

    rig.do(disk, write(BLOCK, 5, 2))
    rig.capture([disk], meanwhile)
    rig.check_snapshots(disk)


def failed(rig: Rig, *words: str, **options: Any) -> wire.Snapshot:
    """Begin a capture, and return it failed, with these words in its error."""
    (made,) = rig.daemon.ended(rig.daemon.begin(rig.guest.name, ["vda"], **options))
    assert made.state == "failed"
    assert "\n" not in made.error
    for word in words:
        assert word in made.error
    return made


def test_app_consistency_without_an_agent_fails_and_auto_says_why_not(rig: Rig) -> None:
    with unchanged(rig, failed=2):
        failed(rig, "no guest agent", "--consistency crash", consistency="app")
        rig.guest.domain().suspend()
        failed(rig, "paused", "--consistency crash", consistency="app")
        rig.guest.domain().resume()
    (auto,) = rig.capture(rig.disks[:1], consistency="auto")
    assert auto.consistency == "crash"
    assert "no guest agent" in auto.reason


def test_foreign_block_job_is_left_alone(rig: Rig) -> None:
    copy = make_image(rig.scratch / "copy.qcow2", str(SIZE))
    shutil.chown(copy, "libvirt-qemu")
    xml = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
    flags = libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    rig.guest.domain().blockCopy("vda", xml, flags=flags)
    try:
        with unchanged(rig, failed=1):
            failed(rig, "copy job")
        assert rig.guest.domain().blockJobInfo("vda")
    finally:
        rig.guest.domain().blockJobAbort("vda")
        copy.unlink()
    rig.capture(rig.disks[:1])


# -- space ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """Mount a small file system."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)


def test_full_and_read_only_store_fail_captures_and_cost_the_guest_nothing(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, workdir: Path
) -> None:
    """FAULTS 10."""
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "16M"))], agent=False).start()
    with tmpfs(workdir / "store", "10M") as store:
        daemon = DoctoredDaemon(workdir, libvirtd.uri, store=f'url = "file://{store}"')
        rig = Rig(guest, daemon.start(), workdir)
        (disk,) = rig.disks
        try:
            rig.do(disk, *[write(n * BLOCK, BLOCK, n) for n in range(100)])
            (first,) = rig.capture([disk])
            assert first.stored_bytes < 2 * MIB
            for n in range(8):
                rig.do(disk, *[random_block(m) for m in range(n * 30, n * 30 + 30)])
            with unchanged(rig, failed=1):
                failed(rig, "No space left on device", "nothing was lost")
            remount(store, "ro,size=64M")
            with unchanged(rig, failed=1):
                failed(rig, "ead-only")
            remount(store, "rw,size=64M")
            rig.do(disk, write(3 * BLOCK, 3, 3))
            (second,) = rig.capture([disk])
            assert second.method == "bitmap"
            rig.check_snapshots(disk)
        finally:
            daemon.stop()


def random_block(number: int) -> Operation:
    """Return a write of a block that neither compresses nor is like another."""
    data = np.frombuffer(Random(number).randbytes(BLOCK), np.uint8)
    return Operation("write", number * BLOCK, BLOCK, data)


def test_daemon_does_not_start_on_a_store_that_cannot_be_written(libvirtd: Libvirtd, workdir: Path) -> None:
    with tmpfs(workdir / "store", "1M") as store:
        remount(store, "ro")
        daemon = DoctoredDaemon(workdir, libvirtd.uri, store=f'url = "file://{store}"')
        daemon.start(wait=False)
        assert daemon.wait_dead() == 1
        lines = daemon.log.read_text().splitlines()
        assert "Traceback" not in "".join(lines)
        assert str(store) in lines[-2]
        assert lines[-1]


def test_no_space_for_overlays_fails_captures_and_costs_the_guest_nothing(workdir: Path) -> None:
    """FAULTS 9."""
    with tmpfs(workdir / "overlays", "3M") as overlays, Libvirtd(short_directory()) as own:
        specs = [DiskSpec(make_image(workdir / "a.qcow2", "16M"))]
        guest = Guest(own, workdir, workdir.name, specs, agent=False).define()
        capture = f'overlay_dir = "{overlays}"\nspace_reserve_bytes ='
        daemon = DoctoredDaemon(workdir, own.uri, capture=f"{capture} {64 * MIB}")
        rig = Rig(guest.start(), daemon.start(), workdir)
        (disk,) = rig.disks
        try:
            rig.do(disk, write(0, 20 * BLOCK, 1))
            with unchanged(rig, failed=1):
                failed(rig, "bytes left for the guest's writes", "capture.overlay_dir")
            daemon.stop()
            daemon.configure(capture=f"{capture} 0\noverlay_limit_bytes = {MIB}")
            daemon.start()
            (overlays / "filler").write_bytes(bytes(3 * MIB - 4096))
            with unchanged(rig, failed=1):
                failed(rig, "No space left")
            (overlays / "filler").unlink()
            rig.capture([disk])
            with daemon.gate("read") as gate:
                made = daemon.begin(guest.name)
                gate.reached(made[0].id)
                rig.do(disk, write(2 * BLOCK, 30 * BLOCK, 2))
                (ended,) = daemon.ended(made)
            assert ended.state == "failed"
            assert "grew to" in ended.error
            daemon.settled()
            rig.check_disk(disk, "a disk whose overlay grew too large")
            rig.capture([disk])
            rig.check_snapshots(disk)
            assert not os.listdir(overlays)
        finally:
            guest.remove()
            daemon.stop()
