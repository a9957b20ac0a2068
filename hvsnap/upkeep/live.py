"""Which blocks are live: those that an entry of any snapshot refers to, and those that somebody may yet refer to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.ranges import RANGE_BLOCKS
from hvsnap.ports import UInt64Array
from hvsnap.store.idset import IdSet

RANGES_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Dead:
    """Blocks that nothing refers to: their ids, the numbers of their packs, their stored bytes; ``uint64[n]`` each."""

    ids: UInt64Array
    packs: UInt64Array
    lengths: UInt64Array


async def mark(catalog: Catalog) -> IdSet:
    """Return every block that an entry of any snapshot refers to, one in the making included, as of one moment."""
    live = IdSet()
    async for ids in catalog.all_references():
        await asyncio.to_thread(live.add, ids)
    return live


async def dead_blocks(catalog: Catalog, live: IdSet) -> AsyncIterator[Dead]:
    """Yield the blocks that are in the catalog and not in ``live``, many at a time, in ascending order.

    Only ranges of ids that hold more blocks than are live are looked into.
    """
    suspects: list[int] = []
    async for number, present in catalog.blocks.ranges_from(0):
        if present > live.count(number * RANGE_BLOCKS, (number + 1) * RANGE_BLOCKS):
            suspects.append(number)
    for start in range(0, len(suspects), RANGES_AT_ONCE):
        ids, entries = await catalog.blocks.in_ranges(suspects[start : start + RANGES_AT_ONCE])
        dead = ~live.has(ids)
        if dead.any():
            yield Dead(ids[dead], entries["pack"][dead].astype(np.uint64), entries["length"][dead].astype(np.uint64))
