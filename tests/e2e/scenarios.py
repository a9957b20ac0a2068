"""Short lives of one disk, each made to bring one class of bug to light.

Every scenario compares bytes, and raises :class:`tests.e2e.oracle.Mismatch` when they are wrong. The same functions run
against the product and against deliberately broken ones.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from random import Random

import libvirt
import numpy as np

from tests.e2e.oracle import BLOCK, SECTOR, Mismatch, Operation, check_same
from tests.e2e.rig import Rig, TestDisk


def write(offset: int, length: int, seed: int) -> Operation:
    """Return a write of bytes that only this seed makes."""
    return Operation("write", offset, length, np.resize(np.frombuffer(Random(seed).randbytes(1021), np.uint8), length))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def zeroed(rig: Rig, disk: TestDisk, kind: str = "zero") -> None:
    """A pattern, a snapshot, zeroes in its place, a snapshot: zeroes come back, and from the first one the pattern."""
    rig.do(disk, write(3 * BLOCK, 4 * BLOCK, 1))
    rig.capture([disk])
    rig.do(disk, Operation(kind, 4 * BLOCK, 2 * BLOCK))
    (second,) = rig.capture([disk])
    if disk.states[second.id][4 * BLOCK : 6 * BLOCK].any():
        raise AssertionError(f"{kind} left something: the test shows nothing")
    rig.check_snapshots(disk)


def written_during(rig: Rig, disk: TestDisk) -> None:
    """What is written while a snapshot is taken is not in it; it is on the disk, and in the next snapshot."""
    rig.do(disk, write(BLOCK, 3 * BLOCK, 2))

    def meanwhile() -> None:
        rig.do(disk, write(2 * BLOCK + SECTOR, BLOCK, 3), Operation("unmap", BLOCK, SECTOR), write(7 * BLOCK, 10, 4))

    rig.capture([disk], meanwhile)
    rig.check_disk(disk, "after writes during a capture")
    rig.capture([disk], meanwhile)
    rig.capture([disk])
    rig.check_snapshots(disk)


def few_blocks_changed(rig: Rig, disk: TestDisk) -> None:
    """Single blocks here and there, first and last ones, change between snapshots."""
    rig.do(disk, write(0, disk.size, 5))
    rig.capture([disk])
    for number, offset in enumerate((0, 17 * BLOCK - 1, 30 * BLOCK, disk.size - 1)):
        rig.do(disk, write(offset, 1, 10 + number))
    rig.capture([disk])
    rig.check_snapshots(disk)


def odd_end(rig: Rig, disk: TestDisk) -> None:
    """The last block is shorter than the others."""
    if disk.size % BLOCK == 0:
        raise AssertionError("the disk must have an odd size")
    last = disk.size // BLOCK * BLOCK
    rig.do(disk, write(last - 100, disk.size - last + 100, 6))
    rig.capture([disk])
    rig.do(disk, write(disk.size - 1, 1, 7))
    rig.capture([disk])
    rig.do(disk, Operation("zero", last, disk.size - last))
    rig.capture([disk])
    rig.check_snapshots(disk)


def head_deleted(rig: Rig, disk: TestDisk) -> None:
    """The newest snapshot is deleted: what it held and nobody wrote since belongs to the next one."""
    rig.do(disk, write(0, 20 * BLOCK, 8))
    rig.capture([disk])
    rig.do(disk, write(5 * BLOCK, BLOCK, 9), Operation("unmap", 9 * BLOCK, BLOCK))
    (second,) = rig.capture([disk])
    rig.delete(disk, second.id)
    rig.do(disk, write(12 * BLOCK, 5, 10))
    rig.capture([disk])
    rig.check_snapshots(disk)


def rolled_back(rig: Rig, disk: TestDisk) -> None:
    """A disk goes back to an earlier snapshot, and from there on lives another life."""
    rig.do(disk, write(0, 20 * BLOCK, 11))
    (first,) = rig.capture([disk])
    rig.do(disk, write(2 * BLOCK, BLOCK, 12))
    rig.capture([disk])
    rig.do(disk, write(8 * BLOCK, 2 * BLOCK, 13), Operation("unmap", 11 * BLOCK, BLOCK), write(30 * BLOCK, 9, 14))
    rig.flush(disk)
    rig.guest.destroy()
    rig.roll_back(disk, first.id)
    rig.guest.start()
    rig.do(disk, write(3 * BLOCK, BLOCK, 15))
    rig.capture([disk])
    rig.check_snapshots(disk)


def on_template(rig: Rig, disk: TestDisk, template: Path) -> None:
    """A disk on a template: what was written while its overlay was open goes into the disk, never into the template."""
    before = sha256(template)

    def meanwhile() -> None:
        rig.do(disk, write(6 * BLOCK, 3 * BLOCK, 16), Operation("unmap", 20 * BLOCK, BLOCK))

    rig.do(disk, write(2 * BLOCK, BLOCK, 17))
    for _ in range(2):
        try:
            rig.capture([disk], meanwhile)
        finally:
            if sha256(template) != before:
                raise Mismatch("the template was written to")
    rig.check_disk(disk, "a disk on a template")
    rig.check_snapshots(disk)


def started_while_read(rig: Rig, disk: TestDisk) -> None:
    """The guest is off, its image is read; it is started and writes, or cannot be: the image read is of one instant."""
    rig.guest.destroy()
    rig.do(disk, write(0, 40 * BLOCK, 18))
    with rig.daemon.gate("read") as gate:
        made = rig.daemon.begin(rig.guest.name, [disk.target])
        gate.reached(made[0].id)
        before = rig.present(disk)
        with contextlib.suppress(libvirt.libvirtError):
            rig.guest.start()
            rig.do(disk, write(0, 40 * BLOCK, 19))
            rig.flush(disk)
        gate.open()
        (ended,) = rig.daemon.ended(made)
        rig.daemon.settled(rig.settle_timeout_s)
    if ended.state == "accomplished":
        check_same(rig.restored(made[0].id), before, "an image at rest")
    rig.guest.start()
    rig.do(disk, write(BLOCK, 40, 20))
    rig.capture([disk])
    rig.check_snapshots(disk)


def damaged_store(rig: Rig, disk: TestDisk) -> None:
    """A bit of a stored block turns: the snapshot is refused rather than restored wrongly."""
    rig.do(disk, Operation("write", BLOCK, 8 * BLOCK, np.frombuffer(Random(18).randbytes(8 * BLOCK), np.uint8)))
    (made,) = rig.capture([disk])
    (pack,) = [path for path in rig.daemon.store.glob("packs/**/*") if path.is_file()]
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    target = rig.scratch / "damaged.raw"
    task = rig.daemon.create_disk(made.id, target, "raw")
    if task.state == "accomplished":
        got = np.fromfile(target, np.uint8)
        target.unlink()
        check_same(got, disk.states[made.id], f"{made.id} from a damaged store")
        raise AssertionError("the damage was in nothing that the snapshot holds")
    assert task.error is not None
    if task.error.code != "damaged" or list(rig.scratch.glob("*damaged.raw*")):
        raise AssertionError(f"{task.error} and left {list(rig.scratch.glob('*damaged.raw*'))}")
