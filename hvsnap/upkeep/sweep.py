"""Freeing space: what nothing refers to is dropped from the catalog, then its space is given back.

The order, on which everything rests (docs/locking.md, "Sweep and capture"):

1. a guard is taken: whatever is handed out to a capture from now on is live;
2. live blocks are marked as of one moment;
3. manifests are made to say what the catalog says: no manifest names a block that was dead at that moment any more;
4. such blocks are dropped from the catalog, while nobody decides on deduplication: now nobody can find them any more;
5. packs are deleted, punched or rewritten; then objects that nothing knows are removed.

A kill anywhere leaves work for the next sweep, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, Damaged, NoSpace, StoreBusy
from hvsnap.model import BlockPlace, Pack, SnapshotId
from hvsnap.ports import Clock
from hvsnap.store.blocks import PackedBlocks
from hvsnap.upkeep.live import dead_blocks, mark
from hvsnap.upkeep.manifests import make_plan, reconcile, write
from hvsnap.upkeep.plan import Fate, PackPlan, plan_pack, plan_packs

log = logging.getLogger(__name__)

REWRITTEN_AT_ONCE = 8
"""Packs whose live blocks are moved together, into few new ones."""


@dataclass(slots=True)
class Swept:
    """What a sweep did, or would do. ``freed_bytes`` are stored bytes of dropped blocks."""

    manifests: int = 0
    dropped_blocks: int = 0
    freed_bytes: int = 0
    deleted_packs: int = 0
    punched_packs: int = 0
    rewritten_packs: int = 0
    orphans: int = 0


Step = Callable[[str], Awaitable[None]]


async def no_step(_name: str) -> None:
    """Do nothing between the steps."""


class Sweeper:
    """Sweeps one store, one sweep at a time.

    ``certain`` tells whether this process is still the store's only writer: asked before anything is removed.
    ``step`` is called before each step with its name; tests stop there.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: PackedBlocks,
        clock: Clock,
        certain: Callable[[], bool] = lambda: True,
        step: Step = no_step,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._certain = certain
        self._step = step
        self._turn = asyncio.Lock()

    @property
    def sweeping(self) -> bool:
        """Whether a sweep is under way."""
        return self._turn.locked()

    async def plan(self) -> tuple[Swept, list[PackPlan]]:
        """Return what a sweep would do now, and what would become of every pack."""
        manifests = await make_plan(self._catalog, self._store)
        result = Swept(manifests=len(manifests.write) + len(manifests.remove))
        with self._store.intake.guard() as guard:
            live = await mark(self._catalog)
            live.update(guard.ids)
            loss: dict[int, tuple[int, int]] = {}
            async for dead in dead_blocks(self._catalog, live):
                result.dropped_blocks += dead.ids.size
                result.freed_bytes += int(dead.lengths.sum())
                numbers, place = np.unique(dead.packs, return_inverse=True)
                blocks = np.bincount(place, minlength=numbers.size)
                lengths = np.bincount(place, weights=dead.lengths, minlength=numbers.size)
                for number, count, length in zip(numbers.tolist(), blocks.tolist(), lengths.tolist(), strict=True):
                    before = loss.get(number, (0, 0))
                    loss[number] = (before[0] + count, before[1] + int(length))
        packs = plan_packs(await self._catalog.upkeep.packs(), loss, can_punch=self._store.rewriting.can_punch)
        fates = [one.fate for one in packs]
        result.deleted_packs = fates.count(Fate.DELETE)
        result.punched_packs = fates.count(Fate.PUNCH)
        result.rewritten_packs = fates.count(Fate.REWRITE)
        result.orphans = len(await self._orphans())
        return result, packs

    async def sweep(self) -> Swept:
        """Free what nothing refers to. Raises what the store and the catalog raise; what was done stays done."""
        async with self._turn:
            result = Swept()
            await self._drop(result)
            await self._catalog.upkeep.tidy()
            await self._packs(result)
            await self._may_remove("orphans")
            for name in await self._orphans():
                self._require_certain()
                await self._store.packs.delete(name)
                result.orphans += 1
            await self._step("end")
            return result

    # -- blocks -----------------------------------------------------------------------------------

    async def _drop(self, result: Swept) -> None:
        await self._step("guard")
        with self._store.intake.guard() as guard:
            await self._step("mark")
            live = await mark(self._catalog)
            await self._may_remove("manifests")
            if not await self._reconcile(result):
                return
            await self._step("drop")
            async for dead in dead_blocks(self._catalog, live):
                await self._may_remove("dropping")
                async with self._store.intake.nobody_deciding():
                    doomed = dead.ids[~guard.ids.has(dead.ids)]
                    result.freed_bytes += await self._catalog.upkeep.drop(doomed)
                    result.dropped_blocks += doomed.size

    async def _reconcile(self, result: Swept) -> bool:
        """Let the manifests say what the catalog says; return whether blocks may be dropped now."""
        try:
            result.manifests, complete = await reconcile(self._catalog, self._store, self._require_certain)
        except NoSpace as error:
            # Manifests of deleted snapshots stay and name blocks that are dropped now: a rebuild would find these
            # snapshots again, and damaged. That is better than a full store which can only be thrown away.
            log.warning("manifests cannot be written anew before space is freed: %s", error.message)
            return True
        if not complete:
            log.info("blocks are dropped another time: snapshots were deleted while manifests were written")
        return complete

    # -- packs ------------------------------------------------------------------------------------

    async def _packs(self, result: Swept) -> None:
        to_rewrite: list[Pack] = []
        for pack in await self._catalog.upkeep.packs():
            todo = plan_pack(pack, 0, 0, can_punch=self._store.rewriting.can_punch)
            if todo.fate is Fate.KEEP and not pack.to_sweep:
                continue
            await self._may_remove("pack")
            await self._check_live(pack)
            if todo.fate is Fate.PUNCH and not await self._punch(pack):
                todo = plan_pack(pack, 0, 0, can_punch=False)
            match todo.fate:
                case Fate.DELETE:
                    await self._delete(pack)
                    result.deleted_packs += 1
                case Fate.PUNCH:
                    await self._catalog.upkeep.swept(pack)
                    result.punched_packs += 1
                case Fate.REWRITE:
                    to_rewrite.append(pack)
                case Fate.KEEP:
                    await self._catalog.upkeep.swept(pack)
        for start in range(0, len(to_rewrite), REWRITTEN_AT_ONCE):
            try:
                result.rewritten_packs += await self._rewrite(to_rewrite[start : start + REWRITTEN_AT_ONCE])
            except NoSpace as error:
                log.warning("packs are rewritten another time: %s", error.message)
                break

    async def _check_live(self, pack: Pack) -> list[BlockPlace]:
        """Return the blocks that lie in a pack, once two tables agree on how many there are.

        SQLite has no checksums. A flipped bit in one of them must not cost a pack that is needed.
        """
        places = await self._catalog.blocks.places_of_pack(pack.number)
        if len(places) == pack.live_blocks:
            return places
        now = {one.number: one.live_blocks for one in await self._catalog.upkeep.packs()}  # or a capture has healed one
        if now.get(pack.number) != len(places):
            what = f"{pack.name} holds {len(places)} blocks by one table of the catalog, {pack.live_blocks} by another"
            hint = "nothing of it is removed; `hvsnap store-rebuild --force` makes a new catalog"
            raise CatalogFailed(f"the catalog is damaged: {what}", hint=hint)
        return places

    async def _punch(self, pack: Pack) -> bool:
        try:
            places = await self._catalog.blocks.places_of_pack(pack.number)
            return await self._store.rewriting.punch(pack.name, places)
        except Damaged as error:
            # Where its index begins is not known: verification says so, too, and rewrites what can be read.
            log.warning("no space is given back in %s: %s", pack.name, error.message)
            return True

    async def _delete(self, pack: Pack) -> None:
        await self._step("delete pack")
        await self._store.packs.delete(pack.name)
        await self._step("forget pack")
        await self._catalog.upkeep.forget_pack(pack.number)

    async def rewrite(self, packs: Sequence[Pack]) -> int:
        """Move the live blocks of packs into new ones, between two sweeps; see :meth:`_rewrite`."""
        async with self._turn:
            return await self._rewrite(packs)

    async def write_manifest(self, snapshot: SnapshotId) -> None:
        """Write a manifest anew, between two sweeps. Raises :class:`SnapshotUnknown`."""
        async with self._turn:
            await write(self._catalog, self._store, snapshot)

    async def _rewrite(self, packs: Sequence[Pack]) -> int:
        """Move the live blocks of packs into new ones and delete them; return how many were.

        A pack with a damaged block stays: what is left of it may be of use to somebody.
        """
        old: list[tuple[str, list[BlockPlace]]] = []
        for pack in packs:
            old.append((pack.name, await self._check_live(pack)))
        mover = self._catalog.upkeep.mover([place for _, places in old for place in places])
        await self._step("rewrite")
        damaged = await self._store.rewriting.rewrite(old, mover)
        if damaged:
            await self._catalog.upkeep.mark_damaged(damaged, self._clock.now())
        rewritten = 0
        numbers = {pack.number for pack in packs}
        for pack in await self._catalog.upkeep.packs():
            if pack.number in numbers:
                await self._may_remove("rewritten")
                if pack.live_blocks:
                    await self._catalog.upkeep.swept(pack)
                else:
                    await self._delete(pack)
                    rewritten += 1
        return rewritten

    async def _orphans(self) -> list[str]:
        """Return packs that neither the catalog nor anybody who is writing knows."""
        listed = [item.name async for item in self._store.packs.list()]
        # In this order: a pack that was listed while it was on its way into the catalog is there once it has left it.
        under_way = self._store.intake.under_way
        known = {pack.name for pack in await self._catalog.upkeep.packs()}
        orphans = [name for name in listed if name not in under_way and name not in known]
        if orphans:
            await self._catalog.upkeep.check_packs()
        lost = known - set(listed)
        if orphans and lost:
            # Perhaps it is that one, and the catalog has its name wrong: SQLite has no checksums.
            log.warning("packs that nothing knows are left alone, since others are missing: %s", min(lost))
            return []
        return orphans

    async def _may_remove(self, step: str) -> None:
        await self._step(step)
        self._require_certain()

    def _require_certain(self) -> None:
        if not self._certain():
            hint = "nothing more is removed until it is certain; another daemon may have taken the store over"
            raise StoreBusy("this daemon may no longer be the store's only writer", hint=hint)
