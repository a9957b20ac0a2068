"""How much each disk has changed from snapshot to snapshot: kept longer than the snapshots themselves."""

from __future__ import annotations

from hvsnap.alarm import Change
from hvsnap.catalog.db import Cursor, Database
from hvsnap.model import DiskId

KEPT = 400
"""Changes of a disk that are remembered: two weeks of hourly snapshots, 20 KiB."""


class Changes:
    """The table of changes."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def of(self, disk: DiskId) -> list[Change]:
        """Return what is remembered of a disk, oldest first."""
        sql = "SELECT at, hours, data_bytes, stored_bytes FROM changes WHERE disk = ? ORDER BY at"
        return [Change(*row) for row in await self._db.read(sql, (disk,))]


async def add(cursor: Cursor, disk: DiskId, change: Change) -> None:
    """Remember a change of a disk, and forget its oldest ones."""
    sql = "INSERT OR REPLACE INTO changes (disk, at, hours, data_bytes, stored_bytes) VALUES (?, ?, ?, ?, ?)"
    await cursor.execute(sql, (disk, change.at, change.hours, change.data_bytes, change.stored_bytes))
    oldest = "SELECT at FROM changes WHERE disk = ? ORDER BY at DESC LIMIT -1 OFFSET ?"
    await cursor.execute(f"DELETE FROM changes WHERE disk = ? AND at IN ({oldest})", (disk, disk, KEPT))
