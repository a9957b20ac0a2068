"""Things that happen, and what mosquitto is told of them."""

from __future__ import annotations

from typing import Any

from hvsnap.catalog.catalog import Catalog
from hvsnap.happenings import EventType, disk_payload, snapshot_payload
from hvsnap.model import Disk, Snapshot
from tests.catalog_kit import a_disk, a_snapshot

GUEST = {"guest": "web01", "guest_uuid": "0b5a1d7e-0000-4000-8000-000000000001"}


async def emit(catalog: Catalog, count: int = 1, **payload: Any) -> list[int]:
    """Let a guest be attached so many times; return the sequences."""
    async with catalog.write() as tx:
        events = [await tx.emit(EventType.GUEST_ATTACHED, GUEST | payload) for _ in range(count)]
    return [event.sequence for event in events]


async def add_disk(catalog: Catalog, **changes: Any) -> Disk:
    disk = a_disk(**changes)
    async with catalog.write() as tx:
        await tx.add_disk(disk)
        await tx.emit(EventType.DISK_ATTACHED, disk_payload(disk))
    return disk


async def add_snapshot(catalog: Catalog, disk: Disk, event: EventType, **changes: Any) -> Snapshot:
    """Add a snapshot and the event that tells of it."""
    async with catalog.write() as tx:
        snapshot = a_snapshot(disk.id, await tx.next_sequence(disk.id), **changes)
        await tx.add_snapshot(snapshot)
        await tx.emit(event, snapshot_payload(disk, snapshot))
    return snapshot
