"""Instant disks: used at once, whole in the end, whatever is killed in between; and nothing served is left over."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import libvirt
import pytest

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from tests.e2e.oracle import Bytes, Replica, check_same, converted, logged_operation
from tests.e2e.rig import DoctoredDaemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import host_pids, wait_for

SIZE = 48 << 20


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(workdir: Path) -> Iterator[None]:
    yield
    for pid in host_pids("nbdkit", str(workdir)):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def source(make_guest: Callable[..., Guest], workdir: Path) -> tuple[Guest, Bytes]:
    """A guest that is off, with a disk of random bytes and holes."""
    path, random = make_image(workdir / "source.qcow2", str(SIZE)), Random(5)
    words = []
    for number in range(24):
        (workdir / "pattern").mkdir(exist_ok=True)
        piece = workdir / "pattern" / str(number)
        piece.write_bytes(random.randbytes(1 << 20))
        words += ["-c", f"write -s {piece} {random.randrange(SIZE // 4096 - 256) * 4096} 1M"]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)
    guest = make_guest([DiskSpec(path)])
    return guest, converted(path, "qcow2", workdir)


def instant(daemon: DoctoredDaemon, snapshot: str, path: Path) -> wire.Task:
    with daemon.client() as client:
        return client.post("/disks", wire.Task, wire.DiskCreate(snapshot=snapshot, path=str(path), instant=True))


def info(path: Path) -> dict[str, object]:
    out = subprocess.run(["qemu-img", "info", "-U", "--output=json", str(path)], check=True, capture_output=True)
    return dict(json.loads(out.stdout))


def nbdkits(daemon: DoctoredDaemon) -> list[int]:
    return host_pids("nbdkit", str(daemon.directory))


def waiting(daemon: DoctoredDaemon) -> list[tuple[str, str]]:
    """Recover without a daemon, which is no failure; return what became of what."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hvsnap"), "--config", str(daemon.config), "--json", "recover"],
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done
    return [(one["kind"], one["outcome"]) for one in json.loads(done.stdout)["operations"]]


def check_protected(daemon: DoctoredDaemon, snapshot: str, task: wire.Task) -> None:
    """Check that neither the snapshot nor the task can be taken away from a disk that is in use."""
    with daemon.client() as client:
        with pytest.raises(DaemonError, match="filled from"):
            client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=[snapshot]))
        with pytest.raises(DaemonError, match="cannot be cancelled"):
            client.post(f"/tasks/{task.id}/cancel", wire.Task)


def check_alone(daemon: DoctoredDaemon, path: Path) -> None:
    """Check that a disk is an ordinary one, and that nothing is left beside it or serves it."""
    assert "backing-filename" not in info(path)
    assert nbdkits(daemon) == []
    assert list((daemon.directory / "run" / "served").iterdir()) == []
    assert [one.name for one in path.parent.iterdir() if one.name.startswith(".new")] == []


def check_clean(path: Path) -> None:
    """Check that QEMU finds no fault in an image that nobody has open."""
    subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], check=True, capture_output=True)


def test_s7_2_a_guest_uses_a_disk_that_is_not_filled_yet_while_the_daemon_is_killed(
    source: tuple[Guest, Bytes],
    make_daemon: Callable[..., DoctoredDaemon],
    make_guest: Callable[..., Guest],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    (guest, content), daemon, path = source, make_daemon(), workdir / "new.qcow2"
    (snapshot,) = daemon.snapshot(guest.name)
    lines: list[str] = []
    with daemon.gate("fill"):
        task = instant(daemon, snapshot.id, path)
        assert (task.kind, task.state) == ("disk-create", "running")
        assert "backing-filename" in info(path)
        check_protected(daemon, snapshot.id, task)
        with daemon.client() as client:
            (journal,) = [one for one in client.get("/doctor", wire.DoctorReport).findings if one.check == "journal"]
        assert journal.severity is wire.Severity.OK, journal  # it is at work, not interrupted
        # Nothing is filled yet: all that it reads comes from the store.
        user = make_guest([DiskSpec(path)], guest_image).start()
        lines += user.run("stress random /dev/vda 3 100 131072").splitlines()
        daemon.kill()
    assert len(nbdkits(daemon)) == 1  # it outlives the daemon

    # What it reads while there is no daemon waits for the next one, and is no error.
    working = threading.Thread(
        target=lambda: lines.extend(user.run("stress random /dev/vda 4 200 131072").splitlines()), name="stress"
    )
    working.start()
    daemon.start()
    with daemon.client() as client:
        wait_for(lambda: any("QEMU fills" in one.step for one in client.get("/tasks", wire.TaskList).tasks), "a pull")
    daemon.kill()
    daemon.start()
    working.join()
    assert len(lines) == 300
    daemon.settled()
    check_alone(daemon, path)
    replica = Replica(content)
    for line in lines:
        replica.apply(logged_operation(line))
    user.shutdown()
    replica.check(converted(path, "qcow2", workdir), "the instant disk")
    with daemon.client() as client:
        client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=[snapshot.id]))


def test_s7_2_attached_to_guests_running_or_off_while_what_serves_it_is_killed(
    source: tuple[Guest, Bytes],
    make_daemon: Callable[..., DoctoredDaemon],
    make_guest: Callable[..., Guest],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    (guest, content), daemon = source, make_daemon()
    (snapshot,) = daemon.snapshot(guest.name)
    first = DiskSpec(make_image(workdir / "a.raw", "1M", "raw"), "raw", "scsi")
    stops = DiskSpec(workdir / "b.qcow2", bus="scsi", driver="error_policy='stop' rerror_policy='stop'")
    user = make_guest([first, stops], guest_image, agent=False)
    off = make_guest([DiskSpec(make_image(workdir / "c.raw", "1M", "raw"), "raw", "scsi")])
    paths = {"sdb": stops.path, "sdc": workdir / "d.qcow2"}
    replicas = {target: Replica(content.copy()) for target in paths}

    def attached(to: Guest, path: Path) -> None:
        body = wire.DiskCreate(
            snapshot=snapshot.id, path=str(path), instant=True, attach=wire.Attach(guest=to.name, target="sdc")
        )
        with daemon.client() as client:
            client.post("/disks", wire.Task, body)
        # At once: the answer comes when it is attached.
        assert str(path) in to.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    def work(target: str, seed: int) -> None:
        for line in user.run(f"stress random /dev/{target} {seed} 60 131072").splitlines():
            replicas[target].apply(logged_operation(line))

    with daemon.gate("fill"):
        instant(daemon, snapshot.id, stops.path)
        user.start()
        attached(user, paths["sdc"])
        attached(off, workdir / "e.qcow2")
        wait_for(lambda: "sdc" in user.run("ls /dev"), "the disk in the guest")
        assert user.run("sha256sum < /dev/sdc").split()[0] == hashlib.sha256(content).hexdigest()
        work("sdc", 1)
        daemon.kill()
        # libvirt does not let QEMU wait: it sees an error, and has stopped when something serves again.
        for pid in nbdkits(daemon):
            os.kill(pid, signal.SIGKILL)
        working = threading.Thread(target=work, args=("sdb", 2), name="stress")
        working.start()
        domain = user.domain()
        wait_for(lambda: bool(domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED), "the guest's stop")
    daemon.start()
    working.join()
    work("sdc", 3)
    daemon.settled()
    for path in (*paths.values(), workdir / "e.qcow2"):
        check_alone(daemon, path)
    user.run("sync")
    user.destroy()
    for target, path in paths.items():
        check_clean(path)
        replicas[target].check(converted(path, "qcow2", workdir), target)
    check_same(converted(workdir / "e.qcow2", "qcow2", workdir), content, "the disk of the guest that is off")


def test_s7_2_a_disk_that_nobody_opens_is_filled_all_the_same_and_one_written_to_keeps_that(
    source: tuple[Guest, Bytes], make_daemon: Callable[..., DoctoredDaemon], workdir: Path
) -> None:
    (guest, content), daemon = source, make_daemon()
    (snapshot,) = daemon.snapshot(guest.name)
    with daemon.client() as client:
        client.post(f"/snapshots/{snapshot.id}/serve", wire.Served, wire.SnapshotServe())
    assert len(nbdkits(daemon)) == 1
    # Untouched: killed before, and again while it is filled.
    path = workdir / "new.qcow2"
    with daemon.gate("fill"):
        instant(daemon, snapshot.id, path)
        daemon.kill()
    assert waiting(daemon) == [("disk-instant", "waiting")]
    wait_for(lambda: len(nbdkits(daemon)) == 1, "the end of what was only served")  # with the daemon
    daemon.start()
    daemon.settled()
    check_alone(daemon, path)
    check_clean(path)
    check_same(converted(path, "qcow2", workdir), content, "the untouched one")

    # Written to by somebody while no daemon runs, and closed again.
    path = workdir / "new2.qcow2"
    with daemon.gate("fill"):
        instant(daemon, snapshot.id, path)
        daemon.kill()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", str(path)], check=True, capture_output=True)
    daemon.start()
    daemon.settled()
    check_alone(daemon, path)
    check_clean(path)
    written = content.copy()
    written[65536 : 2 * 65536] = 7
    check_same(converted(path, "qcow2", workdir), written, "the one written to")

    # Removed before it is whole: that is the end of it.
    path = workdir / "new3.qcow2"
    with daemon.gate("fill"):
        instant(daemon, snapshot.id, path)
        daemon.kill()
    path.unlink()
    daemon.start()
    daemon.settled()
    assert nbdkits(daemon) == []
    assert not path.exists()
