"""Reading one frozen disk into the store, and making a capture's snapshots accomplished.

The order is what the promise rests on: packs durable, manifests durable, catalog committed. A crash before the commit
leaves garbage in the store, never a snapshot with a hole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hvsnap.capture.alarms import Alarms
from hvsnap.capture.facts import CapturedDisk, Step
from hvsnap.capture.giveback import give_back
from hvsnap.capture.pipeline import Pipeline, StagedPage, Totals
from hvsnap.capture.plan import Decision, Selection
from hvsnap.capture.reader import DiskMap, Pace, scan
from hvsnap.capture.unusual import Rules
from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.chain import IndexArray, Page
from hvsnap.errors import HypervisorFailed
from hvsnap.happenings import EventType, snapshot_payload
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import Consistency, Disk, Impact, Kind, Method, OperationId, Progress, Snapshot, State
from hvsnap.ports import Clock, NbdExport, UInt64Array
from hvsnap.secret import Passphrase
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.identity import ManifestHead
from hvsnap.store.manifest import ManifestPage


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """One disk of a capture: what the catalog knew when it began, and what was decided.

    ``export`` is the frozen disk where the guest's own QEMU shows it (fleece); None: its image is opened to be read.
    ``key`` opens an image that is encrypted; ``pace`` is what its readers ask before each group of blocks.
    """

    disk: Disk
    snapshot: Snapshot
    captured: CapturedDisk
    decision: Decision
    export: NbdExport | None = None
    key: Passphrase | None = None
    pace: Pace | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """A disk that was read, with what is kept of its instant.

    ``note`` says why the consistency is less than was asked for, ``guest`` is the guest's definition, ``impact`` what
    it felt, ``skew_ms`` how far its instant is from those of other guests at most.
    """

    plan: DiskPlan
    totals: Totals
    consistency: Consistency
    note: str
    guest: str
    impact: Impact | None
    skew_ms: float | None


class CatalogStage:
    """Compares pages with the snapshot's parent, and stages them in the catalog."""

    def __init__(self, catalog: Catalog, snapshot: Snapshot) -> None:
        self._catalog = catalog
        self._snapshot = snapshot

    async def compare(self, page: int, index: npt.NDArray[np.uint16], block: UInt64Array) -> StagedPage | None:
        """Return the entries that differ from the parent's view; None if there are none."""
        parent = self._snapshot.parent
        view = chain.blank() if parent is None else await self._catalog.view(parent, page)
        entries = chain.changed(view, index, block)
        return StagedPage(page, entries.index, entries.block) if len(entries) else None

    async def stage(self, pages: list[StagedPage]) -> None:
        """Write finished pages in one transaction."""
        async with self._catalog.write() as tx:
            for staged in pages:
                await tx.put_page(self._snapshot.id, staged.page, Page(staged.index, staged.block))


def select(found: DiskMap, carry: dict[int, IndexArray]) -> Selection:
    """Return what to read of a disk: all of it without a bitmap, else what the bitmap or the carried blocks name."""
    if found.dirty is None:
        return Selection(found.data, None)
    candidates = found.dirty
    for page, index in carry.items():
        if page < candidates.pages:
            candidates.add_index(page, index)
    return Selection(found.data, candidates)


class Recorder:
    """Puts the frozen disks of one capture into the store."""

    def __init__(
        self,
        catalog: Catalog,
        store: PackedBlocks,
        clock: Clock,
        run_dir: str,
        report: Callable[[Progress], None],
        rules: Rules | None = None,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._session = store.session()
        self._clock = clock
        self._run_dir = run_dir
        self._report = report
        self._alarms = Alarms(catalog, rules or Rules())

    async def record(self, plan: DiskPlan) -> tuple[DiskPlan, Totals]:
        """Read one frozen disk; the plan comes back with what was really done (a bitmap may turn out unreadable)."""
        if plan.export is not None:
            return plan, await self._read(plan, plan.export)
        if plan.decision.bitmap is not None:
            try:
                async with self._serve(plan, plan.decision.bitmap) as export:
                    return plan, await self._read(plan, export)
            except HypervisorFailed as error:
                reason = f"the dirty bitmap could not be exported: {error.message}"
                plan = replace(plan, decision=Decision(Kind.INCREMENTAL, Method.RESCAN, reason))
        async with self._serve(plan, None) as export:
            return plan, await self._read(plan, export)

    def _serve(self, plan: DiskPlan, bitmap: str | None) -> AbstractAsyncContextManager[NbdExport]:
        base, base_format = plan.captured.base, plan.captured.base_format
        return serve_image(base, base_format, run_dir=self._run_dir, bitmap=bitmap, idle_priority=True, key=plan.key)

    async def _read(self, plan: DiskPlan, export: NbdExport) -> Totals:
        snapshot = plan.snapshot
        found = await asyncio.to_thread(scan, export, self._store.block_size)
        if found.size_bytes != snapshot.size_bytes:
            raise HypervisorFailed(f"disk {plan.disk.target} was resized as its snapshot began", hint="try again")
        if snapshot.parent is not None:
            await self._catalog.check_lineage(snapshot.parent)  # what it says is what the disk is compared with
        selection = select(found, await self._catalog.carry(plan.disk.id))
        if export.give_back:
            await asyncio.to_thread(give_back, export, selection, found.size_bytes, self._store.block_size)
        stage = CatalogStage(self._catalog, snapshot)
        pipeline = Pipeline(snapshot.id, self._session, stage, self._report, plan.pace)
        return await pipeline.run(export, snapshot.size_bytes, selection)

    async def accomplish(self, operations: Sequence[OperationId], done: Sequence[Recorded]) -> None:
        """Make a capture's snapshots durable and visible, all at once; ``operations`` are its journal entries."""
        await self._session.flush()
        finished = []
        for one in done:
            snapshot = self._finished(one)
            head = ManifestHead(snapshot, one.plan.disk, self._store.block_size, one.guest)
            await self._store.manifests.put(head, self._manifest_pages(snapshot))
            finished.append((one.plan, snapshot, one.totals.data_blocks * self._store.block_size))
        async with self._catalog.write() as tx:
            for plan, snapshot, data_bytes in finished:
                await tx.update_snapshot(
                    snapshot.id,
                    state=snapshot.state,
                    kind=snapshot.kind,
                    method=snapshot.method,
                    reason=snapshot.reason,
                    consistency=snapshot.consistency,
                    accomplished_at=snapshot.accomplished_at,
                    read_bytes=snapshot.read_bytes,
                    changed_bytes=snapshot.changed_bytes,
                    stored_bytes=snapshot.stored_bytes,
                    impact=snapshot.impact,
                    skew_ms=snapshot.skew_ms,
                )
                await tx.update_disk(
                    plan.disk.id, head=snapshot.id, bitmap=plan.captured.new, size_bytes=snapshot.size_bytes
                )
                await tx.clear_carry(plan.disk.id)
                await tx.emit(EventType.SNAPSHOT_ACCOMPLISHED, snapshot_payload(plan.disk, snapshot))
                await self._alarms.look(tx, plan.disk, snapshot, data_bytes)
            for operation in operations:
                await tx.step(operation, Step.SETTLING)

    def _finished(self, done: Recorded) -> Snapshot:
        decision, totals = done.plan.decision, done.totals
        reasons = [reason for reason in (decision.reason, done.note) if reason]
        return replace(
            done.plan.snapshot,
            state=State.ACCOMPLISHED,
            kind=decision.kind,
            method=decision.method,
            reason="; ".join(reasons),
            consistency=done.consistency,
            accomplished_at=self._clock.now(),
            read_bytes=totals.read_bytes,
            changed_bytes=totals.changed_blocks * self._store.block_size,
            stored_bytes=totals.new_bytes,
            impact=done.impact,
            skew_ms=done.skew_ms,
        )

    async def _manifest_pages(self, snapshot: Snapshot) -> AsyncIterator[ManifestPage]:
        async for number, entries in self._catalog.own_pages(snapshot.id):
            yield ManifestPage(number, entries.index, await self._store.digests(entries.block))
