"""Damage is found, named, kept from deduplication, and healed by the same content; catalog and store compared."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from hvsnap.errors import CatalogFailed, Damaged
from hvsnap.model import PAGE_BLOCKS, SnapshotId, State
from hvsnap.upkeep import verify as upkeep_verify
from hvsnap.upkeep.check import Checker, Kind
from hvsnap.upkeep.verify import Pace, Verified, Verifier, damaged_snapshots
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, PunchedObjects, a_house, restored

NOISE = PAGE_BLOCKS + 3


@pytest.fixture
def objects() -> PunchedObjects:
    return PunchedObjects()


@pytest.fixture
async def house(tmp_path: Path, objects: PunchedObjects) -> AsyncIterator[House]:
    async with a_house(tmp_path, objects) as opened:
        yield opened


@pytest.fixture
async def disks(house: House) -> Disks:
    """A chain of three: block NOISE is of the first, overwritten in the third; another disk shares it."""
    made = Disks()
    rng = seeded()
    for name in ("vda", "vdb"):
        await made.add(house, name)
    shared = a_block(rng, "noise")
    made.write("vda", NOISE, shared)
    made.write("vda", 0, a_block(rng, "text"))
    await made.take(house, "vda")
    made.write("vda", 1, a_block(rng, "text"))
    await made.take(house, "vda")
    made.write("vda", NOISE, a_block(rng, "noise"))
    await made.take(house, "vda")
    made.write("vdb", 7, shared)
    await made.take(house, "vdb")
    return made


def verifier(house: House) -> Verifier:
    return Verifier(house.catalog, house.store, house.sweeper, house.clock)


async def verify(house: House, *snapshots: SnapshotId) -> Verified:
    rows = [row for row in await house.catalog.snapshots(state=State.ACCOMPLISHED) if row.id in snapshots]
    return await verifier(house).snapshots(rows, lambda _done, _total: None)


async def verify_all(house: House) -> Verified:
    return await verifier(house).everything(lambda _done, _total: None)


async def block_of(house: House, snapshot: SnapshotId, block: int) -> int:
    return int((await house.catalog.view(snapshot, block // PAGE_BLOCKS))[block % PAGE_BLOCKS])


async def damage(house: House, objects: PunchedObjects, block: int) -> None:
    """Flip a bit in the stored form of a block."""
    (place,) = await house.catalog.places([block])
    data = bytearray(objects.objects[place.pack])
    data[place.offset + place.length // 2] ^= 0x10
    objects.objects[place.pack] = bytes(data)


async def test_nothing_is_wrong_with_a_store_as_it_was_written(house: House, disks: Disks) -> None:
    found = await verify_all(house)
    assert (found.damaged, found.manifests, found.indexes, found.affected) == ({}, {}, {}, {})
    assert found.blocks == 4
    assert all(pack.verified_at == house.clock.now() for pack in await house.catalog.upkeep.packs())
    checked = await Checker(house.catalog, house.store, house.clock).check()
    assert (checked.differences, checked.affected, checked.sound) == ([], {}, True)
    assert (checked.packs, checked.manifests, checked.blocks) == (3, 4, 4)


async def test_a_damaged_block_names_every_snapshot_that_it_affects_and_no_other(
    house: House, disks: Disks, objects: PunchedObjects
) -> None:
    """FAULTS 12."""
    first, second, third, other = disks.expected
    block = await block_of(house, first, NOISE)
    await damage(house, objects, block)
    found = await verify(house, first)
    assert list(found.damaged) == list(found.new) == [block]
    assert found.affected == {first: 1, second: 1, other: 1}
    assert (await verify(house, third)).damaged == {}
    again = await verify_all(house)
    assert list(again.damaged) == [block]
    assert again.new == {}
    assert await damaged_snapshots(house.catalog) == {first: 1, second: 1, other: 1}
    with pytest.raises(Damaged):
        await restored(house, second)
    assert await restored(house, third) == disks.expected[third]


async def test_a_damaged_block_is_not_reused_and_heals_with_the_same_content(
    house: House, disks: Disks, objects: PunchedObjects
) -> None:
    """FAULTS 12."""
    first, _second, _third, other = disks.expected
    block = await block_of(house, first, NOISE)
    await damage(house, objects, block)
    await verify_all(house)
    disks.write("vdb", 7, disks.content["vdb"][7])
    healing = await disks.take(house, "vdb")
    assert await block_of(house, healing, 7) == block
    assert await house.catalog.upkeep.damaged() == []
    await disks.check(house)
    assert (await verify_all(house)).damaged == {}
    assert await verify_all(house) is not None
    await house.sweeper.sweep()  # the place of the damaged one is garbage now
    await disks.check(house)
    assert (await verify_all(house)).affected == {}
    assert await damaged_snapshots(house.catalog) == {}
    assert other in disks.expected


async def test_damage_is_remembered_over_a_restart(
    tmp_path: Path, house: House, disks: Disks, objects: PunchedObjects
) -> None:
    first = next(iter(disks.expected))
    block = await block_of(house, first, NOISE)
    await damage(house, objects, block)
    await verify_all(house)
    await house.restart(tmp_path)
    assert [one.id for one in await house.catalog.upkeep.damaged()] == [block]
    healing = await disks.take(house, "vdb")
    assert await block_of(house, healing, 7) == block
    await disks.check(house)


async def test_a_missing_pack_damages_all_its_blocks_and_is_healed(
    house: House, disks: Disks, objects: PunchedObjects
) -> None:
    """FAULTS 12."""
    first = next(iter(disks.expected))
    (place,) = await house.catalog.places([await block_of(house, first, NOISE)])
    del objects.objects[place.pack]
    checked = await Checker(house.catalog, house.store, house.clock).check()
    assert [one.kind for one in checked.differences if one.kind is not Kind.BLOCK_DAMAGED] == [Kind.PACK_MISSING]
    assert not checked.sound
    assert set(checked.affected) == set(disks.expected)  # block 0 is in all of the first chain, NOISE in the other
    found = await verify_all(house)
    assert len(found.damaged) == 2
    for name, numbers in (("vda", (0, NOISE)), ("vdb", (7,))):
        disks.content[name] |= {n: disks.expected[first][n if name == "vda" else NOISE] for n in numbers}
        await disks.take(house, name)
    await disks.check(house)
    assert (await verify_all(house)).damaged == {}


@pytest.mark.parametrize("length", [0, 63, 64, 100, 20_000, 66_000])
async def test_a_pack_that_was_cut_short_is_damaged_where_it_ends(
    house: House, disks: Disks, objects: PunchedObjects, length: int
) -> None:
    first = next(iter(disks.expected))
    (place,) = await house.catalog.places([await block_of(house, first, NOISE)])
    length = min(length, place.offset + place.length - 1)
    objects.objects[place.pack] = objects.objects[place.pack][:length]
    found = await verify_all(house)
    pack = next(pack for pack in await house.catalog.upkeep.packs() if pack.name == place.pack)
    places = await house.catalog.blocks.places_of_pack(pack.number)
    assert set(found.damaged) == {one.id for one in places if one.offset + one.length > length}
    assert first in found.affected


async def test_packs_swapped_with_each_other_are_damaged(house: House, disks: Disks, objects: PunchedObjects) -> None:
    """FAULTS 12."""
    one, other = [name for name in objects.objects if name.startswith("packs/")][:2]
    objects.objects[one], objects.objects[other] = objects.objects[other], objects.objects[one]
    checked = await Checker(house.catalog, house.store, house.clock).check()
    assert {one.kind for one in checked.differences} == {Kind.PACK_DAMAGED}
    found = await verify_all(house)
    assert len(found.damaged) >= 2
    for snapshot in found.affected:
        with pytest.raises(Damaged):
            await restored(house, snapshot)
    for snapshot in set(disks.expected) - set(found.affected):
        assert await restored(house, snapshot) == disks.expected[snapshot]


async def test_a_pack_whose_index_is_damaged_is_written_anew(
    house: House, disks: Disks, objects: PunchedObjects
) -> None:
    """Its blocks are whole, but the catalog could not be rebuilt."""
    first = next(iter(disks.expected))
    (place,) = await house.catalog.places([await block_of(house, first, NOISE)])
    data = bytearray(objects.objects[place.pack])
    data[-100] ^= 1
    objects.objects[place.pack] = bytes(data)
    checked = await Checker(house.catalog, house.store, house.clock).check()
    assert [one.kind for one in checked.differences] == [Kind.PACK_DAMAGED]
    found = await verify_all(house)
    assert (found.damaged, list(found.indexes)) == ({}, [place.pack])
    assert place.pack not in objects.objects
    await disks.check(house)
    assert (await Checker(house.catalog, house.store, house.clock).check()).sound


@pytest.mark.parametrize("how", ["flipped", "missing"])
async def test_a_damaged_or_missing_manifest_is_written_anew(
    house: House, disks: Disks, objects: PunchedObjects, how: str
) -> None:
    name = next(name for name in objects.objects if name.startswith("manifests/"))
    if how == "missing":
        del objects.objects[name]
    else:
        data = bytearray(objects.objects[name])
        data[len(data) // 2] ^= 1
        objects.objects[name] = bytes(data)
    found = await verify_all(house)
    assert len(found.manifests) == 1
    await house.sweeper.sweep()
    await disks.check(house)
    assert (await verify_all(house)).manifests == {}


async def test_what_only_the_store_knows_is_told_and_swept(house: House, disks: Disks, objects: PunchedObjects) -> None:
    """FAULTS 2."""
    pack = next(name for name in objects.objects if name.startswith("packs/"))
    stray_pack = f"packs/00/{'0' * 32}"
    manifest = next(name for name in objects.objects if name.startswith("manifests/"))
    stray_manifest = manifest.replace("s-", "s-z")
    objects.objects |= {stray_pack: objects.objects[pack], stray_manifest: objects.objects[manifest]}
    checked = await Checker(house.catalog, house.store, house.clock).check()
    assert {(one.kind, one.subject) for one in checked.differences} == {
        (Kind.PACK_UNKNOWN, stray_pack),
        (Kind.MANIFEST_UNKNOWN, stray_manifest),
    }
    assert checked.sound
    await house.sweeper.sweep()
    assert stray_pack not in objects.objects
    assert stray_manifest not in objects.objects
    await disks.check(house)


async def test_what_is_none_of_ours_is_told_and_left_alone(house: House, disks: Disks, objects: PunchedObjects) -> None:
    foreign = {"packs/notes", f"packs/00/{'1' * 32}", f"packs/{'0' * 32}", "manifests/d-1/list", "readme", "keys/1"}
    objects.objects |= dict.fromkeys(foreign, b"somebody's")
    checked = await Checker(house.catalog, house.store, house.clock).check()
    assert {one.subject for one in checked.differences if one.kind is Kind.OBJECT_FOREIGN} == foreign
    assert len(checked.differences) == len(foreign)
    assert checked.sound
    await house.sweeper.sweep()
    assert foreign <= objects.objects.keys()
    await disks.check_by_catalog(house)


async def test_packs_that_the_catalog_has_lost_are_not_removed(
    house: House, disks: Disks, objects: PunchedObjects
) -> None:
    stored = dict(objects.objects)
    with closing(sqlite3.connect(house.catalog._db.path)) as connection, connection:
        connection.execute("DELETE FROM packs")
    with pytest.raises(CatalogFailed, match="lost pack") as refused:
        await house.sweeper.sweep()
    assert "store-rebuild" in refused.value.hint
    assert objects.objects == stored


async def test_an_older_copy_of_the_store_is_noticed(house: House, disks: Disks, objects: PunchedObjects) -> None:
    """FAULTS 13."""
    older = dict(objects.objects)
    assert await Checker(house.catalog, house.store, house.clock).newest_missing() == []
    disks.write("vda", 2, a_block(seeded(), "noise"))
    newest = await disks.take(house, "vda")
    assert await Checker(house.catalog, house.store, house.clock).newest_missing() == []
    objects.objects = older
    missing = await Checker(house.catalog, house.store, house.clock).newest_missing()
    assert len(missing) == 2
    assert f"the manifest of {newest}" in missing


class Clock:
    """Goes on only while somebody waits for it."""

    def __init__(self) -> None:
        self.at = 50.0

    def now(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.at += seconds


async def test_a_scrub_reads_at_its_rate(house: House, disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rate, read_bytes = Clock(), 50_000, 0

    class Counted(Pace):
        async def __call__(self, size_bytes: int) -> None:
            nonlocal read_bytes
            await super().__call__(size_bytes)
            read_bytes += size_bytes
            assert read_bytes <= (clock.at - 50.0) * rate + rate + 2 * size_bytes

    monkeypatch.setattr(upkeep_verify, "Pace", lambda bytes_per_s: Counted(bytes_per_s, clock.now, clock.sleep))
    found = await verifier(house).due(house.clock.now() + 1, rate)
    assert (found.damaged, found.packs) == ({}, len(await house.catalog.upkeep.packs()))
    assert read_bytes >= found.read_bytes > 2 * rate
    assert clock.at - 50.0 >= read_bytes / rate - 1
    before = clock.at
    pace = Counted(0, clock.now, clock.sleep)
    await Pace.__call__(pace, 1 << 40)
    assert clock.at == before, "without a rate nobody waits"


async def test_an_interrupted_run_goes_on_with_what_was_not_read(
    house: House, disks: Disks, objects: PunchedObjects
) -> None:
    house.clock.at = 5000.0
    seen: list[int] = []

    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        seen.append(done)
        raise Stop

    with pytest.raises(Stop):
        await verifier(house).everything(stop)
    first_time = [pack.name for pack in await house.catalog.upkeep.packs() if pack.verified_at]
    assert len(first_time) == 1
    name = next(name for name in objects.objects if name.startswith("manifests/"))
    objects.objects[name] = objects.objects[name][:-1]
    found = await verifier(house).due(5000.0, 1 << 30)
    assert (found.packs, len(found.manifests)) == (2, 1)
    again = await verifier(house).due(5000.0, 0)
    assert (again.packs, len(again.manifests)) == (0, 0)


async def test_what_a_wrong_clock_verified_is_read_again(house: House, disks: Disks) -> None:
    now = house.clock.now()
    verifier = Verifier(house.catalog, house.store, house.sweeper, house.clock)
    assert (await verifier.due(now - 10.0, 0)).packs > 0
    assert (await verifier.due(now - 10.0, 0)).packs == 0
    for pack in await house.catalog.upkeep.packs():
        await house.catalog.upkeep.verified(pack.number, now + 1e9)
    assert (await verifier.due(now - 10.0, 0)).packs == len(await house.catalog.upkeep.packs())
