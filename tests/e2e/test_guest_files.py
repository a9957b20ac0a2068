"""File systems of all sorts, read by libguestfs' machine over NBD: which are found, which is meant, what is said.

The machine takes ten seconds to start without KVM, so there is one, over a disk with everything on it.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvsnap.errors import BadRequest, Failed, NotFound, Refused
from hvsnap.guestfiles.launch import start
from hvsnap.guestfiles.requests import Requests
from hvsnap.guestfiles.session import GuestFiles
from tests.conftest import short_directory
from tests.guest import appliance
from tests.guest.libvirtd import wait_for

PART_MIB = 24
DISK_MIB = 5 * PART_MIB + 2
LUKS_UUID = b"6d1f3f5c-2f0e-4f52-9f43-1c7a5f0f5b3e"
QCOW2_MAGIC = b"QFI\xfb"


@dataclass
class Disk:
    """A disk in the machine."""

    guest: Any
    files: GuestFiles
    directory: Path

    def ask(self, **request: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what a request is answered, and the messages before it."""
        told: list[dict[str, Any]] = []
        return Requests(self.files, told.append, []).answer({"filesystem": "", **request}), told


def made(directory: Path) -> Path:
    """Make a disk: an ext4 that is a system's root, its /boot, swap, room for LVM, and what the guest encrypted."""
    root = directory / "root"
    for name in ("etc", "bin", "boot", "usr", "srv"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "fstab").write_text("/dev/sda1 / ext4 defaults 0 0\n/dev/sda2 /boot vfat defaults 0 0\n")
    (root / "etc" / "os-release").write_text('ID=debian\nPRETTY_NAME="A system \x1b[2J"\nVERSION_ID=12\n')
    (root / "srv" / "link").symlink_to("/etc/fstab")
    (root / "srv" / "up").symlink_to("../../../../../../etc/os-release")
    (root / "srv" / "dir").symlink_to("/etc")
    os.mknod(root / "srv" / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(root / "srv" / "pipe")
    parts = [directory / f"part{number}" for number in range(1, 6)]
    for part in parts:
        part.touch()
        os.truncate(part, PART_MIB << 20)
    table = "label: gpt\n" + f"size={PART_MIB}MiB\n" * len(parts)
    disk = directory / "disk.raw"
    disk.touch()
    os.truncate(disk, DISK_MIB << 20)
    for argv in (
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-L", "system", "-d", str(root), str(parts[0])],
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-L", "one", str(directory / "volume"), "8M"],
        ["/sbin/mkfs.vfat", "-n", "BOOT", str(parts[1])],
        ["mcopy", "-i", str(parts[1]), str(root / "etc" / "fstab"), "::kernel"],
        ["/sbin/mkswap", "-q", str(parts[2])],
        ["/sbin/sfdisk", "-q", str(disk)],
    ):
        subprocess.run(argv, check=True, input=table, text=True, capture_output=True)
    with parts[4].open("r+b") as out:
        # The header of LUKS 1: magic, version, cipher, mode, hash, the numbers of a key, UUID.
        words = (b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 4096, 64, bytes(52), 1000, LUKS_UUID)
        out.write(struct.pack(">6sH32s32s32sII52sI40s", *words))
    with disk.open("r+b") as out:
        for number, part in enumerate(parts):
            out.seek((1 + number * PART_MIB) << 20)
            out.write(part.read_bytes())
        # What QEMU takes for a qcow2 where it is let to guess.
        out.seek(0)
        out.write(QCOW2_MAGIC + bytes([0, 0, 0, 3]))
    return disk


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    directory = short_directory()
    image = made(directory)
    server = subprocess.Popen(["nbdkit", "--foreground", "-r", "-U", str(directory / "s"), "file", str(image)])
    patched = pytest.MonkeyPatch()
    for name, value in appliance.environment().items():
        patched.setenv(name, value)
    guest = None
    try:
        wait_for((directory / "s").exists, "nbdkit", 20)
        guest = start(f"nbd+unix:///?socket={directory}/s", directory)
        guest.pvcreate("/dev/sda4")
        guest.vgcreate("data", ["/dev/sda4"])
        guest.lvcreate("one", "data", 8)
        guest.upload(str(directory / "volume"), "/dev/data/one")
        yield Disk(guest, GuestFiles(guest, directory), directory)
    finally:
        if guest is not None:
            guest.close()
        server.terminate()
        server.wait()
        patched.undo()
        shutil.rmtree(directory)


def test_a_disk_that_poses_as_another_format_is_what_it_is(disk: Disk) -> None:
    assert disk.guest.blockdev_getsize64("/dev/sda") == DISK_MIB << 20
    assert bytes(disk.guest.pread_device("/dev/sda", 4, 0)) == QCOW2_MAGIC


def test_all_file_systems_are_listed_with_what_is_known_of_them(disk: Disk) -> None:
    answer, _told = disk.ask(do="filesystems")
    found = {one["device"]: one for one in answer["filesystems"]}
    assert {device: one["type"] for device, one in found.items()} == {
        "/dev/sda1": "ext4",
        "/dev/sda2": "vfat",
        "/dev/sda3": "swap",
        "/dev/sda5": "crypto_LUKS",
        "/dev/data/one": "ext4",
    }
    assert [found[one]["label"] for one in ("/dev/sda1", "/dev/sda2", "/dev/data/one")] == ["system", "BOOT", "one"]
    assert [device for device, one in found.items() if one["encrypted"]] == ["/dev/sda5"]
    assert found["/dev/data/one"]["size_bytes"] == 8 << 20
    assert found["/dev/sda1"]["system"].startswith("A system")
    assert (found["/dev/sda1"]["mounted_at"], found["/dev/sda2"]["mounted_at"]) == (["/"], ["/boot"])


def test_the_only_system_is_meant_with_what_it_mounts(disk: Disk) -> None:
    answer, told = disk.ask(do="list", path="/boot", recursive=False)
    assert answer == {"filesystem": "/dev/sda1"}
    (message,) = told
    assert [(one["path"], one["size_bytes"]) for one in message["entries"]] == [("/boot/kernel", 64)]
    _answer, told = disk.ask(do="list", path="/", recursive=True)
    listed = {one["path"]: one for message in told for one in message["entries"]}
    assert {"/boot/kernel", "/etc/fstab", "/srv/null"} <= set(listed)
    assert listed["/srv/up"]["target"] == "../../../../../../etc/os-release"
    assert not any(path.startswith("/srv/dir/") for path in listed)
    _answer, told = disk.ask(do="list", path="/srv/dir", recursive=False)
    assert [one["path"] for one in told[0]["entries"]] == ["/srv/dir/fstab", "/srv/dir/os-release"]
    _answer, told = disk.ask(do="list", path="/srv/link", recursive=False)
    assert [(one["kind"], one["target"]) for one in told[0]["entries"]] == [("symlink", "/etc/fstab")]


def test_one_that_is_wanted_is_opened_alone(disk: Disk) -> None:
    assert disk.files.open("/dev/sda2") == "/dev/sda2"
    assert [one["path"] for one in next(disk.files.listing("/"))] == ["/kernel"]


def test_copies_follow_no_link_and_leave_devices(disk: Disk, tmp_path: Path) -> None:
    sources = [("/srv", "0"), ("/srv/link", "1"), ("/srv/dir/", "2"), ("/boot/kernel", "3")]
    answer, _told = disk.ask(do="copy", into=str(tmp_path), sources=sources)
    skipped = sorted(answer["tally"]["skipped"])
    assert skipped == [("/srv/null", "character device"), ("/srv/pipe", "fifo")]
    assert os.readlink(tmp_path / "1") == "/etc/fstab"
    assert os.readlink(tmp_path / "0" / "up") == "../../../../../../etc/os-release"
    assert (tmp_path / "2" / "fstab").read_text().startswith("/dev/sda1")
    assert (tmp_path / "3").read_bytes() == (disk.directory / "root" / "etc" / "fstab").read_bytes()
    with pytest.raises(Refused, match="character device"):
        disk.ask(do="copy", into=str(tmp_path), sources=[("/srv/null", "4")])
    with pytest.raises(NotFound, match="/none"):
        disk.ask(do="copy", into=str(tmp_path), sources=[("/none", "5")])
    with pytest.raises(BadRequest):
        disk.ask(do="copy", into=str(tmp_path), sources=[("/etc/fstab/x", "6")])


def test_output_is_a_file_s_content_or_a_tar_stream(disk: Disk, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        disk.ask(do="print", path="/srv/link", descriptor=out.fileno(), archive=False)
        with pytest.raises(Refused, match="terminal"):
            disk.ask(do="print", path="/srv/dir", descriptor=out.fileno(), archive=False)
    assert (tmp_path / "out").read_text().endswith("/dev/sda2 /boot vfat defaults 0 0\n")
    with (tmp_path / "out.tar").open("wb") as out:
        disk.ask(do="print", path="/srv/dir", descriptor=out.fileno(), archive=True)
    listed = subprocess.run(["tar", "-tf", str(tmp_path / "out.tar")], check=True, capture_output=True, text=True)
    assert sorted(listed.stdout.split()) == ["./", "./fstab", "./os-release"]


def test_an_output_or_a_disk_of_the_host_that_fails_is_told_and_the_machine_goes_on(disk: Disk, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(Failed, match="output cannot be written"):
        disk.ask(do="print", path="/etc/fstab", descriptor=writing, archive=False)
    os.close(writing)
    (tmp_path / "0").touch()
    with pytest.raises(Failed, match="exists"):
        disk.ask(do="copy", into=str(tmp_path), sources=[("/etc", "0")])
    assert disk.ask(do="copy", into=str(tmp_path), sources=[("/etc", "1")])[0]["tally"]["files"] == 2
