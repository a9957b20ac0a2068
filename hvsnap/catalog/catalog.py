"""The catalog as the other rooms see it: looking things up, and write transactions.

``async with catalog.write() as tx`` gives a :class:`~hvsnap.catalog.transaction.Transaction`; its events reach
listeners after the commit, never before. Implements :class:`hvsnap.ports.BlockIndex`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np

from hvsnap.catalog import chain, rows
from hvsnap.catalog.chain import IndexArray, Page
from hvsnap.catalog.db import Database
from hvsnap.catalog.transaction import Transaction
from hvsnap.errors import Damaged, DiskUnknown, NotFound, SnapshotUnknown
from hvsnap.model import BlockPlace, Disk, DiskId, Event, GuestUuid, Operation, OperationId, Snapshot, SnapshotId, State
from hvsnap.ports import Clock, UInt64Array

_VARIABLES_MAX = 500

_LINEAGE = """
WITH RECURSIVE lineage (number, parent, depth) AS (
    SELECT number, parent, 0 FROM snapshots WHERE id = ?
    UNION ALL
    SELECT s.number, s.parent, depth + 1 FROM snapshots s JOIN lineage l ON s.id = l.parent
)
"""


class Catalog:
    """All that hvsnap knows of disks, snapshots, blocks and open operations."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db = database
        self._clock = clock
        self.on_event: list[Callable[[Event], None]] = []

    @classmethod
    async def open(cls, state_dir: Path, clock: Clock) -> Catalog:
        """Open the catalog in ``state_dir``; raises as :meth:`Database.open` does."""
        return cls(await Database.open(state_dir), clock)

    async def close(self) -> None:
        """Close it."""
        await self._db.close()

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """Run one transaction; everything in it happens, or nothing."""
        async with self._db.transaction() as cursor:
            tx = Transaction(cursor, self._clock)
            yield tx
        for event in tx.events:
            for listener in self.on_event:
                listener(event)

    # -- disks ------------------------------------------------------------------------------------

    async def disks(self, *, include_released: bool = False) -> list[Disk]:
        """Return the disks, by guest and target."""
        where = "" if include_released else "WHERE NOT released"
        sql = f"SELECT {rows.DISK_COLUMNS} FROM disks {where} ORDER BY guest_name, target, created_at"
        return [rows.disk(row) for row in await self._db.read(sql)]

    async def disk(self, disk_id: DiskId) -> Disk:
        """Return one disk; raises :class:`DiskUnknown`."""
        found = await self._db.read(f"SELECT {rows.DISK_COLUMNS} FROM disks WHERE id = ?", (disk_id,))
        if not found:
            raise DiskUnknown(f"there is no disk {disk_id}")
        return rows.disk(found[0])

    async def find_disk(self, guest_uuid: GuestUuid, serial: str, target: str, source: str) -> Disk | None:
        """Return the disk with this identity: same guest, same serial (or target if it has none), same image."""
        same = "serial = ?" if serial else "serial = '' AND target = ?"
        sql = f"SELECT {rows.DISK_COLUMNS} FROM disks WHERE NOT released AND guest_uuid = ? AND {same} AND source = ?"
        found = await self._db.read(sql, (guest_uuid, serial or target, source))
        return rows.disk(found[0]) if found else None

    # -- snapshots --------------------------------------------------------------------------------

    async def snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        """Return one snapshot; raises :class:`SnapshotUnknown`."""
        found = await self._db.read(f"SELECT {rows.SNAPSHOT_COLUMNS} FROM snapshots WHERE id = ?", (snapshot_id,))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        return rows.snapshot(found[0])

    async def snapshots(self, disk: DiskId | None = None, state: State | None = None) -> list[Snapshot]:
        """Return snapshots, oldest first."""
        sql = f"""SELECT {rows.SNAPSHOT_COLUMNS} FROM snapshots
                  WHERE (?1 IS NULL OR disk = ?1) AND (?2 IS NULL OR state = ?2) ORDER BY number"""
        return [rows.snapshot(row) for row in await self._db.read(sql, (disk, state))]

    # -- views ------------------------------------------------------------------------------------

    async def view(self, snapshot_id: SnapshotId, page: int) -> UInt64Array:
        """Return what a snapshot holds in one page: ``uint64[PAGE_BLOCKS]`` of block ids, 0 = zero."""
        sql = (
            f"{_LINEAGE} SELECT entries FROM lineage JOIN pages ON snapshot = number WHERE page = ? ORDER BY depth DESC"
        )
        found = await self._db.read(sql, (snapshot_id, page))
        return chain.lay_over(chain.decode(row[0]) for row in found)

    async def page_numbers(self, snapshot_id: SnapshotId) -> list[int]:
        """Return the pages that anything of a snapshot's lineage has entries in, ascending."""
        sql = f"{_LINEAGE} SELECT DISTINCT page FROM lineage JOIN pages ON snapshot = number ORDER BY page"
        return [row[0] for row in await self._db.read(sql, (snapshot_id,))]

    async def views(self, snapshot_id: SnapshotId) -> AsyncIterator[tuple[int, UInt64Array]]:
        """Yield ``(page, view)`` of a snapshot, ascending, a page in memory at a time."""
        for page in await self.page_numbers(snapshot_id):
            yield page, await self.view(snapshot_id, page)

    async def own_pages(self, snapshot_id: SnapshotId) -> AsyncIterator[tuple[int, Page]]:
        """Yield ``(page, entries)`` that a snapshot itself holds, ascending, also while it is progressing."""
        own = "JOIN snapshots s ON s.number = p.snapshot WHERE s.id = ?"
        numbers = await self._db.read(f"SELECT page FROM pages p {own} ORDER BY page", (snapshot_id,))
        for (number,) in numbers:
            found = await self._db.read(f"SELECT entries FROM pages p {own} AND page = ?", (snapshot_id, number))
            yield number, chain.decode(found[0][0])

    async def carry(self, disk: DiskId) -> dict[int, IndexArray]:
        """Return the blocks, by page, that the next capture must read although no bitmap names them."""
        found = await self._db.read("SELECT page, indexes FROM carry WHERE disk = ? ORDER BY page", (disk,))
        return {page: chain.decode_indexes(blob) for page, blob in found}

    # -- blocks (ports.BlockIndex) ----------------------------------------------------------------

    async def find(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests that are stored."""
        found: dict[bytes, int] = {}
        for start in range(0, len(digests), _VARIABLES_MAX):
            part = digests[start : start + _VARIABLES_MAX]
            marks = ",".join("?" * len(part))
            rows_found = await self._db.read(f"SELECT digest, id FROM blocks WHERE digest IN ({marks})", part)
            found.update((digest, number) for digest, number in rows_found)
        return found

    async def places(self, ids: Sequence[int]) -> list[BlockPlace]:
        """Return where blocks lie, in the order asked for; an unknown id is :class:`Damaged`."""
        sql = """SELECT b.id, b.digest, p.name, b.offset, b.length, b.flags
                 FROM json_each(?) j JOIN blocks b ON b.id = j.value JOIN packs p ON p.number = b.pack"""
        distinct = sorted({int(number) for number in ids})
        found = {row[0]: BlockPlace(*row) for row in await self._db.read(sql, (json.dumps(distinct),))}
        if len(found) != len(distinct):
            missing = next(number for number in distinct if number not in found)
            raise Damaged(
                f"block {missing} is not in the catalog", hint="the catalog is damaged; keep the store as it is"
            )
        return [found[int(number)] for number in ids]

    async def add_pack(self, pack: str, size_bytes: int, blocks: Sequence[BlockPlace]) -> None:
        """Record a durable pack and its blocks in one transaction."""
        async with self._db.transaction() as cursor:
            number = await cursor.insert("INSERT INTO packs (name, size_bytes) VALUES (?, ?)", (pack, size_bytes))
            # In the order of the digests: neighbouring inserts then touch neighbouring pages of the unique index.
            entries = [
                (b.id, b.digest, number, b.offset, b.length, b.flags) for b in sorted(blocks, key=lambda b: b.digest)
            ]
            await cursor.many(
                "INSERT INTO blocks (id, digest, pack, offset, length, flags) VALUES (?,?,?,?,?,?)", entries
            )
            if blocks:
                highest = str(max(block.id for block in blocks))
                await cursor.execute(
                    """INSERT INTO meta VALUES ('block_id_max', ?)
                       ON CONFLICT (key) DO UPDATE SET value = excluded.value
                       WHERE CAST(excluded.value AS INTEGER) > CAST(value AS INTEGER)""",
                    (highest,),
                )

    async def next_block_id(self) -> int:
        """Return an id greater than any that was ever recorded, deleted ones included."""
        found = await self._db.read("SELECT value FROM meta WHERE key = 'block_id_max'")
        return int(found[0][0]) + 1 if found else 1

    # -- bytes ------------------------------------------------------------------------------------

    async def stored_lengths(self) -> tuple[UInt64Array, UInt64Array]:
        """Return all block ids (ascending) and their stored bytes, both ``uint64[blocks]``."""
        found = await self._db.read("SELECT id, length FROM blocks ORDER BY id")
        table = np.array(found, np.uint64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    async def all_entries(self) -> AsyncIterator[tuple[SnapshotId, int, Page]]:
        """Yield every page of every snapshot: ``(snapshot, page, entries)``."""
        snapshots = await self._db.read("SELECT id, number FROM snapshots ORDER BY number")
        for snapshot_id, _number in snapshots:
            async for page, entries in self.own_pages(SnapshotId(snapshot_id)):
                yield SnapshotId(snapshot_id), page, entries

    # -- journal and events -----------------------------------------------------------------------

    async def operations(self, kind: str | None = None) -> list[Operation]:
        """Return the open operations, oldest first."""
        sql = f"SELECT {rows.OPERATION_COLUMNS} FROM operations WHERE ?1 IS NULL OR kind = ?1 ORDER BY created_at, id"
        return [rows.operation(row) for row in await self._db.read(sql, (kind,))]

    async def operation(self, operation_id: OperationId) -> Operation:
        """Return one open operation; raises :class:`NotFound`."""
        sql = f"SELECT {rows.OPERATION_COLUMNS} FROM operations WHERE id = ?"
        found = await self._db.read(sql, (operation_id,))
        if not found:
            raise NotFound(f"there is no open operation {operation_id}")
        return rows.operation(found[0])

    async def events(self, since: int, limit: int = 500) -> list[Event]:
        """Return stored events after sequence number ``since``."""
        sql = f"SELECT {rows.EVENT_COLUMNS} FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?"
        return [rows.event(row) for row in await self._db.read(sql, (since, limit))]

    async def unpublished(self, limit: int) -> list[Event]:
        """Return the oldest events that have not been published over MQTT."""
        sql = f"SELECT {rows.EVENT_COLUMNS} FROM events WHERE NOT published ORDER BY sequence LIMIT ?"
        return [rows.event(row) for row in await self._db.read(sql, (limit,))]
