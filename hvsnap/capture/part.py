"""One guest's part of a capture: its disks made ready, held at an instant, and what is known of that instant.

A capture of several guests has several parts; the order of their steps is :mod:`hvsnap.capture.capture`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from hvsnap.capture.facts import Mode, Step
from hvsnap.capture.fleece import Fleece
from hvsnap.capture.freeze import Freeze
from hvsnap.capture.impact import Watch
from hvsnap.capture.pivot import create_overlay
from hvsnap.capture.record import DiskPlan
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import AgentUnavailable, HypervisorFailed
from hvsnap.guard import OVERLAY, Bar, StartGuard
from hvsnap.hypervisor import images
from hvsnap.instant import Ready, Span
from hvsnap.model import Consistency, GuestUuid, OperationId
from hvsnap.ports import Hypervisor


@dataclass(frozen=True, slots=True)
class PartOrder:
    """What is to be captured of one guest: its entry in the journal, its disks, who watches what it feels."""

    operation: OperationId
    guest: GuestUuid
    name: str
    mode: Mode
    disks: tuple[DiskPlan, ...]
    watch: Watch


class Part:
    """Carries out one :class:`PartOrder`, step by step.

    ``plans`` are the disks as they are to be read; ``consistency`` and ``note`` tell of the instant, once it is held,
    ``span`` when that was; None where the guest is off.
    """

    def __init__(
        self, hypervisor: Hypervisor, catalog: Catalog, guard: StartGuard, block_size: int, order: PartOrder
    ) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._guard = guard
        self._block_size = block_size
        self.order = order
        self.plans: Sequence[DiskPlan] = order.disks
        self.definition = ""
        self.consistency = Consistency.CRASH
        self.note = ""
        self.span: Span | None = None
        self._fleece: Fleece | None = None

    @property
    def offline(self) -> bool:
        """Whether the guest is off."""
        return self.order.mode is Mode.OFFLINE

    @property
    def bases(self) -> list[str]:
        """The images."""
        return [plan.captured.base for plan in self.order.disks]

    @property
    def beside(self) -> list[str]:
        """The files that take something meanwhile: overlays, scratch images."""
        paths = (plan.captured.overlay or plan.captured.scratch for plan in self.order.disks)
        return [path for path in paths if path]

    # -- before the instant -----------------------------------------------------------------------

    async def rest(self) -> None:
        """Look at the guest before anything is done to it."""
        self.definition = await self._hypervisor.definition(self.order.guest)
        await self.order.watch.rest()

    async def prepare(self) -> None:
        """Put everything in place; the guest writes as before.

        A bitmap that was added before the instant holds a superset of what is written after it.
        """
        if self.offline:
            for plan in self.order.disks:
                if plan.captured.new:
                    await images.bitmap_add(plan.captured.base, plan.captured.new, self._block_size, key=plan.key)
            return
        for base in self.bases:
            await images.sync_image(base)
        names = {plan.captured.target: plan.captured.new for plan in self.order.disks if plan.captured.new}
        await self._hypervisor.bitmap_add(self.order.guest, names, self._block_size)
        if self.order.mode is Mode.FLEECE:
            await self._step(Step.SCRATCH)
            fleecer = await self._hypervisor.fleecer(self.order.guest)
            self._fleece = Fleece(fleecer, self.order.guest, self.order.disks)
            await self._fleece.prepare()
            return
        await self._step(Step.OVERLAYS)
        bare = (await self._hypervisor.guest(self.order.guest)).instance is not None
        for plan in self.order.disks:
            await create_overlay(plan.captured, self._block_size, bare=bare, key=plan.key)

    async def tell_offline(self, asked: Consistency) -> None:
        """Say how consistent a guest that is off is; its images are locked."""
        if (await self._hypervisor.guest(self.order.guest)).saved:
            self.note = "the guest is saved: its memory has what its file systems have not written yet"
            if asked is Consistency.APP:
                raise AgentUnavailable(self.note, hint="start the guest, or do without")
        elif asked is not Consistency.CRASH:
            # It was shut down, so its file systems are as consistent as they get.
            self.consistency = Consistency.APP

    # -- the instant, and after it ----------------------------------------------------------------

    async def switch(self, freeze: Freeze | None, ready: Ready) -> None:
        """Hold the instant of all disks; ``freeze`` is the one that may be in force."""
        if self._fleece is not None:
            self.span = await self._fleece.hold(ready)
        else:
            overlays = {plan.captured.target: plan.captured.overlay for plan in self.order.disks}
            self.span = await self._hypervisor.switch_to_overlays(self.order.guest, overlays, ready)
        if freeze is not None and freeze.in_force:
            self.consistency = Consistency.APP

    async def check(self) -> None:
        """Look whether it is as it should be, now that the guest has been switched; see to it that it stays so."""
        if self._fleece is not None:
            self.plans = await self._fleece.exported()
        elif not self.offline:
            await self._check_switched()
            await self._bar()

    async def _check_switched(self) -> None:
        """Look whether every disk is on its overlay, over exactly its image: geometry before and after."""
        guest = await self._hypervisor.guest(self.order.guest)
        shown = {disk.target: [layer.path for layer in disk.layers[:2]] for disk in guest.disks}
        for plan in self.order.disks:
            expected = [plan.captured.overlay, plan.captured.base]
            if shown.get(plan.captured.target) != expected:
                raise HypervisorFailed(f"disk {plan.captured.target} is on {shown.get(plan.captured.target)}")

    async def _bar(self) -> None:
        """From here on the guest starts from its overlays, or not at all, whatever becomes of its definition."""
        for plan in self.order.disks:
            disk = await self._catalog.disk(plan.captured.disk)
            await self._guard.bar(Bar.of(disk, OVERLAY, overlay=plan.captured.overlay))

    def explaining(self) -> contextlib.AbstractContextManager[None]:
        """Say what a read that fails in here most likely means."""
        return contextlib.nullcontext() if self._fleece is None else self._fleece.explaining()

    async def _step(self, step: Step) -> None:
        async with self._catalog.write() as tx:
            await tx.step(self.order.operation, step)
