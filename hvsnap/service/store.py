"""The store as its owner sees it: what it holds, whether it is sound, what can be freed (SERVICE 9, 12)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hvsnap import wire
from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.drill import Outcome
from hvsnap.errors import BadRequest, Refused
from hvsnap.model import SnapshotId, State
from hvsnap.service.housekeeping import Housekeeping
from hvsnap.service.sampling import device_space
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.views import drill, when, when_or_none
from hvsnap.store.blocks import PackedBlocks
from hvsnap.upkeep.check import HARMLESS
from hvsnap.upkeep.plan import Fate
from hvsnap.upkeep.verify import Verified, damaged_snapshots

KIND_VERIFY = "snapshot-verify"
KIND_CHECK = "store-check"
KIND_COMPACT = "store-compact"

TOLD_MAX = 1000
"""Damaged blocks, differences and packs that an answer lists."""


class Store:
    """Shows, checks, verifies and compacts the store. ``directory`` is where a local one is."""

    def __init__(
        self,
        catalog: Catalog,
        store: PackedBlocks,
        snapshots: Snapshots,
        tasks: Tasks,
        housekeeping: Housekeeping,
        *,
        url: str,
        directory: Path | None,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._snapshots = snapshots
        self._tasks = tasks
        self._housekeeping = housekeeping
        self._url = url
        self._directory = directory

    async def info(self) -> wire.StoreInfo:
        """Return the store at a glance, by the catalog's figures."""
        packs = await self._catalog.upkeep.packs()
        verified = [pack.verified_at for pack in packs if pack.verified_at is not None]
        drills = (await self._catalog.drills.newest()).values()
        free, total = (0, 0) if self._directory is None else await asyncio.to_thread(device_space, self._directory)
        return wire.StoreInfo(
            url=self._url,
            repository=self._store.repository.id.hex(),
            block_size=self._store.block_size,
            packs=len(packs),
            size_bytes=sum(pack.size_bytes for pack in packs),
            live_bytes=sum(pack.live_bytes for pack in packs),
            live_blocks=sum(pack.live_blocks for pack in packs),
            snapshots=len(await self._catalog.snapshots(state=State.ACCOMPLISHED)),
            free_bytes=free if total else None,
            total_bytes=total or None,
            sweeping=self._housekeeping.sweeper.sweeping,
            swept_at=when_or_none(self._housekeeping.swept_at),
            damaged_blocks=len(await self._catalog.upkeep.damaged()),
            affected=await self._affected(await damaged_snapshots(self._catalog)),
            unverified_packs=len(packs) - len(verified),
            verified_since=when(min(verified)) if verified else None,
            drill=drill(max(drills, key=lambda one: one.began_at, default=None)),
            drills_failed=sum(one.outcome is not Outcome.PASSED for one in drills),
        )

    def check(self) -> TaskView:
        """Start comparing catalog and store, both ways."""

        async def work(run: TaskRun) -> wire.StoreChecked:
            run.step("comparing catalog and store")
            found = await self._housekeeping.checker.check()
            differences = [
                wire.StoreDifference(
                    kind=one.kind, subject=one.subject, detail=one.detail, harmless=one.kind in HARMLESS
                )
                for one in found.differences
            ]
            return wire.StoreChecked(
                sound=found.sound,
                packs=found.packs,
                manifests=found.manifests,
                blocks=found.blocks,
                difference_count=len(differences),
                differences=differences[:TOLD_MAX],
                affected=await self._affected(found.affected),
            )

        return self._tasks.start(KIND_CHECK, self._url, work)

    def compact(self, *, dry_run: bool) -> TaskView:
        """Start freeing what no snapshot refers to, or telling what that would do."""

        async def work(run: TaskRun) -> wire.StoreCompacted:
            run.step("looking for what nothing refers to")
            if dry_run:
                done, packs = await self._housekeeping.sweeper.plan()
            else:
                done, packs = await self._housekeeping.sweep(), []
            return wire.StoreCompacted(
                dry_run=dry_run,
                dropped_blocks=done.dropped_blocks,
                freed_bytes=done.freed_bytes,
                deleted_packs=done.deleted_packs,
                punched_packs=done.punched_packs,
                rewritten_packs=done.rewritten_packs,
                orphans=done.orphans,
                manifests=done.manifests,
                packs=[
                    wire.PackFate(
                        pack=one.pack.name,
                        fate=one.fate,
                        size_bytes=one.pack.size_bytes,
                        live_bytes=one.live_bytes,
                    )
                    for one in packs
                    if one.fate is not Fate.KEEP
                ][:TOLD_MAX],
            )

        return self._tasks.start(KIND_COMPACT, self._url, work)

    async def verify(self, ids: Sequence[str], *, everything: bool) -> TaskView:
        """Start reading every block of some snapshots, or of all that is stored.

        Raises :class:`BadRequest` unless one of both is asked for, :class:`SnapshotUnknown`, and :class:`Refused` for
        a snapshot that is not accomplished.
        """
        if bool(ids) == everything:
            raise BadRequest("which snapshots?", hint="name some, or ask for all")
        rows = [await self._snapshots.row(name) for name in dict.fromkeys(ids)]
        for row in rows:
            if row.state is not State.ACCOMPLISHED:
                raise Refused(f"snapshot {row.id} is {row.state}", hint="only accomplished snapshots hold blocks")

        async def work(run: TaskRun) -> wire.SnapshotsVerified:
            run.step("reading stored blocks")
            report = _reporter(run)
            if everything:
                found = await self._housekeeping.verify(report)
                count = len(await self._catalog.snapshots(state=State.ACCOMPLISHED))
            else:
                found = await self._housekeeping.verify_snapshots(rows, report)
                count = len(rows)
            return await self._verified(found, count)

        subject = "everything" if everything else ", ".join(row.id for row in rows[:3]) + (", …" if rows[3:] else "")
        return self._tasks.start(KIND_VERIFY, subject, work)

    async def _verified(self, found: Verified, count: int) -> wire.SnapshotsVerified:
        damaged = [wire.DamagedBlock(block=block, detail=why) for block, why in found.damaged.items()]
        return wire.SnapshotsVerified(
            snapshots=count,
            packs=found.packs,
            blocks=found.blocks,
            read_bytes=found.read_bytes,
            damaged_blocks=len(damaged),
            damaged=damaged[:TOLD_MAX],
            healed_blocks=found.healed,
            rewritten=[*(f"manifest of {name}" for name in found.manifests), *found.indexes],
            affected=await self._affected(found.affected),
        )

    async def _affected(self, counts: Mapping[SnapshotId, int]) -> list[wire.AffectedSnapshot]:
        disks = {disk.id: disk for disk in await self._catalog.disks(include_released=True)}
        rows = [row for row in await self._catalog.snapshots(state=State.ACCOMPLISHED) if row.id in counts]
        return [
            wire.AffectedSnapshot(
                id=row.id,
                disk=row.disk,
                guest=disks[row.disk].guest_name,
                target=disks[row.disk].target,
                name=row.name,
                blocks=counts[row.id],
            )
            for row in rows
        ]


def _reporter(run: TaskRun) -> Callable[[int, int], None]:
    """Return what turns bytes read so far, and bytes in all, into a task's progress."""
    meter: Meter | None = None
    before = 0

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal meter, before
        if meter is None:
            meter = Meter(run.view.id, total_bytes, run.progress)
        meter.add(done_bytes - before)
        before = done_bytes

    return report
