"""Manifests that say what the catalog says: written anew after a neighbour's deletion, removed after their own.

From the manifests alone the catalog can be rebuilt, at any moment: a deleted snapshot's manifest stays until every
child that inherited from it has a new one, and those of a chain are removed from its end (docs/format.md, "Manifest").
Plan and action are apart: :func:`plan` compares two lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.moment import Moment
from hvsnap.errors import CatalogFailed, Damaged, FormatUnknown, NotFound, SnapshotUnknown
from hvsnap.model import DiskId, ManifestState, Snapshot, SnapshotId, State
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.identity import REVISION_MAX, ManifestHead, ManifestName
from hvsnap.store.manifest import ManifestPage

LOOKS_MAX = 3
"""How often what was changed meanwhile is written before the rest is left to the next time."""


@dataclass(frozen=True, slots=True)
class ManifestPlan:
    """Snapshots whose manifests are to be written, and then the manifests that are to be removed, in this order."""

    write: dict[SnapshotId, DiskId] = field(default_factory=dict)
    remove: list[ManifestName] = field(default_factory=list)


def plan(
    before: Mapping[SnapshotId, ManifestState],
    listed: Sequence[ManifestName],
    now: Mapping[SnapshotId, ManifestState],
    rows: Sequence[Snapshot],
) -> ManifestPlan:
    """Return what is to be done.

    ``before`` and ``now`` are the states of the accomplished snapshots' manifests before and after the objects were
    ``listed``; ``rows`` are all snapshots between the listing and ``now``. A manifest that was not listed is missing
    only if its snapshot was accomplished before.
    """
    there = {(name.snapshot, name.revision) for name in listed}
    states = {row.id: row.state for row in rows}
    disks = {row.id: row.disk for row in rows}
    write = {
        snapshot: disks[snapshot]
        for snapshot, state in now.items()
        if state.changes or (before.get(snapshot) == state and (snapshot, state.revision) not in there)
        if snapshot in disks
    }
    remove = [
        name
        for name in listed
        if name.snapshot not in states
        or states[name.snapshot] is State.FAILED
        or (name.snapshot in now and name.revision < now[name.snapshot].revision)
    ]
    # From the end of each chain: a manifest is never there without its parent's.
    remove.sort(key=lambda name: (name.disk, -name.sequence, name.revision))
    return ManifestPlan(write, remove)


def check_not_ahead(listed: Sequence[ManifestName], sequences: Mapping[DiskId, int]) -> None:
    """Raise :class:`CatalogFailed` if the store holds manifests that this catalog cannot have written.

    An older copy of the catalog was put back then. To it, whatever was stored since looks like something left over; a
    sweep would remove snapshots that are whole.
    """
    ahead = [name for name in listed if name.sequence > sequences.get(name.disk, 0)]
    if ahead:
        raise CatalogFailed(
            f"the catalog is older than the store: it has not written {ahead[0]} and {len(ahead) - 1} more manifests",
            hint="nothing is removed; stop the daemon, keep the catalog's file aside, and run `hvsnap store-rebuild`",
        )


async def make_plan(catalog: Catalog, store: PackedBlocks) -> ManifestPlan:
    """Look at both sides, and return what is to be done."""
    before = await catalog.upkeep.manifests()
    listed = [name async for name in store.manifests.all()]
    check_not_ahead(listed, await catalog.sequences())
    # In this order: what is deleted between the two looks is still among the rows, so its manifest stays, and its
    # children's changes are seen. The other way round its manifest would go before theirs are written.
    rows = await catalog.snapshots()
    now = await catalog.upkeep.manifests()
    return plan(before, listed, now, rows)


async def reconcile(
    catalog: Catalog, store: PackedBlocks, require_certain: Callable[[], None] = lambda: None
) -> tuple[int, bool]:
    """Make the manifests say what the catalog says; return how many were written or removed, and whether that was all.

    Nothing of a chain is removed while a manifest of it is still to be written. ``require_certain`` is called before
    each one is removed: writing the others may have taken longer than a lease lasts. Raises what that, the store and
    the catalog raise. Killed anywhere, it is simply begun again.
    """
    todo = await make_plan(catalog, store)
    done = 0
    for _ in range(LOOKS_MAX):
        if not todo.write:
            break
        for snapshot in todo.write:
            with contextlib.suppress(SnapshotUnknown):  # deleted since
                await write(catalog, store, snapshot)
                done += 1
        todo = await make_plan(catalog, store)
    waiting = set(todo.write.values())
    for name in todo.remove:
        if name.disk not in waiting:
            require_certain()
            await store.manifests.delete(name)
            done += 1
    return done, not todo.write


async def write(catalog: Catalog, store: PackedBlocks, snapshot_id: SnapshotId) -> ManifestName:
    """Write a snapshot's manifest as a new revision; the older ones stay. Raises :class:`SnapshotUnknown`."""
    async with catalog.moment() as moment:
        snapshot, state = await moment.snapshot(snapshot_id)
        disk = await moment.disk(snapshot.disk)
        listed = [name async for name in store.manifests.all(snapshot.disk) if name.snapshot == snapshot_id]
        xml = await _domain_xml(store, listed)
        revision = max([state.revision, *(name.revision for name in listed)]) + 1
        if revision > REVISION_MAX:
            raise Damaged(f"the manifest of {snapshot_id} was written anew too often", hint="please report this")
        head = ManifestHead(snapshot, disk, store.block_size, xml, revision)
        name = await store.manifests.put(head, _pages(moment, store, snapshot_id))
    await catalog.upkeep.manifest_written(state, revision)
    return name


async def _domain_xml(store: PackedBlocks, listed: Sequence[ManifestName]) -> str:
    """Return the guest's definition at the time of the snapshot: only the manifests know it."""
    for name in reversed(listed):
        try:
            return (await store.manifests.head(name)).domain_xml
        except (Damaged, FormatUnknown, NotFound):
            continue
    return ""


async def _pages(moment: Moment, store: PackedBlocks, snapshot: SnapshotId) -> AsyncIterator[ManifestPage]:
    async for number, entries in moment.own_pages(snapshot):
        yield ManifestPage(number, entries.index, await store.digests(entries.block))
