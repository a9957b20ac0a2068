"""An old copy of the catalog beside a newer store: nothing of the store is taken for something left over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hvsnap.errors import CatalogFailed
from tests.store_kit import BLOCK
from tests.upkeep_kit import Disks, PunchedObjects, a_house


async def test_a_sweep_removes_nothing_that_an_old_catalog_does_not_know(workdir: Path) -> None:
    state, copy, objects, disks = workdir / "state", workdir / "copy", PunchedObjects(), Disks()
    async with a_house(state, objects) as house:
        await disks.add(house, "vda")
        disks.write("vda", 1, b"\1" * BLOCK)
        first = await disks.take(house, "vda")
    shutil.copytree(state, copy)
    async with a_house(state, objects) as house:
        disks.write("vda", 2, b"\2" * BLOCK)
        await disks.take(house, "vda")
        await disks.delete(house, first)
        await house.sweeper.sweep()
        await disks.check(house)
    before = dict(objects.objects)
    async with a_house(copy, objects) as house:
        with pytest.raises(CatalogFailed, match="older than the store") as caught:
            await house.sweeper.sweep()
        with pytest.raises(CatalogFailed):
            await house.sweeper.plan()
    assert "store-rebuild" in caught.value.hint
    assert objects.objects == before
    async with a_house(state, objects) as house:
        await disks.check(house)


async def test_deleting_everything_is_not_mistaken_for_an_old_catalog(workdir: Path) -> None:
    objects, disks = PunchedObjects(), Disks()
    async with a_house(workdir, objects) as house:
        await disks.add(house, "vda")
        disks.write("vda", 1, b"\1" * BLOCK)
        one = await disks.take(house, "vda")
        await disks.delete(house, one)
        await house.sweeper.sweep()
        assert [name for name in objects.objects if not name.startswith("hvsnap.json")] == []
