"""Policies and settings of disks in the store: written when they change, brought back by a rebuild, never in plain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.model import DiskId, Origin
from hvsnap.policy import Keep, Policy, PolicyId
from hvsnap.store.repository import Repository
from hvsnap.store.settings import DiskSettings, HostSettings, _check, decode, encode
from hvsnap.upkeep.rebuild import Rebuild
from hvsnap.upkeep.settings import SettingsKeeper, present
from tests.store_kit import BLOCK, a_block, seeded
from tests.upkeep_kit import Disks, FusedObjects, House

DAILY = Policy(PolicyId("p-daily"), "Daily", (3, 15), (0, 4), "Europe/Berlin", None, Keep(last=3, weekly=2), 12.5)
NIGHTLY = Policy(PolicyId("p-night"), "Nightly", (1,))
OF_DISKS = (DiskSettings(DiskId("d-a"), DAILY.id, True), DiskSettings(DiskId("d-b"), None, False, True))
MADE = (Origin("/images/b.qcow2", 4711, "s-a", 14.5), Origin("/images/c.qcow2", 4712, "i-a", 15.0))
SET = HostSettings((DAILY, NIGHTLY), OF_DISKS, MADE)
NAME = "settings/00000007"
REFUSED = (Damaged, FormatUnknown)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_written_is_read_and_nothing_else(sealed: bool) -> None:
    repository = Repository.new(BLOCK, "zstd:1", sealed=sealed)
    data = encode(SET, NAME, repository)
    assert decode(data, NAME, repository) == SET
    assert (b"Europe" in data) is not sealed
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        try:
            assert decode(changed, NAME, repository) == SET, "white space alone may differ"
        except REFUSED:
            continue
    for length in range(len(data) - 1):
        with pytest.raises(REFUSED):
            decode(data[:length], NAME, repository)
    for other in (replace(repository, secret=bytes(32)), replace(repository, sealed=not sealed)):
        with pytest.raises(REFUSED):
            decode(data, NAME, other)
    with pytest.raises(REFUSED):
        decode(data, "settings/00000008", repository)


def test_what_an_earlier_release_wrote_has_no_origins() -> None:
    repository = Repository.new(BLOCK, "zstd:1")
    values = json.loads(encode(SET, NAME, repository))
    document = json.loads(values["settings"])
    del document["origins"], values["check"]
    values["settings"] = json.dumps(document)
    values["check"] = _check(values, repository)
    assert decode(json.dumps(values).encode(), NAME, repository) == replace(SET, origins=())


async def test_a_rebuild_brings_policies_back_and_what_was_set_for_disks(tmp_path: Path) -> None:
    rng, disks, objects = seeded(), Disks(), FusedObjects()
    house = await House.open(tmp_path / "old", objects)
    for name in ("vda", "vdb", "vdc"):
        await disks.add(house, name)
        disks.write(name, 1, a_block(rng))
        await disks.take(house, name)
    keeper = SettingsKeeper(house.catalog, house.store)
    assert not await keeper.reconcile(), "nothing is set: nothing is written"
    ids = {name: disk.id for name, disk in disks.disks.items()}
    async with house.catalog.write() as tx:
        await tx.put_policy(DAILY)
        await tx.put_policy(NIGHTLY)
        await tx.update_disk(ids["vda"], policy=DAILY.id, delete_auto_with_disk=True)
        await tx.update_disk(ids["vdb"], released=True)
        for origin in (*MADE, Origin("/dev/vg/a", None, "s-a", 16.0)):
            await tx.put_origin(origin)
    assert await keeper.reconcile()
    assert not await keeper.reconcile()
    assert not await SettingsKeeper(house.catalog, house.store).reconcile(), "another start has nothing to add"
    async with house.catalog.write() as tx:
        await tx.remove_policy(NIGHTLY.id)
    assert not await SettingsKeeper(house.catalog, house.store, lambda: False).reconcile(), "who is not sure writes not"
    assert await keeper.reconcile()
    assert [name for name in objects.objects if name.startswith("settings/")] == ["settings/00000002"]
    before = await present(house.catalog)
    await house.close()

    house = await House.open(tmp_path / "new", objects)
    assert (await Rebuild(house.catalog, house.store, house.clock).run()).damaged == []
    assert await present(house.catalog) == before
    assert await house.catalog.policies() == [DAILY]
    assert tuple(await house.catalog.origins()) == MADE, "what a device was made of is not believed of another one"
    now = {disk.id: disk for disk in await house.catalog.disks(include_released=True)}
    assert (now[ids["vda"]].policy, now[ids["vda"]].delete_auto_with_disk) == (DAILY.id, True)
    assert [now[ids[name]].released for name in ("vda", "vdb", "vdc")] == [False, True, False]
    await house.close()

    # Damaged, it is named, and all else is rebuilt; the next look writes what is set then.
    data = objects.objects["settings/00000002"]
    objects.objects["settings/00000002"] = data[:200] + bytes([data[200] ^ 1]) + data[201:]
    house = await House.open(tmp_path / "third", objects)
    found = await Rebuild(house.catalog, house.store, house.clock).run()
    assert (found.snapshots, len(found.damaged)) == (3, 1)
    assert "set again" in found.damaged[0]
    await SettingsKeeper(house.catalog, house.store).reconcile()
    assert not [name for name in objects.objects if name.startswith("settings/")]
    await house.close()
