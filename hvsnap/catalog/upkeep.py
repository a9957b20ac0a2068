"""What keeping the store in order changes in the catalog: blocks dropped, moved, found damaged; manifests written anew.

A :class:`Upkeep` is used by one task at a time; captures go on beside it. Every method is one transaction or several,
each of which may be the last before a crash: what is left to be done can always be told from the catalog and the store.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvsnap.catalog import ranges, rows, sums
from hvsnap.catalog.block_rows import blobs_of, entries_of, forget_damage, insert_pack, put_range, release, write
from hvsnap.catalog.blocks import MERGE_BLOCKS, Blocks
from hvsnap.catalog.db import REBUILD, Cursor, Database
from hvsnap.catalog.ranges import ENTRY, EntryArray
from hvsnap.catalog.recent import prefixes_of
from hvsnap.errors import CatalogFailed
from hvsnap.model import BlockPlace, DamagedBlock, ManifestState, Pack, SnapshotId
from hvsnap.ports import UInt64Array

RANGES_IN_TRANSACTION = 128
"""Ranges that blocks are dropped from at once, 65,536 ids: others wait for it, some tenths of a second."""

STALE_SHARE = 1 / 16
STALE_MAX = 1 << 20
"""Index entries of dropped blocks are removed when they are a 16th of the live ones, or a million (20 MiB)."""


class Upkeep:
    """Changes blocks, packs and manifests in the catalog."""

    def __init__(self, database: Database, blocks: Blocks) -> None:
        self._db = database
        self._blocks = blocks

    # -- packs ------------------------------------------------------------------------------------

    async def packs(self) -> list[Pack]:
        """Return all packs, oldest first."""
        sql = f"SELECT {rows.PACK_COLUMNS} FROM packs ORDER BY number"
        return [rows.pack(row) for row in await self._db.read(sql)]

    async def check_packs(self) -> None:
        """Return once it is certain that every block's pack is known; asked before unknown ones are removed.

        Raises :class:`~hvsnap.errors.CatalogFailed`.
        """
        sql = "SELECT pack FROM pack_ranges WHERE pack NOT IN (SELECT number FROM packs) LIMIT 1"
        if lost := await self._db.read(sql):
            raise CatalogFailed(
                f"the catalog is damaged: it has lost pack {lost[0][0]}, with blocks in it", hint=REBUILD
            )

    async def swept(self, pack: Pack) -> None:
        """Write down that a sweep has looked at a pack as it was in this row; later changes stay to be looked at."""
        async with self._db.transaction() as cursor:
            sql = "UPDATE packs SET to_sweep = to_sweep - ? WHERE number = ?"
            await cursor.execute(sql, (pack.to_sweep, pack.number))

    async def to_sweep(self) -> None:
        """Let the next sweep look at every pack: what lies in them beside live blocks is not known."""
        async with self._db.transaction() as cursor:
            await cursor.execute("UPDATE packs SET to_sweep = to_sweep + 1")

    async def forget_pack(self, number: int) -> None:
        """Remove the row of a pack without live blocks, whose object is gone."""
        async with self._db.transaction() as cursor:
            await cursor.execute("DELETE FROM packs WHERE number = ? AND live_blocks = 0", (number,))
            cursor.after_commit = lambda: self._blocks.forget_pack(number)

    async def verified(self, number: int, at: float) -> None:
        """Write down when all blocks of a pack were read and found whole."""
        async with self._db.transaction() as cursor:
            await cursor.execute("UPDATE packs SET verified_at = ? WHERE number = ?", (at, number))

    # -- blocks -----------------------------------------------------------------------------------

    async def drop(self, ids: UInt64Array) -> int:
        """Drop blocks to which nothing refers, and return their stored bytes. Their packs are to be swept then.

        In as many transactions as it takes; nobody may be told of these blocks meanwhile
        (:meth:`hvsnap.store.intake.Intake.nobody_deciding`). Ids that are not there are no error.
        """
        freed_bytes = 0
        ids = np.unique(ids)
        parts = list(ranges.group(ids))
        async with self._blocks.turn:
            for start in range(0, len(parts), RANGES_IN_TRANSACTION):
                some = parts[start : start + RANGES_IN_TRANSACTION]
                freed_bytes += await self._drop_some(ids, some)
        return freed_bytes

    async def _drop_some(self, ids: UInt64Array, parts: list[tuple[int, slice]]) -> int:
        async with self._db.transaction() as cursor:
            blobs = await blobs_of(cursor, [number for number, _ in parts])
            there = [(number, part) for number, part in parts if number in blobs]
            dropped = []
            smaller: list[tuple[bytes, int]] = []
            for number, part in there:
                gone_here, kept = _split(number, ids[part], blobs[number])
                if kept.size * 2 < ranges.stored(blobs[number][1]):
                    await put_range(cursor, number, kept)
                elif gone_here[0].size:
                    smaller.append((ranges.encode_live(kept["slot"]), number))
                dropped.append(gone_here)
            await cursor.many("UPDATE blocks SET live = ? WHERE range = ?", smaller)
            gone_ids = np.concatenate([np.zeros(0, np.uint64), *(some for some, _ in dropped)])
            gone = np.concatenate([np.zeros(0, ENTRY), *(entries for _, entries in dropped)])
            await release(cursor, gone)
            prefixes = prefixes_of(gone["digest"])
            order = np.argsort(prefixes)
            pairs = zip(prefixes[order].tolist(), gone_ids[order].tolist(), strict=True)
            await cursor.many("INSERT OR IGNORE INTO stale_digests (prefix, block) VALUES (?, ?)", pairs)
            await forget_damage(cursor, [block for block in gone_ids.tolist() if self._blocks.is_damaged(block)])
            cursor.after_commit = lambda: self._blocks.forget(gone_ids)
        return int(gone["length"].sum())

    async def tidy(self) -> int:
        """Remove the index entries of dropped blocks, if they are many; return how many were removed.

        In the order of the index, so that each of its pages is written once, not once for each block.
        """
        ((stale,),) = await self._db.read("SELECT count(*) FROM stale_digests")
        ((live,),) = await self._db.read("SELECT total(live_blocks) FROM packs")
        if not stale or stale < min(STALE_MAX, live * STALE_SHARE):
            return 0
        async with self._blocks.turn:
            while await self._tidy_some():
                pass
        return int(stale)

    async def _tidy_some(self) -> bool:
        async with self._db.transaction() as cursor:
            sql = "SELECT prefix, block FROM stale_digests ORDER BY prefix, block LIMIT ?"
            pairs = await cursor.read(sql, (MERGE_BLOCKS,))
            await cursor.many("DELETE FROM digests WHERE prefix = ? AND block = ?", pairs)
            await cursor.many("DELETE FROM stale_digests WHERE prefix = ? AND block = ?", pairs)
        return bool(pairs)

    def mover(self, places: Sequence[BlockPlace]) -> Mover:
        """Return what takes packs to which these blocks were copied from where they were."""
        return Mover(self._db, self._blocks, {place.id: place for place in places})

    # -- damage -----------------------------------------------------------------------------------

    async def mark_damaged(self, damaged: dict[int, str], at: float) -> dict[int, str]:
        """Write down that blocks are damaged: they are handed out to no deduplication any more.

        Returns those that were not known to be. Blocks that were dropped meanwhile are left out.
        """
        ids = np.array(sorted(damaged), np.uint64)
        present = await self._blocks.digests_of_present(ids)
        new = {block: damaged[block] for block, _ in present if not self._blocks.is_damaged(block)}
        async with self._db.transaction() as cursor:
            sql = "INSERT OR IGNORE INTO damaged (block, why, found_at) VALUES (?, ?, ?)"
            await cursor.many(sql, [(block, why, at) for block, why in new.items()])
            cursor.after_commit = lambda: self._blocks.remember_damage(dict(present))
        return new

    async def clear_damage(self, ids: Sequence[int]) -> None:
        """Write down that blocks are whole: they were read again."""
        async with self._db.transaction() as cursor:
            await forget_damage(cursor, ids)
            cursor.after_commit = lambda: self._blocks.forget_damage(ids)

    async def damaged(self) -> list[DamagedBlock]:
        """Return all blocks that are known to be damaged."""
        rows = await self._db.read("SELECT block, why, found_at FROM damaged ORDER BY block")
        return [DamagedBlock(*row) for row in rows]

    # -- notes ------------------------------------------------------------------------------------

    async def note(self, key: str) -> float:
        """Return a time that was noted; 0 if none was."""
        found = await self._db.read("SELECT value FROM meta WHERE key = ?", (f"note/{key}",))
        return float(found[0][0]) if found else 0.0

    async def set_note(self, key: str, at: float) -> None:
        """Note a time."""
        async with self._db.transaction() as cursor:
            await cursor.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"note/{key}", repr(at)))

    async def text(self, key: str) -> str:
        """Return a text that was noted; empty if none was."""
        found = await self._db.read("SELECT value FROM meta WHERE key = ?", (f"text/{key}",))
        return str(found[0][0]) if found else ""

    async def set_text(self, key: str, value: str) -> None:
        """Note a text."""
        async with self._db.transaction() as cursor:
            await cursor.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"text/{key}", value))

    # -- manifests --------------------------------------------------------------------------------

    async def manifests(self) -> dict[SnapshotId, ManifestState]:
        """Return the state of every accomplished snapshot's manifest."""
        await sums.check_rows(self._db, "snapshots", "TRUE", ())
        sql = "SELECT id, manifest_revision, manifest_changes FROM snapshots WHERE state = 'accomplished'"
        found = await self._db.read(sql)
        return {SnapshotId(row[0]): ManifestState(SnapshotId(row[0]), row[1], row[2]) for row in found}

    async def manifest(self, snapshot: SnapshotId) -> ManifestState | None:
        """Return the state of one snapshot's manifest; None unless it is accomplished."""
        await sums.check_rows(self._db, "snapshots", "id = ?", (snapshot,))
        sql = "SELECT manifest_revision, manifest_changes FROM snapshots WHERE id = ? AND state = 'accomplished'"
        found = await self._db.read(sql, (snapshot,))
        return ManifestState(snapshot, *found[0]) if found else None

    async def manifest_written(self, written: ManifestState, revision: int) -> None:
        """Write down that a revision says what the snapshot was when ``written`` was read; later changes stay."""
        async with self._db.transaction() as cursor:
            sql = """UPDATE snapshots SET manifest_revision = ?, manifest_changes = manifest_changes - ?
                     WHERE id = ?"""
            await cursor.execute(sql, (revision, written.changes, written.snapshot))


def _split(
    number: int, ids: UInt64Array, stored: tuple[bytes, bytes]
) -> tuple[tuple[UInt64Array, EntryArray], EntryArray]:
    """Return ids and entries of those blocks of a range that are to be dropped, and the entries of the others."""
    entries = ranges.decode(number, *stored)
    here = ranges.ids_of(number, entries)
    leaving = np.isin(here, ids)
    return (here[leaving], entries[leaving]), entries[~leaving]


class Mover:
    """Takes new packs to which known blocks were copied: a :class:`hvsnap.ports.PackIndex`.

    A block moves only if it still is where it was copied from: it may have been dropped, or healed, meanwhile.
    """

    def __init__(self, database: Database, blocks: Blocks, old: dict[int, BlockPlace]) -> None:
        self._db = database
        self._blocks = blocks
        self._old = old

    async def add_pack(self, pack: str, size_bytes: int, blocks: Sequence[BlockPlace]) -> None:
        """Record a durable pack, and let its blocks lie there from now on, in one transaction."""
        async with self._db.transaction() as cursor:
            number = await insert_pack(cursor, pack, size_bytes, np.zeros(0, ENTRY))
            moved = [block for block in await self._present(cursor, blocks) if block is not None]
            ids, entries = entries_of(moved)
            entries["pack"] = number
            await write(cursor, number, ids, entries, may_replace=set(ids.tolist()))
            sql = "UPDATE packs SET live_blocks = ?, live_bytes = ?, indexed = 1, to_sweep = ? WHERE number = ?"
            left_behind = int(len(moved) < len(blocks))
            await cursor.execute(sql, (len(moved), int(entries["length"].sum()), left_behind, number))
            cursor.after_commit = lambda: self._blocks.name_pack(number, pack)

    async def _present(self, cursor: Cursor, blocks: Sequence[BlockPlace]) -> list[BlockPlace | None]:
        """Return the blocks that may move, ascending by id."""
        blocks = sorted(blocks, key=lambda block: block.id)
        numbers = sorted({block.id // ranges.RANGE_BLOCKS for block in blocks})
        now: dict[int, tuple[str, int]] = {}
        for number, stored in (await blobs_of(cursor, numbers)).items():
            entries = ranges.decode(number, *stored)
            where = zip(entries["pack"].tolist(), entries["offset"].tolist(), strict=True)
            now |= zip(
                ranges.ids_of(number, entries).tolist(),
                ((self._blocks.pack_name(pack), offset) for pack, offset in where),
                strict=True,
            )
        return [
            block if now.get(block.id) == (self._old[block.id].pack, self._old[block.id].offset) else None
            for block in blocks
        ]
