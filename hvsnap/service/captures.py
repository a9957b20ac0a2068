"""Making snapshots: the rules of SERVICE 2 and 3, and who captures which disk when.

A request becomes one run for each disk, or one for all its disks as a group, of one guest or several. A run waits for
its turn, is planned, journaled, carried out and settled. It lives in the daemon: whoever asked may go away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Sequence
from dataclasses import replace

from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.capture.freeze import Freezer
from hvsnap.capture.settle import Settle
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, HvsnapError, Refused, Stopping
from hvsnap.guard import StartGuard
from hvsnap.happenings import EventType, snapshot_payload
from hvsnap.model import (
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
from hvsnap.service.admission import Admission
from hvsnap.service.inventory import Found, Inventory
from hvsnap.service.lanes import Lanes, Run
from hvsnap.service.planning import CaptureSettings, Planner
from hvsnap.service.requests import SnapshotRequest
from hvsnap.service.uses import Uses
from hvsnap.store.blocks import PackedBlocks

__all__ = ["CaptureSettings", "Captures"]

log = logging.getLogger(__name__)


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
        guard: StartGuard,
    ) -> None:
        self._group = group
        self._catalog = catalog
        self._inventory = inventory
        self._publisher = publisher
        self._clock = clock
        self._lanes = Lanes()
        self._admission = Admission(
            hypervisor,
            catalog,
            inventory,
            uses,
            self._lanes,
            snapshots_per_disk=settings.snapshots_per_disk,
            sealed=store.repository.sealed,
        )
        self._freezer = Freezer(hypervisor, catalog)
        self._planner = Planner(hypervisor, self._freezer, catalog, store, clock, settings, guard, self._report)
        self._settle = Settle(hypervisor, self._freezer, catalog, guard)
        self._turns = asyncio.Semaphore(settings.parallel)
        self._admitting = asyncio.Lock()
        self._recovering = asyncio.Lock()
        self._progress: dict[SnapshotId, Progress] = {}
        self._stopping = False

    # -- asked from outside -----------------------------------------------------------------------

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        """Check the request, start the captures, and return their snapshots in state ``progressing``."""
        name = request.name or names.default_name(self._clock.now())
        automatic = request.automatic
        if automatic is None:
            name = names.check_name(name)
        description = names.check_description(request.description)
        tags = names.check_tags(request.tags)
        if self._stopping:
            raise Stopping("the daemon is stopping")
        found = await self._found(request)
        await self._planner.check(found)
        async with self._admitting:
            disks = [await self._admission.admit(one, wait=request.wait) for one in found]
            group = GroupId(new_id("g")) if request.together else None
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
                    automatic=automatic is not None,
                    expires_at=None if automatic is None else automatic.expires_at,
                    retention="" if automatic is None else automatic.retention,
                )
                for disk in disks
            ]
            made = await self._add(disks, made)
            parts = [list(range(len(found)))] if request.together else [[number] for number in range(len(found))]
            for part in parts:
                self._launch(
                    Run(
                        [found[n] for n in part], [disks[n] for n in part], [made[n] for n in part], request.consistency
                    )
                )
        return made

    async def _found(self, request: SnapshotRequest) -> list[Found]:
        """Return the disks of all guests that are to be captured; each guest may be named once."""
        found: list[Found] = []
        for member in request.members:
            disks = await self._inventory.to_capture(member.guest, member.disks)
            guest = disks[0].guest
            if any(one.guest.uuid == guest.uuid for one in found):
                hint = "name all its disks in one place, or none of them for all that can be captured"
                raise BadRequest(f"guest {guest.name} is asked for twice", hint=hint)
            found += disks
        return found

    async def wait(self, ids: Sequence[SnapshotId]) -> list[Snapshot]:
        """Return the snapshots when their runs have ended, the guest back on its images."""
        runs = [self._lanes.of_snapshot(snapshot) for snapshot in ids]
        tasks = [run.task for run in runs if run is not None and run.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        return [await self._catalog.snapshot(snapshot) for snapshot in ids]

    async def cancel(self, snapshot_id: SnapshotId) -> None:
        """Give a running capture up; with a group all its snapshots. Raises :class:`Refused` when none runs."""
        run = self._lanes.of_snapshot(snapshot_id)
        if run is None or run.settling:
            snapshot = await self._catalog.snapshot(snapshot_id)
            raise Refused(f"snapshot {snapshot_id} is {snapshot.state} already", hint="nothing is left to cancel")
        self._cancel(run)

    async def settled(self, disks: Sequence[DiskId]) -> None:
        """Return when no capture is at work on these disks any more."""
        tasks = {run.task for disk in disks for run in self._lanes.of_disk(disk) if run.task is not None}
        if tasks:
            await asyncio.wait(tasks)

    def busy_disks(self) -> set[DiskId]:
        """Return the disks that are being captured, or wait for it."""
        return self._lanes.disks()

    def progress(self, snapshot_id: SnapshotId) -> Progress | None:
        """Return how far a running capture is."""
        return self._progress.get(snapshot_id)

    async def shutdown(self, timeout_s: float) -> None:
        """Refuse new captures, give up those that run, and wait until their guests are safe, for ``timeout_s``."""
        self._stopping = True
        runs = self._lanes.runs()
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

    async def recover(self, only: Container[OperationId] | None = None) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle what a crash left open; returns each open capture and, if it could not be settled, why.

        Captures that run now are left alone, and with ``only`` all others than these. Raises nothing: what cannot be
        settled yet stays in the journal.
        """
        async with self._recovering:
            running = self._lanes.snapshots()

            def leave(operation: Operation) -> bool:
                # Those are at work, too, that began while this was waiting for something.
                at_work = running | self._lanes.snapshots()
                mine = {disk.snapshot for disk in CaptureFacts.of(operation).disks}
                return bool(at_work & mine) or (only is not None and operation.id not in only)

            outcome = await self._settle.settle_open(leave)
            if only is not None:
                return outcome
            await self._fail_forgotten()
            return outcome + await self._freezer.recover()

    async def give_way(self, disks: Sequence[DiskId]) -> None:
        """Give the captures of disks up whose guest is about to be started, and wait until they are settled."""
        for disk in disks:
            for run in self._lanes.of_disk(disk):
                if not run.settling:
                    self._cancel(run)
        await self.settled(disks)

    async def guest_starts(self, guest: GuestUuid, timeout_s: float) -> None:
        """Wait for what keeps a guest from starting for a moment: the merge of an overlay, the removal of a bitmap."""
        await self._settle.offline.ended(guest, timeout_s)

    async def thaw_loop(self) -> None:
        """Thaw guests whose agents did not confirm it, as soon as they do."""
        await self._freezer.run()

    async def _fail_forgotten(self) -> None:
        """Mark snapshots failed that were waiting for their turn when the daemon died: no journal entry knows them.

        Lanes, journal, rows, in this order: a run that ends in between is in one of the first two, or its row says so.
        """
        async with self._admitting:  # a new request's rows are there before its lanes are entered
            known = self._lanes.snapshots()
            known |= {d.snapshot for o in await self._catalog.operations(KIND) for d in CaptureFacts.of(o).disks}
            for snapshot in await self._catalog.snapshots(state=State.PROGRESSING):
                if snapshot.id not in known:
                    await self._fail([snapshot], "the daemon ended before its turn came")

    # -- a run ------------------------------------------------------------------------------------

    def _cancel(self, run: Run) -> None:
        # Once: a second cancellation would break into the settling that the first one set off.
        if run.task is not None and not run.cancelled:
            run.cancelled = True
            run.task.cancel()

    async def _add(self, disks: list[Disk], made: list[Snapshot]) -> list[Snapshot]:
        numbered = []
        async with self._catalog.write() as tx:
            for disk, snapshot in zip(disks, made, strict=True):
                one = replace(snapshot, sequence=await tx.next_sequence(disk.id))
                await tx.add_snapshot(one)
                await tx.emit(EventType.SNAPSHOT_CREATED, snapshot_payload(disk, one))
                numbered.append(one)
        return numbered

    def _launch(self, run: Run) -> None:
        self._lanes.enter(run)
        name = f"capture {' '.join(snapshot.id for snapshot in run.snapshots)}"
        run.task = self._group.create_task(self._run(run), name=name)
        run.task.add_done_callback(lambda _task: self._leave(run))

    def _leave(self, run: Run) -> None:
        self._lanes.leave(run)
        for snapshot in run.snapshots:
            self._progress.pop(snapshot.id, None)

    async def _run(self, run: Run) -> None:
        """Carry one run out; whatever happens to it ends as its snapshots' state."""
        error = "it was cancelled"
        operations: list[OperationId] = []
        try:
            if run.ahead:
                await asyncio.wait(run.ahead)
            async with self._turns:
                operations, capture = await self._planner.begin(run)
                await capture.run()
                run.settling = True
        except HvsnapError as failure:
            error = f"{failure.message} ({failure.hint})" if failure.hint else failure.message
        except asyncio.CancelledError:
            error = "the daemon was stopped" if self._stopping else error
        except Exception:
            log.exception("capture of %s failed", ", ".join(snapshot.id for snapshot in run.snapshots))
            error = "a fault in hvsnap; the daemon's log has the details"
        finishing = asyncio.ensure_future(self._finish(run, operations, error))
        try:
            await asyncio.shield(finishing)
        except asyncio.CancelledError:
            await asyncio.wait([finishing])

    async def _finish(self, run: Run, operations: Sequence[OperationId], error: str) -> None:
        """Bring all guests back, side by side: none waits for another one's merge."""
        if operations:
            await asyncio.gather(*(self._settle_one(operation, error) for operation in operations))
            return
        try:
            await self._fail(run.snapshots, error)
        except HvsnapError as failure:
            log.warning("capture of %s cannot be marked failed yet: %s", run.snapshots[0].id, failure.message)
        except Exception:
            log.exception("marking the capture of %s failed did not work", run.snapshots[0].id)

    async def _settle_one(self, operation: OperationId, error: str) -> None:
        try:
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

    def _report(self, progress: Progress) -> None:
        self._progress[SnapshotId(progress.id)] = progress
        self._publisher.progress(progress)
