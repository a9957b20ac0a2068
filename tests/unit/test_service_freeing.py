"""What a deletion says it would free is what it frees: compared with the catalog after a real deletion."""

import random
from pathlib import Path

import numpy as np
import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.model import SnapshotId, State
from hvsnap.service.freeing import count_references, plan_deletion
from tests.catalog_kit import a_block, a_disk, a_page, a_snapshot, add_chain
from tests.service_kit import a_catalog

BLOCKS = 40


def length(block: int) -> int:
    return 1000 + block


async def add_blocks(catalog: Catalog) -> None:
    await catalog.add_pack("p", 10_000_000, [a_block(n, length(n)) for n in range(1, BLOCKS)])


async def referred(catalog: Catalog) -> set[int]:
    """An independent look: every block that any entry of any snapshot names."""
    found: set[int] = set()
    async for _snapshot, _page, entries in catalog.all_entries():
        found.update(entries.block.tolist())
    return found - {0}


async def delete(catalog: Catalog, *snapshots: SnapshotId) -> int:
    """Delete for real; return the bytes of the blocks that nothing refers to any more."""
    before = await referred(catalog)
    async with catalog.write() as tx:
        for snapshot in snapshots:
            await tx.delete_snapshot(snapshot)
    return sum(length(block) for block in before - await referred(catalog))


async def test_the_example_of_the_specification(workdir: Path) -> None:
    """SERVICE 4.2: S1 = A B C D, S2 = B1 C1, S3 = B2. Deleting S2 frees B1 only."""
    a, b, c, d, b1, c1, b2 = range(1, 8)
    async with a_catalog(workdir) as catalog:
        await add_blocks(catalog)
        full = {0: {0: a, 1: b, 2: c, 3: d}}
        s1, s2, s3 = await add_chain(catalog, a_disk(), full, {0: {1: b1, 2: c1}}, {0: {1: b2}})
        plan = await plan_deletion(catalog, [s1, s2, s3])
        assert plan.alone == {s1: length(b) + length(c), s2: length(b1), s3: length(b2)}
        assert plan.together == sum(length(n) for n in range(1, 8))
        assert await delete(catalog, s2) == length(b1)


async def test_a_block_that_another_disk_shares_is_not_freed(workdir: Path) -> None:
    async with a_catalog(workdir) as catalog:
        await add_blocks(catalog)
        (mine,) = await add_chain(catalog, a_disk(), {0: {0: 1, 1: 2}, 7: {5: 3}})
        (_other,) = await add_chain(catalog, a_disk(source="/images/x"), {3: {9: 2}})
        plan = await plan_deletion(catalog, [mine])
        assert plan.alone == {mine: length(1) + length(3)}
        assert await delete(catalog, mine) == plan.together


async def test_a_block_in_two_snapshots_is_freed_only_with_both(workdir: Path) -> None:
    async with a_catalog(workdir) as catalog:
        await add_blocks(catalog)
        one, two = await add_chain(catalog, a_disk(), {0: {0: 1}}, {0: {1: 1}})
        plan = await plan_deletion(catalog, [one, two])
        assert plan.alone == {one: 0, two: 0}
        assert plan.together == length(1)


async def test_a_failed_snapshot_frees_nothing_and_keeps_nothing(workdir: Path) -> None:
    async with a_catalog(workdir) as catalog:
        await add_blocks(catalog)
        disk = a_disk()
        (base,) = await add_chain(catalog, disk, {0: {0: 1, 1: 2}})
        async with catalog.write() as tx:
            failed = a_snapshot(disk.id, await tx.next_sequence(disk.id), base, state=State.FAILED)
            await tx.add_snapshot(failed)
        plan = await plan_deletion(catalog, [failed.id, base])
        assert plan.alone == {failed.id: 0, base: length(1) + length(2)}
        assert await delete(catalog, base) == plan.alone[base]


@pytest.mark.parametrize("seed", range(30))
async def test_the_plan_is_what_happens_in_random_trees(workdir: Path, seed: int) -> None:
    """Trees, not only lines: a rolled back disk goes on from an earlier node."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with a_catalog(workdir) as catalog:
        await add_blocks(catalog)
        snapshots: list[SnapshotId] = []
        for number in range(2):
            disk = a_disk(source=f"/images/{number}")
            made: list[SnapshotId] = []
            async with catalog.write() as tx:
                await tx.add_disk(disk)
                for _ in range(rng.randint(1, 6)):
                    parent = rng.choice(made) if made else None
                    one = a_snapshot(disk.id, await tx.next_sequence(disk.id), parent)
                    await tx.add_snapshot(one)
                    for page in rng.sample(range(3), rng.randint(0, 3)):
                        entries = {rng.randrange(6): rng.randrange(BLOCKS) for _ in range(rng.randint(1, 6))}
                        await tx.put_page(one.id, page, a_page(entries))
                    made.append(one.id)
            snapshots += made
        doomed = rng.sample(snapshots, rng.randint(1, len(snapshots)))
        plan = await plan_deletion(catalog, doomed)
        assert plan.together >= sum(plan.alone.values())
        if len(doomed) == 1:
            assert await delete(catalog, *doomed) == plan.alone[doomed[0]]
        else:
            assert await delete(catalog, *doomed) == plan.together


async def test_references_count_every_entry(workdir: Path) -> None:
    async with a_catalog(workdir) as catalog:
        await add_blocks(catalog)
        await add_chain(catalog, a_disk(), {0: {0: 1, 1: 1, 2: 0}}, {0: {0: 2}})
        counts = await count_references(catalog)
        assert counts.of(np.arange(5, dtype=np.uint64)).tolist() == [1, 2, 1, 0, 0]
