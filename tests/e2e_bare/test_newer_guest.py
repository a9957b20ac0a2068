"""A guest that really boots on the next Debian release's QEMU: captured in its I/O, frozen by its agent, compared.

The test is skipped, and says so, where that QEMU cannot be had; the cells of docs/support.md run on it, too.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.oracle import instant_in_log, logged_operation
from tests.e2e.rig import Rig
from tests.e2e_bare.rig import BareRig, DoctoredDaemon
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for


@pytest.fixture(params=["libvirt redirect", "bare fleece"])
def rig(
    request: pytest.FixtureRequest,
    newer_qemu: Path,
    guest_image: GuestImage,
    make_daemon: Callable[..., DoctoredDaemon],
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Rig:
    """A booted guest that writes at random to vda and has a file system on vdb."""
    monkeypatch.setenv("PATH", f"{newer_qemu}:{os.environ['PATH']}")  # hvsnap's tools and the test's are of it, too
    emulator = str(newer_qemu / "qemu-system-x86_64")
    random, system = make_image(workdir / "a.qcow2", "8M"), workdir / "fs.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(system), "16M"], check=True)
    guest: BareGuest | Guest
    if request.param == "bare fleece":
        disks = [BareDisk(random), BareDisk(system, "raw", id="vdb")]
        make_bare: Callable[..., BareGuest] = request.getfixturevalue("make_bare")
        guest = make_bare(disks, guest_image, qemu=[emulator]).start()
        rig: Rig = BareRig(guest, make_daemon(guest), workdir)
    else:
        libvirtd: Libvirtd = request.getfixturevalue("libvirtd")
        make_guest: Callable[..., Guest] = request.getfixturevalue("make_guest")
        guest = make_guest([DiskSpec(random), DiskSpec(system, "raw")], guest_image, emulator=emulator).start()
        rig = Rig(guest, make_daemon(libvirt=libvirtd.uri), workdir)
    guest.run("mount /dev/vdb /mnt")
    guest.spawn("stress random /dev/vda 77 0 200000")
    written_on(guest)
    return rig


def written_on(guest: BareGuest | Guest) -> None:
    """Return when the guest has had some more operations acknowledged."""
    before = len(guest.logged())
    wait_for(lambda: len(guest.logged()) > before + 5, "the guest to go on writing")


def test_a_booted_guest_of_a_newer_qemu_is_captured_while_it_writes(rig: Rig, workdir: Path) -> None:
    guest = rig.guest
    assert guest.qmp("query-version")["qemu"]["major"] >= 10
    ids: list[str] = []
    for number in range(3):
        guest.run(f"echo {number} > /mnt/file")  # not synced: freezing does that
        made = {one.target: one for one in rig.daemon.snapshot(guest.name, group=True, consistency="app")}
        assert {one.consistency for one in made.values()} == {"app"}
        assert made["vda"].method == ("bitmap" if number else "full")
        ids.append(made["vda"].id)
        rig.restored(made["vdb"].id).tofile(workdir / "restored.raw")
        shown = subprocess.run(["debugfs", "-R", "cat file", str(workdir / "restored.raw")], capture_output=True)
        assert shown.stdout.decode() == f"{number}\n"
        written_on(guest)
    guest.run("pkill stress; sleep 0.3; sync")
    log = [logged_operation(line) for line in guest.logged()]
    images = [rig.restored(snapshot_id) for snapshot_id in ids]
    instants = [instant_in_log(image, images[0] * 0, log) for image in images]
    assert 0 < instants[0] < instants[1] < instants[2]
    rig.check_on_images()
