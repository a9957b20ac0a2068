"""Which bare guests are there, and what of them is refused, with what words."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from tests.e2e.oracle import BLOCK, logged_operation
from tests.e2e.scenarios import write
from tests.e2e_bare.conftest import MakeRig
from tests.e2e_bare.rig import BareRig, DoctoredDaemon, a_disk, guests
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import wait_for

MIB = 1 << 20
NOBODY = 65534


def qemu_version(guest: BareGuest) -> tuple[int, int]:
    found = guest.qmp("query-version")["qemu"]
    return found["major"], found["minor"]


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_a_disk_with_an_iothread_is_refused_where_qemu_would_abort(make_rig: MakeRig, workdir: Path, bus: str) -> None:
    disk = a_disk(workdir, iothread=True, bus=bus)
    rig = make_rig([disk])
    if qemu_version(rig.guest) >= (9, 0):
        rig.do(rig.disks[0], write(BLOCK, 3 * BLOCK, 2))
        rig.capture(rig.disks)
        rig.check_snapshots(rig.disks[0])
        return
    with pytest.raises(DaemonError, match="has an I/O thread, and QEMU 7") as refused:
        rig.daemon.begin(rig.guest.name)
    assert refused.value.exit_status == 4
    assert 'capture = "redirect"' in refused.value.error.hint
    assert rig.daemon.status().snapshots == 0
    assert rig.guest.active


def test_disks_with_an_iothread_are_redirected(
    make_bare: Callable[..., BareGuest],
    make_daemon: Callable[..., DoctoredDaemon],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    """A real guest writes: QEMU's own qemu-io is not for disks that are in another thread."""
    disks = [a_disk(workdir, "vda", iothread=True), a_disk(workdir, "sda", iothread=True, bus="scsi")]
    guest = make_bare(disks, guest_image).start()
    rig = BareRig(guest, make_daemon(guest, mode="redirect"), workdir)
    for number in range(3):
        for disk in rig.disks:
            for line in guest.run(f"stress random /dev/{disk.target} {number} 8 300000; sync").splitlines():
                disk.replica.apply(logged_operation(line))
        snapshots = rig.daemon.snapshot(guest.name, group=True, consistency="crash")
        for disk in rig.disks:
            (snapshot,) = (one for one in snapshots if one.target == disk.target)
            disk.replica.check(rig.restored(snapshot.id), f"snapshot {number} of {disk.target}")
    rig.check_on_images()


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_filter_above_the_image_stays_there_or_is_refused(make_rig: MakeRig, workdir: Path, mode: str) -> None:
    path = make_image(workdir / "vda.qcow2", "4M")
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    image = {"driver": "qcow2", "node-name": "image", "discard": "unmap", "file": file}
    node = {"driver": "throttle", "node-name": "slow", "throttle-group": "group", "discard": "unmap", "file": image}
    extra = ["-object", "throttle-group,id=group", "-blockdev", json.dumps(node)]
    rig = make_rig([BareDisk(path, node="slow")], mode, extra=extra)
    if mode == "redirect":
        ended = rig.failed(rig.daemon.begin(rig.guest.name))
        assert "a filter (slow) lies above the image" in ended.error
    else:
        random = Random(8)
        for _ in range(3):
            rig.random_operations(random, rig.disks[0], 5)
            (snapshot,) = rig.capture(rig.disks, storm=random)
        assert snapshot.method == "bitmap"
        rig.check_snapshots(rig.disks[0])
    assert rig.guest.root_node() == "slow"


def test_qemus_nbd_server_in_other_hands_is_left_alone(make_rig: MakeRig, workdir: Path) -> None:
    rig = make_rig([a_disk(workdir)])
    address = {"type": "unix", "data": {"path": str(workdir / "theirs.sock")}}
    rig.qmp("nbd-server-start", addr=address)
    rig.qmp("block-export-add", type="nbd", id="theirs", **{"node-name": "vda-drive"})
    ended = rig.failed(rig.daemon.begin(rig.guest.name))
    assert "NBD server" in ended.error
    assert "theirs" in ended.error
    assert [one["id"] for one in rig.qmp("query-block-exports")] == ["theirs"]
    rig.qmp("block-export-del", id="theirs", mode="hard")
    rig.qmp("nbd-server-stop")
    rig.capture(rig.disks)


@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_somebody_elses_block_job_is_left_alone(make_rig: MakeRig, workdir: Path, mode: str) -> None:
    rig = make_rig([a_disk(workdir)], mode)
    rig.do(rig.disks[0], write(0, 8 * MIB, 3))
    target = make_image(workdir / "copy.qcow2", "8M")
    rig.qmp(
        "blockdev-add", **{"driver": "qcow2", "node-name": "copy", "file": {"driver": "file", "filename": str(target)}}
    )
    rig.qmp("blockdev-mirror", **{"job-id": "theirs", "device": "vda-drive", "target": "copy", "sync": "full"})
    ended = rig.failed(rig.daemon.begin(rig.guest.name))
    assert "a mirror job is at work on disk vda" in ended.error
    assert [job["device"] for job in rig.qmp("query-block-jobs")] == ["theirs"]
    rig.qmp("block-job-cancel", device="theirs", force=True)
    wait_for(lambda: not rig.qmp("query-block-jobs"), "the end of their job")
    rig.qmp("blockdev-del", **{"node-name": "copy"})
    rig.capture(rig.disks)
    rig.check_snapshots(rig.disks[0])


def test_what_cannot_be_captured_is_listed_with_a_reason(
    make_bare: Callable[..., BareGuest], make_daemon: Callable[..., DoctoredDaemon], workdir: Path
) -> None:
    disks = [
        a_disk(workdir, "vda", extra=",bootindex=2"),
        a_disk(workdir, "vdb", extra=",share-rw=on"),
        a_disk(workdir, "vdc", style="drive", node_extra=",read-only=on"),
        a_disk(workdir, "sda", bus="scsi", serial="SER", extra=",bootindex=1"),
    ]
    node = '{"driver": "null-co", "node-name": "null", "size": 1048576}'
    nbd = ["-blockdev", node, "-device", "virtio-blk-pci,drive=null,id=vdn"]
    cd = ["-device", "ide-cd,id=cd0", "-drive", f"file={make_image(workdir / 'i.raw', '1M', 'raw')},if=ide,format=raw"]
    guest = make_bare(disks, extra=[*cd, *nbd]).start()
    daemon = make_daemon(guest)
    with daemon.client() as client:
        (shown,) = client.get("/guests", wire.GuestList).guests
    reasons = {disk.target: disk.skip_reason for disk in shown.disks}
    assert reasons == {
        "vda": "",
        "vdb": "it is shared with other guests",
        "vdc": "it is read-only",
        "sda": "",
        "vdn": "no image format below the node null, a null-co",
        "cd0": "it is a cdrom",
        "ide0-hd0": "its bus is ide, not virtio or scsi",
    }
    assert [disk.target for disk in shown.disks if disk.system] == ["sda"]
    assert {snapshot.target for snapshot in daemon.snapshot(guest.name)} == {"vda", "sda"}


# -- who is there ---------------------------------------------------------------------------------


def test_a_socket_in_other_hands_is_a_finding_and_hides_nobody(
    make_bare: Callable[..., BareGuest], make_daemon: Callable[..., DoctoredDaemon], workdir: Path
) -> None:
    held = make_bare([a_disk(workdir, "vda")]).start()
    free = make_bare([a_disk(workdir, "vdb")]).start()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(held.qmp_socket))
        daemon = make_daemon(held, free, libvirt="qemu+unix:///system?socket=/nonexistent/libvirt-sock")
        with daemon.client() as client:
            answer = client.get("/guests", wire.GuestList)
            assert [guest.name for guest in answer.guests] == [free.name]
            assert any(held.name in note and "another program holds it" in note for note in answer.notes)
            assert any(note.startswith("libvirt: ") for note in answer.notes)
            found = client.get("/doctor", wire.DoctorReport).findings
            assert [one.check for one in found if held.name in one.what] == ["bare-guest"]
            with pytest.raises(DaemonError, match="says nothing"):
                daemon.begin(held.name)
        daemon.snapshot(free.name)
    wait_for(lambda: len(guests(daemon)) == 2, "the guest's return", 30.0)
    daemon.snapshot(held.name)


def test_a_guest_without_a_uuid_and_off_keeps_its_chains(
    make_bare: Callable[..., BareGuest], make_daemon: Callable[..., DoctoredDaemon], workdir: Path
) -> None:
    guest = make_bare([a_disk(workdir, "vda"), a_disk(workdir, "vdb", image_format="raw")], guest_uuid=None).start()
    daemon = make_daemon(guest)
    rig = BareRig(guest, daemon, workdir)
    random = Random(9)
    for disk in rig.disks:
        rig.random_operations(random, disk, 4)
    rig.capture(rig.disks)
    uuid = guests(daemon)[0].uuid
    guest.quit()
    wait_for(lambda: guests(daemon)[0].state == "off", "the end of the guest")
    rig.random_operations(random, rig.disks[0], 3)
    rig.capture(rig.disks)
    daemon.stop()
    daemon.start()
    rig.capture(rig.disks)
    assert guests(daemon)[0].uuid == uuid
    guest.start()
    (first, _second) = rig.capture(rig.disks)
    assert (first.kind, first.method) == ("incremental", "bitmap")
    for disk in rig.disks:
        assert len(disk.states) == 4
        rig.check_snapshots(disk)


def test_a_guest_that_never_ran_is_captured_by_its_configured_disks(
    make_bare: Callable[..., BareGuest], workdir: Path
) -> None:
    guest = make_bare([a_disk(workdir, "vda")])
    directory = workdir / "daemon"
    directory.mkdir()
    table = guest.table().partition("\n")[2] + f"disks.vda = {{ path = '{guest.disks[0].path}' }}\n"
    daemon = DoctoredDaemon(directory, "", "", **{f"hypervisor.qmp.{guest.name}": table}).start()
    try:
        rig = BareRig(guest, daemon, workdir)
        rig.do(rig.disks[0], write(5 * BLOCK, 2 * BLOCK, 8))
        rig.capture(rig.disks)
        guest.start()
        rig.do(rig.disks[0], write(7 * BLOCK, 2 * BLOCK, 9))
        (snapshot,) = rig.capture(rig.disks)
        assert snapshot.kind == "incremental"
        rig.check_snapshots(rig.disks[0])
    finally:
        daemon.stop()


def test_a_qemu_of_another_user_is_captured(
    make_bare: Callable[..., BareGuest], make_daemon: Callable[..., DoctoredDaemon]
) -> None:
    """It cannot enter the daemon's private directory, and needs the scratch image to be its own."""
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as name:
        workdir = Path(name)
        workdir.chmod(0o777)
        guest = make_bare([a_disk(workdir)], user=NOBODY)
        for path in (guest.disks[0].path,):
            os.chown(path, NOBODY, NOBODY)
        guest._directory.chmod(0o777)
        guest.start()
        rig = BareRig(guest, make_daemon(guest), workdir)
        rig.do(rig.disks[0], write(0, 3 * MIB, 4))
        rig.capture(rig.disks, storm=Random(3))
        rig.check_snapshots(rig.disks[0])


def test_captures_of_two_disks_share_qemus_server_and_a_lost_monitor_is_found_again(
    make_rig: MakeRig, workdir: Path
) -> None:
    """FAULTS 19."""
    rig = make_rig([a_disk(workdir, "vda"), a_disk(workdir, "vdb")])
    random = Random(4)
    for disk in rig.disks:
        rig.random_operations(random, disk, 6)
    rig.capture(rig.disks, storm=random)  # two captures side by side
    rig.do(rig.disks[0], write(BLOCK, BLOCK, 1))

    def lose_the_monitor() -> None:
        for connection in daemon_sockets(rig.daemon.pid, rig.guest.qmp_socket):
            shut_down(rig.daemon.pid, connection)

    rig.capture(rig.disks, lose_the_monitor)
    for disk in rig.disks:
        rig.check_snapshots(disk)


def daemon_sockets(pid: int, _path: Path) -> Iterator[int]:
    """Yield the descriptors of a process that are connected Unix sockets."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.exists(entry) and os.readlink(entry).startswith("socket:"):
            yield int(entry.name)


def shut_down(pid: int, descriptor: int) -> None:
    """Shut a stream of another process down, if it is one that QEMU's monitor is at the other end of."""
    theirs = os.pidfd_open(pid)
    try:
        import ctypes  # noqa: PLC0415

        number = ctypes.CDLL(None).syscall(438, theirs, descriptor, 0)  # pidfd_getfd
        if number < 0:
            return
        with socket.socket(fileno=number) as mine:
            if mine.family == socket.AF_UNIX and mine.type & socket.SOCK_STREAM:
                try:
                    peer = mine.getpeername()
                except OSError:
                    return
                if str(peer).endswith(".qmp"):
                    mine.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(theirs)
