"""A new catalog from the store alone: from its manifests, and from the indexes of its packs.

Every block that a manifest names is read and verified on the way: an index tells where a block *was*, and a hole or a
damaged block that entered the catalog as whole would be handed out to deduplication. What is damaged costs nothing
else: its blocks enter the catalog as damaged, and heal as any other when a capture brings the same content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hvsnap.alarm import Change
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.chain import Page
from hvsnap.errors import Damaged, FormatUnknown, NotFound
from hvsnap.model import BlockPlace, Disk, DiskId, ManifestState, SnapshotId
from hvsnap.ports import Clock, ObjectInfo, UInt64Array
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.identity import ManifestHead, ManifestName
from hvsnap.store.idset import IdSet
from hvsnap.store.manifest import ManifestPage
from hvsnap.store.pack import HEADER_BYTES, EntryArray, PackId
from hvsnap.upkeep.affected import affected
from hvsnap.upkeep.settings import bring_back

PAGES_AT_ONCE = 8
"""Pages of a manifest that enter the catalog in one transaction: 32,768 entries at most."""

UNREADABLE = (Damaged, FormatUnknown, NotFound)


@dataclass(slots=True)
class Rebuilt:
    """What was found in the store. ``damaged`` says in words what could not be used, and why.

    ``lost`` are snapshots that are not in the catalog, since their manifest, or one that they build on, cannot be read;
    ``affected`` are in it and do not restore: the number of their blocks that are damaged or missing.
    """

    disks: int = 0
    snapshots: int = 0
    packs: int = 0
    blocks: int = 0
    images: int = 0
    damaged_blocks: int = 0
    damaged: list[str] = field(default_factory=list)
    lost: list[SnapshotId] = field(default_factory=list)
    affected: dict[SnapshotId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Found:
    """A manifest that was read to its end; ``newest``: no revision of it is above."""

    name: ManifestName
    head: ManifestHead
    newest: bool


class Rebuild:
    """Fills an empty catalog from a store. Used once.

    ``thorough``: every block is read. Else, of a store that is only read, those alone that several packs list: which of
    them has it is not told by an index. All others are verified as they are restored, and nothing else uses them.
    """

    def __init__(self, catalog: Catalog, store: PackedBlocks, clock: Clock, *, thorough: bool = True) -> None:
        self._thorough = thorough
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._found: dict[SnapshotId, _Found] = {}
        self._sequences: dict[DiskId, int] = {}
        self._wanted: list[UInt64Array] = []
        self._next_id = 1
        self._result = Rebuilt()

    async def run(self) -> Rebuilt:
        """Fill the catalog, and return what was found. Raises what the store and the catalog raise."""
        await self._read_manifests()
        await self._read_packs()
        await self._enter_disks()
        for one in self._found.values():
            await self._enter_pages(one)
        await self._enter_heads()
        await self._enter_changes()
        await self._enter_images()
        try:
            await bring_back(self._catalog, self._store)
        except UNREADABLE as error:
            self._result.damaged.append(f"{error.message}; policies, and what is set for disks, have to be set again")
        await self._catalog.upkeep.to_sweep()
        return await self._told()

    # -- manifests --------------------------------------------------------------------------------

    async def _read_manifests(self) -> None:
        """Read all manifests to their ends, and choose the revisions that count."""
        revisions: dict[tuple[DiskId, int, SnapshotId], list[ManifestName]] = {}
        async for name in self._store.manifests.all():
            revisions.setdefault((name.disk, name.sequence, name.snapshot), []).append(name)
            self._sequences[name.disk] = max(name.sequence, self._sequences.get(name.disk, 0))
        numbers: set[tuple[DiskId, int]] = set()
        for (disk, sequence, snapshot), names in sorted(revisions.items()):  # parents come before their children
            found = await self._choose(sorted(names, key=lambda name: -name.revision))
            if found is None or (disk, sequence) in numbers or snapshot in self._found:
                self._result.lost.append(snapshot)
                continue
            numbers.add((disk, sequence))
            self._found[snapshot] = found

    async def _choose(self, names: Sequence[ManifestName]) -> _Found | None:
        """Return the highest revision that can be used.

        An older one tells the truth as long as its parent's manifest is there: that holds what has moved since
        (docs/format.md, "Manifest").
        """
        for name in names:
            try:
                head, wanted = await self._look(name)
            except UNREADABLE as error:
                self._result.damaged.append(error.message)
                continue
            parent = head.snapshot.parent
            if parent is not None and (parent not in self._found or self._found[parent].name.disk != name.disk):
                self._result.damaged.append(f"{name} builds on {parent}, whose manifest is missing or damaged")
                continue
            self._wanted.append(wanted)
            return _Found(name, replace(head, domain_xml=""), newest=name is names[0])
        return None

    async def _look(self, name: ManifestName) -> tuple[ManifestHead, UInt64Array]:
        """Read a manifest to its end; return its head, and the beginnings of the digests that it names."""
        head = await self._store.manifests.head(name)
        parts = [np.zeros(0, np.uint64)]
        async for page in self._store.manifests.pages(name):
            parts.append(_beginnings(page.digests))
        return head, np.unique(np.concatenate(parts))

    # -- packs ------------------------------------------------------------------------------------

    async def _read_packs(self) -> None:
        wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._wanted]))
        self._wanted.clear()
        whole: set[str] = set()
        async for item in self._store.packs.list():
            try:
                index = await self._store.packs.index(item.name)
            except UNREADABLE as error:
                self._result.damaged.append(error.message)
                continue
            if await self._enter_pack(item, index[np.isin(_beginnings(index["digest"]), wanted)]):
                whole.add(item.name)
        for pack in await self._catalog.upkeep.packs():
            if pack.name in whole:
                await self._catalog.upkeep.verified(pack.number, self._clock.now())

    async def _enter_pack(self, item: ObjectInfo, index: EntryArray) -> bool:
        """Enter what is needed of a pack; return whether all of that is whole. A whole copy wins over a damaged one."""
        listed = {place.digest: place for place in self._places(item.name, index)}
        if not self._thorough:
            await self._doubt(list(listed))
        known = await self._catalog.find(list(listed))
        hurt = await self._catalog.damaged(list(listed))
        checked = [place for digest, place in listed.items() if self._thorough or digest in hurt]
        bad = await self._store.rewriting.check(item.name, checked)
        entered: list[BlockPlace] = []
        damaged: dict[int, str] = {}
        for digest, place in listed.items():
            if digest in known or (digest in hurt and place.id in bad):
                continue
            if place.id in bad:
                damaged[place.id] = bad[place.id]
            entered.append(replace(place, id=hurt.get(digest, place.id)))
        if entered:
            await self._catalog.add_pack(item.name, item.size_bytes, entered)
            await self._catalog.upkeep.mark_damaged(damaged, self._clock.now())
        return self._thorough and not bad

    async def _doubt(self, digests: list[bytes]) -> None:
        """Verify those of the blocks that an earlier pack listed, too."""
        known = await self._catalog.find(digests)
        packs: dict[str, list[BlockPlace]] = {}
        for place in await self._catalog.places(list(known.values())):
            packs.setdefault(place.pack, []).append(place)
        for pack, places in packs.items():
            bad = await self._store.rewriting.check(pack, places)
            await self._catalog.upkeep.mark_damaged(bad, self._clock.now())

    def _places(self, pack: str, index: EntryArray) -> list[BlockPlace]:
        """Return the entries of an index as places with new ids."""
        first = self._next_id
        self._next_id += index.size
        return [
            BlockPlace(
                block, entry["digest"].tobytes(), pack, int(entry["offset"]), int(entry["length"]), int(entry["flags"])
            )
            for block, entry in enumerate(index, first)
        ]

    # -- the catalog ------------------------------------------------------------------------------

    async def _enter_disks(self) -> None:
        """Enter disks and snapshots: a disk as its newest snapshot knew it."""
        newest: dict[DiskId, ManifestHead] = {one.name.disk: one.head for one in self._found.values()}
        identities: set[tuple[str, str, str]] = set()
        for head in sorted(newest.values(), key=lambda head: -head.snapshot.created_at):
            identity = identity_of(head.disk)
            # Another disk of the same guest, place and image came after it: so this one had been released.
            disk = replace(head.disk, size_bytes=head.snapshot.size_bytes, released=identity in identities)
            identities.add(identity)
            async with self._catalog.write() as tx:
                await tx.add_disk(disk)
                await tx.set_sequence(disk.id, self._sequences[disk.id])
        for one in self._found.values():
            snapshot = replace(one.head.snapshot, accomplished_at=one.head.snapshot.created_at)
            async with self._catalog.write() as tx:
                await tx.add_snapshot(snapshot)
                if not one.newest:
                    await tx.update_snapshot(snapshot.id, name=snapshot.name)  # written anew by the next sweep
            state = ManifestState(snapshot.id, 0, 0)
            await self._catalog.upkeep.manifest_written(state, one.name.revision)
        self._result.disks, self._result.snapshots = len(newest), len(self._found)

    async def _enter_pages(self, one: _Found) -> None:
        """Enter what a snapshot changed."""
        pages: list[ManifestPage] = []
        async for page in self._store.manifests.pages(one.name):
            pages.append(page)
            if len(pages) == PAGES_AT_ONCE:
                await self._put(one, pages)
                pages.clear()
        if pages:
            await self._put(one, pages)
        async with self._catalog.write() as tx:
            await tx.sum_up(one.name.snapshot)

    async def _put(self, one: _Found, pages: Sequence[ManifestPage]) -> None:
        ids = await self._ids({digest.tobytes() for page in pages for digest in page.digests})
        async with self._catalog.write() as tx:
            for page in pages:
                block = np.array([ids[digest.tobytes()] for digest in page.digests], np.uint64)
                await tx.put_page(one.name.snapshot, page.number, Page(page.index, block))

    async def _ids(self, digests: set[bytes]) -> dict[bytes, int]:
        """Return the ids of blocks; those that no pack lists are entered as damaged."""
        zero = bytes(32)
        listed = list(digests - {zero})
        ids = {zero: 0} | await self._catalog.find(listed) | await self._catalog.damaged(listed)
        missing = [digest for digest in listed if digest not in ids]
        if missing:
            pack = PackId.new(self._store.repository.id, self._store.block_size).name
            places = [BlockPlace(self._next_id + at, one, pack, HEADER_BYTES, 1, 0) for at, one in enumerate(missing)]
            self._next_id += len(places)
            await self._catalog.add_pack(pack, 0, places)
            reason = "no readable pack of the store lists it"
            await self._catalog.upkeep.mark_damaged(
                dict.fromkeys((one.id for one in places), reason), self._clock.now()
            )
            ids |= {place.digest: place.id for place in places}
        return ids

    async def _enter_heads(self) -> None:
        """Let each disk continue from its newest snapshot, without a bitmap: the next capture compares all of it."""
        heads = {one.name.disk: one.name.snapshot for one in self._found.values()}
        async with self._catalog.write() as tx:
            for disk, snapshot in heads.items():
                await tx.update_disk(disk, head=snapshot)

    async def _enter_changes(self) -> None:
        """Enter how much each disk has changed up to now, so that it is still known what is usual for it."""
        async with self._catalog.write() as tx:
            for one in sorted(self._found.values(), key=lambda one: one.head.snapshot.created_at):
                snapshot = one.head.snapshot
                parent = self._found.get(snapshot.parent) if snapshot.parent is not None else None
                before = parent.head.snapshot.created_at if parent is not None else None
                change = Change.since(before, snapshot.created_at, snapshot.changed_bytes, snapshot.stored_bytes)
                await tx.add_change(one.name.disk, change)

    async def _enter_images(self) -> None:
        """Enter the images whose snapshots were found; of two with one name the later one gets its id behind it."""
        names: set[str] = set()
        images = []
        for name in await self._store.images.all():
            try:
                images.append(await self._store.images.get(name))
            except UNREADABLE as error:
                self._result.damaged.append(error.message)
        for image in sorted(images, key=lambda image: (image.created_at, image.id)):
            if image.snapshot not in self._found:
                self._result.damaged.append(f"image {image.id} is of snapshot {image.snapshot}, which is not there")
                continue
            # Two have one name only where the removal of the first one's object was interrupted.
            shown = replace(image, name=f"{image.name} {image.id}") if image.name in names else image
            names.add(shown.name)
            async with self._catalog.write() as tx:
                await tx.add_image(shown)
            self._result.images += 1

    async def _told(self) -> Rebuilt:
        result = self._result
        packs = await self._catalog.upkeep.packs()
        result.packs, result.blocks = len(packs), sum(pack.live_blocks for pack in packs)
        damaged = [block.id for block in await self._catalog.upkeep.damaged()]
        result.damaged_blocks = len(damaged)
        result.affected = await affected(self._catalog, IdSet(np.array(damaged, np.uint64)))
        return result


def identity_of(disk: Disk) -> tuple[str, str, str]:
    """Return what makes a disk the same disk: guest, serial (or target, if it has none), image."""
    return disk.guest_uuid, f"serial {disk.serial}" if disk.serial else f"target {disk.target}", disk.source


def _beginnings(digests: npt.NDArray[np.uint8]) -> UInt64Array:
    """Return the first 8 bytes of each digest, ``uint64[n]``: a chance of 1 in 10^12 to keep a block too many."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)
