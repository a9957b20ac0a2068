"""What a rollback writes and reads, counted by the kernel: its disk is a block device of which all traffic is known."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hvsnap import wire
from tests.e2e.oracle import BLOCK, Bytes, Operation, check_same
from tests.e2e.rig import Rig
from tests.e2e.scenarios import write
from tests.e2e.test_block_devices import DeviceSpec
from tests.guest.domain import make_image

MIB = 1 << 20
SIZE = 512 * MIB
SECTOR = 512


@pytest.fixture
def device(workdir: Path) -> Iterator[Path]:
    file = make_image(workdir / "device", str(SIZE + 32 * MIB), "raw")
    attach = ["losetup", "--find", "--show", str(file)]
    loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(loop)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a block device was asked to read and to write; discards are neither."""

    read: int
    written: int

    @classmethod
    def of(cls, device: Path) -> Traffic:
        fields = Path(f"/sys/block/{device.name}/stat").read_text().split()
        return cls(int(fields[2]) * SECTOR, int(fields[6]) * SECTOR)


def differing_blocks(one: Bytes, other: Bytes) -> int:
    wrong = (one != other).reshape(-1, BLOCK).any(axis=1)
    return int(np.count_nonzero(wrong))


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_s6_4_only_blocks_that_differ_are_written(
    kind: str, device: Path, make_rig: Callable[..., Rig], workdir: Path
) -> None:
    """A hundredth of a disk changed in places, much was written again as it was: a block more is too much."""
    if kind == "qcow2":
        make_image(device, str(SIZE))
    (workdir / "overlays").mkdir(mode=0o755)
    rig = make_rig([DeviceSpec(device, kind)], capture=f'overlay_dir = "{workdir / "overlays"}"')
    (disk,) = rig.disks
    random = Random(6)
    content = write(0, 96 * MIB, 1)
    rig.do(disk, content)
    (wanted,) = rig.capture([disk])
    before = disk.states[wanted.id]
    assert content.data is not None
    for _ in range(80):
        offset = random.randrange(96 * MIB // BLOCK - 1) * BLOCK + random.choice([0, 4096, 12345])
        rig.do(disk, write(offset, random.choice([512, 4096, BLOCK]), random.randrange(1 << 30)))
    rig.do(disk, Operation("zero", 50 * MIB, MIB), write(300 * MIB, MIB, 3))  # gone since, and new
    rig.do(disk, Operation("write", 60 * MIB, 16 * MIB, before[60 * MIB : 76 * MIB]))  # the same once more
    rig.guest.destroy()
    after = rig.present(disk)
    differing_bytes = differing_blocks(before, after) * BLOCK
    assert differing_bytes > 5 * MIB

    subprocess.run(["blockdev", "--flushbufs", str(device)], check=True)  # what is read is read from the device
    was = Traffic.of(device)
    task = rig.daemon.roll_back(f"{rig.guest.name}/{disk.target}", wanted.id, safety_snapshot=False)
    now = Traffic.of(device)
    check_same(rig.present(disk), before, "the disk rolled back")
    assert isinstance(task.result, wire.RolledBack), task.error
    assert task.result.written_bytes == differing_bytes
    written_bytes = now.written - was.written
    print(f"{kind}: {differing_bytes} bytes in blocks that differ, {written_bytes} written, {now.read - was.read} read")
    assert written_bytes <= 1.05 * differing_bytes
    if kind == "raw":
        assert written_bytes == differing_bytes
    else:  # of what nobody wrote to nothing is read: the bitmap and the chain tell
        dirty_bytes = differing_bytes + 16 * MIB
        assert now.read - was.read < dirty_bytes + 16 * MIB
