"""The catalog's file flipped, cut and swapped anywhere: refused and named, or harmless; never another content.

SQLite has no checksums, so this is ours to see to: of each byte that was ever tried, this takes a fresh sample at each
run (its seed is printed), and all of them in the end. ``HVSNAP_TEST_ALL=1`` takes 3,000.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, Damaged, HvsnapError, SnapshotUnknown
from hvsnap.model import PAGE_BLOCKS, State
from hvsnap.store.blocks import open_store
from tests.catalog_kit import StoppedClock
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, PunchedObjects, from_the_store_alone, restored

FLIPS = 3000 if os.environ.get("HVSNAP_TEST_ALL") else 120
PAGE = 4096


class Scene:
    """A store with a chain, and the file of its catalog, closed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "catalog.db"
        self.objects = PunchedObjects()
        self.disks = Disks()
        self.good = b""
        self.stored: dict[str, bytes] = {}
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
        await house.close()
        self.good, self.stored = self.path.read_bytes(), dict(self.objects.objects)

    async def try_with(self, content: bytes) -> None:
        """Open the catalog with this content and use it: all that may happen is an error that says so."""
        for path in self.directory.glob("catalog.db*"):
            path.unlink()
        self.path.write_bytes(content)
        self.objects.objects = dict(self.stored)
        try:
            catalog = await Catalog.open(self.directory, StoppedClock())
        except CatalogFailed:
            self.outcomes["refused"] += 1
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


async def test_a_flipped_bit_anywhere(scene: Scene) -> None:
    rng = seeded()
    used = [at for at, byte in enumerate(scene.good) if byte]
    for at in rng.sample(used, min(FLIPS, len(used))):
        flipped = bytes([scene.good[at] ^ (1 << rng.randrange(8))])
        await scene.try_with(scene.good[:at] + flipped + scene.good[at + 1 :])
    assert scene.outcomes["refused"] > FLIPS // 10


async def test_cut_at_any_length_and_pages_swapped(scene: Scene) -> None:
    rng = seeded()
    for _ in range(FLIPS // 8):
        await scene.try_with(scene.good[: rng.randrange(len(scene.good))])
        one, two = sorted(rng.sample(range(len(scene.good) // PAGE), 2))
        pages = [scene.good[at : at + PAGE] for at in range(0, len(scene.good), PAGE)]
        pages[one], pages[two] = pages[two], pages[one]
        await scene.try_with(b"".join(pages))
    assert scene.outcomes["refused"] > FLIPS // 16
