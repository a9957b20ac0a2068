"""Making snapshots: the rules of SERVICE 2 and 3, and who captures which disk when.

A request becomes one run for each disk, or one for all its disks as a group. A run waits for its turn, is planned,
journaled, carried out and settled. It lives in the daemon: whoever asked may go away.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hvsnap.capture.capture import Capture, CaptureOrder
from hvsnap.capture.facts import KIND, CapturedDisk, CaptureFacts, Mode, Step
from hvsnap.capture.plan import decide
from hvsnap.capture.record import DiskPlan, Recorder
from hvsnap.capture.settle import Settle
from hvsnap.capture.space import SpaceLimits
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import (
    CaptureRunning,
    ChainFull,
    ForeignJob,
    HvsnapError,
    Refused,
    Stopping,
)
from hvsnap.happenings import EventType, snapshot_payload
from hvsnap.hypervisor import images
from hvsnap.model import (
    Bitmap,
    Consistency,
    Disk,
    DiskId,
    GroupId,
    GuestUuid,
    Kind,
    Method,
    Operation,
    OperationId,
    Progress,
    Snapshot,
    SnapshotId,
    State,
    new_id,
)
from hvsnap.ports import Clock, Hypervisor, Publisher
from hvsnap.service import names
from hvsnap.service.inventory import Found, Inventory
from hvsnap.service.requests import SnapshotRequest
from hvsnap.service.uses import Uses
from hvsnap.store.blocks import PackedBlocks

log = logging.getLogger(__name__)

BITMAP_PREFIX = "hvsnap-"
SETTLE_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What the configuration says of captures."""

    run_dir: str
    overlay_dir: str
    parallel: int
    snapshots_per_disk: int
    freeze_timeout_s: float
    space: SpaceLimits


@dataclass(slots=True, eq=False)
class _Run:
    """One capture from its request to its end. ``settling``: its snapshots are accomplished."""

    found: list[Found]
    disks: list[Disk]
    snapshots: list[Snapshot]
    consistency: Consistency
    task: asyncio.Task[None] | None = None
    settling: bool = False
    cancelled: bool = False
    ahead: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def guest(self) -> GuestUuid:
        return self.found[0].guest.uuid


class Captures:
    """Runs captures in ``group``; implements :class:`hvsnap.service.requests.CapturesPort`."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        hypervisor: Hypervisor,
        catalog: Catalog,
        store: PackedBlocks,
        inventory: Inventory,
        uses: Uses,
        publisher: Publisher,
        clock: Clock,
        settings: CaptureSettings,
    ) -> None:
        self._group = group
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._store = store
        self._inventory = inventory
        self._uses = uses
        self._publisher = publisher
        self._clock = clock
        self._settings = settings
        self._settle = Settle(hypervisor, catalog)
        self._turns = asyncio.Semaphore(settings.parallel)
        self._admission = asyncio.Lock()
        self._recovering = asyncio.Lock()
        self._lanes: dict[DiskId, list[_Run]] = {}
        self._runs: dict[SnapshotId, _Run] = {}
        self._progress: dict[SnapshotId, Progress] = {}
        self._stopping = False

    # -- asked from outside -----------------------------------------------------------------------

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        """Check the request, start the captures, and return their snapshots in state ``progressing``."""
        name = names.check_name(request.name) if request.name else names.default_name(self._clock.now())
        description = names.check_description(request.description)
        tags = names.check_tags(request.tags)
        if self._stopping:
            raise Stopping("the daemon is stopping")
        found = await self._inventory.to_capture(request.guest, request.disks)
        async with self._admission:
            disks = [await self._admit(one, wait=request.wait) for one in found]
            group = GroupId(new_id("g")) if request.group else None
            made = [
                Snapshot(
                    id=SnapshotId(new_id("s")),
                    disk=disk.id,
                    sequence=0,
                    parent=None,
                    name=name,
                    description=description,
                    kind=Kind.INCREMENTAL if disk.head else Kind.FULL,
                    method=Method.BITMAP if disk.head else Method.FULL,
                    reason="",
                    consistency=request.consistency,
                    state=State.PROGRESSING,
                    size_bytes=disk.size_bytes,
                    created_at=self._clock.now(),
                    group=group,
                    tags=dict(tags),
                )
                for disk in disks
            ]
            made = await self._add(disks, made)
            parts = [list(range(len(found)))] if request.group else [[number] for number in range(len(found))]
            for part in parts:
                self._launch(
                    _Run(
                        [found[n] for n in part], [disks[n] for n in part], [made[n] for n in part], request.consistency
                    )
                )
        return made

    async def wait(self, ids: Sequence[SnapshotId]) -> list[Snapshot]:
        """Return the snapshots when their runs have ended, the guest back on its images."""
        tasks = [run.task for run in (self._runs.get(snapshot) for snapshot in ids) if run is not None and run.task]
        if tasks:
            await asyncio.wait(tasks)
        return [await self._catalog.snapshot(snapshot) for snapshot in ids]

    async def cancel(self, snapshot_id: SnapshotId) -> None:
        """Give a running capture up; with a group all its snapshots. Raises :class:`Refused` when none runs."""
        run = self._runs.get(snapshot_id)
        if run is None or run.settling:
            snapshot = await self._catalog.snapshot(snapshot_id)
            raise Refused(f"snapshot {snapshot_id} is {snapshot.state} already", hint="nothing is left to cancel")
        self._cancel(run)

    async def settled(self, disks: Sequence[DiskId]) -> None:
        """Return when no capture is at work on these disks any more."""
        tasks = {run.task for disk in disks for run in self._lanes.get(disk, ()) if run.task is not None}
        if tasks:
            await asyncio.wait(tasks)

    def busy_disks(self) -> set[DiskId]:
        """Return the disks that are being captured, or wait for it."""
        return set(self._lanes)

    def progress(self, snapshot_id: SnapshotId) -> Progress | None:
        """Return how far a running capture is."""
        return self._progress.get(snapshot_id)

    async def shutdown(self, timeout_s: float) -> None:
        """Refuse new captures, give up those that run, and wait until their guests are safe, for ``timeout_s``."""
        self._stopping = True
        runs = {id(run): run for run in self._runs.values()}.values()
        for run in runs:
            if not run.settling:
                self._cancel(run)
        tasks = [run.task for run in runs if run.task is not None]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                log.warning("%s is not settled yet; `hvsnap recover` or the next start will do it", task.get_name())
                task.cancel()

    # -- recovery ---------------------------------------------------------------------------------

    async def recover(self) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle what a crash left open; returns each open capture and, if it could not be settled, why.

        Captures that run now are left alone. Raises nothing: what cannot be settled yet stays in the journal.
        """
        async with self._recovering:
            outcome: list[tuple[Operation, HvsnapError | None]] = []
            running = set(self._runs)
            for operation in await self._catalog.operations(KIND):
                try:
                    if running & {disk.snapshot for disk in CaptureFacts.of(operation).disks}:
                        continue
                    await self._settle.settle(operation)
                    outcome.append((operation, None))
                    log.info("capture %s was settled", operation.id)
                except HvsnapError as error:
                    log.warning("capture %s cannot be settled yet: %s", operation.id, error.message)
                    outcome.append((operation, error))
            await self._fail_forgotten(running)
            return outcome

    async def recover_loop(self) -> None:
        """Try again, every :data:`SETTLE_RETRY_S`, what could not be settled before."""
        while True:
            await asyncio.sleep(SETTLE_RETRY_S)
            if await self._catalog.operations(KIND):
                await self.recover()

    async def _fail_forgotten(self, running: set[SnapshotId]) -> None:
        """Mark snapshots failed that were waiting for their turn when the daemon died: no journal entry knows them."""
        open_now = {d.snapshot for o in await self._catalog.operations(KIND) for d in CaptureFacts.of(o).disks}
        for snapshot in await self._catalog.snapshots(state=State.PROGRESSING):
            if snapshot.id not in running | set(self._runs) | open_now:
                await self._fail([snapshot], "the daemon ended before its turn came")

    # -- admission --------------------------------------------------------------------------------

    async def _admit(self, found: Found, *, wait: bool) -> Disk:
        """Check the rules for one disk and return its row; nothing has begun when this refuses."""
        info = await images.image_info(found.view.top.path, found.view.top.format)
        where = f"disk {found.view.target} of {found.guest.name}"
        if info.encrypted:
            raise Refused(f"{where} is encrypted, and the store has no key", hint="its data would be stored in plain")
        disk = await self._inventory.register(found, info.size_bytes)
        self._uses.check_disk(disk.id)
        for operation in await self._catalog.operations():
            await self._check_operation(operation, disk, where)
        for run in self._lanes.get(disk.id, ()):
            # A capture whose snapshot is accomplished only has to bring the guest back: that is waited for.
            if not wait and not run.settling:
                raise CaptureRunning(f"{where} is being captured (snapshot {run.snapshots[0].id})")
        nodes = [s for s in await self._catalog.snapshots(disk.id) if s.state is not State.FAILED]
        if len(nodes) >= self._settings.snapshots_per_disk:
            raise ChainFull(f"the chain of {where} holds {len(nodes)} snapshots already")
        return disk

    async def _check_operation(self, operation: Operation, disk: Disk, where: str) -> None:
        """Refuse a disk that something left open by a crash still concerns."""
        if operation.kind == KIND:
            facts = CaptureFacts.of(operation)
            mine = [one for one in facts.disks if one.disk == disk.id]
            if mine and mine[0].snapshot not in self._runs:
                hint = "`hvsnap recover` finishes it, and `hvsnap doctor` says what stands in the way"
                raise CaptureRunning(f"an interrupted capture of {where} is not settled yet", hint=hint)
        elif operation.facts.get("disk") == disk.id:
            hint = "wait for it, or finish it with `hvsnap recover`"
            raise CaptureRunning(f"a {operation.kind} of {where} is not finished", hint=hint)

    async def _add(self, disks: list[Disk], made: list[Snapshot]) -> list[Snapshot]:
        numbered = []
        async with self._catalog.write() as tx:
            for disk, snapshot in zip(disks, made, strict=True):
                one = replace(snapshot, sequence=await tx.next_sequence(disk.id))
                await tx.add_snapshot(one)
                await tx.emit(EventType.SNAPSHOT_CREATED, snapshot_payload(disk, one))
                numbered.append(one)
        return numbered

    # -- a run ------------------------------------------------------------------------------------

    def _launch(self, run: _Run) -> None:
        for disk, snapshot in zip(run.disks, run.snapshots, strict=True):
            lane = self._lanes.setdefault(disk.id, [])
            run.ahead += [other.task for other in lane if other.task is not None]
            lane.append(run)
            self._runs[snapshot.id] = run
        name = f"capture {' '.join(snapshot.id for snapshot in run.snapshots)}"
        run.task = self._group.create_task(self._run(run), name=name)
        run.task.add_done_callback(lambda _task: self._leave(run))

    def _cancel(self, run: _Run) -> None:
        # Once: a second cancellation would break into the settling that the first one set off.
        if run.task is not None and not run.cancelled:
            run.cancelled = True
            run.task.cancel()

    def _leave(self, run: _Run) -> None:
        for disk, snapshot in zip(run.disks, run.snapshots, strict=True):
            self._lanes[disk.id].remove(run)
            if not self._lanes[disk.id]:
                del self._lanes[disk.id]
            self._runs.pop(snapshot.id, None)
            self._progress.pop(snapshot.id, None)

    async def _run(self, run: _Run) -> None:
        """Carry one run out; whatever happens to it ends as its snapshots' state."""
        error = "it was cancelled"
        operation: OperationId | None = None
        try:
            if run.ahead:
                await asyncio.wait(run.ahead)
            async with self._turns:
                operation, capture = await self._begin(run)
                await capture.run()
                run.settling = True
        except HvsnapError as failure:
            error = f"{failure.message} ({failure.hint})" if failure.hint else failure.message
        except asyncio.CancelledError:
            error = "the daemon was stopped" if self._stopping else error
        except Exception:
            log.exception("capture of %s failed", ", ".join(snapshot.id for snapshot in run.snapshots))
            error = "a fault in hvsnap; the daemon's log has the details"
        finishing = asyncio.ensure_future(self._finish(run, operation, error))
        try:
            await asyncio.shield(finishing)
        except asyncio.CancelledError:
            await asyncio.wait([finishing])

    async def _finish(self, run: _Run, operation: OperationId | None, error: str) -> None:
        try:
            if operation is None:
                await self._fail(run.snapshots, error)
                return
            await self._settle.settle(await self._catalog.operation(operation), error)
        except HvsnapError as failure:
            log.warning("capture %s cannot be settled yet: %s", operation, failure.message)
        except Exception:
            log.exception("settling capture %s failed", operation)

    async def _fail(self, snapshots: Sequence[Snapshot], error: str) -> None:
        """Mark snapshots failed that never began."""
        async with self._catalog.write() as tx:
            for snapshot in snapshots:
                disk = await self._catalog.disk(snapshot.disk)
                await tx.update_snapshot(snapshot.id, state=State.FAILED, error=error)
                failed = replace(snapshot, state=State.FAILED, error=error)
                await tx.emit(EventType.SNAPSHOT_FAILED, snapshot_payload(disk, failed))

    async def _begin(self, run: _Run) -> tuple[OperationId, Capture]:
        """Plan a run against the present, and write it into the journal."""
        guest = await self._hypervisor.guest(run.guest)
        mode = Mode.REDIRECT if guest.active else Mode.OFFLINE
        plans = []
        for disk_row, snapshot in zip(run.disks, run.snapshots, strict=True):
            disk = await self._catalog.disk(disk_row.id)
            plans.append(await self._plan(disk, snapshot, mode, run, self._store.block_size))
        facts = CaptureFacts(mode, tuple(plan.captured for plan in plans))
        async with self._catalog.write() as tx:
            for plan in plans:
                s = plan.snapshot
                await tx.update_snapshot(
                    s.id, parent=s.parent, kind=s.kind, method=s.method, reason=s.reason, size_bytes=s.size_bytes
                )
            operation = await tx.open_operation(KIND, run.guest, Step.BITMAPS, facts.as_json())
        recorder = Recorder(self._catalog, self._store, self._clock, self._settings.run_dir, self._report)
        order = CaptureOrder(
            operation=operation.id,
            guest=run.guest,
            mode=mode,
            disks=tuple(plans),
            consistency=run.consistency,
            freeze_timeout_s=self._settings.freeze_timeout_s,
            space=self._settings.space,
            block_size=self._store.block_size,
        )
        return operation.id, Capture(self._hypervisor, self._catalog, recorder, order)

    async def _plan(self, disk: Disk, snapshot: Snapshot, mode: Mode, run: _Run, block_size: int) -> DiskPlan:
        """Decide how one disk is captured; raises :class:`ForeignJob` when somebody else is at work on it."""
        info = await images.image_info(disk.source, disk.format)
        bitmaps: Sequence[Bitmap] = info.bitmaps
        if mode is Mode.REDIRECT:
            job = await self._hypervisor.job(run.guest, disk.target)
            if job is not None:
                raise ForeignJob(f"a {job.type} job is at work on disk {disk.target} of {disk.guest_name}")
            bitmaps = await self._hypervisor.bitmaps(run.guest, disk.target)
        by_name = {bitmap.name: bitmap for bitmap in bitmaps}
        head = await self._catalog.snapshot(disk.head) if disk.head else None
        decision = decide(
            disk,
            by_name,
            size_bytes=info.size_bytes,
            head_size_bytes=None if head is None else head.size_bytes,
            block_size=block_size,
        )
        captured = CapturedDisk(
            disk=disk.id,
            snapshot=snapshot.id,
            target=disk.target,
            base=disk.source,
            base_format=disk.format,
            overlay=self._overlay_path(disk, snapshot) if mode is Mode.REDIRECT else "",
            old=disk.bitmap if disk.bitmap in by_name else None,
            new=f"{BITMAP_PREFIX}{snapshot.id}" if info.holds_bitmaps else None,
        )
        planned = replace(
            snapshot,
            parent=disk.head,
            kind=decision.kind,
            method=decision.method,
            reason=decision.reason,
            size_bytes=info.size_bytes,
        )
        return DiskPlan(disk, planned, captured, decision)

    def _overlay_path(self, disk: Disk, snapshot: Snapshot) -> str:
        directory, name = os.path.split(disk.source)
        return os.path.join(self._settings.overlay_dir or directory, f"{name}.{snapshot.id}.overlay")

    def _report(self, progress: Progress) -> None:
        self._progress[SnapshotId(progress.id)] = progress
        self._publisher.progress(progress)
