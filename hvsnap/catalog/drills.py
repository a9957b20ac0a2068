"""What came of restore drills: the newest few of each disk."""

from __future__ import annotations

from hvsnap.catalog.db import Cursor, Database, Row
from hvsnap.catalog.rows import or_damaged
from hvsnap.drill import Drill, Outcome

KEPT = 50
"""Drills of a disk that are remembered: a year of weekly ones."""

_COLUMNS = "disk, snapshot, began_at, ended_at, outcome, written_bytes, error"


class Drills:
    """The table of drills."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def all(self) -> list[Drill]:
        """Return all that are remembered, oldest first."""
        return [_drill(row) for row in await self._db.read(f"SELECT {_COLUMNS} FROM drills ORDER BY number")]

    async def newest(self) -> dict[str, Drill]:
        """Return the newest drill of each disk."""
        return {one.disk: one for one in await self.all()}

    async def of_snapshots(self) -> dict[str, Drill]:
        """Return the newest drill of each snapshot."""
        return {one.snapshot: one for one in await self.all()}


@or_damaged
def _drill(row: Row) -> Drill:
    disk, snapshot, began_at, ended_at, outcome, written_bytes, error = row
    return Drill(disk, snapshot, began_at, ended_at, Outcome(outcome), written_bytes, error)


async def add(cursor: Cursor, drill: Drill) -> None:
    """Remember a drill, and forget the oldest ones of its disk."""
    sql = f"INSERT INTO drills ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
    values = (drill.disk, drill.snapshot, drill.began_at, drill.ended_at, drill.outcome, drill.written_bytes)
    await cursor.execute(sql, (*values, drill.error))
    oldest = "SELECT number FROM drills WHERE disk = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
    await cursor.execute(f"DELETE FROM drills WHERE number IN ({oldest})", (drill.disk, KEPT))
