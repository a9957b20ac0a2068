"""What deleting snapshots would free, told before it is done (SERVICE 4.2, 4.3, 9.1).

A node's entries move on to each child that has none of its own there; what moves to nobody is dropped, and a block to
which no entry of any chain refers any more is free. The same rule tells what a snapshot alone holds: what deleting it
alone would free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.chain import Page
from hvsnap.model import ZERO_BLOCK, Snapshot, SnapshotId, State
from hvsnap.ports import UInt64Array
from hvsnap.store.idset import IdCounts, IdSet
from hvsnap.upkeep.affected import side_by_side

Counts = IdCounts
"""How many entries refer to each block."""

LOOKUP_BLOCKS = 10_000
"""Blocks whose sizes are asked for in one query."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """Stored bytes that deleting each snapshot alone would free, and all of them together."""

    alone: dict[SnapshotId, int]
    together: int


@dataclass(frozen=True, slots=True)
class Change:
    """How many entries more, or less, refer to each of some blocks after a deletion: ``uint64[n]``, ``int64[n]``."""

    ids: UInt64Array
    more: npt.NDArray[np.int64]


Parents = dict[SnapshotId, SnapshotId | None]


def delete_from_page(pages: dict[SnapshotId, Page], parents: Parents, doomed: Sequence[SnapshotId]) -> Change:
    """Return how one page's entries change when ``doomed`` are deleted one after the other.

    ``pages`` holds the entries of the doomed and of their children (missing: none); it is used up, like ``parents``.
    """
    ids: list[UInt64Array] = [np.zeros(0, np.uint64)]
    more: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for snapshot in doomed:
        mine = pages.pop(snapshot, chain.EMPTY)
        above = parents.pop(snapshot)
        times = np.full(len(mine), -1)
        for child in [name for name, parent in parents.items() if parent == snapshot]:
            parents[child] = above
            theirs = pages.get(child, chain.EMPTY)
            times += ~chain.members(theirs)[mine.index]
            pages[child] = chain.hand_over(mine, theirs)
        # What moved to one child stays one entry: of a large snapshot that is nearly everything.
        changed = times != 0
        ids.append(mine.block[changed])
        more.append(times[changed])
    return Change(np.concatenate(ids), np.concatenate(more))


def freed_blocks(counts: Counts, changes: Sequence[Change]) -> UInt64Array:
    """Return the ids of the blocks to which nothing refers any more after the changes."""
    ids, place = np.unique(np.concatenate([np.zeros(0, np.uint64), *(one.ids for one in changes)]), return_inverse=True)
    change = np.zeros(ids.size, np.int64)
    np.add.at(change, place, np.concatenate([np.zeros(0, np.int64), *(one.more for one in changes)]))
    free: npt.NDArray[np.bool_] = (ids != ZERO_BLOCK) & (change < 0) & (counts.of(ids).astype(np.int64) + change == 0)
    return ids[free]


async def count_references(catalog: Catalog) -> Counts:
    """Count the entries of all chains that refer to each block."""
    counts = IdCounts()
    async for ids in catalog.all_references():
        await asyncio.to_thread(counts.add, ids)
    return counts


async def chain_blocks(catalog: Catalog, names: Iterable[SnapshotId]) -> UInt64Array:
    """Return the ids of the blocks that the snapshots of a chain hold, each once; zeroes are none."""
    used = IdSet()
    for name in names:
        async for _page, entries in catalog.own_pages(name):
            used.add(entries.block)
    return used.array()


async def stored_bytes(catalog: Catalog, ids: UInt64Array) -> int:
    """Return what the store holds for these blocks, in bytes."""
    total = 0
    for start in range(0, ids.size, LOOKUP_BLOCKS):
        entries = await catalog.blocks.entries(ids[start : start + LOOKUP_BLOCKS])
        total += int(entries["length"].sum(dtype=np.int64))
    return total


def parents_of(rows: Iterable[Snapshot]) -> Parents:
    """Return the parents of accomplished snapshots: failed ones inherit nothing, one in the making bars deletion."""
    return {row.id: row.parent for row in rows if row.state is State.ACCOMPLISHED}


async def plan_deletion(catalog: Catalog, doomed: Sequence[SnapshotId]) -> Deletion:
    """Return what deleting ``doomed`` would free, each alone and all together."""
    parents = parents_of(await catalog.snapshots())
    counts = await count_references(catalog)
    alone = {name: await freed_bytes(catalog, [name], parents, counts) for name in doomed}
    together = await freed_bytes(catalog, doomed, parents, counts) if len(doomed) > 1 else sum(alone.values())
    return Deletion(alone, together)


async def freed_bytes(catalog: Catalog, doomed: Sequence[SnapshotId], parents: Parents, counts: Counts) -> int:
    """Return the stored bytes that deleting ``doomed`` would free."""
    holding = [name for name in doomed if name in parents]
    if not holding:
        return 0
    near = {name: parent for name, parent in parents.items() if name in holding or parent in holding}
    changes: list[Change] = []
    async for pages in side_by_side(catalog, list(near)):
        if any(name in pages for name in holding):
            changes.append(delete_from_page(pages, dict(near), holding))
    free = await asyncio.to_thread(freed_blocks, counts, changes)
    return await stored_bytes(catalog, free)
