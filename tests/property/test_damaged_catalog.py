"""The catalog's file flipped, cut and swapped anywhere: refused and named, or harmless; never another content.

SQLite has no checksums, so this is ours to see to: of each byte that was ever tried, this takes a fresh sample at each
run (its seed is printed), and all of them in the end. ``HVSNAP_TEST_ALL=1`` takes 3,000. Rows that say what may be
deleted, and when, are handed out as they were written or not at all.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from hvsnap.catalog import row_sums
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, Damaged, HvsnapError, SnapshotUnknown
from hvsnap.model import PAGE_BLOCKS, GuestUuid, Image, ImageId, Origin, State
from hvsnap.policy import Keep, Policy, PolicyId
from hvsnap.store.blocks import open_store
from tests.catalog_kit import StoppedClock
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, PunchedObjects, from_the_store_alone, restored

FLIPS = 3000 if os.environ.get("HVSNAP_TEST_ALL") else 120
PAGE = 4096


async def told(catalog: Catalog) -> list[object]:
    """Return all that deletions, expiry, recovery and the next capture go by."""
    disks = await catalog.disks(include_released=True)
    return [
        *(disks, await catalog.snapshots(), await catalog.policies(), await catalog.images(), await catalog.origins()),
        *(await catalog.operations(), await catalog.upkeep.manifests()),
        [{page: index.tobytes() for page, index in (await catalog.carry(disk.id)).items()} for disk in disks],
    ]


class Scene:
    """A store with a chain, and the file of its catalog, closed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "catalog.db"
        self.objects = PunchedObjects()
        self.disks = Disks()
        self.good = b""
        self.stored: dict[str, bytes] = {}
        self.told: list[object] = []
        self.outcomes: Counter[str] = Counter()

    async def make(self, rng: random.Random) -> None:
        house = await House.open(self.directory, self.objects)
        await self.disks.add(house, "vda")
        for number in range(4):
            written = rng.sample(range(30), 6) + rng.sample(range(PAGE_BLOCKS, PAGE_BLOCKS + 20), 5)
            for block in [*written, 9000 + number]:
                self.disks.write("vda", block, a_block(rng))
            await self.disks.take(house, "vda")
        await self.disks.delete(house, list(self.disks.expected)[1])
        await house.sweeper.sweep()
        await self._set(house)
        self.told = await told(house.catalog)
        await house.close()
        self.good, self.stored = self.path.read_bytes(), dict(self.objects.objects)

    async def _set(self, house: House) -> None:
        """Set what people set, and begin what is journaled."""
        first, *_, last = self.disks.expected
        disk = self.disks.disks["vda"].id
        async with house.catalog.write() as tx:
            await tx.put_policy(Policy(PolicyId("p-daily"), "Daily", (3, 15), (0, 4), "UTC", 30, Keep(last=3), 12.5))
            await tx.update_disk(disk, policy="p-daily", delete_auto_with_disk=True)
            await tx.update_snapshot(first, locked_until=2e9, tags={"case": "4711"}, description="the auditor's")
            await tx.update_snapshot(last, automatic=True, expires_at=2e9, retention='{"last": 3}')
            await tx.add_image(Image(ImageId("i-1"), "debian", "a template", first, 13.5))
            await tx.put_origin(Origin("/images/b.qcow2", 4711, first, 14.5))
            await tx.open_operation("capture", GuestUuid("g"), "redirect", {"overlay": "/images/a.hvsnap", "node": "n"})
            await tx.add_carry(disk, 1, np.array([3, 17], np.uint16))

    async def open(self, content: bytes) -> Catalog | None:
        """Open the catalog with this content; None if it is refused with a way out."""
        for path in self.directory.glob("catalog.db*"):
            path.unlink()
        self.path.write_bytes(content)
        try:
            return await Catalog.open(self.directory, StoppedClock())
        except CatalogFailed as error:
            self.outcomes["refused" if error.hint else "refused without a way out"] += 1
            return None

    async def try_with(self, content: bytes) -> None:
        """Open the catalog with this content and use it: all that may happen is an error that says so."""
        self.objects.objects = dict(self.stored)
        catalog = await self.open(content)
        if catalog is None:
            return
        try:
            store = await open_store(self.objects, catalog)
        except CatalogFailed:
            self.outcomes["refused"] += 1
            await catalog.close()
            return
        try:
            await self._use(House(catalog, store, self.objects))
        finally:
            await store.close()
            await catalog.close()

    async def _use(self, house: House) -> None:
        outcome = "harmless"
        assert await told(house.catalog) == self.told
        for row in await house.catalog.snapshots(state=State.ACCOMPLISHED):
            try:
                assert await restored(house, row.id) == self.disks.expected[row.id]
            except (CatalogFailed, Damaged, SnapshotUnknown):
                outcome = "refused later"
        # And above all: a sweep that believes it must not free what is needed.
        with suppress(HvsnapError):
            await house.sweeper.sweep()
        alone = await from_the_store_alone(self.objects, house.store)
        assert {name: alone.get(name) for name in self.disks.expected} == self.disks.expected
        self.outcomes[outcome] += 1


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    made = Scene(tmp_path)
    await made.make(seeded())
    yield made
    print(dict(made.outcomes))
    assert not made.outcomes["refused without a way out"]


async def test_a_flipped_bit_anywhere(scene: Scene) -> None:
    """FAULTS 14."""
    rng = seeded()
    used = [at for at, byte in enumerate(scene.good) if byte]
    for at in rng.sample(used, min(FLIPS, len(used))):
        flipped = bytes([scene.good[at] ^ (1 << rng.randrange(8))])
        await scene.try_with(scene.good[:at] + flipped + scene.good[at + 1 :])
    assert scene.outcomes["refused"] > FLIPS // 10


async def test_a_flipped_bit_in_what_says_what_may_be_deleted(scene: Scene) -> None:
    """Locks, expiry, tags, policies, images, the journal: a row is as it was written, or nothing is used. FAULTS 14."""
    rng = seeded()
    with closing(sqlite3.connect(scene.path)) as connection:
        sql = f"SELECT name, pageno FROM dbstat WHERE name IN ({', '.join('?' * len(row_sums.COLUMNS))})"
        pages = connection.execute(sql, tuple(row_sums.COLUMNS)).fetchall()
    assert {name for name, _ in pages} == set(row_sums.COLUMNS)
    for _name, number in pages:
        used = [at for at in range((number - 1) * PAGE, number * PAGE) if scene.good[at]]
        for at in rng.sample(used, min(FLIPS // 3, len(used))):
            flipped = bytes([scene.good[at] ^ (1 << rng.randrange(8))])
            catalog = await scene.open(scene.good[:at] + flipped + scene.good[at + 1 :])
            if catalog is not None:
                try:
                    assert await told(catalog) == scene.told
                finally:
                    await catalog.close()
                scene.outcomes["harmless"] += 1
    assert scene.outcomes["refused"] > 2 * scene.outcomes["harmless"]


async def test_a_table_whose_page_is_that_of_another(scene: Scene) -> None:
    """As a device does that writes a page to another place: mostly the table is empty then. FAULTS 14."""
    with closing(sqlite3.connect(scene.path)) as connection:
        number = {name: page - 1 for name, page in connection.execute("SELECT name, pageno FROM dbstat")}
    used = ("packs", "blocks", "pack_ranges", "pages", "digests", "meta", *row_sums.COLUMNS)
    empty = ("damaged", "usage", "events_unpublished", "image_objects_to_remove")
    pairs = combinations(number, 2) if os.environ.get("HVSNAP_TEST_ALL") else product(used, empty)
    good = [scene.good[at : at + PAGE] for at in range(0, len(scene.good), PAGE)]
    for one, two in pairs:
        pages = list(good)
        pages[number[one]], pages[number[two]] = pages[number[two]], pages[number[one]]
        print(one, two)
        await scene.try_with(b"".join(pages))
    assert scene.outcomes["refused"] > 2 * scene.outcomes["harmless"]


async def test_cut_at_any_length_and_pages_swapped(scene: Scene) -> None:
    """FAULTS 14."""
    rng = seeded()
    for _ in range(FLIPS // 8):
        await scene.try_with(scene.good[: rng.randrange(len(scene.good))])
        one, two = sorted(rng.sample(range(len(scene.good) // PAGE), 2))
        pages = [scene.good[at : at + PAGE] for at in range(0, len(scene.good), PAGE)]
        pages[one], pages[two] = pages[two], pages[one]
        await scene.try_with(b"".join(pages))
    assert scene.outcomes["refused"] > FLIPS // 16
