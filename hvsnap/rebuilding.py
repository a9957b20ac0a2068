"""``hvsnap store-rebuild`` and ``store-rekey``: what is done to catalog and store while no daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.lock import StateLock
from hvsnap.catalog.replacement import NAME, Replacement
from hvsnap.config import Settings
from hvsnap.errors import CatalogFailed, NotFound, Refused, StoreFailed
from hvsnap.house import SystemClock
from hvsnap.model import State
from hvsnap.ports import ObjectStore
from hvsnap.store.blocks import open_store
from hvsnap.store.keyring import StoreKey, change_key
from hvsnap.store.lease import WriterLease
from hvsnap.store.opening import open_key, open_objects, writer_id, writer_lease
from hvsnap.store.reading import ReadOnlyObjects
from hvsnap.upkeep.bond import Bond
from hvsnap.upkeep.rebuild import Rebuild, Rebuilt

READS_MAX = 3
"""How often a store that its writer changes meanwhile is read before what seems to be missing is believed."""


def rebuild(settings: Settings, *, force: bool) -> wire.StoreRebuilt:
    """Make the catalog anew; ``force``: also where there is one that is not damaged.

    Another host's store (``store.read_only``) has no lease taken, and of its packs only the indexes are read; ``force``
    is not needed, since such a catalog is a copy.

    Raises :class:`StoreBusy` when a daemon runs, here or on another host with this store; :class:`Refused` for a
    healthy catalog, and what the store raises. Nothing is changed then; the store is only read.
    """
    return asyncio.run(_rebuild(settings, force))


async def _rebuild(settings: Settings, force: bool) -> wire.StoreRebuilt:
    state_dir, clock = Path(settings.state_dir), SystemClock()
    read_only = settings.store.read_only
    await _may_replace(state_dir, clock, force or read_only)
    async with contextlib.AsyncExitStack() as stack:
        lock = StateLock(state_dir)
        await asyncio.to_thread(lock.acquire)
        stack.callback(lock.release)
        objects = await asyncio.to_thread(open_objects, settings.store, state_dir)
        stack.callback(objects.close)
        key = await open_key(settings.store, objects)
        lease = None if read_only else await _held(stack, settings, objects)
        beside = Replacement(state_dir)
        for _ in range(READS_MAX):
            await asyncio.to_thread(beside.clear)
            answer = await _filled(beside, objects, key, lease)
            if lease is not None or not (answer.damaged or answer.damaged_blocks):
                break
        kept = await asyncio.to_thread(beside.put_in_place)
    return answer.model_copy(update={"kept": str(kept or "")})


async def _filled(
    beside: Replacement, objects: ObjectStore, key: StoreKey | None, lease: WriterLease | None
) -> wire.StoreRebuilt:
    """Fill a new catalog from the store; without a lease it is another host's."""
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        catalog = await Catalog.open(beside.directory, clock)
        stack.push_async_callback(catalog.close)
        seen = objects if lease is not None else ReadOnlyObjects(objects)
        store = await open_store(seen, catalog, create=False, key=key)
        stack.push_async_callback(store.close)
        found = await Rebuild(catalog, store, clock, thorough=lease is not None).run()
        await (Bond.note_read(catalog, store) if lease is None else Bond(catalog, lease).note(store))
        return await _answer(catalog, found)


async def _held(stack: contextlib.AsyncExitStack, settings: Settings, objects: ObjectStore) -> WriterLease:
    """Return the store's lease, kept until the stack is left."""
    holder = await asyncio.to_thread(writer_id, Path(settings.state_dir))
    lease = writer_lease(settings.store, objects, holder, settings.host_id)
    await lease.acquire()
    stack.push_async_callback(lease.release)
    keeping = asyncio.create_task(lease.keep(), name="lease")
    stack.callback(keeping.cancel)
    return lease


def rekey(settings: Settings, new_key_file: str) -> None:
    """Let the key of another file open the store, and the present one no more.

    Raises :class:`StoreBusy` when a daemon runs, :class:`Refused` for a store that is not encrypted or a wrong key.
    """
    asyncio.run(_rekey(settings, new_key_file))


async def _rekey(settings: Settings, new_key_file: str) -> None:
    if settings.store.read_only:
        raise Refused("the store is another host's, and only read here", hint="change its key there")
    if not settings.store.encryption.key_file:
        hint = "the present key is what store.encryption.key_file names; a plain store cannot be encrypted in place"
        raise Refused("no key is configured", hint=hint)
    new = await asyncio.to_thread(StoreKey.read, new_key_file, "NEW_KEY_FILE")
    state_dir = Path(settings.state_dir)
    async with contextlib.AsyncExitStack() as stack:
        lock = StateLock(state_dir)
        await asyncio.to_thread(lock.acquire)
        stack.callback(lock.release)
        objects = await asyncio.to_thread(open_objects, settings.store, state_dir)
        stack.callback(objects.close)
        old = await open_key(settings.store, objects)
        holder = await asyncio.to_thread(writer_id, state_dir)
        lease = writer_lease(settings.store, objects, holder, settings.host_id)
        await lease.acquire()
        stack.push_async_callback(lease.release)
        if old is not None:
            try:
                await change_key(objects, old, new)
            except NotFound as error:
                raise StoreFailed("there is no repository", hint="check the store's place") from error


async def _may_replace(state_dir: Path, clock: SystemClock, force: bool) -> None:
    """Raise :class:`Refused` for a catalog that is whole and in use, or that guests depend on."""
    if not await asyncio.to_thread((state_dir / NAME).exists):
        return
    try:
        catalog = await Catalog.open(state_dir, clock)
    except CatalogFailed as error:
        if "store-rebuild" in error.hint or force:
            return
        raise  # of a newer version, or not readable by us: perhaps it is whole
    try:
        if await catalog.operations():
            hint = "`hvsnap recover` settles it; then try again"
            raise Refused("the catalog's journal has open operations, which guests depend on", hint=hint)
        snapshots = await catalog.snapshots(state=State.ACCOMPLISHED)
    finally:
        await catalog.close()
    if snapshots and not force:
        hint = "`--force` replaces it, and keeps it under another name"
        raise Refused(f"there is a catalog, whole, with {len(snapshots)} snapshots", hint=hint)


async def _answer(catalog: Catalog, found: Rebuilt) -> wire.StoreRebuilt:
    rows = {row.id: row for row in await catalog.snapshots()}
    disks = {disk.id: disk for disk in await catalog.disks(include_released=True)}
    affected = []
    for snapshot, blocks in found.affected.items():
        row = rows[snapshot]
        disk = disks[row.disk]
        affected.append(
            wire.AffectedSnapshot(
                id=snapshot, disk=disk.id, guest=disk.guest_name, target=disk.target, name=row.name, blocks=blocks
            )
        )
    return wire.StoreRebuilt(
        disks=found.disks,
        snapshots=found.snapshots,
        images=found.images,
        packs=found.packs,
        blocks=found.blocks,
        damaged_blocks=found.damaged_blocks,
        damaged=found.damaged,
        lost=[str(snapshot) for snapshot in found.lost],
        affected=affected,
        kept="",
    )
