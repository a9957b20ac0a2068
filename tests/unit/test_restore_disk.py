"""A new disk is whole under its name or not there, wherever its making is killed; so is what it was to replace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hvsnap.errors import Refused
from hvsnap.model import SnapshotId
from hvsnap.restore import target
from hvsnap.restore.disk import ATTACH_KIND, Attachment, DiskMaker, Order
from hvsnap.restore.occupancy import Occupancy
from tests.service_kit import WEB, FakeHypervisor
from tests.store_kit import skip_unless_root
from tests.upkeep_kit import BLOCK, Disks, Fuse, House, Killed, PunchedObjects

BLOCKS = 40
OLD = b"old" * 1000


class DirectoryPools:
    """Pools that are directories."""

    def __init__(self, directory: Path, fuse: Fuse) -> None:
        self.directory = directory
        self.fuse = fuse

    async def volume_path(self, pool: str, name: str) -> str:
        return str(self.directory / name)

    async def create_volume(self, pool: str, name: str, image_format: str, size_bytes: int) -> str:
        self.fuse.begin()
        path = str(self.directory / name)
        subprocess.run(["qemu-img", "create", "-q", "-f", image_format, path, str(size_bytes)], check=True)
        self.fuse.end()
        return path

    async def delete_volume(self, pool: str, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    async def refresh_pool(self, pool: str) -> None:
        return


def order_of(kind: str, snapshot: SnapshotId, path: Path) -> Order:
    attach = Attachment(WEB, "vdb")
    if kind == "volume":
        return Order(snapshot, path.name, "raw", pool="default", attach=attach)
    return Order(snapshot, str(path), "raw", force=kind == "replace", attach=attach)


def maker_of(house: House, directory: Path, fuse: Fuse) -> DiskMaker:
    occupancy = Occupancy(FakeHypervisor(), house.catalog)
    return DiskMaker(house.catalog, house.store, str(directory), occupancy, DirectoryPools(directory / "disks", fuse))


@pytest.fixture
def fused_names(monkeypatch: pytest.MonkeyPatch) -> list[Fuse]:
    """Let the giving of names be points at which the fuse in the list kills."""
    fuses: list[Fuse] = []
    real = target.publish

    def publish(temporary: str, path: str, *, replace: bool = False) -> None:
        fuses[-1].begin()
        real(temporary, path, replace=replace)
        fuses[-1].end()

    monkeypatch.setattr(target, "publish", publish)
    return fuses


async def one_life(directory: Path, kind: str, fuse: Fuse, left: int, *, after: bool) -> bool:
    """Make a disk, killed at one point; look at what the next daemon makes of it. True if it was killed."""
    disks, path = Disks(), directory / "disks" / "new.raw"
    path.parent.mkdir(exist_ok=True)
    (directory / "state").mkdir()
    if kind == "replace":
        path.write_bytes(OLD)
    objects = PunchedObjects()
    house = await House.open(directory / "state", objects, fuse)
    await disks.add(house, "vda", BLOCKS)
    for number in (0, 7, BLOCKS - 1):
        disks.write("vda", number, os.urandom(BLOCK))
    snapshot = await disks.take(house, "vda")
    wanted = b"".join(disks.expected[snapshot].get(number, bytes(BLOCK)) for number in range(BLOCKS))
    maker = maker_of(house, directory, fuse)
    killed = False

    async def dead(*_arguments: object) -> None:
        raise Killed

    fuse.set(left, after=after)
    maker._give_up = dead  # type: ignore[method-assign]
    try:
        await maker.create(order_of(kind, snapshot, path), lambda _progress: None)
    except Killed:
        killed = True
    fuse.set(-1, after=False)
    fuse.blown = False
    await house.restart(directory / "state")
    for operation in await house.catalog.operations("disk-create"):
        await maker_of(house, directory, fuse).recover(operation)
    told = [event.type for event in await house.catalog.events(0) if event.type.startswith("disk.")]
    present = path.read_bytes() if path.exists() else b""
    whole = present == wanted
    assert whole or present == (OLD if kind == "replace" else b"")
    assert os.listdir(path.parent) == ([path.name] if present else [])
    assert told == (["disk.created"] if whole else told and ["disk.create-failed"])
    origin = await house.catalog.origin(str(path))
    assert (origin is not None and origin.made_of == snapshot) == whole
    attaching = await house.catalog.operations()
    assert [one.kind for one in attaching] == [ATTACH_KIND] * whole
    assert whole or killed
    await house.close()
    return killed


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["new", "replace", "volume"])
async def test_f29_killed_at_any_step_a_disk_is_whole_or_not_there(
    kind: str, after: bool, workdir: Path, fused_names: list[Fuse]
) -> None:
    kills = 0
    for left in range(20):
        directory = workdir / str(left)
        directory.mkdir()
        fused_names.append(Fuse())
        if not await one_life(directory, kind, fused_names[-1], left, after=after):
            break
        kills += 1
    assert kills == (6 if kind == "volume" else 4)  # journal, volume, journal, inode, name, end


async def test_f29_a_volume_that_somebody_else_made_meanwhile_is_left_alone(workdir: Path) -> None:
    """The journal says that a volume was about to be made; what is there holds something, so it is not ours."""
    (workdir / "disks").mkdir()
    house = await House.open(workdir, PunchedObjects())
    disks = Disks()
    await disks.add(house, "vda", BLOCKS)
    disks.write("vda", 0, os.urandom(BLOCK))
    snapshot = await disks.take(house, "vda")
    path = workdir / "disks" / "new.raw"
    maker = maker_of(house, workdir, Fuse())
    order = order_of("volume", snapshot, path)
    await maker._begin(order, await maker.check(order))
    path.write_bytes(b"\xff" * (2 << 20))
    (operation,) = await house.catalog.operations()
    assert not await maker.recover(operation)
    assert path.stat().st_size == 2 << 20
    await house.close()


async def test_f29_a_device_that_was_not_finished_is_blank_unless_somebody_uses_it(workdir: Path) -> None:
    skip_unless_root()
    (workdir / "disks").mkdir()
    file = workdir / "device"
    file.write_bytes(b"\xff" * (BLOCKS * BLOCK))
    attach = ["losetup", "--find", "--show", str(file)]
    loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    house = await House.open(workdir, PunchedObjects())
    try:
        disks = Disks()
        await disks.add(house, "vda", BLOCKS)
        disks.write("vda", 0, os.urandom(BLOCK))
        snapshot = await disks.take(house, "vda")
        maker = maker_of(house, workdir, Fuse())
        order = Order(snapshot, loop, "raw", force=True)
        for used in (True, False):
            operation = await maker._begin(order, await maker.check(order))
            holder = os.open(loop, os.O_RDWR | os.O_EXCL) if used else -1
            assert not await maker.recover(operation)
            os.close(holder) if used else None
            content = file.read_bytes()
            assert (content[: 1 << 20].count(0), content[-(1 << 20) :].count(0)) == ((0, 0) if used else (1 << 20,) * 2)
        with pytest.raises(Refused):
            await DiskMaker(house.catalog, house.store, str(workdir)).check(order)  # nobody to ask who uses it
    finally:
        await house.close()
        subprocess.run(["losetup", "--detach", loop], check=True)
