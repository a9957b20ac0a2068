"""A daemon that may have lost the store to another one removes nothing more, at whatever change it comes to know.

FAULTS 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvsnap.errors import StoreBusy
from hvsnap.policy import Policy, PolicyId
from hvsnap.upkeep.settings import SettingsKeeper
from hvsnap.upkeep.sweep import Sweeper
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, PunchedObjects


class Losing(PunchedObjects):
    """Objects whose writer is no longer certain after so many changes; what is removed later is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.left = -1
        self.too_late: list[str] = []

    @property
    def certain(self) -> bool:
        return self.left != 0

    def appear(self, name: str, data: bytes) -> None:
        super().appear(name, data)
        self._changed()

    async def delete(self, name: str) -> None:
        self._removed(name)
        await super().delete(name)

    async def punch(self, name: str, holes: Sequence[tuple[int, int]]) -> bool:
        self._removed(name)
        return await super().punch(name, holes)

    def _removed(self, name: str) -> None:
        if not self.certain:
            self.too_late.append(name)
        self._changed()

    def _changed(self) -> None:
        self.left -= self.left > 0


async def test_a_sweep_removes_nothing_once_it_is_not_certain(tmp_path: Path) -> None:
    rng, disks, objects = seeded(), Disks(), Losing()
    house = await House.open(tmp_path, objects)
    for name in ("vda", "vdb"):
        await disks.add(house, name)
    for _ in range(4):
        for name in ("vda", "vdb"):
            for number in rng.sample(range(40), 24):
                disks.write(name, number, a_block(rng, "noise"))
            await disks.take(house, name)
    objects.objects["packs/aa/" + "aa" * 16] = b"left over"
    removed = 0
    for changes in range(1, 100):
        objects.left = changes
        doomed = rng.choice(list(disks.expected)) if len(disks.expected) > 2 else None
        if doomed is not None:
            await disks.delete(house, doomed)
        before = set(objects.objects)
        try:
            await Sweeper(house.catalog, house.store, house.clock, lambda: objects.certain).sweep()
        except StoreBusy:
            assert objects.too_late == []
            continue
        finally:
            removed += len(before - set(objects.objects))
            objects.left = -1
        if doomed is None:
            break
    assert objects.too_late == []
    assert removed
    await disks.check(house)
    await house.close()


async def test_settings_of_another_writer_are_not_removed(tmp_path: Path) -> None:
    objects = Losing()
    house = await House.open(tmp_path, objects)
    keeper = SettingsKeeper(house.catalog, house.store, lambda: objects.certain)
    for number in range(2):
        async with house.catalog.write() as tx:
            await tx.put_policy(Policy(PolicyId(f"p{number}"), f"policy {number}", (number,)))
        objects.left = 1 if number else -1
        await keeper.reconcile()
    assert objects.too_late == []
    assert sorted(name for name in objects.objects if name.startswith("settings/")) == [
        "settings/00000001",
        "settings/00000002",
    ]
    await house.close()
