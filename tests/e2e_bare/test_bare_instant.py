"""Instant disks of bare guests: used at once by their launcher's QEMU, filled by it, an ordinary image in the end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvsnap import wire
from tests.e2e.oracle import Replica, check_same, converted, logged_operation
from tests.e2e.rig import DoctoredDaemon
from tests.e2e.test_instant_disks import check_alone, check_clean, instant, nbdkits
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import host_pids, wait_for

SIZE = 24 << 20


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(workdir: Path) -> Iterator[None]:
    yield
    for pid in host_pids("nbdkit", str(workdir)):
        os.kill(pid, signal.SIGKILL)


def test_s7_2_a_bare_guest_waits_for_what_serves_its_disk_and_fills_it(
    make_bare: Callable[..., BareGuest],
    make_daemon: Callable[..., DoctoredDaemon],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    path = make_image(workdir / "source.qcow2", str(SIZE))
    noise = workdir / "noise"
    noise.write_bytes(os.urandom(12 << 20))
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -s {noise} 1M 12M", str(path)], check=True, capture_output=True
    )
    content = converted(path, "qcow2", workdir)
    source = make_bare([BareDisk(path)]).start()
    new = workdir / "new.qcow2"
    user = make_bare([BareDisk(new)], guest_image)
    daemon = make_daemon(source, user)
    (snapshot,) = daemon.snapshot(source.name)
    lines: list[str] = []
    with daemon.gate("fill"):
        instant(daemon, snapshot.id, new)
        user.start()
        lines += user.run("stress random /dev/vda 1 60 131072").splitlines()
        # Its QEMU was told to wait for what serves it: killed, that is started again, and nobody sees an error.
        for pid in nbdkits(daemon):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: bool(nbdkits(daemon)), "another nbdkit")
        lines += user.run("stress random /dev/vda 2 60 131072").splitlines()
        (guest,) = [one for one in daemon_guests(daemon) if one.name == user.name]
        assert [(one.path, "lies over" in one.skip_reason) for one in guest.disks] == [(str(new), True)]
    lines += user.run("stress random /dev/vda 3 60 131072").splitlines()
    daemon.settled()
    check_alone(daemon, new)
    user.run("sync")
    (after,) = daemon.snapshot(user.name)
    replica = Replica(content)
    for line in lines:
        replica.apply(logged_operation(line))
    user.quit()
    check_clean(new)
    disk = converted(new, "qcow2", workdir)
    replica.check(disk, "the instant disk")
    restored = workdir / "restored.qcow2"
    daemon.create_disk(after.id, restored)
    check_same(converted(restored, "qcow2", workdir), disk, "a snapshot of it")


def daemon_guests(daemon: DoctoredDaemon) -> list[wire.Guest]:
    with daemon.client() as client:
        return client.get("/guests", wire.GuestList).guests
