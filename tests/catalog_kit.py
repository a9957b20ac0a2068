"""Values for tests of the catalog."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.chain import Page
from hvsnap.model import (
    BlockPlace,
    Consistency,
    Disk,
    DiskId,
    GuestUuid,
    Kind,
    Method,
    Snapshot,
    SnapshotId,
    State,
    new_id,
)


class StoppedClock:
    """Tells the time it was given."""

    def __init__(self, now: float = 1000.0) -> None:
        self.at = now

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


def a_disk(**changes: Any) -> Disk:
    disk_id = DiskId(new_id("d"))
    disk = Disk(
        id=disk_id,
        guest_uuid=GuestUuid("0b5a1d7e-0000-4000-8000-000000000001"),
        guest_name="web01",
        target="vda",
        serial="",
        source=f"/images/{disk_id}.qcow2",
        format="qcow2",
        size_bytes=2**30,
        system=True,
        created_at=1.0,
    )
    return replace(disk, **changes)


def a_snapshot(disk: DiskId, sequence: int, parent: SnapshotId | None = None, **changes: Any) -> Snapshot:
    snapshot = Snapshot(
        id=SnapshotId(new_id("s")),
        disk=disk,
        sequence=sequence,
        parent=parent,
        name=f"number {sequence}",
        description="",
        kind=Kind.INCREMENTAL if parent else Kind.FULL,
        method=Method.BITMAP if parent else Method.FULL,
        reason="",
        consistency=Consistency.CRASH,
        state=State.ACCOMPLISHED,
        size_bytes=2**30,
        created_at=float(sequence),
    )
    return replace(snapshot, **changes)


def a_page(entries: dict[int, int]) -> Page:
    index = sorted(entries)
    return Page(np.array(index, np.uint16), np.array([entries[i] for i in index], np.uint64))


def a_block(block_id: int, length: int = 1000, pack: str = "p") -> BlockPlace:
    return BlockPlace(block_id, block_id.to_bytes(32, "big"), pack, block_id * 70_000, length, 0)


async def add_chain(catalog: Catalog, disk: Disk, *pages: dict[int, dict[int, int]]) -> list[SnapshotId]:
    """Add a disk and accomplished snapshots on top of each other, ``{page: {index: block}}`` each; the last is head."""
    made: list[SnapshotId] = []
    async with catalog.write() as tx:
        await tx.add_disk(disk)
        for own in pages:
            one = a_snapshot(disk.id, await tx.next_sequence(disk.id), made[-1] if made else None)
            await tx.add_snapshot(one)
            for page, entries in own.items():
                await tx.put_page(one.id, page, a_page(entries))
            made.append(one.id)
        if made:
            await tx.update_disk(disk.id, head=made[-1], bitmap=f"hvsnap-{made[-1]}")
    return made


async def contents(catalog: Catalog, snapshot: SnapshotId) -> dict[int, dict[int, int]]:
    """Return a snapshot's view as ``{page: {index: block}}`` without what is zero."""
    found: dict[int, dict[int, int]] = {}
    async for page, view in catalog.views(snapshot):
        used = {int(i): int(view[i]) for i in np.flatnonzero(view)}
        if used:
            found[page] = used
    return found


async def own(catalog: Catalog, snapshot: SnapshotId) -> dict[int, dict[int, int]]:
    """Return a snapshot's own entries as ``{page: {index: block}}``."""
    return {
        page: dict(zip(entries.index.tolist(), entries.block.tolist(), strict=True))
        async for page, entries in catalog.own_pages(snapshot)
    }
