"""The catalog as the other rooms see it: looking things up, and write transactions.

``async with catalog.write() as tx`` gives a :class:`~hvsnap.catalog.transaction.Transaction`; its events reach
listeners after the commit, never before. Implements :class:`hvsnap.ports.BlockIndex`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvsnap.catalog import chain, figures, images, origins, policies, rows, sums
from hvsnap.catalog.blocks import Blocks
from hvsnap.catalog.chain import IndexArray, Page
from hvsnap.catalog.changes import Changes
from hvsnap.catalog.db import REBUILD, Database, Row, settled
from hvsnap.catalog.drills import Drills
from hvsnap.catalog.moment import Moment
from hvsnap.catalog.transaction import Transaction
from hvsnap.catalog.upkeep import Upkeep
from hvsnap.catalog.usage import Usage
from hvsnap.errors import CatalogFailed, Damaged, DiskUnknown, NoSpace, NotFound, SnapshotUnknown
from hvsnap.model import (
    BlockPlace,
    Disk,
    DiskId,
    Event,
    GuestUuid,
    Image,
    ImageId,
    Operation,
    OperationId,
    Origin,
    Snapshot,
    SnapshotId,
    State,
)
from hvsnap.policy import Policy
from hvsnap.ports import Clock, UInt64Array

VIEWS_AT_ONCE = 16
"""Pages of a view that are read and laid over each other together: a chain of 64 nodes makes that 40 MiB at most."""

PAGES_AT_ONCE = 8
"""Own pages read together; callers hold a stream for each of 64 snapshots open side by side."""

REFERENCES_AT_ONCE = 128
"""Pages whose block ids are read together: 4 MiB at most."""

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
        self.blocks = Blocks(database)
        self.upkeep = Upkeep(database, self.blocks)
        self.usage = Usage(database)
        self.changes = Changes(database)
        self.drills = Drills(database)
        self.on_event: list[Callable[[Event], None]] = []

    @classmethod
    async def open(cls, state_dir: Path, clock: Clock) -> Catalog:
        """Open the catalog in ``state_dir``; raises as :meth:`Database.open` does."""
        database = await Database.open(state_dir)
        try:
            catalog = cls(database, clock)
            await catalog.blocks.load()
            for rows_of in (catalog.snapshots, catalog.operations, catalog.policies):
                await rows_of()  # or they are damaged
            await catalog.disks(include_released=True)
            for row in await database.read("SELECT key, value FROM meta"):
                rows.check_meta(row)
            with contextlib.suppress(NoSpace):  # at a later start, then
                await sums.complete(database)
        except BaseException as error:
            await settled(database.close())
            if isinstance(error, Damaged):  # not the store's: what one table says of another is not there
                raise CatalogFailed(f"the catalog {database.path} is damaged: {error}", hint=REBUILD) from error
            raise
        return catalog

    async def close(self) -> None:
        """Close it."""
        await self._db.close()

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """Run one transaction; everything in it happens, or nothing."""
        async with self._db.transaction() as cursor:
            tx = Transaction(cursor, self._clock)
            cursor.after_commit = lambda: self._announce(tx.events)
            yield tx

    def _announce(self, events: Iterable[Event]) -> None:
        """Tell listeners of committed events. What fails in a listener is no failure of the transaction."""
        for event in events:
            for listener in self.on_event:
                try:
                    listener(event)
                except Exception as error:
                    context = {"message": f"a listener failed on event {event.type}", "exception": error}
                    asyncio.get_running_loop().call_exception_handler(context)

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

    async def sequences(self) -> dict[DiskId, int]:
        """Return the highest sequence number that was ever given to a snapshot of each disk, deleted ones included."""
        found = await self._db.read("SELECT key, value FROM meta WHERE key LIKE 'sequence/%'")
        return {DiskId(key.removeprefix("sequence/")): int(value) for key, value in found}

    # -- views ------------------------------------------------------------------------------------

    async def view(self, snapshot_id: SnapshotId, page: int) -> UInt64Array:
        """Return what a snapshot holds in one page: ``uint64[PAGE_BLOCKS]`` of block ids, 0 = zero.

        Raises :class:`SnapshotUnknown`: a snapshot that is not there must never read as zeroes.
        """
        sql = f"""{_LINEAGE} SELECT entries FROM lineage LEFT JOIN pages ON snapshot = number AND page = ?
                  ORDER BY depth DESC"""
        found = await self._db.read(sql, (snapshot_id, page))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        return chain.lay_over(chain.decode(row[0]) for row in found if row[0] is not None)

    async def check_lineage(self, snapshot_id: SnapshotId) -> None:
        """Return once it is certain that nothing of a snapshot, or of what it builds on, is lost or misplaced here.

        Raises :class:`SnapshotUnknown`, :class:`~hvsnap.errors.CatalogFailed`.
        """
        async with self._db.scan() as reader:
            await sums.check(reader, snapshot_id)

    async def page_numbers(self, snapshot_id: SnapshotId) -> list[int]:
        """Return the pages that anything of a snapshot's lineage has entries in, ascending, once that is checked."""
        await self.check_lineage(snapshot_id)
        sql = f"{_LINEAGE} SELECT DISTINCT page FROM lineage CROSS JOIN pages ON snapshot = number ORDER BY page"
        return [row[0] for row in await self._db.read(sql, (snapshot_id,))]

    async def views(self, snapshot_id: SnapshotId) -> AsyncIterator[tuple[int, UInt64Array]]:
        """Yield ``(page, view)`` of a snapshot, ascending, a few pages in memory at a time.

        The other snapshots of the chain may be deleted meanwhile: that changes no view, and each page is read by a
        single query. Raises :class:`SnapshotUnknown` when the snapshot itself is, or is not there.
        """
        sql = f"""{_LINEAGE} SELECT page, entries FROM lineage CROSS JOIN pages ON snapshot = number
                  WHERE page BETWEEN ? AND ? ORDER BY page, depth DESC"""
        numbers = await self.page_numbers(snapshot_id)
        for start in range(0, len(numbers), VIEWS_AT_ONCE):
            wanted = numbers[start : start + VIEWS_AT_ONCE]
            found = await self._db.read(sql, (snapshot_id, wanted[0], wanted[-1]))
            views = await asyncio.to_thread(_lay_over_rows, found)
            for page in wanted:
                if page not in views:
                    raise SnapshotUnknown(f"snapshot {snapshot_id} was deleted while it was being read")
                yield page, views.pop(page)

    async def own_pages(self, snapshot_id: SnapshotId) -> AsyncIterator[tuple[int, Page]]:
        """Yield ``(page, entries)`` that a snapshot itself holds, ascending, also while it is progressing.

        Raises :class:`SnapshotUnknown`.
        """
        found = await self._db.read("SELECT number FROM snapshots WHERE id = ?", (snapshot_id,))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        sql = "SELECT page, entries FROM pages WHERE snapshot = ? AND page > ? ORDER BY page LIMIT ?"
        last = -1
        while batch := await self._db.read(sql, (found[0][0], last, PAGES_AT_ONCE)):
            last = batch[-1][0]
            for page, entries in await asyncio.to_thread(_decode_rows, batch):
                yield page, entries

    async def carry(self, disk: DiskId) -> dict[int, IndexArray]:
        """Return the blocks, by page, that the next capture must read although no bitmap names them."""
        await sums.check_rows(self._db, "carry", "disk = ?", (disk,))
        found = await self._db.read("SELECT page, indexes FROM carry WHERE disk = ? ORDER BY page", (disk,))
        return {page: chain.decode_indexes(blob) for page, blob in found}

    # -- blocks (ports.BlockIndex) ----------------------------------------------------------------

    async def find(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests that are stored, and not known to be damaged."""
        return await self.blocks.find(digests)

    async def damaged(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests whose stored form is damaged: storing them again heals these blocks."""
        return await self.blocks.damaged(digests)

    async def places(self, ids: Sequence[int]) -> list[BlockPlace]:
        """Return where blocks lie, in the order asked for; an unknown id is :class:`~hvsnap.errors.Damaged`."""
        return await self.blocks.places(ids)

    async def digests(self, ids: UInt64Array) -> npt.NDArray[np.uint8]:
        """Return digests, ``uint8[n, 32]``, in the order asked for; an unknown id is Damaged."""
        return await self.blocks.digests(ids)

    async def add_pack(self, pack: str, size_bytes: int, blocks: Sequence[BlockPlace]) -> None:
        """Record a durable pack and its blocks in one transaction; a damaged block among them is healed."""
        await self.blocks.add_pack(pack, size_bytes, blocks)

    async def next_block_id(self) -> int:
        """Return an id greater than any that was ever recorded, deleted ones included."""
        return await self.blocks.next_id()

    # -- references -------------------------------------------------------------------------------

    async def all_entries(self) -> AsyncIterator[tuple[SnapshotId, int, Page]]:
        """Yield every page of every snapshot, ``(snapshot, page, entries)``, all of one and the same moment."""
        sql = """SELECT snapshot, page, entries FROM pages WHERE (snapshot, page) > (?, ?)
                 ORDER BY snapshot, page LIMIT ?"""
        async with self._db.scan() as reader:
            ids = {number: SnapshotId(name) for number, name in await reader.read("SELECT number, id FROM snapshots")}
            last = (0, -1)
            while batch := await reader.read(sql, (*last, REFERENCES_AT_ONCE)):
                last = (batch[-1][0], batch[-1][1])
                pages = await asyncio.to_thread(_decode_rows, [row[1:] for row in batch])
                for row, (page, entries) in zip(batch, pages, strict=True):
                    yield ids[row[0]], page, entries

    # -- policies ---------------------------------------------------------------------------------

    async def policies(self) -> list[Policy]:
        """Return all policies, by name."""
        return await policies.read_all(self._db)

    async def schedule_checked(self) -> float | None:
        """Return until when policies have been looked at; None before the first look."""
        return await policies.read_checked(self._db)

    # -- images -----------------------------------------------------------------------------------

    async def images(self) -> list[Image]:
        """Return all images, by name."""
        return await images.read_all(self._db)

    async def image_objects_to_remove(self) -> list[ImageId]:
        """Return images that are not in the catalog, and whose objects the store may hold."""
        return await images.read_objects_to_remove(self._db)

    # -- origins ----------------------------------------------------------------------------------

    async def origins(self) -> list[Origin]:
        """Return all disks that were made here, and of what, by path."""
        return await origins.read_all(self._db)

    async def origin(self, path: str) -> Origin | None:
        """Return what the image at a path was made of, if it was made here."""
        return await origins.read_one(self._db, path)

    # -- bare guests ------------------------------------------------------------------------------

    async def recall(self, guest: str) -> dict[str, Any] | None:
        """Return what was remembered of a bare guest (:class:`hvsnap.ports.GuestMemory`)."""
        found = await self._db.read("SELECT value FROM meta WHERE key = ?", (f"guest/{guest}",))
        seen: dict[str, Any] | None = json.loads(found[0][0]) if found else None
        return seen

    async def remember(self, guest: str, seen: dict[str, Any]) -> None:
        """Remember what a bare guest looks like."""
        async with self.write() as tx:
            await tx.remember_guest(guest, seen)

    async def all_references(self) -> AsyncIterator[UInt64Array]:
        """Yield the block ids of all entries of all snapshots, many at a time, all of one and the same moment.

        At the end it raises :class:`~hvsnap.errors.CatalogFailed` if pages were lost or misplaced: act on them then.
        """
        sql = """SELECT snapshot, page, entries FROM pages WHERE (snapshot, page) > (?, ?)
                 ORDER BY snapshot, page LIMIT ?"""
        async with self._db.scan() as reader:
            audit = await sums.Audit.begin(reader)
            last = (0, -1)
            while batch := await reader.read(sql, (*last, REFERENCES_AT_ONCE)):
                last = (batch[-1][0], batch[-1][1])
                audit.add(batch)
                yield await asyncio.to_thread(_block_ids, [row[2] for row in batch])
            audit.finish()

    async def figures(self) -> figures.Figures:
        """Return what monitoring asks for, summed up."""
        return await figures.read(self._db)

    @contextlib.asynccontextmanager
    async def moment(self) -> AsyncIterator[Moment]:
        """Give queries that all see the catalog as it is now."""
        async with self._db.scan() as reader:
            yield Moment(reader)

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

    async def unpublished_count(self) -> int:
        """Return how many events have not been published over MQTT."""
        return int((await self._db.read("SELECT count(*) FROM events WHERE NOT published"))[0][0])


def _block_ids(blobs: list[bytes]) -> UInt64Array:
    return np.concatenate([page.block for page in chain.decode_many(blobs)])


def _decode_rows(found: list[Row]) -> list[tuple[int, Page]]:
    return list(zip([page for page, _ in found], chain.decode_many([blob for _, blob in found]), strict=True))


def _lay_over_rows(found: list[Row]) -> dict[int, UInt64Array]:
    """Return the views of rows ``(page, entries)`` that come page by page, oldest first."""
    decoded = _decode_rows(found)
    return {
        page: chain.lay_over(entries for _page, entries in group) for page, group in groupby(decoded, key=itemgetter(0))
    }
