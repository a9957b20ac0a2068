"""A checksum over each snapshot's place in its chain and the list of its pages.

SQLite has no checksums. Blobs have one of their own, but a flipped bit in a *key* would put a sound page elsewhere, and
a row that is lost would let the parent's content show through: both restore as something that never was. So the
catalog holds, for each accomplished snapshot, a CRC-32 over what identifies it (:data:`_IDENTITY`) and over the number
and checksum of each of its pages. Whoever reads a view, and the sweep before it drops anything, compares.
"""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import Iterable

from hvsnap.catalog import row_sums
from hvsnap.catalog.block_rows import Queries
from hvsnap.catalog.db import Cursor, Database, Row
from hvsnap.errors import CatalogFailed, SnapshotUnknown
from hvsnap.model import SnapshotId, State

HEAD_BYTES = 5
"""Form and CRC-32, which the blobs of pages begin with (chain.py)."""

_IDENTITY = "s.number, s.id, s.disk, s.sequence, s.parent, s.size_bytes"
_WAY_OUT = "`hvsnap store-rebuild --force` makes a new catalog; nothing was changed"
_PAGE = struct.Struct(f"<qq{HEAD_BYTES}s")
# The snapshot, too: where order is lost, an index hands out rows of other keys than the one that was asked for.
_PAGES = f"SELECT snapshot, page, substr(entries, 1, {HEAD_BYTES}) FROM pages WHERE snapshot = ? ORDER BY page"


def begin(identity: Row) -> int:
    """Return the sum of a snapshot without pages; ``identity`` has the columns of :data:`_IDENTITY`."""
    return zlib.crc32(json.dumps(list(identity)).encode())


def add(present: int, pages: Iterable[Row]) -> int:
    """Return the sum with the next pages added: ``(snapshot, page, the blob's beginning)``, ascending.

    Raises :class:`CatalogFailed` for what is none of these.
    """
    try:
        parts = [_PAGE.pack(number, page, head[:HEAD_BYTES]) for number, page, head in pages]
    except (TypeError, struct.error) as error:
        raise _damaged("", f"one of its pages is none: {error}") from error
    return zlib.crc32(b"".join(parts), present)


async def write(cursor: Cursor, number: int) -> None:
    """Write down the sum of a snapshot, all of whose pages are there."""
    (identity,) = await cursor.read(f"SELECT {_IDENTITY} FROM snapshots s WHERE number = ?", (number,))
    pages = await cursor.read(_PAGES, (number,))
    total = await asyncio.to_thread(add, begin(identity), pages)
    await cursor.execute("UPDATE snapshots SET sum = ? WHERE number = ?", (total, number))


async def complete(database: Database) -> None:
    """Write down the sums that are missing, of rows, too: those of a catalog of an earlier version."""
    sql = "SELECT number FROM snapshots WHERE sum IS NULL AND state = ?"
    for (number,) in await database.read(sql, (State.ACCOMPLISHED,)):
        async with database.transaction() as cursor:
            await write(cursor, number)
    for missing, statement in row_sums.missing_sums():
        if await database.read(missing):
            async with database.transaction() as cursor:
                await cursor.execute(statement)


async def check(queries: Queries, snapshot_id: SnapshotId) -> None:
    """Compare a snapshot and all that it builds on, in one state of the catalog.

    Raises :class:`SnapshotUnknown`, and :class:`CatalogFailed` naming the snapshot that is damaged.
    """
    sql = f"SELECT {_IDENTITY}, s.sum FROM snapshots s WHERE id = ?"
    wanted: str | None = snapshot_id
    seen: set[str] = set()
    while wanted is not None:
        found = await queries.read(sql, (wanted,))
        if not found and not seen:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        if not found or wanted in seen:
            raise _damaged(wanted, f"snapshot {snapshot_id} builds on it, and it is not there")
        seen.add(wanted)
        *identity, known = found[0]
        if known is not None:
            pages = await queries.read(_PAGES, (identity[0],))
            total = await asyncio.to_thread(add, begin(tuple(identity)), pages)
            if total != known:
                raise _damaged(wanted, "the checksum of its pages is wrong")
        wanted = identity[4]


async def check_rows(queries: Queries, table: str, where: str, parameters: Iterable[object]) -> None:
    """Raise :class:`CatalogFailed` if one of these rows of a table of ``row_sums`` is not what was written."""
    sql = f"SELECT 1 FROM {table} WHERE NOT {row_sums.whole(table)} AND {where} LIMIT 1"
    if await queries.read(sql, tuple(parameters)):
        raise CatalogFailed(f"the catalog is damaged: a row of {table} is not what was written", hint=_WAY_OUT)


class Audit:
    """Compares all snapshots while somebody reads all pages anyway, in one state of the catalog."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._known = {identity[0]: (str(identity[1]), known) for *identity, known in rows}
        self._sums = {identity[0]: begin(tuple(identity)) for *identity, _ in rows}

    @classmethod
    async def begin(cls, queries: Queries) -> Audit:
        """Read what is to be compared."""
        return cls(await queries.read(f"SELECT {_IDENTITY}, s.sum FROM snapshots s"))

    def add(self, rows: Iterable[Row]) -> None:
        """Take the next rows ``(snapshot, page, entries)``, ascending. Raises :class:`CatalogFailed`."""
        for number, page, blob in rows:
            if number not in self._sums:
                raise _damaged(f"number {number}", f"page {page} belongs to it, and it is not there")
            self._sums[number] = add(self._sums[number], [(number, page, blob)])

    def finish(self) -> None:
        """Raise :class:`CatalogFailed` for a snapshot whose pages are not what they were."""
        for number, (snapshot, known) in self._known.items():
            if known is not None and self._sums[number] != known:
                raise _damaged(snapshot, "the checksum of its pages is wrong")


def _damaged(snapshot: str, what: str) -> CatalogFailed:
    return CatalogFailed(f"snapshot {snapshot or '(some)'} is damaged in the catalog: {what}", hint=_WAY_OUT)
