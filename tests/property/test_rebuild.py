"""The catalog destroyed, and made anew from the store alone: after any history, and from a damaged store."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from hvsnap.errors import Damaged, HvsnapError
from hvsnap.model import DiskId, Snapshot, SnapshotId, State
from hvsnap.upkeep.rebuild import Rebuild, Rebuilt
from tests.property.test_store_history import (
    DISKS,
    LARGE,
    THREE,
    Delete,
    History,
    RollBack,
    Step,
    Sweep,
    Take,
    Write,
    content,
    steps,
)
from tests.upkeep_kit import FusedObjects, House, Killed, live_bytes, referred_bytes, restored


async def lived(directory: Path, sequence: list[Step]) -> History:
    """Return a history after its steps and a last sweep, its catalog closed."""
    history = History(directory / "old", FusedObjects())
    await history.open()
    for name in DISKS:
        await history.disks.add(history.house, name)
    for step in sequence:
        await history.do(step)
    history.objects.fuse.left = -1
    return history


async def rebuilt(directory: Path, history: History) -> tuple[House, Rebuilt]:
    house = await House.open(directory / "new", history.objects)
    found = await Rebuild(house.catalog, house.store, house.clock).run()
    await house.restart(directory / "new")  # as the daemon opens it: the store asks for its first new id then
    return house, found


def rows(snapshots: list[Snapshot]) -> dict[SnapshotId, tuple[object, ...]]:
    return {
        one.id: (
            one.disk,
            one.sequence,
            one.parent,
            one.name,
            one.kind,
            one.tags,
            one.automatic,
            one.expires_at,
            one.retention,
            one.skew_ms,
        )
        for one in snapshots
    }


async def changes(house: House) -> dict[tuple[DiskId, float], tuple[float | None, int]]:
    """Return what is known of each disk's past: hours since the snapshot before, bytes that changed."""
    disks = await house.catalog.disks()
    return {
        (disk.id, one.at): (one.hours, one.data_bytes)
        for disk in disks
        for one in await house.catalog.changes.of(disk.id)
    }


async def run(sequence: list[Step]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="hvsnap-rebuild-"))
    try:
        history = await lived(directory, sequence)
        await history.house.sweeper.sweep()
        before = rows(await history.house.catalog.snapshots(state=State.ACCOMPLISHED))
        figures = (await live_bytes(history.house), await referred_bytes(history.house))
        packs = {(one.name, one.size_bytes, one.live_bytes) for one in await history.house.catalog.upkeep.packs()}
        await history.house.close()
        shutil.rmtree(directory / "old")

        house, found = await rebuilt(directory, history)
        assert (found.damaged, found.lost, found.affected, found.damaged_blocks) == ([], [], {}, 0)
        assert rows(await house.catalog.snapshots()) == before
        assert {(one.name, one.size_bytes, one.live_bytes) for one in await house.catalog.upkeep.packs()} == packs
        assert (await live_bytes(house), await referred_bytes(house)) == figures
        left = {one.id: one for one in await house.catalog.snapshots()}
        assert await changes(house) == {
            (one.disk, one.created_at): (
                (one.created_at - left[one.parent].created_at) / 3600 if one.parent is not None else None,
                one.changed_bytes,
            )
            for one in left.values()
        }
        await history.disks.check(house)
        planned, _packs = await house.sweeper.plan()
        assert (planned.manifests, planned.dropped_blocks, planned.orphans) == (0, 0, 0)

        # Life goes on: each disk's next snapshot finds only differences, under a number of its own.
        history.house = house
        for disk in await house.catalog.disks():
            history.disks.disks[disk.target] = disk
            reads = {name for name in history.objects.objects if name.startswith("packs/")}
            present = history.disks.content[disk.target]
            head = history.disks.expected[disk.head] if disk.head else {}
            await history.disks.take(house, disk.target)
            if set(present.values()) <= set(head.values()):
                assert {name for name in history.objects.objects if name.startswith("packs/")} == reads
        await house.sweeper.sweep()
        await history.exact()
        await history.disks.check(house)
        await house.close()
    finally:
        shutil.rmtree(directory)


@given(steps)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_whatever_happened_the_store_alone_tells_all_of_it(sequence: list[Step]) -> None:
    """FAULTS 14."""
    asyncio.run(run(sequence))


def test_after_deletions_holes_rewritten_packs_and_a_rollback() -> None:
    asyncio.run(run([*LARGE, Sweep(), RollBack(0), Write("vda", 2, 7), Take("vda"), Delete(0), Delete(1), Sweep()]))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed_at", range(0, 16, 2))
async def test_in_the_middle_of_a_sweep(tmp_path: Path, killed_at: int, after: bool) -> None:
    """What the catalog held restores; a snapshot whose deletion was under way may be back, whole. FAULTS 28."""
    history = await lived(tmp_path, LARGE)
    history.objects.fuse.set(killed_at, after=after)
    with suppress(Killed, HvsnapError):  # late points are beyond the sweep's end
        await history.house.sweeper.sweep()
    history.objects.fuse = type(history.objects.fuse)()
    await history.house.close()
    house, found = await rebuilt(tmp_path, history)
    assert (found.damaged, found.lost, found.affected) == ([], [], {})
    for snapshot, expected in history.disks.expected.items():
        assert await restored(house, snapshot) == expected
    await house.close()


async def test_a_hole_never_enters_as_a_block(tmp_path: Path) -> None:
    """A manifest of a deleted snapshot that still names dropped blocks: deduplication must not be told of these."""
    history = await lived(tmp_path, [Write("vda", n, 2 * n + 1) for n in range(4)] + [Take("vda")])
    (name,) = [name for name in history.objects.objects if name.startswith("packs/")]
    (pack,) = await history.house.catalog.upkeep.packs()
    place = (await history.house.catalog.blocks.places_of_pack(pack.number))[1]
    await history.house.close()
    await history.objects.punch(name, [(place.offset, place.length)])
    house, found = await rebuilt(tmp_path, history)
    assert found.damaged_blocks == 1
    assert await house.catalog.find([place.digest]) == {}
    (snapshot,) = history.disks.expected
    assert found.affected == {snapshot: 1}
    with pytest.raises(Damaged):
        await restored(house, snapshot)
    history.house = house  # and the next capture heals it
    await history.disks.take(house, "vda")
    await history.disks.check(house)
    await house.close()


@pytest.mark.parametrize("harm", ["index", "cut", "gone"])
async def test_a_pack_that_cannot_be_read(tmp_path: Path, harm: str) -> None:
    """Its blocks are damaged, its snapshots are named; the others restore; what is there still heals it."""
    history = await lived(tmp_path, [*THREE, Write("vdb", 9, 8), Take("vdb")])
    snapshots = list(history.disks.expected)
    name = next(name for name in history.objects.objects if name.startswith("packs/"))
    owner: dict[SnapshotId, bool] = {}
    for pack in await history.house.catalog.upkeep.packs():
        if pack.name == name:
            ids = {place.id for place in await history.house.catalog.blocks.places_of_pack(pack.number)}
    for snapshot in snapshots:
        owner[snapshot] = False
        async for _page, view in history.house.catalog.views(snapshot):
            owner[snapshot] |= bool(ids & set(view[np.flatnonzero(view)].tolist()))
    await history.house.close()
    data = history.objects.objects[name]
    match harm:
        case "index":
            history.objects.objects[name] = data[:-120] + bytes([data[-120] ^ 1]) + data[-119:]
        case "cut":
            history.objects.objects[name] = data[:-1]
        case _:
            del history.objects.objects[name]
    house, found = await rebuilt(tmp_path, history)
    assert set(found.affected) == {snapshot for snapshot, hit in owner.items() if hit} != set()
    assert len(found.damaged) == (0 if harm == "gone" else 1)
    for snapshot, expected in history.disks.expected.items():
        if owner[snapshot]:
            with pytest.raises(Damaged):
                await restored(house, snapshot)
        else:
            assert await restored(house, snapshot) == expected
    await house.close()


async def test_a_manifest_that_cannot_be_read_costs_only_what_builds_on_it(tmp_path: Path) -> None:
    history = await lived(tmp_path, THREE)
    await history.house.close()
    first, second, third, other = history.disks.expected
    (name,) = [name for name in history.objects.objects if name.endswith(second)]
    data = history.objects.objects[name]
    for position in (0, 9, 20, 40, len(data) // 2, len(data) - 60, len(data) - 1):
        history.objects.objects[name] = data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]
        house, found = await rebuilt(tmp_path, history)
        assert found.lost == [second, third]
        assert len(found.damaged) == 2
        assert second in found.damaged[0]
        assert second in found.damaged[1]
        assert {row.id for row in await house.catalog.snapshots()} == {first, other}
        for snapshot in (first, other):
            assert await restored(house, snapshot) == history.disks.expected[snapshot]
        async with house.catalog.write() as tx:
            assert await tx.next_sequence(history.disks.disks["vda"].id) == 4  # numbers are not used twice
        await house.close()
        shutil.rmtree(tmp_path / "new")


async def test_of_two_revisions_an_older_one_serves_as_long_as_it_is_true(tmp_path: Path) -> None:
    history = await lived(tmp_path, THREE)
    third = list(history.disks.expected)[2]
    (old,) = [name for name in history.objects.objects if name.endswith(third)]
    kept = history.objects.objects[old]
    async with history.house.catalog.write() as tx:
        await tx.update_snapshot(third, name="renamed")
    await history.house.sweeper.sweep()
    await history.house.close()
    (new,) = [name for name in history.objects.objects if f"{third}." in name]
    history.objects.objects[old] = kept
    history.objects.objects[new] = history.objects.objects[new][:-1]
    house, found = await rebuilt(tmp_path, history)
    assert len(found.damaged) == 1
    assert found.lost == []
    await history.disks.check_by_catalog(house)
    await house.sweeper.sweep()
    assert [name for name in history.objects.objects if third in name] == [f"{old}.0002"]
    await house.close()


async def test_two_disks_of_one_identity(tmp_path: Path) -> None:
    """A disk that was released, and added again: only the later one is the guest's."""
    history = await lived(tmp_path, [Write("vda", 0, 1), Take("vda")])
    older = history.disks.disks["vda"]
    async with history.house.catalog.write() as tx:
        await tx.update_disk(older.id, released=True)
    await history.disks.add(history.house, "vda")
    history.disks.write("vda", 0, content(4))
    await history.do(Take("vda"))
    async with history.house.catalog.write() as tx:
        await tx.update_snapshot(list(history.disks.expected)[1], tags={"a": "b"})
    await history.house.sweeper.sweep()
    await history.house.close()
    house, found = await rebuilt(tmp_path, history)
    assert found.disks == 2
    released = {disk.id: disk.released for disk in await house.catalog.disks(include_released=True)}
    assert sorted(released.values()) == [False, True]
    assert (await house.catalog.snapshot(list(history.disks.expected)[1])).tags == {"a": "b"}
    await house.close()


def test_the_oracle_catches_a_broken_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rebuild, "_enter_pages", lambda *_args: asyncio.sleep(0))
    with pytest.raises((AssertionError, HvsnapError)):
        asyncio.run(run(THREE))
