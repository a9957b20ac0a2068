"""An image from a guest's system disk to a machine that boots from its file, and over the loss of the catalog."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.e2e.test_command_line import CommandLine, raw, write
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

SAYS = b"booted from the image"
BOOT_SECTOR = bytes.fromhex("fc31c08ed8be1a7cbaf803ac84c07403eeebf8baf400eef4ebfd") + SAYS + b"\0"
"""Writes the text to the first serial port, and ends QEMU by its debug port."""

MIB = 1 << 20


@pytest.fixture
def hvsnap(libvirtd: Libvirtd, workdir: Path) -> Iterator[CommandLine]:
    one = CommandLine(workdir, libvirtd.uri)
    yield one
    one.close()


def test_s7_4_an_exported_image_boots_and_images_outlive_the_catalog(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    (workdir / "boot").write_bytes(BOOT_SECTOR + bytes(510 - len(BOOT_SECTOR)) + b"\x55\xaa")
    (workdir / "noise").write_bytes(Random(7).randbytes(2 * MIB))
    write(disk, f"write -s {workdir}/boot 0 512", f"write -s {workdir}/noise 3M 2M", "write -P 65 20M 8M")
    content = raw(disk, workdir / "raw")
    hvsnap.start_daemon()
    snapshot = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    image = hvsnap.ok("image-create", snapshot, "debian-12", "-q").strip()
    write(disk, "write -P 1 0 512")  # the guest goes on
    exported, made = workdir / "debian.qcow2", workdir / "made.qcow2"
    hvsnap.ok("image-export", "debian-12", str(exported))
    hvsnap.ok("disk-create", image, str(made))
    assert exported.stat().st_size < 3 * MIB  # the noise; the rest compresses to nothing
    assert raw(exported, workdir / "raw") == raw(made, workdir / "raw") == content
    machine = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-monitor", "none", "-serial", "stdio"]
    machine += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive", f"file={exported},format=qcow2,snapshot=on"]
    booted = subprocess.run(machine, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert SAYS in booted.stdout, booted
    kept = hvsnap("snapshot-delete", snapshot)
    assert (kept.status, f"behind image debian-12 ({image})" in kept.err) == (4, True)
    hvsnap.end_daemon()
    for path in (workdir / "state").glob("catalog.db*"):
        path.unlink()
    assert json.loads(hvsnap.ok("store-rebuild", "--json"))["images"] == 1
    hvsnap.start_daemon()
    (again,) = json.loads(hvsnap.ok("image-list", "--json"))["images"]
    assert (again["id"], again["name"], again["snapshot"]) == (image, "debian-12", snapshot)
    assert hvsnap("snapshot-delete", snapshot).status == 4
    hvsnap.ok("image-delete", "debian-12")
    hvsnap.ok("snapshot-delete", snapshot)
    assert raw(made, workdir / "raw") == content
