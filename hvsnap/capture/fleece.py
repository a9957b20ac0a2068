"""Capturing by fleece: old data is copied aside inside the guest's own QEMU before it is overwritten.

The guest's image stays current all the time, so that whoever starts the guest again, knowing nothing of hvsnap, loses
nothing. A crash of QEMU leaves nothing but the scratch images, a crash of the daemon nodes with names of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hvsnap.capture.facts import CapturedDisk
from hvsnap.capture.plan import Decision
from hvsnap.capture.record import DiskPlan
from hvsnap.errors import GuestUnknown, HvsnapError, HypervisorFailed, ReadFailed
from hvsnap.hypervisor import images
from hvsnap.instant import Ready, Span
from hvsnap.model import GuestUuid, Kind, Method
from hvsnap.ports import FleecedDisk, Fleecer, Hypervisor, NbdExport

log = logging.getLogger(__name__)

ATTEMPTS = 3
RETRY_S = 1.0


class Fleece:
    """One fleece of one guest's disks. What :func:`undo` does is beside it, since a crash may come first."""

    def __init__(self, fleecer: Fleecer, guest: GuestUuid, plans: Sequence[DiskPlan]) -> None:
        self._fleecer = fleecer
        self._guest = guest
        self._plans = plans
        self._disks = [fleeced(plan.captured, plan.decision.bitmap) for plan in plans]

    async def prepare(self) -> None:
        """Make the scratch images and put everything in place; the guest writes as before."""
        for plan in self._plans:
            captured = plan.captured
            await images.create_image(captured.scratch, "qcow2", plan.snapshot.size_bytes, like=captured.base)
        await self._fleecer.fleece_prepare(self._guest, self._disks)

    async def hold(self, ready: Ready) -> Span:
        """Hold the instant of all disks; tells when that was."""
        return await self._fleecer.fleece_hold(self._guest, self._disks, ready)

    async def exported(self) -> list[DiskPlan]:
        """Return the plans with the exports to read from; one whose bitmap QEMU refuses becomes a rescan."""
        return [await self._exported(plan, disk) for plan, disk in zip(self._plans, self._disks, strict=True)]

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Say what a read that fails in here most likely means: QEMU gives no reason."""
        try:
            yield
        except ReadFailed as error:
            scratch = ", ".join(disk.scratch for disk in self._disks)
            why = f"{error.message}; QEMU gives an instant up when its scratch image cannot take what is overwritten"
            hint = f"look for space and speed where {scratch} lies; capture.overlay_dir names another place"
            raise ReadFailed(why, hint=hint) from error

    async def _exported(self, plan: DiskPlan, disk: FleecedDisk) -> DiskPlan:
        try:
            return replace(plan, export=await self._export(disk))
        except HypervisorFailed as error:
            if disk.old is None:
                raise
            reason = f"the dirty bitmap could not be exported: {error.message}"
            decision = Decision(Kind.INCREMENTAL, Method.RESCAN, reason)
            return replace(plan, decision=decision, export=await self._export(replace(disk, old=None)))

    async def _export(self, disk: FleecedDisk) -> NbdExport:
        return (await self._fleecer.fleece_export(self._guest, [disk]))[disk.target]


def fleeced(captured: CapturedDisk, bitmap: str | None) -> FleecedDisk:
    """Return a disk of a capture as its fleecer takes it."""
    return FleecedDisk(captured.target, captured.snapshot, captured.scratch, bitmap)


async def undo(hypervisor: Hypervisor, guest: GuestUuid, disks: Sequence[CapturedDisk]) -> None:
    """Remove everything of a fleece, by the guest's real state: now or after a crash of anybody, any number of times.

    Raises what stands in the way; the guest writes to its own image in any case.
    """
    attempt = 1
    while await _active(hypervisor, guest):
        try:
            fleecer = await hypervisor.fleecer(guest)
            await fleecer.fleece_undo(guest, [fleeced(disk, None) for disk in disks])
            break
        except HvsnapError as error:
            # A guest that ends meanwhile has nothing left to undo: look again.
            attempt += 1
            if attempt > ATTEMPTS:
                raise
            log.info("ending the fleece of guest %s: %s; looking again", guest, error.message)
            await asyncio.sleep(RETRY_S)
    for disk in disks:
        await images.remove(disk.scratch)


async def _active(hypervisor: Hypervisor, guest: GuestUuid) -> bool:
    try:
        return (await hypervisor.guest(guest)).active
    except GuestUnknown:
        return False
