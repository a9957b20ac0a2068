"""What one write transaction can do to the catalog."""

from __future__ import annotations

import json
import uuid
from typing import Any

from hvsnap.alarm import Change
from hvsnap.catalog import chain, changes, deletion, drills, images, origins, policies, rows, sums
from hvsnap.catalog.chain import IndexArray, Page
from hvsnap.catalog.db import Cursor
from hvsnap.drill import Drill
from hvsnap.errors import DiskUnknown, NotFound, SnapshotUnknown
from hvsnap.model import (
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
    new_id,
)
from hvsnap.policy import Policy, PolicyId
from hvsnap.ports import Clock

IN_MANIFEST = {"name", "description", "tags", "expires_at", "retention", "locked_until"}
"""Fields that may change after a snapshot's manifest was written, and are in it."""

OUTBOX_EVENTS_MAX = 10_000
"""Events that wait for the broker at most: some days of a busy host, a few MiB."""


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
        """Change fields of a disk; raises :class:`DiskUnknown`."""
        await self._update("disks", rows.DISK_FIELDS, disk_id, changes)

    # -- snapshots --------------------------------------------------------------------------------

    async def add_snapshot(self, snapshot: Snapshot) -> None:
        """Add a snapshot, whose sequence number is :meth:`next_sequence`'s."""
        await self._insert("snapshots", rows.SNAPSHOT_FIELDS, snapshot)

    async def update_snapshot(self, snapshot_id: SnapshotId, **changes: Any) -> None:
        """Change fields of a snapshot; raises :class:`SnapshotUnknown`."""
        await self._update("snapshots", rows.SNAPSHOT_FIELDS, snapshot_id, changes)
        if IN_MANIFEST & set(changes):
            sql = """UPDATE snapshots SET manifest_changes = manifest_changes + 1
                     WHERE id = ? AND state = 'accomplished'"""
            await self._cursor.execute(sql, (snapshot_id,))
        if changes.get("state") == State.ACCOMPLISHED:
            await self.sum_up(snapshot_id)

    async def sum_up(self, snapshot_id: SnapshotId) -> None:
        """Write down what proves that a snapshot's pages are all there, and its own; they are, now."""
        await sums.write(self._cursor, await self._number(snapshot_id))

    async def next_sequence(self, disk: DiskId) -> int:
        """Return the sequence number of a disk's next snapshot; numbers of deleted ones are not used again."""
        found = await self._cursor.read("SELECT value FROM meta WHERE key = ?", (f"sequence/{disk}",))
        sequence = int(found[0][0]) + 1 if found else 1
        sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        await self._cursor.execute(sql, (f"sequence/{disk}", str(sequence)))
        return sequence

    async def set_sequence(self, disk: DiskId, sequence: int) -> None:
        """Let a disk's next snapshot have the number after this one."""
        sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        await self._cursor.execute(sql, (f"sequence/{disk}", str(sequence)))

    async def put_page(self, snapshot_id: SnapshotId, page: int, entries: Page) -> None:
        """Write a snapshot's entries of one page, in place of those it had; raises :class:`NoSpace` in time."""
        await self._cursor.check_room()
        number = await self._number(snapshot_id)
        sql = "INSERT OR REPLACE INTO pages (snapshot, page, entries) VALUES (?, ?, ?)"
        await self._cursor.execute(sql, (number, page, chain.encode(entries)))
        await self._cursor.execute("UPDATE snapshots SET sum = NULL WHERE number = ? AND sum IS NOT NULL", (number,))

    async def drop_pages(self, snapshot_id: SnapshotId) -> None:
        """Remove all entries of a snapshot that failed."""
        await self._cursor.execute("DELETE FROM pages WHERE snapshot = ?", (await self._number(snapshot_id),))

    async def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        """Remove a snapshot from its chain; every other one keeps its view (SERVICE 4).

        Its entries move to each child that has none of its own there. Where a disk's present state continues from
        it, the disk continues from the parent instead, and what the snapshot had changed is carried over to
        the next capture. Raises :class:`SnapshotInUse` while it, or a snapshot that builds on it, is being made.
        """
        await deletion.delete(self._cursor, snapshot_id)

    async def add_carry(self, disk: DiskId, page: int, index: IndexArray) -> None:
        """Let the next capture of a disk read blocks of one page although no bitmap names them."""
        await sums.check_rows(self._cursor, "carry", "disk = ? AND page = ?", (disk, page))
        found = await self._cursor.read("SELECT indexes FROM carry WHERE disk = ? AND page = ?", (disk, page))
        known = chain.decode_indexes(found[0][0]) if found else chain.EMPTY.index
        joined = chain.encode_indexes(chain.join_indexes(known, index))
        sql = "INSERT OR REPLACE INTO carry (disk, page, indexes) VALUES (?, ?, ?)"
        await self._cursor.execute(sql, (disk, page, joined))

    async def clear_carry(self, disk: DiskId) -> None:
        """Forget them: a capture has read them, or the disk was rolled back."""
        await self._cursor.execute("DELETE FROM carry WHERE disk = ?", (disk,))

    async def add_change(self, disk: DiskId, change: Change) -> None:
        """Remember how much a disk has changed up to a snapshot."""
        await changes.add(self._cursor, disk, change)

    async def add_drill(self, drill: Drill) -> None:
        """Remember what came of a restore drill."""
        await drills.add(self._cursor, drill)

    # -- policies ---------------------------------------------------------------------------------

    async def put_policy(self, policy: Policy) -> None:
        """Add a policy, or write it anew."""
        await policies.put(self._cursor, policy)

    async def remove_policy(self, policy: PolicyId) -> None:
        """Remove a policy; its disks have none from then on. Raises :class:`NotFound`."""
        await policies.remove(self._cursor, policy)

    async def schedule_checked(self, moment: float) -> None:
        """Note until when policies have been looked at."""
        await policies.put_checked(self._cursor, moment)

    # -- images -----------------------------------------------------------------------------------

    async def add_image(self, image: Image) -> None:
        """Add an image. Raises :class:`SnapshotUnknown`, :class:`Refused` for a name that is taken."""
        await images.add(self._cursor, image)

    async def remove_image(self, image: ImageId) -> None:
        """Remove an image. Raises :class:`ImageUnknown`."""
        await images.remove(self._cursor, image)

    async def expect_image_object(self, image: ImageId) -> None:
        """Note that the store may hold an object of an image that is not in the catalog: it is to be removed."""
        await images.expect_object(self._cursor, image)

    async def forget_image_object(self, image: ImageId) -> None:
        """Cross it out: the object is gone, or its image is in the catalog."""
        await images.forget_object(self._cursor, image)

    # -- origins ----------------------------------------------------------------------------------

    async def put_origin(self, origin: Origin) -> None:
        """Remember what a disk was made of, in the place of what was remembered of its path."""
        await origins.put(self._cursor, origin)

    async def forget_origin(self, path: str) -> None:
        """Forget what the image at a path was made of: something else is written there."""
        await origins.forget(self._cursor, path)

    # -- journal ----------------------------------------------------------------------------------

    async def open_operation(self, kind: str, guest_uuid: GuestUuid, step: str, facts: dict[str, Any]) -> Operation:
        """Begin an operation: ``step`` is what will be done first."""
        operation = Operation(OperationId(new_id("o")), kind, guest_uuid, step, facts, self._clock.now())
        values = (operation.id, kind, guest_uuid, step, json.dumps(facts), operation.created_at)
        sql = "INSERT INTO operations (id, kind, guest_uuid, step, facts, created_at) VALUES (?, ?, ?, ?, ?, ?)"
        await self._cursor.execute(sql, values)
        return operation

    async def step(self, operation: OperationId, step: str, **facts: Any) -> None:
        """Write down what will be done next, and facts in place of those known by the same names.

        Raises :class:`NotFound` for an operation that is not open.
        """
        found = await self._cursor.read("SELECT facts FROM operations WHERE id = ?", (operation,))
        if not found:
            raise NotFound(f"there is no open operation {operation}")
        merged = json.loads(found[0][0]) | facts
        sql = "UPDATE operations SET step = ?, facts = ? WHERE id = ?"
        await self._cursor.execute(sql, (step, json.dumps(merged), operation))

    async def close_operation(self, operation: OperationId) -> None:
        """End an operation: nothing of it is left open."""
        await self._cursor.execute("DELETE FROM operations WHERE id = ?", (operation,))

    # -- bare guests ------------------------------------------------------------------------------

    async def remember_guest(self, name: str, seen: dict[str, Any]) -> None:
        """Remember what a bare guest looked like."""
        sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        await self._cursor.execute(sql, (f"guest/{name}", json.dumps(seen)))

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

    async def trim_events(self, keep: int, keep_unpublished: int = OUTBOX_EVENTS_MAX) -> int:
        """Forget all but the newest ``keep`` events and, beyond these, the unpublished ones.

        Of the unpublished ones at most ``keep_unpublished`` stay, so that a broker that never comes back fills no
        disk: reports of progress go first (a later one says more), then the oldest. Returns how many
        unpublished events were lost.
        """
        progress_first = "ORDER BY type LIKE '%progress' DESC, sequence LIMIT max(0, ?)"
        (waiting,) = (await self._cursor.read("SELECT count(*) FROM events WHERE NOT published"))[0]
        excess = f"SELECT sequence FROM events WHERE NOT published {progress_first}"
        sql = f"DELETE FROM events WHERE sequence IN ({excess})"
        lost = await self._cursor.execute(sql, (waiting - keep_unpublished,))
        newest = "SELECT sequence FROM events ORDER BY sequence DESC LIMIT ?"
        await self._cursor.execute(f"DELETE FROM events WHERE published AND sequence NOT IN ({newest})", (keep,))
        return lost

    # -- inside -----------------------------------------------------------------------------------

    async def _insert(self, table: str, names: tuple[str, ...], value: object) -> None:
        marks = ", ".join("?" * len(names))
        values = [rows.to_column(name, getattr(value, name)) for name in names]
        await self._cursor.execute(f"INSERT INTO {table} ({rows.columns(names)}) VALUES ({marks})", values)

    async def _update(self, table: str, names: tuple[str, ...], key: str, changes: dict[str, Any]) -> None:
        unknown = set(changes) - set(names)
        if unknown:
            raise ValueError(f"{table} has no {', '.join(sorted(unknown))}")
        if not changes:
            return
        sets = ", ".join(f'"{name}" = ?' for name in changes)
        values = [rows.to_column(name, value) for name, value in changes.items()]
        if not await self._cursor.execute(f"UPDATE {table} SET {sets} WHERE id = ?", (*values, key)):
            raise (
                SnapshotUnknown(f"there is no snapshot {key}")
                if table == "snapshots"
                else DiskUnknown(f"there is no disk {key}")
            )

    async def _number(self, snapshot_id: SnapshotId) -> int:
        found = await self._cursor.read("SELECT number FROM snapshots WHERE id = ?", (snapshot_id,))
        if not found:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
        return int(found[0][0])
