"""Disks that are block devices of the host: nothing can lie beside them, and QEMU's locks do not reach them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import libvirt
import pytest

from hvsnap.cli.client import DaemonError
from tests.e2e import scenarios
from tests.e2e.oracle import BLOCK, check_same
from tests.e2e.rig import Rig
from tests.e2e.scenarios import write
from tests.guest.domain import DiskSpec, make_image

MIB = 1 << 20
SIZE = 4 * MIB + 512 * 77


class DeviceSpec(DiskSpec):
    """A disk whose source is a block device."""

    def xml(self, number: int) -> str:
        xml = super().xml(number).replace("<disk type='file'", "<disk type='block'")
        return xml.replace("<source file=", "<source dev=")


@pytest.fixture
def device(workdir: Path) -> Iterator[Path]:
    """Return a loop device."""
    file = make_image(workdir / "device", str(2 * SIZE), "raw")
    attach = ["losetup", "--find", "--show", str(file)]
    loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(loop)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.fixture
def overlays(workdir: Path) -> str:
    directory = workdir / "overlays"
    directory.mkdir(mode=0o755)
    return f'overlay_dir = "{directory}"'


def test_block_device_without_a_place_for_overlays_is_refused(
    device: Path, make_rig: Callable[..., Rig], workdir: Path
) -> None:
    rig = make_rig([DeviceSpec(device, "raw")])
    with pytest.raises(DaemonError) as caught:
        rig.daemon.begin(rig.guest.name)
    assert (caught.value.error.code, caught.value.error.exit_status) == ("refused", 4)
    assert "capture.overlay_dir" in caught.value.hint
    assert rig.daemon.status().snapshots == 0
    rig.guest.destroy()
    rig.capture(rig.disks)  # a guest that is off needs none
    rig.check_snapshots(rig.disks[0])


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_block_device_lives_like_a_file_also_when_its_guest_dies_in_a_capture(
    kind: str, device: Path, overlays: str, make_rig: Callable[..., Rig]
) -> None:
    if kind == "qcow2":
        make_image(device, str(SIZE))
    rig = make_rig([DeviceSpec(device, kind)], capture=overlays)
    (disk,) = rig.disks
    random = Random(8)
    rig.random_operations(random, disk, 10)
    rig.capture([disk], storm=random)
    scenarios.rolled_back(rig, disk)

    def die() -> None:
        rig.do(disk, write(2 * BLOCK, 3 * BLOCK, 1))
        rig.flush(disk)
        rig.guest.kill()

    rig.capture([disk], die)
    rig.check_disk(disk, "a device merged into while its guest was off")
    rig.guest.start()
    rig.do(disk, write(5, 5, 2))
    rig.capture([disk])
    rig.check_snapshots(disk)


def test_guest_started_while_its_device_is_read_cannot_change_what_is_read(
    device: Path, overlays: str, make_rig: Callable[..., Rig]
) -> None:
    rig = make_rig([DeviceSpec(device, "raw")], capture=overlays)
    (disk,) = rig.disks
    rig.do(disk, write(0, 40 * BLOCK, 1))
    rig.flush(disk)
    rig.guest.destroy()
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name)
        gate.reached(made[0].id)
        before = rig.present(disk)
        with contextlib.suppress(libvirt.libvirtError):
            rig.guest.start()
            rig.do(disk, write(3 * BLOCK, BLOCK, 2))
            rig.guest.destroy()
        gate.open()
        (ended,) = rig.daemon.ended(made)
        rig.daemon.settled()
    if ended.state == "accomplished":
        check_same(rig.restored(ended.id), before, "a device at rest")
    else:
        assert "was written to while it was read" in ended.error
    rig.replace(disk)
    rig.guest.start()
    rig.capture([disk])
    rig.check_snapshots(disk)
