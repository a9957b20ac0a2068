"""The catalog as it was at one moment, while others go on writing."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hvsnap.catalog import chain, rows
from hvsnap.catalog.chain import Page
from hvsnap.catalog.db import Reader
from hvsnap.errors import DiskUnknown, SnapshotUnknown
from hvsnap.model import Disk, DiskId, ManifestState, Snapshot, SnapshotId

PAGES_AT_ONCE = 16


class Moment:
    """Queries that all see the same state. Made by :meth:`hvsnap.catalog.catalog.Catalog.moment`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def snapshot(self, snapshot_id: SnapshotId) -> tuple[Snapshot, ManifestState]:
        """Return a snapshot and the state of its manifest; raises :class:`SnapshotUnknown`."""
        sql = f"""SELECT manifest_revision, manifest_changes, {rows.SNAPSHOT_COLUMNS} FROM snapshots WHERE id = ?"""
        found = await self._reader.read(sql, (snapshot_id,))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        revision, changes, *row = found[0]
        return rows.snapshot(tuple(row)), ManifestState(snapshot_id, revision, changes)

    async def disk(self, disk_id: DiskId) -> Disk:
        """Return a disk; raises :class:`DiskUnknown`."""
        found = await self._reader.read(f"SELECT {rows.DISK_COLUMNS} FROM disks WHERE id = ?", (disk_id,))
        if not found:
            raise DiskUnknown(f"there is no disk {disk_id}")
        return rows.disk(found[0])

    async def own_pages(self, snapshot_id: SnapshotId) -> AsyncIterator[tuple[int, Page]]:
        """Yield ``(page, entries)`` that a snapshot itself holds, ascending."""
        sql = """SELECT page, entries FROM pages
                 WHERE snapshot = (SELECT number FROM snapshots WHERE id = ?) AND page > ? ORDER BY page LIMIT ?"""
        last = -1
        while batch := await self._reader.read(sql, (snapshot_id, last, PAGES_AT_ONCE)):
            last = batch[-1][0]
            for page, entries in batch:
                yield page, chain.decode(entries)
