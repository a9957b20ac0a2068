"""Planning a capture against the present, and writing it into the journal before anything of it is done."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvsnap.capture.capture import Capture, CaptureOrder
from hvsnap.capture.facts import KIND, CapturedDisk, CaptureFacts, Mode, Step
from hvsnap.capture.freeze import Freezer
from hvsnap.capture.impact import Watch
from hvsnap.capture.part import Part, PartOrder
from hvsnap.capture.plan import decide
from hvsnap.capture.record import DiskPlan, Recorder
from hvsnap.capture.space import SpaceLimits
from hvsnap.capture.support import ImageTraits, Way, refusal
from hvsnap.capture.throttle import Throttle
from hvsnap.capture.unusual import Rules
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import ForeignJob, Refused
from hvsnap.guard import StartGuard
from hvsnap.hypervisor import images
from hvsnap.model import Bitmap, Disk, GuestUuid, GuestView, OperationId, Progress, Snapshot
from hvsnap.ports import Clock, Hypervisor
from hvsnap.service.inventory import Found
from hvsnap.service.lanes import Run
from hvsnap.store.blocks import PackedBlocks

BITMAP_PREFIX = "hvsnap-"


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What the configuration says of captures."""

    run_dir: str
    overlay_dir: str
    parallel: int
    snapshots_per_disk: int
    freeze_timeout_s: float
    space: SpaceLimits
    impact_budget_pct: float = 0.0
    rate_max_bytes_s: int = 0
    alarms: Rules = field(default_factory=Rules)


@dataclass(frozen=True, slots=True)
class _Planned:
    """How the disks of one guest are captured."""

    guest: GuestView
    mode: Mode
    plans: tuple[DiskPlan, ...]
    watch: Watch


class Planner:
    """Makes captures of runs; ``report`` is told how far each one is."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        freezer: Freezer,
        catalog: Catalog,
        store: PackedBlocks,
        clock: Clock,
        settings: CaptureSettings,
        guard: StartGuard,
        report: Callable[[Progress], None],
    ) -> None:
        self._hypervisor = hypervisor
        self._freezer = freezer
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._settings = settings
        self._guard = guard
        self._report = report
        self._limit = Throttle(settings.rate_max_bytes_s or None, clock=clock.monotonic)

    async def check(self, found: Sequence[Found]) -> None:
        """Refuse what the guests' QEMUs cannot do, before anything of a capture exists."""
        for guest in {one.guest.uuid: one.guest for one in found}.values():
            views = [one.view for one in found if one.guest.uuid == guest.uuid]
            if guest.active:
                for view in views:
                    await asyncio.to_thread(self._check_place, view.top.path)
            if guest.active and guest.fleece:
                fleecer = await self._hypervisor.fleecer(guest.uuid)
                await fleecer.fleece_check(guest.uuid, [view.target for view in views])

    async def begin(self, run: Run) -> tuple[list[OperationId], Capture]:
        """Plan a run against the present, and write it into the journal: an entry for each guest, all or none."""
        planned = [await self._plan_guest(uuid, pairs) for uuid, pairs in run.by_guest().items()]
        parts = []
        async with self._catalog.write() as tx:
            for one in planned:
                for s in (plan.snapshot for plan in one.plans):
                    await tx.update_snapshot(
                        s.id, parent=s.parent, kind=s.kind, method=s.method, reason=s.reason, size_bytes=s.size_bytes
                    )
                facts = CaptureFacts(one.mode, tuple(plan.captured for plan in one.plans))
                operation = await tx.open_operation(KIND, one.guest.uuid, Step.BITMAPS, facts.as_json())
                order = PartOrder(operation.id, one.guest.uuid, one.guest.name, one.mode, one.plans, one.watch)
                parts.append(Part(self._hypervisor, self._catalog, self._guard, self._store.block_size, order))
        settings = self._settings
        recorder = Recorder(self._catalog, self._store, self._clock, settings.run_dir, self._report, settings.alarms)
        asked = CaptureOrder(run.consistency, settings.freeze_timeout_s, settings.space)
        capture = Capture(self._freezer, self._catalog, recorder, asked, parts)
        return [part.order.operation for part in parts], capture

    async def _plan_guest(self, uuid: GuestUuid, pairs: Sequence[tuple[Disk, Snapshot]]) -> _Planned:
        guest = await self._hypervisor.guest(uuid)
        mode = Mode.OFFLINE if not guest.active else Mode.FLEECE if guest.fleece else Mode.REDIRECT
        targets = [disk.target for disk, _snapshot in pairs]
        watch = Watch(self._hypervisor, uuid, targets, self._clock, self._settings.impact_budget_pct, self._limit)
        if mode is not Mode.OFFLINE:
            await watch.begin()
        plans = []
        for disk_row, snapshot in pairs:
            disk = await self._catalog.disk(disk_row.id)
            plan = await self._plan(disk, snapshot, mode, guest)
            plans.append(replace(plan, pace=watch.throttle))
        return _Planned(guest, mode, tuple(plans), watch)

    async def _plan(self, disk: Disk, snapshot: Snapshot, mode: Mode, guest: GuestView) -> DiskPlan:
        """Decide how one disk is captured; raises :class:`ForeignJob` when somebody else is at work on it."""
        info = await images.image_info(disk.source, disk.format)
        secret = next((view.secret for view in guest.disks if view.target == disk.target), "")
        # The guest may have been started since the request was admitted.
        image = ImageTraits(info.encrypted, secret=bool(secret))
        where = f"disk {disk.target} of {disk.guest_name}"
        why = refusal(where, Way(mode, bare=guest.instance is not None), image, sealed=self._store.repository.sealed)
        if why is not None:
            raise why
        bitmaps: Sequence[Bitmap] = info.bitmaps
        if mode is not Mode.OFFLINE:
            job = await self._hypervisor.job(guest.uuid, disk.target)
            if job is not None:
                raise ForeignJob(f"a {job.type} job is at work on disk {disk.target} of {disk.guest_name}")
            bitmaps = await self._hypervisor.bitmaps(guest.uuid, disk.target)
        by_name = {bitmap.name: bitmap for bitmap in bitmaps}
        head = await self._catalog.snapshot(disk.head) if disk.head else None
        decision = decide(
            disk,
            by_name,
            size_bytes=info.size_bytes,
            head_size_bytes=None if head is None else head.size_bytes,
            block_size=self._store.block_size,
        )
        captured = CapturedDisk(
            disk=disk.id,
            snapshot=snapshot.id,
            target=disk.target,
            base=disk.source,
            base_format=disk.format,
            overlay=self._path_beside(disk, snapshot, "overlay") if mode is Mode.REDIRECT else "",
            old=disk.bitmap if disk.bitmap in by_name else None,
            new=f"{BITMAP_PREFIX}{snapshot.id}" if info.holds_bitmaps else None,
            scratch=self._path_beside(disk, snapshot, "scratch") if mode is Mode.FLEECE else "",
            secret=secret if info.encrypted else "",
        )
        planned = replace(
            snapshot,
            parent=disk.head,
            kind=decision.kind,
            method=decision.method,
            reason=decision.reason,
            size_bytes=info.size_bytes,
        )
        return DiskPlan(disk, planned, captured, decision, key=await self._hypervisor.passphrase(captured.secret))

    def _check_place(self, image: str) -> None:
        """Refuse a block device beside which nothing can lie: /dev is no place for the guest's writes. Blocking."""
        if not self._settings.overlay_dir and Path(image).is_block_device():
            hint = "name a directory for what the guest writes meanwhile: capture.overlay_dir"
            raise Refused(f"{image} is a block device, and nothing can be put beside it", hint=hint)

    def _path_beside(self, disk: Disk, snapshot: Snapshot, kind: str) -> str:
        self._check_place(disk.source)
        directory, name = os.path.split(disk.source)
        return os.path.join(self._settings.overlay_dir or directory, f"{name}.{snapshot.id}.{kind}")
