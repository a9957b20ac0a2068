"""One capture of one guest's disks: the steps of docs/capture.md, in their order.

Every step is journaled before it is done. Whatever raises here, the caller settles the journal's entry afterwards
(:mod:`hvsnap.capture.settle`), so that there is one way of undoing for errors, cancellation and crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from hvsnap.capture.facts import Mode, Step
from hvsnap.capture.fleece import Fleece
from hvsnap.capture.freeze import Freezer
from hvsnap.capture.impact import Watch
from hvsnap.capture.pipeline import Totals
from hvsnap.capture.pivot import create_overlay
from hvsnap.capture.record import DiskPlan, Recorder
from hvsnap.capture.space import SpaceLimits, check, room, watch
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import AgentMissing, AgentUnavailable, HypervisorFailed
from hvsnap.guard import OVERLAY, Bar, StartGuard
from hvsnap.hypervisor import images
from hvsnap.hypervisor.image_lock import images_locked
from hvsnap.model import Consistency, GuestUuid, OperationId
from hvsnap.ports import Hypervisor


@dataclass(frozen=True, slots=True)
class CaptureOrder:
    """A capture that the journal has begun: its entry, its guest, its disks, and what was asked for."""

    operation: OperationId
    guest: GuestUuid
    mode: Mode
    disks: tuple[DiskPlan, ...]
    consistency: Consistency
    freeze_timeout_s: float
    space: SpaceLimits
    block_size: int


class Capture:
    """Carries out one :class:`CaptureOrder`."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        freezer: Freezer,
        catalog: Catalog,
        recorder: Recorder,
        guard: StartGuard,
        order: CaptureOrder,
        watch: Watch,
    ) -> None:
        self._hypervisor = hypervisor
        self._freezer = freezer
        self._catalog = catalog
        self._recorder = recorder
        self._guard = guard
        self._order = order
        self._watch = watch
        self._plans: Sequence[DiskPlan] = order.disks
        self._fleece: Fleece | None = None
        images_beside = (plan.captured.overlay or plan.captured.scratch for plan in order.disks)
        self._beside = [path for path in images_beside if path]

    async def run(self) -> None:
        """Take the snapshots: accomplished when this returns. The guest is not yet back on its images."""
        definition = await self._hypervisor.definition(self._order.guest)
        await self._watch.rest()
        async with self._instant() as (consistency, note), self._watching_space(), self._governing():
            with contextlib.nullcontext() if self._fleece is None else self._fleece.explaining():
                done: list[tuple[DiskPlan, Totals]] = [await self._recorder.record(plan) for plan in self._plans]
        targets = [plan.captured.target for plan in self._plans]
        felt = {target: impact for target in targets if (impact := self._watch.impact(target)) is not None}
        await self._recorder.accomplish(self._order.operation, done, consistency, note, definition, felt)

    # -- holding the instant ----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _instant(self) -> AsyncIterator[tuple[Consistency, str]]:
        """Keep the disks as they were at one instant for as long as the context lasts; tells of its consistency."""
        if self._order.mode is Mode.OFFLINE:
            async with self._held_offline() as held:
                yield held
        elif self._order.mode is Mode.FLEECE:
            yield await self._hold_by_fleece()
        else:
            yield await self._redirect()

    async def _redirect(self) -> tuple[Consistency, str]:
        """Redirect the guest's writes to overlays; the images are frozen when this returns."""
        order = self._order
        await asyncio.to_thread(check, self._beside, order.space)
        for plan in order.disks:
            await images.sync_image(plan.captured.base)
        await self._add_bitmaps()
        await self._step(Step.OVERLAYS)
        bare = (await self._hypervisor.guest(order.guest)).instance is not None
        for plan in order.disks:
            await create_overlay(plan.captured, order.block_size, bare=bare, key=plan.key)
        consistency, note = await self._switch_consistently()
        await self._check_switched()
        await self._bar()
        await self._step(Step.READING)
        return consistency, note

    async def _switch_consistently(self) -> tuple[Consistency, str]:
        """Switch with the file systems frozen, if that is asked for and can be had (SERVICE 2.8)."""
        asked = self._order.consistency
        if asked is Consistency.CRASH:
            await self._switch()
            return Consistency.CRASH, ""
        await self._step(Step.FREEZING, freezing=True)
        switched = False
        try:
            async with self._freezer.frozen(self._order.guest, self._order.freeze_timeout_s) as freeze:
                await self._switch()
                switched = True
            if not freeze.expired:
                return Consistency.APP, ""
            why = f"the freeze ended after {self._order.freeze_timeout_s:g} s, before the disks were switched"
        except AgentUnavailable as error:
            why = error.message
            if isinstance(error, AgentMissing):
                await self._step(Step.FREEZING, freezing=False)
            if asked is Consistency.APP:
                raise
        if asked is Consistency.APP:
            raise AgentUnavailable(why, hint="try again, or raise capture.freeze_timeout_s (at most 9)")
        if not switched:
            await self._switch()
        return Consistency.CRASH, why

    async def _hold_by_fleece(self) -> tuple[Consistency, str]:
        """Hold the instant in the guest's QEMU, its image current all the time (:mod:`hvsnap.capture.fleece`)."""
        order = self._order
        await asyncio.to_thread(check, self._beside, order.space)
        for plan in order.disks:
            await images.sync_image(plan.captured.base)
        await self._add_bitmaps()
        await self._step(Step.SCRATCH)
        self._fleece = Fleece(await self._hypervisor.fleecer(order.guest), order.guest, order.disks)
        await self._fleece.prepare()
        consistency, note = await self._switch_consistently()
        await self._step(Step.READING)
        self._plans = await self._fleece.exported()
        return consistency, note

    async def _add_bitmaps(self) -> None:
        """Before the instant: a bitmap that was added earlier holds a superset of what is written after it."""
        names = {plan.captured.target: plan.captured.new for plan in self._order.disks if plan.captured.new}
        await self._hypervisor.bitmap_add(self._order.guest, names, self._order.block_size)

    async def _switch(self) -> None:
        await self._step(Step.SWITCHING)
        if self._fleece is not None:
            await self._fleece.hold()
            return
        overlays = {plan.captured.target: plan.captured.overlay for plan in self._order.disks}
        await self._hypervisor.switch_to_overlays(self._order.guest, overlays)

    async def _check_switched(self) -> None:
        """Look whether every disk is on its overlay, over exactly its image: geometry before and after."""
        guest = await self._hypervisor.guest(self._order.guest)
        shown = {disk.target: [layer.path for layer in disk.layers[:2]] for disk in guest.disks}
        for plan in self._order.disks:
            expected = [plan.captured.overlay, plan.captured.base]
            if shown.get(plan.captured.target) != expected:
                raise HypervisorFailed(f"disk {plan.captured.target} is on {shown.get(plan.captured.target)}")

    async def _bar(self) -> None:
        """From here on the guest starts from its overlays, or not at all, whatever becomes of its definition."""
        for plan in self._order.disks:
            disk = await self._catalog.disk(plan.captured.disk)
            await self._guard.bar(Bar.of(disk, OVERLAY, overlay=plan.captured.overlay))

    @contextlib.asynccontextmanager
    async def _held_offline(self) -> AsyncIterator[tuple[Consistency, str]]:
        """Keep the images of a guest that is off as they are: it does not start while they are read.

        A guest that was started and stopped before the locks were taken does no harm: both bitmaps recorded it.
        """
        for plan in self._order.disks:
            if plan.captured.new:
                await images.bitmap_add(plan.captured.base, plan.captured.new, self._order.block_size, key=plan.key)
        async with images_locked([plan.captured.base for plan in self._order.disks]):
            await self._step(Step.READING)
            asked = self._order.consistency
            if (await self._hypervisor.guest(self._order.guest)).saved:
                why = "the guest is saved: its memory has what its file systems have not written yet"
                if asked is Consistency.APP:
                    raise AgentUnavailable(why, hint="start the guest, or do without")
                yield Consistency.CRASH, why
            else:
                # The guest was shut down, so its file systems are as consistent as they get.
                yield Consistency.CRASH if asked is Consistency.CRASH else Consistency.APP, ""

    # -- around it --------------------------------------------------------------------------------

    async def _step(self, step: Step, **facts: bool) -> None:
        async with self._catalog.write() as tx:
            await tx.step(self._order.operation, step, **facts)

    @contextlib.asynccontextmanager
    async def _governing(self) -> AsyncIterator[None]:
        """Spare the guest while it is read, until half of the space for its writes is used."""
        beside, limits = self._beside, self._order.space
        room_at_first = await asyncio.to_thread(room, beside, limits) if beside else 0
        async with self._watch.governing(lambda: bool(beside) and room(beside, limits) < room_at_first / 2):
            yield

    @contextlib.asynccontextmanager
    async def _watching_space(self) -> AsyncIterator[None]:
        """Give the capture up, as :class:`NoSpace`, when the overlays' file system runs short."""
        if not self._beside:
            yield
            return
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch(self._beside, self._order.space), name="watch-space")
                yield
                watcher.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
