"""Rows of the table of blocks, and of the packs that they lie in: written in a transaction, read anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hvsnap.catalog import ranges
from hvsnap.catalog.db import Cursor, Row
from hvsnap.catalog.ranges import DIGEST_BYTES, ENTRY, EntryArray
from hvsnap.errors import CatalogFailed
from hvsnap.model import BlockPlace
from hvsnap.ports import UInt64Array

Blobs = dict[int, tuple[bytes, bytes]]
"""For each range which of its blocks are live, and where they lie, as they are stored."""


async def insert_pack(cursor: Cursor, name: str, size_bytes: int, entries: EntryArray) -> int:
    """Write a pack's row, all of ``entries`` live in it; return its number."""
    sql = "INSERT INTO packs (name, size_bytes, live_blocks, live_bytes) VALUES (?, ?, ?, ?)"
    return await cursor.insert(sql, (name, size_bytes, entries.size, int(entries["length"].sum())))


async def write(cursor: Cursor, pack: int, ids: UInt64Array, entries: EntryArray, *, may_replace: set[int]) -> None:
    """Write ascending blocks of a pack into their ranges; only those that may be replaced may be there."""
    for number, part in ranges.group(ids):
        new = entries[part]
        found = await blobs_of(cursor, [number])
        if found:
            old = ranges.decode(number, *found[number])
            leaving = old[np.isin(old["slot"], new["slot"])]
            known = set(ranges.ids_of(number, leaving).tolist())
            if not known <= may_replace:
                hint = "nothing was changed; please report this"
                raise CatalogFailed(f"block {min(known - may_replace)} is in the catalog already", hint=hint)
            await release(cursor, leaving)
            new = ranges.replace(old, new)
        await put_range(cursor, number, new)
        await cursor.execute("INSERT OR IGNORE INTO pack_ranges (pack, range) VALUES (?, ?)", (pack, number))


async def put_range(cursor: Cursor, number: int, entries: EntryArray) -> None:
    """Write a range, all of its entries live; one without entries is removed."""
    if not entries.size:
        await cursor.execute("DELETE FROM blocks WHERE range = ?", (number,))
        return
    sql = "INSERT OR REPLACE INTO blocks (range, live, entries) VALUES (?, ?, ?)"
    await cursor.execute(sql, (number, ranges.encode_live(entries["slot"]), ranges.encode(number, entries)))


class Queries(Protocol):
    """Where rows can be read: the readers' connection, or the writer's in a transaction."""

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Return all rows of a query."""
        ...


async def blobs_of(queries: Queries, numbers: Sequence[int]) -> Blobs:
    """Return which blocks of some ranges are live, and where they lie; ranges that are not there are left out."""
    sql = "SELECT b.range, b.live, b.entries FROM json_each(?) j CROSS JOIN blocks b ON b.range = j.value"
    return {row[0]: (row[1], row[2]) for row in await queries.read(sql, (json.dumps(list(numbers)),))}


def entries_of(blocks: Sequence[BlockPlace]) -> tuple[UInt64Array, EntryArray]:
    """Return ids, ascending, and entries of places; the pack's number is still to come."""
    blocks = sorted(blocks, key=lambda block: block.id)
    ids = np.array([block.id for block in blocks], np.uint64)
    entries = np.zeros(len(blocks), ENTRY)
    entries["slot"] = ids % np.uint64(ranges.RANGE_BLOCKS)
    entries["pack"] = 1
    for field in ("flags", "offset", "length"):
        entries[field] = [getattr(block, field) for block in blocks]
    if blocks:
        digests = np.frombuffer(b"".join(block.digest for block in blocks), np.uint8)
        entries["digest"] = digests.reshape(-1, DIGEST_BYTES)
    return ids, entries


def pick(
    ids: UInt64Array,
    parts: list[tuple[int, slice]],
    blobs: Blobs,
    entries: EntryArray,
    present: npt.NDArray[np.bool_],
) -> None:
    """Take the entries of ``ids`` out of their ranges."""
    for number, part in parts:
        if number in blobs:
            stored = ranges.decode(number, *blobs[number])
            place, there = ranges.find(stored, (ids[part] % np.uint64(ranges.RANGE_BLOCKS)).astype(np.uint16))
            entries[part] = stored[place]
            present[part] = there


async def release(cursor: Cursor, entries: EntryArray) -> None:
    """Write down that packs no longer hold these blocks; the next sweep looks at them."""
    sql = """UPDATE packs SET live_blocks = live_blocks - ?, live_bytes = live_bytes - ?, to_sweep = to_sweep + 1
             WHERE number = ?"""
    packs, place = np.unique(entries["pack"], return_inverse=True)
    count = np.bincount(place, minlength=packs.size)
    length = np.bincount(place, weights=entries["length"], minlength=packs.size).astype(np.int64)
    await cursor.many(sql, zip(count.tolist(), length.tolist(), packs.tolist(), strict=True))


async def forget_damage(cursor: Cursor, ids: Sequence[int]) -> None:
    """Cross blocks out of the list of the damaged."""
    if ids:
        await cursor.many("DELETE FROM damaged WHERE block = ?", [(block,) for block in ids])


async def raise_highest(cursor: Cursor, block: int) -> None:
    sql = """INSERT INTO meta VALUES ('block_id_max', ?)
             ON CONFLICT (key) DO UPDATE SET value = excluded.value
             WHERE CAST(excluded.value AS INTEGER) > CAST(value AS INTEGER)"""
    if block > 0:
        await cursor.execute(sql, (str(block),))
