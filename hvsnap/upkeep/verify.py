"""Reading stored blocks again: are they what was stored? A damaged one is handed out to no deduplication any more.

It heals when a capture brings the same content: that is stored under the block's id, and all that refer to it are
whole again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Damaged, FormatUnknown, NotFound, SnapshotUnknown
from hvsnap.model import BlockPlace, Pack, Snapshot, SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.identity import ManifestName
from hvsnap.store.idset import IdSet
from hvsnap.upkeep.affected import affected
from hvsnap.upkeep.sweep import Sweeper

log = logging.getLogger(__name__)

MANIFESTS_VERIFIED = "manifests-verified"

Report = Callable[[int, int], None]
"""Is told the stored bytes that were read, and those of all that is to be read."""


@dataclass(slots=True)
class Verified:
    """What a verification found.

    ``damaged`` are blocks by their ids, with the reason, ``new`` those of them that were not known to be. ``manifests``
    and ``indexes`` (of packs) were damaged, and are written anew. ``affected`` snapshots have so many damaged blocks.
    """

    packs: int = 0
    blocks: int = 0
    read_bytes: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    new: dict[int, str] = field(default_factory=dict)
    healed: int = 0
    manifests: dict[SnapshotId, str] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)
    affected: dict[SnapshotId, int] = field(default_factory=dict)


class Pace:
    """Lets bytes pass at a rate, a second's worth at once at most; 0 bytes per second is as fast as it goes."""

    def __init__(
        self,
        bytes_per_s: int,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._now = now
        self._sleep = sleep
        self._free_at = now()

    async def __call__(self, size_bytes: int) -> None:
        """Return when so many bytes may be read."""
        if self._bytes_per_s:
            now = self._now()
            self._free_at = max(self._free_at, now - 1.0) + size_bytes / self._bytes_per_s
            if self._free_at > now:
                await self._sleep(self._free_at - now)


class Verifier:
    """Verifies packs and manifests of one store."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, sweeper: Sweeper, clock: Clock) -> None:
        self._catalog = catalog
        self._store = store
        self._sweeper = sweeper
        self._clock = clock

    async def snapshots(self, rows: Sequence[Snapshot], report: Report, *, bytes_per_s: int = 0) -> Verified:
        """Read every block of these snapshots once, and their manifests; raises :class:`SnapshotUnknown`."""
        wanted = IdSet()
        for row in rows:
            async for _page, view in self._catalog.views(row.id):
                wanted.add(view)
        result = Verified()
        parts = [(pack, await self._wanted(pack, wanted)) for pack in await self._catalog.upkeep.packs()]
        parts = [(pack, places) for pack, places in parts if places]
        total = sum(place.length for _, places in parts for place in places)
        pace = Pace(bytes_per_s)
        for pack, places in parts:
            await self._check(pack, places, pace, result)
            report(result.read_bytes, total)
        for row in rows:
            await self._check_manifest(row, result)
        return await self._told(result)

    async def everything(self, report: Report) -> Verified:
        """Read all packs, those first that were not verified for longest, and all manifests."""
        result = Verified()
        await self._packs(await self._catalog.upkeep.packs(), Pace(0), result, report)
        await self._manifests(result)
        return await self._told(result)

    async def due(self, before: float, bytes_per_s: int) -> Verified:
        """Read packs and manifests that were not verified since ``before``, at a rate.

        A time that is yet to come was told by a clock that was wrong, and counts for nothing. What was read whole is
        remembered pack by pack, so that an interrupted run goes on where it was.
        """
        result = Verified()
        now = self._clock.now()
        packs = [pack for pack in await self._catalog.upkeep.packs() if not before <= (pack.verified_at or 0.0) <= now]
        await self._packs(packs, Pace(bytes_per_s), result, lambda _done, _total: None)
        if not before <= await self._catalog.upkeep.note(MANIFESTS_VERIFIED) <= now:
            await self._manifests(result)
        return await self._told(result)

    async def _packs(self, packs: Sequence[Pack], pace: Pace, result: Verified, report: Report) -> None:
        total = sum(pack.live_bytes for pack in packs)
        for pack in sorted(packs, key=lambda pack: (pack.verified_at or 0.0, pack.number)):
            await self.pack(pack, pace, result)
            report(result.read_bytes, total)

    async def _manifests(self, result: Verified) -> None:
        for row in await self._catalog.snapshots(state=State.ACCOMPLISHED):
            await self._check_manifest(row, result)
        await self._catalog.upkeep.set_note(MANIFESTS_VERIFIED, self._clock.now())

    async def pack(self, pack: Pack, pace: Pace, result: Verified) -> None:
        """Verify one pack: each live block, and its index, without which the catalog could not be rebuilt."""
        places = await self._catalog.blocks.places_of_pack(pack.number)
        damaged = await self._check(pack, places, pace, result)
        wrong = await self._store.rewriting.check_index(pack.name) if places else ""
        if wrong and not damaged:
            log.warning("%s: its blocks are moved to another pack", wrong)
            result.indexes[pack.name] = wrong
            await self._sweeper.rewrite([pack])
        elif not damaged:
            await self._catalog.upkeep.verified(pack.number, self._clock.now())

    # -- inside -----------------------------------------------------------------------------------

    async def _wanted(self, pack: Pack, wanted: IdSet) -> list[BlockPlace]:
        places = await self._catalog.blocks.places_of_pack(pack.number)
        chosen = wanted.has(np.array([place.id for place in places], np.uint64))
        return [place for place, take in zip(places, chosen, strict=True) if take]

    async def _check(self, pack: Pack, places: Sequence[BlockPlace], pace: Pace, result: Verified) -> dict[int, str]:
        """Read blocks of one pack, and write down what is damaged, and what no longer is."""
        damaged = await self._store.rewriting.check(pack.name, places, pace)
        if damaged:
            damaged = await self._still(damaged, places)
        new = await self._catalog.upkeep.mark_damaged(damaged, self._clock.now()) if damaged else {}
        healed = [place.id for place in places if place.id not in damaged and self._catalog.blocks.is_damaged(place.id)]
        if healed:
            await self._catalog.upkeep.clear_damage(healed)
        result.packs += 1
        result.blocks += len(places)
        result.read_bytes += sum(place.length for place in places)
        result.damaged |= damaged
        result.new |= new
        result.healed += len(healed)
        return damaged

    async def _still(self, damaged: dict[int, str], places: Sequence[BlockPlace]) -> dict[int, str]:
        """Return those damaged blocks that are where they were read: others were dropped, moved or healed since."""
        before = {place.id: place for place in places}
        now = {place.id: place for place in await self._catalog.blocks.present_places(sorted(damaged))}
        return {block: why for block, why in damaged.items() if now.get(block) == before[block]}

    async def _check_manifest(self, row: Snapshot, result: Verified) -> None:
        """Read a manifest to its end; one that is damaged or missing is written anew from the catalog."""
        state = await self._catalog.upkeep.manifest(row.id)
        if state is None:
            return
        name = ManifestName(row.disk, row.sequence, row.id, state.revision)
        try:
            async for _page in self._store.manifests.pages(name):
                pass
        except (Damaged, FormatUnknown, NotFound) as error:
            if await self._catalog.upkeep.manifest(row.id) != state:
                return  # written anew, or deleted, meanwhile
            log.warning("%s; it is written anew", error.message)
            result.manifests[row.id] = error.message
            with contextlib.suppress(SnapshotUnknown):
                await self._sweeper.write_manifest(row.id)

    async def _told(self, result: Verified) -> Verified:
        damaged = IdSet(result.damaged)
        result.affected = await affected(self._catalog, damaged)
        await read_again(self._catalog, damaged, result.affected)
        return result


async def read_again(catalog: Catalog, damaged: IdSet, snapshots: Collection[SnapshotId]) -> None:
    """Let the next captures read the damaged blocks of their disks' heads: what did not change since, heals them."""
    for disk in await catalog.disks():
        if disk.head not in snapshots or disk.head is None:
            continue
        async for page, view in catalog.views(disk.head):
            index = np.flatnonzero(damaged.has(view)).astype(np.uint16)
            if index.size:
                async with catalog.write() as tx:
                    await tx.add_carry(disk.id, page, index)


async def damaged_snapshots(catalog: Catalog) -> dict[SnapshotId, int]:
    """Return the snapshots that are known not to restore, with the number of their damaged blocks."""
    return await affected(catalog, IdSet(block.id for block in await catalog.upkeep.damaged()))
