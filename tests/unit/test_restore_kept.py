"""What a rollback has verified is not read twice where it is kept; what is written is the same, however little is."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.pipeline import Meter
from hvsnap.errors import Damaged
from hvsnap.hypervisor import images
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import PAGE_BLOCKS, SnapshotId
from hvsnap.restore import fill
from hvsnap.restore.fill import DifferingWrites, Filler
from hvsnap.restore.kept import Kept, Room
from hvsnap.restore.writer import open_writer
from tests.store_kit import MemoryObjects, a_block, seeded
from tests.upkeep_kit import BLOCK, Disks, House, a_house

WRITTEN = (*range(8), PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 7, 2 * PAGE_BLOCKS + 1)
ZEROED = (40, PAGE_BLOCKS + 1)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with a_house(tmp_path, MemoryObjects()) as made:
        yield made


async def taken(house: House, disks: Disks) -> SnapshotId:
    """Take a snapshot of blocks on three pages, of which two are the same."""
    rng = seeded()
    await disks.add(house, "vda")
    for number in WRITTEN:
        disks.write("vda", number, a_block(rng, "noise"))
    disks.write("vda", WRITTEN[-1], disks.content["vda"][WRITTEN[0]])
    return await disks.take(house, "vda")


def differing(house: House, filler: Filler) -> DifferingWrites:
    differs = BlockSet(3 * PAGE_BLOCKS)
    for number in WRITTEN + ZEROED:
        differs.add_index(number // PAGE_BLOCKS, np.array([number % PAGE_BLOCKS], np.uint16))
    return DifferingWrites(filler, differs)


def meter() -> Meter:
    return Meter("x", 1, lambda _progress: None)


@pytest.mark.parametrize("remembered", [0, 1 << 20], ids=["asked again", "remembered"])
@pytest.mark.parametrize("kept_blocks", [0, 5, len(WRITTEN)])
async def test_what_is_kept_is_read_once_and_all_is_written(
    house: House, workdir: Path, monkeypatch: pytest.MonkeyPatch, kept_blocks: int, remembered: int
) -> None:
    monkeypatch.setattr(fill, "REMEMBERED_BLOCKS_MAX", remembered)
    monkeypatch.setattr(fill, "WINDOW_BLOCKS", 2 if kept_blocks == 5 else fill.WINDOW_BLOCKS)
    disks = Disks()
    snapshot = await house.catalog.snapshot(await taken(house, disks))
    room = Room(kept_blocks * BLOCK)
    kept = Kept(room)
    filler = Filler(house.catalog, house.store, snapshot, kept)
    writes = differing(house, filler)
    assert await filler.count(writes) == (len(WRITTEN), len(ZEROED))
    await filler.verify(writes, meter())
    assert room.free_bytes == max(0, kept_blocks - (len(WRITTEN) - 1)) * BLOCK  # one content is there twice
    assert isinstance(house.objects, MemoryObjects)
    house.objects.reads.clear()

    image = workdir / "image"
    await images.create_image(str(image), "raw", snapshot.size_bytes)
    with image.open("r+b") as file:
        for number in ZEROED:
            file.seek(number * BLOCK)
            file.write(b"old" * 1000)
    serving = serve_image(str(image), "raw", run_dir=str(workdir), read_only=False)
    async with serving as export, open_writer(export) as writer:
        await filler.clear(writes, writer, snapshot.size_bytes)
        await filler.fill(writes, writer, snapshot.size_bytes, meter(), cleared=True)
        await writer.finish()
    kept.close()

    assert (house.objects.reads == []) == (kept_blocks == len(WRITTEN))
    assert room.free_bytes == kept_blocks * BLOCK
    content = disks.expected[snapshot.id]
    with image.open("rb") as file:
        for number in WRITTEN + ZEROED:
            file.seek(number * BLOCK)
            assert file.read(BLOCK) == content.get(number, bytes(BLOCK)), number


async def test_damage_is_met_before_anything_is_written_however_much_is_kept(house: House) -> None:
    disks = Disks()
    snapshot = await house.catalog.snapshot(await taken(house, disks))
    room = Room()
    kept = Kept(room)
    filler = Filler(house.catalog, house.store, snapshot, kept)
    assert isinstance(house.objects, MemoryObjects)
    (place,) = await house.catalog.places([int((await house.catalog.view(snapshot.id, 1))[7])])
    data = bytearray(house.objects.objects[place.pack])
    data[place.offset + place.length // 2] ^= 1
    house.objects.objects[place.pack] = bytes(data)
    with pytest.raises(Damaged):
        await filler.verify(differing(house, filler), meter())
    kept.close()
    assert room.free_bytes == Room().free_bytes


def test_rollbacks_share_one_room() -> None:
    room = Room(3 * BLOCK)
    one, other = Kept(room), Kept(room)
    blocks = [bytes([number]) * BLOCK for number in range(4)]
    one.keep(1, blocks[1])
    one.keep(1, blocks[1])
    other.keep(1, blocks[1])
    other.keep(2, blocks[2])
    other.keep(3, blocks[3])  # no room
    assert [other.get(number) for number in (1, 2, 3)] == [blocks[1], blocks[2], None]
    one.close()
    assert one.get(1) is None
    other.keep(3, blocks[3])
    assert other.get(3) is blocks[3]
    before = sys.getrefcount(blocks[3])
    other.forget([3, 4])
    assert (sys.getrefcount(blocks[3]), room.free_bytes) == (before - 1, BLOCK)
