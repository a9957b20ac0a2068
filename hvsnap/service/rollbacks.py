"""Setting disks back: to a snapshot of their own (SERVICE 6), or to what they were made of (SERVICE 7.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CaptureRunning, ChainFull, Failed, GuestRunning, HvsnapError, Refused
from hvsnap.happenings import EventType, disk_payload
from hvsnap.model import Disk, DiskId, GuestState, GuestView, Progress, Snapshot, SnapshotId, State
from hvsnap.ports import Hypervisor
from hvsnap.restore import rollback
from hvsnap.restore.rollback import RollbackPlan
from hvsnap.service.inventory import Found, Inventory, pick_disk
from hvsnap.service.names import NAME_LENGTH_MAX
from hvsnap.service.origins import Origins
from hvsnap.service.requests import CapturesPort, ReinitRequest, RollbackRequest, SnapshotRequest
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.uses import Uses

SHUTDOWN_TIMEOUT_S = 180.0
"""A guest's services may take their time: systemd alone gives each of them 90 s."""

KIND_ROLLBACK = "disk-rollback"
KIND_REINIT = "disk-reinit"

Report = Callable[[Progress], None]


class Roller(Protocol):
    """Sets disks back: :class:`hvsnap.restore.rollback.Rollback`."""

    async def plan(
        self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report, *, origin: bool = False
    ) -> RollbackPlan:
        """Return what would be written, by looking at the disk."""
        ...

    async def run(
        self,
        disk_id: DiskId,
        snapshot_id: SnapshotId,
        report: Report,
        *,
        origin: bool = False,
        begins: Callable[[], None] = lambda: None,
    ) -> RollbackPlan:
        """Bring the disk back to the snapshot, with ``origin`` also to another disk's; ``begins``: writing comes."""
        ...


@dataclass(frozen=True, slots=True)
class _Rolling:
    """A rollback that was checked and may begin; ``origin``: the id of what the disk is re-initialised to."""

    request: RollbackRequest | ReinitRequest
    found: Found
    disk: Disk
    snapshot: Snapshot
    origin: str = ""

    @property
    def to(self) -> str:
        """What the disk is set back to, as its user calls it."""
        return self.origin or self.snapshot.id


def pick_for(disks: Sequence[Disk], name: str, snapshot: Snapshot) -> Disk:
    """Return the disk that a rollback names: where the name fits several, the snapshot's own.

    Raises :class:`Refused` when it fits only others (SERVICE 6.7).
    """
    own = [disk for disk in disks if disk.id == snapshot.disk]
    if any(name in _names(disk) for disk in own):
        return own[0]
    disk = pick_disk(disks, name)
    hint = f"make a new disk of it: `hvsnap disk-create {snapshot.id} TARGET`"
    raise Refused(f"snapshot {snapshot.id} belongs to disk {snapshot.disk}, not to {disk.id}", hint=hint)


def _names(disk: Disk) -> tuple[str, ...]:
    targets = (disk.target, f"{disk.guest_name}/{disk.target}", f"{disk.guest_uuid}/{disk.target}")
    return (disk.id, disk.source, *targets)


def safety_name(snapshot: Snapshot, origin: str = "") -> str:
    """Return the name of the snapshot that is made before a rollback, or before a disk goes back to its origin."""
    name = f"before re-initialising to {origin}" if origin else f"before rollback to {snapshot.name}"
    return name[:NAME_LENGTH_MAX].rstrip()


def check_can_stop(guest: GuestView) -> None:
    """Refuse a guest that cannot be shut down, or that would be no more then."""
    if guest.state is GuestState.PAUSED:
        hint = f"let it go on (`virsh resume {guest.name}`), or end it with `virsh destroy {guest.name}`"
        raise Refused(f"guest {guest.name} is paused, and does not notice that it is to shut down", hint=hint)
    if not guest.persistent:
        hint = "define it first (`virsh dumpxml`, `virsh define`): a transient guest is gone once it is off"
        raise Refused(f"guest {guest.name} has no definition that outlives its shutdown", hint=hint)


class Rollbacks:
    """Sets disks back, as tasks."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        catalog: Catalog,
        inventory: Inventory,
        snapshots: Snapshots,
        origins: Origins,
        captures: CapturesPort,
        tasks: Tasks,
        uses: Uses,
        roller: Roller,
        *,
        snapshots_max: int,
    ) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._inventory = inventory
        self._snapshots = snapshots
        self._origins = origins
        self._captures = captures
        self._tasks = tasks
        self._uses = uses
        self._roller = roller
        self._snapshots_max = snapshots_max

    async def plan(self, request: RollbackRequest) -> wire.RollbackPlan:
        """Return what a rollback would do now. It looks at the disk, which takes its time where no bitmap helps."""
        return await self._plan(await self._check(request))

    async def plan_reinit(self, request: ReinitRequest) -> wire.RollbackPlan:
        """Return what re-initialising a disk would do now; see :meth:`plan`."""
        return await self._plan(await self._check_reinit(request))

    async def _plan(self, rolling: _Rolling) -> wire.RollbackPlan:
        if rolling.found.guest.active:
            return self._told(rolling, None)  # a disk in use cannot be compared
        with self._uses.hold_snapshot(rolling.snapshot.id, "being compared with its disk"):
            plan = await self._roller.plan(
                rolling.disk.id, rolling.snapshot.id, lambda _progress: None, origin=bool(rolling.origin)
            )
        return self._told(rolling, plan)

    async def begin(self, request: RollbackRequest) -> tuple[wire.RollbackPlan, TaskView]:
        """Start a rollback. Raises what can be told beforehand: nothing was touched then."""
        return self._begin(await self._check(request), KIND_ROLLBACK)

    async def begin_reinit(self, request: ReinitRequest) -> tuple[wire.RollbackPlan, TaskView]:
        """Start to bring a disk back to its origin. Raises what can be told beforehand: nothing was touched then."""
        return self._begin(await self._check_reinit(request), KIND_REINIT)

    def _begin(self, rolling: _Rolling, kind: str) -> tuple[wire.RollbackPlan, TaskView]:
        subject = f"{rolling.disk.guest_name}/{rolling.disk.target} to {rolling.to}"
        task = self._tasks.start(
            kind, subject, lambda run: self._roll_back(rolling, run), guest=rolling.disk.guest_uuid
        )
        return self._told(rolling, None), task

    async def _check(self, request: RollbackRequest) -> _Rolling:
        """Check the rules of SERVICE 6 that can be checked before anything is touched."""
        snapshot = await self._snapshots.row(request.snapshot)
        disk = pick_for(await self._catalog.disks(include_released=True), request.disk, snapshot)
        if snapshot.state is not State.ACCOMPLISHED:
            hint = "only accomplished snapshots can be restored"
            raise Refused(f"snapshot {snapshot.id} is {snapshot.state}", hint=hint)
        found = await self._inventory.attached(disk)
        await self._check_free(request, found, disk)
        return _Rolling(request, found, disk, snapshot)

    async def _check_reinit(self, request: ReinitRequest) -> _Rolling:
        """Check the rules of SERVICE 7.3 in the same way. A disk without any snapshot becomes known by it."""
        disk = await self._inventory.known_or_attached(request.disk)
        found = await self._inventory.attached(disk)
        origin, snapshot = await self._origins.of_disk(disk)
        await self._check_free(request, found, disk)
        return _Rolling(request, found, disk, snapshot, origin)

    async def _check_free(self, request: RollbackRequest | ReinitRequest, found: Found, disk: Disk) -> None:
        """Refuse a disk that is in use, or whose chain has no room for the safety snapshot."""
        if found.guest.active and not request.stop:
            raise GuestRunning(f"guest {found.guest.name} is {found.guest.state}")
        if found.guest.active:
            check_can_stop(found.guest)
        rollback.check_not_saved(found.guest)
        self._uses.check_disk(disk.id)
        if disk.id in self._captures.busy_disks():
            raise CaptureRunning(f"disk {disk.target} of {disk.guest_name} is being captured")
        for operation in await self._catalog.operations():
            if operation.kind == rollback.KIND and operation.facts.get("disk") == disk.id:
                hint = "`hvsnap recover` finishes it"
                raise Refused(f"an interrupted rollback of disk {disk.id} is not finished", hint=hint)
        if request.safety_snapshot:
            nodes = [row for row in await self._catalog.snapshots(disk.id) if row.state is not State.FAILED]
            if len(nodes) >= self._snapshots_max:
                hint = "delete a snapshot of this disk first, or give --no-safety-snapshot"
                raise ChainFull(f"the chain of disk {disk.id} has no room for a safety snapshot", hint=hint)

    def _told(self, rolling: _Rolling, plan: RollbackPlan | None) -> wire.RollbackPlan:
        request, disk, active = rolling.request, rolling.disk, rolling.found.guest.active
        kept = ", but for the safety snapshot" if request.safety_snapshot else ""
        since = "the disk was made" if rolling.origin else "the snapshot"
        notes = [f"what was written since {since} is lost{kept}"]
        if plan is not None:
            notes += _resized(plan)
        return wire.RollbackPlan(
            disk=disk.id,
            guest=disk.guest_name,
            target=disk.target,
            snapshot=rolling.snapshot.id,
            path=disk.source,
            method="" if plan is None else plan.method,
            write_bytes=None if plan is None else plan.write_bytes + plan.zero_bytes,
            stop=active,
            safety_snapshot=request.safety_snapshot,
            start=request.start,
            notes=notes,
        )

    async def _roll_back(self, rolling: _Rolling, run: TaskRun) -> wire.RolledBack | wire.Reinitialised:
        """Stop, save, set back, start: as far as asked for."""
        request, disk, snapshot = rolling.request, rolling.disk, rolling.snapshot
        with self._uses.hold_snapshot(snapshot.id, "being rolled back to"):
            if request.stop and (await self._hypervisor.guest(disk.guest_uuid)).active:
                run.step("shutting the guest down")
                await self._hypervisor.shutdown(disk.guest_uuid, SHUTDOWN_TIMEOUT_S)
            safety = await self._save(rolling, run) if request.safety_snapshot else None
            # Another capture may begin as one ends; between the last look and the hold nothing else runs.
            while disk.id in self._captures.busy_disks():
                await self._captures.settled([disk.id])
            with self._uses.hold_disk(disk.id, "being rolled back"):
                run.step("comparing the disk with the snapshot")
                done = await self._run(rolling, run)
        started, notes = await self._start(rolling, run) if request.start else (False, [])
        told: dict[str, Any] = {
            "disk": disk.id,
            "snapshot": snapshot.id,
            "written_bytes": done.write_bytes + done.zero_bytes,
            "safety_snapshot": safety,
            "started": started,
            "notes": _resized(done) + notes,
        }
        return wire.Reinitialised(origin=rolling.origin, **told) if rolling.origin else wire.RolledBack(**told)

    async def _save(self, rolling: _Rolling, run: TaskRun) -> SnapshotId:
        """Make the safety snapshot (SERVICE 6.3); without it nothing is written."""
        run.step("making a safety snapshot")
        made = await self._captures.create(
            SnapshotRequest(
                guest=rolling.disk.guest_uuid,
                disks=(rolling.disk.id,),
                name=safety_name(rolling.snapshot, rolling.origin),
                description=f"made before the disk was set back to {rolling.to}",
                wait=True,
            )
        )
        (saved,) = await self._captures.wait([snapshot.id for snapshot in made])
        if saved.state is not State.ACCOMPLISHED:
            hint = "the disk is as it was; give --no-safety-snapshot to go without"
            raise Failed(f"the safety snapshot {saved.id} failed: {saved.error}", hint=hint)
        return saved.id

    async def _run(self, rolling: _Rolling, run: TaskRun) -> RollbackPlan:
        """Set the disk back; a failure on the way leaves the journal's entry, and says so."""
        disk, snapshot = rolling.disk, rolling.snapshot

        def begins() -> None:
            run.final("the rollback has begun to write: it goes on to its end")
            run.step("setting the disk back")

        try:
            return await self._roller.run(
                disk.id, snapshot.id, run.progress, origin=bool(rolling.origin), begins=begins
            )
        except HvsnapError as error:
            left = [one for one in await self._catalog.operations(rollback.KIND) if one.facts.get("disk") == disk.id]
            if left:
                async with self._catalog.write() as tx:
                    payload = disk_payload(disk) | {"snapshot": snapshot.id, "error": error.message}
                    await tx.emit(EventType.ROLLBACK_FAILED, payload)
            raise

    async def _start(self, rolling: _Rolling, run: TaskRun) -> tuple[bool, list[str]]:
        """Start the guest; that it does not start does not undo the rollback."""
        run.step("starting the guest")
        try:
            await self._hypervisor.start(rolling.disk.guest_uuid)
        except HvsnapError as error:
            return False, [f"guest {rolling.disk.guest_name} was not started: {error.message}"]
        return True, []


def _resized(plan: RollbackPlan) -> list[str]:
    return ["the disk's size is not the snapshot's: its file system must be grown again"] if plan.resized else []
