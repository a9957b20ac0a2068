"""What one write transaction can do to the catalog."""

from __future__ import annotations

import json
import uuid
from typing import Any

from hvsnap.catalog import chain, rows
from hvsnap.catalog.chain import IndexArray, Page
from hvsnap.catalog.db import Cursor
from hvsnap.errors import SnapshotInUse, SnapshotUnknown
from hvsnap.model import Disk, DiskId, Event, GuestUuid, Operation, OperationId, Snapshot, SnapshotId, State, new_id
from hvsnap.ports import Clock


class Transaction:
    """Changes of one transaction; ``events`` are announced after its commit."""

    def __init__(self, cursor: Cursor, clock: Clock) -> None:
        self._cursor = cursor
        self._clock = clock
        self.events: list[Event] = []

    # -- disks ------------------------------------------------------------------------------------

    async def add_disk(self, disk: Disk) -> None:
        """Add a disk."""
        await self._insert("disks", rows.DISK_FIELDS, disk)

    async def update_disk(self, disk_id: DiskId, **changes: Any) -> None:
        """Change fields of a disk."""
        await self._update("disks", rows.DISK_FIELDS, disk_id, changes)

    # -- snapshots --------------------------------------------------------------------------------

    async def add_snapshot(self, snapshot: Snapshot) -> None:
        """Add a snapshot."""
        await self._insert("snapshots", rows.SNAPSHOT_FIELDS, snapshot)

    async def update_snapshot(self, snapshot_id: SnapshotId, **changes: Any) -> None:
        """Change fields of a snapshot."""
        await self._update("snapshots", rows.SNAPSHOT_FIELDS, snapshot_id, changes)

    async def next_sequence(self, disk: DiskId) -> int:
        """Return the sequence number of a disk's next snapshot; numbers of deleted ones are not used again."""
        found = await self._cursor.read("SELECT value FROM meta WHERE key = ?", (f"sequence/{disk}",))
        sequence = int(found[0][0]) + 1 if found else 1
        sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        await self._cursor.execute(sql, (f"sequence/{disk}", str(sequence)))
        return sequence

    async def put_page(self, snapshot_id: SnapshotId, page: int, entries: Page) -> None:
        """Write a snapshot's entries of one page, in place of those it had."""
        number = await self._number(snapshot_id)
        await self._put_page(number, page, entries)

    async def drop_pages(self, snapshot_id: SnapshotId) -> None:
        """Remove all entries of a snapshot that failed."""
        await self._cursor.execute("DELETE FROM pages WHERE snapshot = ?", (await self._number(snapshot_id),))

    async def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        """Remove a snapshot from its chain; every other one keeps its view (SERVICE 4).

        Its entries move to each child that has none of its own there. Where a disk's present state continues from
        it, the disk continues from the parent instead, and what the snapshot had changed is carried over to
        the next capture. Raises :class:`SnapshotInUse` while it is being made.
        """
        snapshot = await self._snapshot(snapshot_id)
        if snapshot.state is State.PROGRESSING:
            raise SnapshotInUse(f"snapshot {snapshot_id} is still being made", hint="wait for it, or cancel it")
        number = await self._number(snapshot_id)
        children = await self._cursor.read("SELECT state, number FROM snapshots WHERE parent = ?", (snapshot_id,))
        if any(state == State.PROGRESSING for state, _number in children):
            hint = "wait for that snapshot, or cancel it"
            raise SnapshotInUse(f"snapshot {snapshot_id} is what a snapshot being made builds on", hint=hint)
        disks = await self._cursor.read("SELECT id FROM disks WHERE head = ?", (snapshot_id,))
        for (page,) in await self._cursor.read("SELECT page FROM pages WHERE snapshot = ?", (number,)):
            entries = await self._page(number, page)
            for _state, child_number in children:
                mine = await self._page(child_number, page)
                await self._put_page(child_number, page, chain.hand_over(entries, mine))
            for (disk,) in disks:
                await self.add_carry(DiskId(disk), page, entries.index)
        await self._cursor.execute("UPDATE snapshots SET parent = ? WHERE parent = ?", (snapshot.parent, snapshot_id))
        for (disk,) in disks:
            # Without a parent there is nothing to compare with: the next snapshot is a full one, whatever the
            # bitmap says. Its name is kept all the same, so that the next capture removes it from the image.
            await self.update_disk(DiskId(disk), head=snapshot.parent)
            if snapshot.parent is None:
                await self.clear_carry(DiskId(disk))
        await self._cursor.execute("DELETE FROM pages WHERE snapshot = ?", (number,))
        await self._cursor.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))

    async def add_carry(self, disk: DiskId, page: int, index: IndexArray) -> None:
        """Add blocks that the next capture of a disk must read."""
        found = await self._cursor.read("SELECT indexes FROM carry WHERE disk = ? AND page = ?", (disk, page))
        joined = chain.join_indexes(chain.decode_indexes(found[0][0]), index) if found else index
        sql = "INSERT OR REPLACE INTO carry (disk, page, indexes) VALUES (?, ?, ?)"
        await self._cursor.execute(sql, (disk, page, chain.encode_indexes(joined)))

    async def clear_carry(self, disk: DiskId) -> None:
        """Forget them: a capture has read them, or the disk was rolled back."""
        await self._cursor.execute("DELETE FROM carry WHERE disk = ?", (disk,))

    # -- journal ----------------------------------------------------------------------------------

    async def open_operation(self, kind: str, guest_uuid: GuestUuid, step: str, facts: dict[str, Any]) -> Operation:
        """Begin an operation: ``step`` is what will be done first."""
        operation = Operation(OperationId(new_id("o")), kind, guest_uuid, step, facts, self._clock.now())
        values = (operation.id, kind, guest_uuid, step, json.dumps(facts), operation.created_at)
        sql = f"INSERT INTO operations ({rows.OPERATION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
        await self._cursor.execute(sql, values)
        return operation

    async def step(self, operation: OperationId, step: str, **facts: Any) -> None:
        """Write down what will be done next, and facts to add to those known."""
        sql = "UPDATE operations SET step = ?, facts = json_patch(facts, ?) WHERE id = ?"
        await self._cursor.execute(sql, (step, json.dumps(facts), operation))

    async def close_operation(self, operation: OperationId) -> None:
        """End an operation: nothing of it is left open."""
        await self._cursor.execute("DELETE FROM operations WHERE id = ?", (operation,))

    # -- events -----------------------------------------------------------------------------------

    async def emit(self, event_type: str, payload: dict[str, Any]) -> Event:
        """Store an event; it is announced once the transaction is committed."""
        event = Event(uuid.uuid4().hex, event_type, self._clock.now(), payload)
        sql = "INSERT INTO events (id, type, at, payload) VALUES (?, ?, ?, ?)"
        sequence = await self._cursor.insert(sql, (event.id, event.type, event.at, json.dumps(payload)))
        event = Event(event.id, event.type, event.at, payload, sequence)
        self.events.append(event)
        return event

    async def mark_published(self, up_to_sequence: int) -> None:
        """Mark events as published."""
        sql = "UPDATE events SET published = 1 WHERE NOT published AND sequence <= ?"
        await self._cursor.execute(sql, (up_to_sequence,))

    async def trim_events(self, keep: int) -> None:
        """Forget all but the newest ``keep`` events, published or not: the outbox is bounded."""
        sql = "DELETE FROM events WHERE sequence <= (SELECT max(sequence) FROM events) - ?"
        await self._cursor.execute(sql, (keep,))

    # -- inside -----------------------------------------------------------------------------------

    async def _insert(self, table: str, names: tuple[str, ...], value: object) -> None:
        marks = ", ".join("?" * len(names))
        values = [rows.to_column(name, getattr(value, name)) for name in names]
        await self._cursor.execute(f"INSERT INTO {table} ({rows.columns(names)}) VALUES ({marks})", values)

    async def _update(self, table: str, names: tuple[str, ...], key: str, changes: dict[str, Any]) -> None:
        unknown = set(changes) - set(names)
        if unknown:
            raise ValueError(f"{table} has no {', '.join(sorted(unknown))}")
        sets = ", ".join(f'"{name}" = ?' for name in changes)
        values = [rows.to_column(name, value) for name, value in changes.items()]
        await self._cursor.execute(f"UPDATE {table} SET {sets} WHERE id = ?", (*values, key))

    async def _snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        sql = f"SELECT {rows.SNAPSHOT_COLUMNS} FROM snapshots WHERE id = ?"
        found = await self._cursor.read(sql, (snapshot_id,))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        return rows.snapshot(found[0])

    async def _number(self, snapshot_id: SnapshotId) -> int:
        found = await self._cursor.read("SELECT number FROM snapshots WHERE id = ?", (snapshot_id,))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        return int(found[0][0])

    async def _page(self, number: int, page: int) -> Page:
        found = await self._cursor.read("SELECT entries FROM pages WHERE snapshot = ? AND page = ?", (number, page))
        return chain.decode(found[0][0]) if found else chain.EMPTY

    async def _put_page(self, number: int, page: int, entries: Page) -> None:
        sql = "INSERT OR REPLACE INTO pages (snapshot, page, entries) VALUES (?, ?, ?)"
        await self._cursor.execute(sql, (number, page, chain.encode(entries)))
