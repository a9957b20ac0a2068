"""The test guest does what the other tests rely on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import wait_for
from tests.guest.workload import Mirror

MIB = 1 << 20


def raw_bytes(path: Path, workdir: Path) -> bytes:
    out = workdir / "raw"
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(path), str(out)], check=True)
    return out.read_bytes()


def test_guest_runs_commands_and_its_operations_match_the_mirror(
    make_guest: Callable[..., Guest], guest_image: GuestImage, workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "32M")
    guest = make_guest([DiskSpec(disk)], guest_image).start()
    assert guest.run("echo a; echo b") == "a\nb"
    with pytest.raises(RuntimeError, match="ended with 3"):
        guest.run("exit_with() { return 3; }; exit_with")
    mirror = Mirror(workdir / "mirror", 32 * MIB)
    lines = guest.run("stress random /dev/vda 7 60 300000").splitlines()
    assert len(lines) == 60
    assert {line.split()[0] for line in lines} == {"write", "zero", "discard"}
    for line in lines:
        mirror.apply(line)
    guest.shutdown()
    assert raw_bytes(disk, workdir) == (workdir / "mirror").read_bytes()


def test_guest_killed_starts_again_and_its_log_survives(
    make_guest: Callable[..., Guest], guest_image: GuestImage, workdir: Path
) -> None:
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "32M"))], guest_image).start()
    guest.spawn("stress random /dev/vda 1 0 65536")
    wait_for(lambda: len(guest.logged()) > 20, "20 operations")
    guest.kill()
    assert len(guest.logged()) > 20
    guest.start()
    assert guest.run("echo back") == "back"


def test_guest_freezes_and_thaws_through_its_agent(
    make_guest: Callable[..., Guest], guest_image: GuestImage, workdir: Path
) -> None:
    raw = workdir / "fs.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(raw), "32M"], check=True)
    guest = make_guest([DiskSpec(raw, "raw")], guest_image).start()
    guest.run("mount /dev/vda /mnt && echo x > /mnt/x")
    assert guest.domain().fsFreeze(None, 0) == 1
    assert guest.domain().fsThaw(None, 0) == 1
