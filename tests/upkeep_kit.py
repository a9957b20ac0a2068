"""Disks that are captured into a real catalog and a real store, without a guest; and looks at both.

:class:`Disks` holds the bytes that every snapshot must restore to: the oracle. :func:`from_the_store_alone` restores
all snapshots from packs and manifests, without the catalog.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Damaged
from hvsnap.model import PAGE_BLOCKS, BlockPlace, Disk, Snapshot, SnapshotId, State
from hvsnap.ports import ObjectStore
from hvsnap.store.blocks import PackedBlocks, Session, open_store
from hvsnap.store.identity import ManifestHead, ManifestName
from hvsnap.store.manifest import ManifestPage
from hvsnap.upkeep.sweep import Sweeper
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot
from tests.store_kit import BLOCK, MemoryObjects

Contents = dict[int, bytes]
"""Block number to content; blocks that are not there are zeroes."""


class PunchedObjects(MemoryObjects):
    """Objects in memory that holes can be punched into."""

    def __init__(self) -> None:
        super().__init__()
        self.holes: dict[str, list[tuple[int, int]]] = {}

    async def punch(self, name: str, holes: Sequence[tuple[int, int]]) -> bool:
        data = bytearray(await self.get(name))
        for start, length in holes:
            assert 0 < length <= len(data) - start
            data[start : start + length] = bytes(length)
        self.objects[name] = bytes(data)
        self.holes[name] = list(holes)
        return True


class Killed(BaseException):
    """Stands for kill -9: nothing handles it."""


class Fuse:
    """Kills at the n-th change of store or catalog: before it, or right after it. ``left`` < 0: never."""

    def __init__(self) -> None:
        self.left = -1
        self.after = False
        self.blown = False

    def set(self, left: int, *, after: bool) -> None:
        self.left, self.after = left, after

    def begin(self) -> None:
        if self.blown or (self.left == 0 and not self.after):
            self.blown = True  # and whoever lives on changes nothing any more
            raise Killed

    def end(self) -> None:
        if self.left == 0:
            self.blown = True
            raise Killed
        self.left -= 1


class FusedObjects(PunchedObjects):
    """Objects whose changes a fuse counts."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = Fuse()

    async def punch(self, name: str, holes: Sequence[tuple[int, int]]) -> bool:
        self.fuse.begin()
        done = await super().punch(name, holes)
        self.fuse.end()
        return done

    async def delete(self, name: str) -> None:
        self.fuse.begin()
        await super().delete(name)
        self.fuse.end()

    def appear(self, name: str, data: bytes) -> None:
        self.fuse.begin()
        super().appear(name, data)
        self.fuse.end()


class House:
    """Catalog and store, open."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, objects: ObjectStore) -> None:
        self.catalog = catalog
        self.store = store
        self.objects = objects
        self.clock = StoppedClock()
        self.sweeper = Sweeper(catalog, store, self.clock)

    @classmethod
    async def open(cls, state_dir: Path, objects: ObjectStore, fuse: Fuse | None = None) -> House:
        catalog = await Catalog.open(state_dir, StoppedClock())
        if fuse is not None:
            commit = catalog._db._commit

            async def fused(cursor: object) -> None:
                fuse.begin()
                await commit(cursor)  # type: ignore[arg-type]
                fuse.end()

            catalog._db._commit = fused  # type: ignore[method-assign]
        return cls(catalog, await open_store(objects, catalog), objects)

    async def restart(self, state_dir: Path) -> None:
        """Close both and open them again, as the next daemon does."""
        await self.close()
        again = await House.open(state_dir, self.objects)
        self.catalog, self.store, self.sweeper = again.catalog, again.store, again.sweeper

    async def close(self) -> None:
        await self.store.close()
        await self.catalog.close()


@asynccontextmanager
async def a_house(state_dir: Path, objects: ObjectStore) -> AsyncIterator[House]:
    house = await House.open(state_dir, objects)
    try:
        yield house
    finally:
        await house.close()


class Disks:
    """Disks with their present contents, and the bytes of every snapshot that was made of them."""

    def __init__(self) -> None:
        self.content: dict[str, Contents] = {}
        self.disks: dict[str, Disk] = {}
        self.expected: dict[SnapshotId, Contents] = {}

    async def add(self, house: House, name: str, size_blocks: int = 3 * PAGE_BLOCKS) -> None:
        disk = a_disk(target=name, source=f"/images/{name}", size_bytes=size_blocks * BLOCK)
        self.disks[name] = disk
        self.content[name] = {}
        async with house.catalog.write() as tx:
            await tx.add_disk(disk)

    def write(self, name: str, block: int, content: bytes) -> None:
        """Write a block; one of zeroes is trimmed."""
        if any(content):
            self.content[name][block] = content
        else:
            self.content[name].pop(block, None)

    async def take(self, house: House, name: str, /, **fields: Any) -> SnapshotId:
        """Make a snapshot in the order in which captures do it; ``fields`` are its own."""
        taking = await Taking.begin(house, self, name, **fields)
        await taking.put()
        await taking.stage()
        return await taking.accomplish()

    async def delete(self, house: House, *snapshots: SnapshotId) -> None:
        async with house.catalog.write() as tx:
            for snapshot in snapshots:
                await tx.delete_snapshot(snapshot)
                self.expected.pop(snapshot, None)

    async def roll_back(self, house: House, name: str, snapshot: SnapshotId) -> None:
        self.content[name] = dict(self.expected[snapshot])
        async with house.catalog.write() as tx:
            await tx.update_disk(self.disks[name].id, head=snapshot)
            await tx.clear_carry(self.disks[name].id)

    async def check(self, house: House) -> None:
        """Every snapshot restores byte for byte: by the catalog, and from the store alone."""
        await self.check_by_catalog(house)
        alone = await from_the_store_alone(house.objects, house.store)
        assert {name: alone.get(name) for name in self.expected} == self.expected

    async def check_by_catalog(self, house: House) -> None:
        """Every snapshot, and no other, restores byte for byte by the catalog."""
        rows = await house.catalog.snapshots(state=State.ACCOMPLISHED)
        assert {row.id for row in rows} == set(self.expected)
        for snapshot, content in self.expected.items():
            assert await restored(house, snapshot) == content


class Taking:
    """A capture, step by step: all dirty or not, every block is read, as a rescan does."""

    snapshot: Snapshot

    def __init__(self, house: House, disks: Disks, name: str, session: Session) -> None:
        self.house = house
        self.disks = disks
        self.disk = disks.disks[name]
        self.content = dict(disks.content[name])
        self.session = session
        self.ids: dict[int, int] = {}

    @classmethod
    async def begin(cls, house: House, disks: Disks, name: str, /, **fields: Any) -> Taking:
        taking = cls(house, disks, name, house.store.session())
        head = (await house.catalog.disk(taking.disk.id)).head
        async with house.catalog.write() as tx:
            sequence = await tx.next_sequence(taking.disk.id)
            told = {"size_bytes": taking.disk.size_bytes, "skew_ms": sequence / 8}
            taking.snapshot = a_snapshot(taking.disk.id, sequence, head, state=State.PROGRESSING, **told, **fields)
            await tx.add_snapshot(taking.snapshot)
        return taking

    async def put(self) -> None:
        numbers = sorted(self.content)
        stored = await self.session.put(memoryview(b"".join(self.content[number] for number in numbers)))
        self.ids = dict(zip(numbers, stored.ids.tolist(), strict=True))
        await self.session.flush()

    async def stage(self) -> None:
        catalog, parent = self.house.catalog, self.snapshot.parent
        for page in range(-(-self.disk.size_bytes // BLOCK // PAGE_BLOCKS)):
            before = chain.blank() if parent is None else await catalog.view(parent, page)
            now = chain.blank()
            for block, number in self.ids.items():
                if block // PAGE_BLOCKS == page:
                    now[block % PAGE_BLOCKS] = number
            index = chain.difference(before, now)
            if index.size:
                async with catalog.write() as tx:
                    await tx.put_page(self.snapshot.id, page, chain.Page(index, now[index]))

    async def accomplish(self) -> SnapshotId:
        house, snapshot = self.house, replace(self.snapshot, state=State.ACCOMPLISHED)

        async def pages() -> AsyncIterator[ManifestPage]:
            async for number, entries in house.catalog.own_pages(snapshot.id):
                yield ManifestPage(number, entries.index, await house.store.digests(entries.block))

        await house.store.manifests.put(ManifestHead(snapshot, self.disk, BLOCK, "<domain/>"), pages())
        async with house.catalog.write() as tx:
            await tx.update_snapshot(snapshot.id, state=State.ACCOMPLISHED)
            await tx.update_disk(self.disk.id, head=snapshot.id)
            await tx.clear_carry(self.disk.id)
        self.disks.expected[snapshot.id] = self.content
        return snapshot.id

    async def fail(self) -> None:
        async with self.house.catalog.write() as tx:
            await tx.drop_pages(self.snapshot.id)
            await tx.update_snapshot(self.snapshot.id, state=State.FAILED)


async def restored(house: House, snapshot: SnapshotId) -> Contents:
    """Restore a snapshot by the catalog."""
    content: Contents = {}
    async for page, view in house.catalog.views(snapshot):
        index = np.flatnonzero(view)
        ids = view[index].tolist()
        async for position, block in house.store.get(ids):
            content[page * PAGE_BLOCKS + int(index[position])] = block
    return content


async def referred_bytes(house: House) -> int:
    """Return the stored bytes of all blocks that any entry refers to: the algebra's sum, counted one by one."""
    ids: set[int] = set()
    async for _snapshot, _page, entries in house.catalog.all_entries():
        ids.update(entries.block.tolist())
    return sum(place.length for place in await house.catalog.places(sorted(ids - {0})))


async def live_bytes(house: House) -> int:
    """Return the stored bytes that the catalog says are live in all packs."""
    return sum(pack.live_bytes for pack in await house.catalog.upkeep.packs())


async def from_the_store_alone(objects: ObjectStore, store: PackedBlocks) -> dict[SnapshotId, Contents]:
    """Restore every snapshot whose manifest is in the store, from manifests and packs only.

    A digest that several packs list is taken from any pack where it is whole. Blocks that are nowhere are left out of a
    snapshot's contents: whoever compares will see it.
    """
    blocks = await _readable(objects, store)
    names: dict[SnapshotId, ManifestName] = {}
    async for name in store.manifests.names():
        names[name.snapshot] = name
    own: dict[SnapshotId, dict[int, bytes]] = {}
    parents: dict[SnapshotId, SnapshotId | None] = {}
    for snapshot, name in names.items():
        parents[snapshot] = (await store.manifests.head(name)).snapshot.parent
        own[snapshot] = {}
        async for page in store.manifests.pages(name):
            for index, digest in zip(page.index.tolist(), page.digests, strict=True):
                own[snapshot][page.number * PAGE_BLOCKS + index] = digest.tobytes()
    found: dict[SnapshotId, Contents] = {}
    for snapshot in names:
        digests: dict[int, bytes] = {}
        lineage: list[SnapshotId] = []
        at: SnapshotId | None = snapshot
        while at is not None:
            lineage.append(at)
            at = parents[at]  # a manifest whose parent's is missing is an error of the product
        for one in reversed(lineage):
            digests |= own[one]
        found[snapshot] = {
            number: blocks[digest] for number, digest in digests.items() if any(digest) and digest in blocks
        }
    return found


async def _readable(objects: ObjectStore, store: PackedBlocks) -> dict[bytes, bytes]:
    """Return every block that any pack lists and holds, by its digest."""
    blocks: dict[bytes, bytes] = {}
    for item in [item async for item in store.packs.list()]:
        data = memoryview(await objects.get(item.name))
        for entry in await store.packs.index(item.name):
            place = BlockPlace(
                1,
                entry["digest"].tobytes(),
                item.name,
                int(entry["offset"]),
                int(entry["length"]),
                int(entry["flags"]),
            )
            try:
                (block,) = await asyncio.to_thread(store._fetcher._codec.restore, data, 0, [place])
            except Damaged:
                continue
            blocks[place.digest] = block
    return blocks
