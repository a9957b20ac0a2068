"""Which snapshots a damaged block affects: those in whose view it is, whoever of their lineage holds its entry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np

from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.chain import Page
from hvsnap.model import DiskId, Snapshot, SnapshotId, State
from hvsnap.ports import UInt64Array
from hvsnap.store.idset import IdSet


async def affected(catalog: Catalog, damaged: IdSet) -> dict[SnapshotId, int]:
    """Return the accomplished snapshots that do not restore without these blocks, with how many of theirs they are."""
    if not len(damaged):
        return {}
    rows = await catalog.snapshots(state=State.ACCOMPLISHED)
    holders: set[SnapshotId] = set()
    async for snapshot, _page, entries in catalog.all_entries():
        if snapshot not in holders and damaged.has(entries.block).any():
            holders.add(snapshot)
    found: dict[SnapshotId, int] = {}
    for disk in dict.fromkeys(row.disk for row in rows if row.id in holders):
        for snapshot, count in (await _affected_of(catalog, disk, rows, damaged)).items():
            found[snapshot] = count
    return found


async def _affected_of(
    catalog: Catalog, disk: DiskId, rows: Sequence[Snapshot], damaged: IdSet
) -> dict[SnapshotId, int]:
    """Look at all snapshots of one chain, page by page; parents come before their children."""
    chain_rows = sorted((row for row in rows if row.disk == disk), key=lambda row: row.sequence)
    counts = dict.fromkeys((row.id for row in chain_rows), 0)
    async for pages in side_by_side(catalog, list(counts)):
        if any(damaged.has(entries.block).any() for entries in pages.values()):
            for snapshot, count in (await asyncio.to_thread(_count, chain_rows, pages, damaged)).items():
                counts[snapshot] += count
    return {snapshot: count for snapshot, count in counts.items() if count}


def _count(rows: Sequence[Snapshot], pages: dict[SnapshotId, Page], damaged: IdSet) -> dict[SnapshotId, int]:
    views: dict[SnapshotId, UInt64Array] = {}
    for row in rows:
        view = views[row.parent].copy() if row.parent in views else chain.blank()
        own = pages.get(row.id, chain.EMPTY)
        view[own.index] = own.block
        views[row.id] = view
    return {snapshot: int(np.count_nonzero(damaged.has(view))) for snapshot, view in views.items()}


async def side_by_side(catalog: Catalog, names: Sequence[SnapshotId]) -> AsyncIterator[dict[SnapshotId, Page]]:
    """Yield the entries of several snapshots for one page after the other: a row of pages in memory at a time."""
    streams = {name: aiter(catalog.own_pages(name)) for name in names}
    heads = {name: await anext(stream, None) for name, stream in streams.items()}
    while True:
        numbers = [head[0] for head in heads.values() if head is not None]
        if not numbers:
            return
        number = min(numbers)
        row: dict[SnapshotId, Page] = {}
        for name, head in heads.items():
            if head is not None and head[0] == number:
                row[name] = head[1]
                heads[name] = await anext(streams[name], None)
        yield row
