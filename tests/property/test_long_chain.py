"""A chain at its limit, 64 snapshots with a branch, deleted in any order: what is left restores, nothing else is kept.

``HVSNAP_TEST_ALL=1`` takes other orders, too, and looks more often.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hvsnap.model import PAGE_BLOCKS, SnapshotId
from hvsnap.store.objects import LocalObjects
from hvsnap.store.repository import CONFIG_NAME
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, PunchedObjects, a_house, live_bytes, referred_bytes

SNAPSHOTS = 64
ALL = bool(os.environ.get("HVSNAP_TEST_ALL"))
CHECKS = 30 if ALL else 7
BLOCKS = [*range(6), *range(PAGE_BLOCKS - 2, PAGE_BLOCKS + 4), *range(2 * PAGE_BLOCKS, 2 * PAGE_BLOCKS + 4)]
"""Blocks that are written: in three pages, and across the border of two."""

Order = Callable[[random.Random, list[SnapshotId]], list[SnapshotId]]
ORDERS: dict[str, Order] = {
    "oldest first": lambda _rng, names: names,
    "newest first": lambda _rng, names: names[::-1],
    "every other one, then the rest": lambda _rng, names: names[1::2] + names[::2],
    "any": lambda rng, names: rng.sample(names, len(names)),
}


async def fill(house: House, disks: Disks, rng: random.Random) -> None:
    """Make the chain; contents come back now and then, blocks are trimmed, and half-way the disk is rolled back."""
    seen: list[bytes] = []
    await disks.add(house, "vda")
    for number in range(SNAPSHOTS):
        if number == SNAPSHOTS // 2:
            await disks.roll_back(house, "vda", list(disks.expected)[number // 2])
        for block in rng.sample(BLOCKS, 4):
            again = seen and rng.random() < 0.3
            seen.append(rng.choice(seen) if again else a_block(rng))
            disks.write("vda", block, seen[-1])
        await disks.take(house, "vda")


async def exact(house: House, disks: Disks) -> None:
    """Everything restores, by the catalog and without it; as many blocks are kept as there are contents."""
    await disks.check(house)
    contents = {content for view in disks.expected.values() for content in view.values()}
    assert sum(pack.live_blocks for pack in await house.catalog.upkeep.packs()) == len(contents)
    assert await live_bytes(house) == await referred_bytes(house)


@pytest.mark.parametrize("order", ORDERS if ALL else ["any"])
async def test_a_full_chain_is_deleted_in_an_order(tmp_path: Path, order: str) -> None:
    rng, disks = seeded(), Disks()
    objects = LocalObjects(tmp_path / "store") if order == "any" else PunchedObjects()
    async with a_house(tmp_path / "state", objects) as house:
        await fill(house, disks, rng)
        assert len(disks.expected) == SNAPSHOTS
        await exact(house, disks)
        doomed = ORDERS[order](rng, list(disks.expected))
        checked = {SNAPSHOTS - 1, *rng.sample(range(SNAPSHOTS - 1), CHECKS)}
        for number, name in enumerate(doomed):
            await disks.delete(house, name)
            if number in checked:
                await house.sweeper.sweep()
                await exact(house, disks)
        assert [item.name async for item in objects.list("")] == [CONFIG_NAME]
