"""A store that fills its device: captures fail cleanly, deleting and sweeping still work, and make room again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap.errors import NoSpace
from hvsnap.store.lease import WriterLease
from hvsnap.store.objects import LocalObjects
from tests.store_kit import BLOCK, a_block, seeded, skip_unless_root
from tests.upkeep_kit import Disks, House, Taking, a_house


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    skip_unless_root()
    path = tmp_path / "device"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(device: Path) -> None:
    """Take what is left, as another program would."""
    with (device / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 20, 4096):
            try:
                while ballast.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


async def capture_until_full(house: House, disks: Disks) -> int:
    """Make snapshots of changing contents until one fails; return how many succeeded."""
    rng = seeded()
    for made in range(100):
        for number in range(24):
            disks.write("vda", number, a_block(rng, "noise"))
        taking = await Taking.begin(house, disks, "vda")
        try:
            await taking.put()
            await taking.stage()
            await taking.accomplish()
        except NoSpace:
            await taking.fail()
            return made
    raise AssertionError("the device never became full")


@pytest.mark.parametrize("others", [False, True])
async def test_captures_fill_the_device_and_deletions_make_room(
    small_device: Path, tmp_path: Path, others: bool
) -> None:
    """FAULTS 10."""
    objects = LocalObjects(small_device / "store")
    async with a_house(small_device / "state", objects) as house:
        lease = WriterLease(objects, "me", "here", ttl_s=60)
        await lease.acquire()
        disks = Disks()
        await disks.add(house, "vda")
        made = await capture_until_full(house, disks)
        assert made >= 4
        await disks.check(house)
        if others:
            fill(small_device)
        await lease._create(lease._number + 1)  # as the lease's loop does: it must not be lost for a full device
        for snapshot in list(disks.expected)[1:-1]:
            await disks.delete(house, snapshot)
        swept = await house.sweeper.sweep()
        assert swept.freed_bytes >= (made - 2) * 24 * BLOCK
        await disks.check(house)
        assert await capture_until_full(house, disks) >= 1  # there is room again
        await disks.check(house)
    objects.close()


async def test_a_sweep_frees_space_even_if_no_manifest_can_be_written(
    small_device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the manifests of deleted snapshots stay for a while; the next sweep puts that right. FAULTS 10."""
    objects = LocalObjects(small_device)
    async with a_house(tmp_path / "state", objects) as house:
        disks = Disks()
        await disks.add(house, "vda")
        rng = seeded()
        for _ in range(4):
            for number in range(8):
                disks.write("vda", number, a_block(rng, "noise"))
            await disks.take(house, "vda")
        for snapshot in list(disks.expected)[1:-1]:
            await disks.delete(house, snapshot)

        async def no_room(*_args: object) -> None:
            raise NoSpace("the device is full")

        with monkeypatch.context() as patch:
            patch.setattr(house.store.manifests, "put", no_room)
            swept = await house.sweeper.sweep()
        assert (swept.dropped_blocks, swept.deleted_packs) == (16, 2)
        await disks.check(house)
        again = await house.sweeper.sweep()
        assert again.manifests > 0
        await disks.check(house)
        assert len([one async for one in house.store.manifests.all()]) == 2
    objects.close()
