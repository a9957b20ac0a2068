"""Disks that were made here, and of what: by the path of their image."""

from __future__ import annotations

from hvsnap.catalog.db import Cursor, Database, Row
from hvsnap.catalog.row_sums import whole
from hvsnap.catalog.rows import checked, or_damaged
from hvsnap.model import Origin

_COLUMNS = "path, inode, made_of, created_at"
_WHOLE = whole("origins")


@or_damaged
def _origin(row: Row) -> Origin:
    return Origin(*checked(row))


async def read_all(reader: Database) -> list[Origin]:
    """Return all that are remembered, by path."""
    return [_origin(row) for row in await reader.read(f"SELECT {_COLUMNS}, {_WHOLE} FROM origins ORDER BY path")]


async def read_one(reader: Database, path: str) -> Origin | None:
    """Return what is remembered of the image at a path."""
    found = await reader.read(f"SELECT {_COLUMNS}, {_WHOLE} FROM origins WHERE path = ?", (path,))
    return _origin(found[0]) if found else None


async def put(cursor: Cursor, origin: Origin) -> None:
    """Remember one, in the place of what was remembered of that path."""
    values = (origin.path, origin.inode, origin.made_of, origin.created_at)
    await cursor.execute(f"INSERT OR REPLACE INTO origins ({_COLUMNS}) VALUES (?, ?, ?, ?)", values)


async def forget(cursor: Cursor, path: str) -> None:
    """Forget what is remembered of a path: something else is written there."""
    await cursor.execute("DELETE FROM origins WHERE path = ?", (path,))
