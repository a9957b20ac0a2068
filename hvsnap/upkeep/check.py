"""Catalog against store, both ways, without reading a block: what each knows, and the other does not.

Cheap enough for every day (one small read for each pack). Whether blocks are whole is verification's to tell.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Damaged, FormatUnknown, NotFound
from hvsnap.model import BlockPlace, Pack, SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.idset import IdSet
from hvsnap.store.pack import EntryArray, is_pack
from hvsnap.upkeep.affected import affected
from hvsnap.upkeep.manifests import make_plan

NEWEST = 64
"""Packs and manifests that are looked for at the start: an older copy of the store lacks the newest ones."""


class Kind(enum.StrEnum):
    """What is wrong."""

    PACK_MISSING = "pack-missing"
    PACK_DAMAGED = "pack-damaged"
    PACK_DIFFERS = "pack-differs"  # it does not hold what the catalog says
    PACK_UNKNOWN = "pack-unknown"  # the next sweep removes it
    MANIFEST_MISSING = "manifest-missing"  # the next sweep writes it
    MANIFEST_UNKNOWN = "manifest-unknown"  # the next sweep removes it
    MANIFEST_PENDING = "manifest-pending"  # the next sweep writes it anew
    IMAGE_MISSING = "image-missing"  # the next sweep writes it
    IMAGE_UNKNOWN = "image-unknown"  # of a catalog that was lost, or is being removed
    BLOCK_MISSING = "block-missing"  # a snapshot refers to a block that the catalog does not know
    BLOCK_DAMAGED = "block-damaged"  # known from an earlier verification
    FIGURES_WRONG = "figures-wrong"
    OBJECT_FOREIGN = "object-foreign"


HARMLESS = {
    Kind.PACK_UNKNOWN,
    Kind.MANIFEST_UNKNOWN,
    Kind.MANIFEST_PENDING,
    Kind.IMAGE_MISSING,
    Kind.IMAGE_UNKNOWN,
    Kind.OBJECT_FOREIGN,
}
"""What an interruption leaves, and what is none of ours: no snapshot is the worse for it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing on which catalog and store do not agree."""

    kind: Kind
    subject: str
    detail: str


@dataclass(slots=True)
class Checked:
    """What was looked at, what is wrong, and which snapshots do not restore for it, with their damaged blocks."""

    packs: int = 0
    manifests: int = 0
    blocks: int = 0
    differences: list[Difference] = field(default_factory=list)
    affected: dict[SnapshotId, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong that a snapshot suffers from."""
        return not self.affected and all(one.kind in HARMLESS for one in self.differences)


class Checker:
    """Compares one catalog with one store."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, clock: Clock) -> None:
        self._catalog = catalog
        self._store = store
        self._clock = clock

    async def check(self) -> Checked:
        """Compare everything. What changes meanwhile is not taken for wrong."""
        result = Checked()
        damaged = IdSet()
        await self._packs(result, damaged)
        await self._manifests(result)
        await self._images(result)
        missing = await self._references(result)
        for block in await self._catalog.upkeep.damaged():
            result.differences.append(Difference(Kind.BLOCK_DAMAGED, f"block {block.id}", block.why))
            damaged.add(np.array([block.id], np.uint64))
        damaged.update(missing)
        result.affected = await affected(self._catalog, damaged)
        return result

    async def newest_missing(self) -> list[str]:
        """Return what is not in the store of the newest packs and manifests; some: an older copy was put back."""
        missing = []
        for pack in (await self._catalog.upkeep.packs())[-NEWEST:]:
            if pack.live_blocks and await self._store.packs.size(pack.name) is None:
                missing.append(pack.name)
        if missing or await self._catalog.snapshots(state=State.ACCOMPLISHED):
            todo = await make_plan(self._catalog, self._store)
            states = await self._catalog.upkeep.manifests()
            missing += [f"the manifest of {name}" for name in todo.write if name in states and not states[name].changes]
        return missing

    # -- inside -----------------------------------------------------------------------------------

    async def _packs(self, result: Checked, damaged: IdSet) -> None:
        listed = {item.name: item.size_bytes async for item in self._store.packs.beside()}
        under_way = self._store.intake.under_way
        packs = await self._catalog.upkeep.packs()
        at_once = self._store.packs.at_once
        for start in range(0, len(packs), at_once):
            await asyncio.gather(*(self._one(pack, result, damaged) for pack in packs[start : start + at_once]))
        known = {pack.name for pack in packs} | {pack.name for pack in await self._catalog.upkeep.packs()}
        for name, size_bytes in listed.items():
            if not is_pack(name):
                detail = f"{size_bytes} bytes; no object of a repository has such a name, and it is left alone"
                result.differences.append(Difference(Kind.OBJECT_FOREIGN, name, detail))
            elif name not in known and name not in under_way:
                detail = f"{size_bytes} bytes; the next sweep removes it"
                result.differences.append(Difference(Kind.PACK_UNKNOWN, name, detail))

    async def _one(self, pack: Pack, result: Checked, damaged: IdSet) -> None:
        """Look at one pack, beside others."""
        places = await self._catalog.blocks.places_of_pack(pack.number)
        result.packs += 1
        result.blocks += len(places)
        found = await self._pack(pack, places)
        if found is None or not await self._unchanged(pack):
            return
        result.differences.append(found)
        if found.kind in (Kind.PACK_MISSING, Kind.PACK_DIFFERS):
            damaged.add(np.array([place.id for place in places], np.uint64))
        if found.kind is Kind.PACK_MISSING:  # deduplication must not refer to it any more
            why = dict.fromkeys((place.id for place in places), found.kind.value)
            await self._catalog.upkeep.mark_damaged(why, self._clock.now())

    async def _pack(self, pack: Pack, places: Sequence[BlockPlace]) -> Difference | None:
        """Return what is wrong with one pack, if anything is."""
        if (pack.live_blocks, pack.live_bytes) != (len(places), sum(place.length for place in places)):
            detail = f"{pack.live_blocks} blocks of {pack.live_bytes} bytes are written down, {len(places)} there"
            return Difference(Kind.FIGURES_WRONG, pack.name, detail)
        if not places:
            return None  # the next sweep removes it
        try:
            index = await self._store.packs.index(pack.name)
        except NotFound:
            return Difference(Kind.PACK_MISSING, pack.name, f"{len(places)} blocks were in it")
        except (Damaged, FormatUnknown) as error:
            return Difference(Kind.PACK_DAMAGED, pack.name, error.message)
        wrong = differing(index, places)
        if wrong:
            return Difference(Kind.PACK_DIFFERS, pack.name, f"{wrong} of {len(places)} blocks are not in its index")
        return None

    async def _unchanged(self, pack: Pack) -> bool:
        """Whether a pack is still as it was when we looked: a sweep may have changed or removed it since."""
        return pack in await self._catalog.upkeep.packs()

    async def _manifests(self, result: Checked) -> None:
        states = await self._catalog.upkeep.manifests()
        todo = await make_plan(self._catalog, self._store)
        result.manifests = len(states)
        for snapshot in todo.write:
            if snapshot in states and states[snapshot].changes:
                detail = "a neighbour was deleted, or it was edited; the next sweep writes it anew"
                result.differences.append(Difference(Kind.MANIFEST_PENDING, snapshot, detail))
            else:
                detail = "the next sweep writes it"
                result.differences.append(Difference(Kind.MANIFEST_MISSING, snapshot, detail))
        for name in todo.remove:
            detail = "the next sweep removes it"
            result.differences.append(Difference(Kind.MANIFEST_UNKNOWN, str(name), detail))

    async def _images(self, result: Checked) -> None:
        """Compare images; those that come or go meanwhile are in one of the two looks at the catalog."""
        before = {image.id for image in await self._catalog.images()}
        listed = set(await self._store.images.all())
        now = {image.id for image in await self._catalog.images()}
        result.differences += [
            Difference(Kind.IMAGE_MISSING, image, "the next sweep writes its object")
            for image in sorted((before & now) - listed)
        ]
        result.differences += [
            Difference(Kind.IMAGE_UNKNOWN, image, "the catalog does not know it; `hvsnap store-rebuild` would")
            for image in sorted(listed - before - now)
        ]

    async def _references(self, result: Checked) -> IdSet:
        """Return the blocks that entries refer to, and that the catalog does not know."""
        missing = IdSet()
        async for ids in self._catalog.all_references():
            missing.add(await self._catalog.blocks.missing(ids))
        if len(missing):
            detail = f"{len(missing)} blocks that snapshots refer to are not in the catalog"
            result.differences.append(Difference(Kind.BLOCK_MISSING, "catalog", detail))
        return missing


def differing(index: EntryArray, places: Sequence[BlockPlace]) -> int:
    """Return how many blocks do not lie where the catalog says, by the index of their pack."""
    listed = {
        (int(entry["offset"]), int(entry["length"]), int(entry["flags"]), entry["digest"].tobytes()) for entry in index
    }
    return sum((place.offset, place.length, place.flags, place.digest) not in listed for place in places)
