"""Bringing a guest's disk back from its overlay to the frozen image: decided purely, done step by step.

The overlay and the image below it together always hold the guest's newest data, until the commit has pivoted; from
then on the image alone does. Every step looks at the present first, so it may be interrupted and repeated at any point.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto

from hvsnap.capture.facts import CapturedDisk
from hvsnap.capture.pivot import pivot_proved
from hvsnap.errors import Busy, ForeignJob, GuestUnknown, HypervisorFailed
from hvsnap.hypervisor import images
from hvsnap.model import DiskView, GuestUuid, GuestView
from hvsnap.ports import Hypervisor, JobView

POLL_S_FIRST = 0.02
POLL_S_MAX = 0.5


class Action(Enum):
    """What to do next about one overlay."""

    DONE = auto()  # no layer of the guest's disks, and no file: nothing is left
    DISCARD = auto()  # a file that is no layer of any disk and holds nothing newer
    START_COMMIT = auto()
    WAIT = auto()
    PIVOT = auto()
    COMMIT_OFFLINE = auto()
    FINISH_PIVOT = auto()  # pivoted, but libvirt's definition still names the overlay


def attached(guest: GuestView | None, path: str) -> DiskView | None:
    """Return the guest's disk that has an image anywhere in its backing chain."""
    if guest is None:
        return None
    return next((d for d in guest.disks if any(layer.path == path for layer in d.layers)), None)


def next_action(
    guest: GuestView | None, disk: CapturedDisk, job: JobView | None, *, exists: bool, empty: bool, pivoted: bool
) -> Action:
    """Decide what is to be done about a disk's overlay.

    ``exists``: the overlay's file is there; ``empty``: no guest wrote to it; ``pivoted``: the pivot was asked for,
    and the marker in the overlay shows that it was closed in good order. Raises :class:`ForeignJob` and
    :class:`HypervisorFailed` where somebody else has changed the disk: their work is not touched; and :class:`Busy`
    for a guest that is saved: what is kept of it names the overlay.
    """
    found = attached(guest, disk.overlay)
    if found is None:
        if not exists:
            return Action.DONE
        if empty or pivoted:
            return Action.DISCARD
        if guest is None or attached(guest, disk.base) is None:
            return Action.COMMIT_OFFLINE  # unplugged: nobody goes on with either
        raise HypervisorFailed(
            f"{disk.overlay} holds newer data of disk {disk.target}, but the guest is no longer on it",
            hint=f"if it ran on {disk.base} since, the two have parted: choose one. Either remove the overlay, or shut "
            f"the guest off and run `qemu-img commit -b {disk.base} {disk.overlay}`; then `hvsnap recover`",
        )
    if found.top.path != disk.overlay:
        raise HypervisorFailed(
            f"another snapshot was made on top of {disk.overlay}",
            hint=f"merge {found.top.path} into it (virsh blockcommit), then run `hvsnap recover`",
        )
    if guest is None or not guest.active:
        if pivoted:
            return Action.FINISH_PIVOT
        if guest is not None and guest.saved:
            raise Busy(
                f"guest {guest.name} is saved, and will go on with {disk.overlay}",
                hint="restore or start it; its disk is merged then",
            )
        return Action.COMMIT_OFFLINE
    if job is None:
        return Action.START_COMMIT
    if job.type != "active-commit":
        raise ForeignJob(f"a {job.type} job of another program is at work on disk {disk.target}")
    return Action.PIVOT if job.ready else Action.WAIT


class Merge:
    """Brings disks back from their overlays, online or offline, whichever the guest's state asks for."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    async def look(self, uuid: GuestUuid) -> GuestView | None:
        """Return the guest, or None when libvirt no longer knows it."""
        try:
            return await self._hypervisor.guest(uuid)
        except GuestUnknown:
            return None

    async def decide(self, uuid: GuestUuid, disk: CapturedDisk, *, pivot_asked: bool, asked: str = "") -> Action:
        """Look at the guest, the files and the jobs, and decide; ``asked`` names the QEMU that was asked to pivot."""
        guest = await self.look(uuid)
        exists = await asyncio.to_thread(images.exists, disk.overlay)
        found = attached(guest, disk.overlay)
        job = None
        if guest is not None and guest.active and found is not None:
            job = await self._hypervisor.job(uuid, found.target)
        pivoted = empty = False
        if exists and (found is None or guest is None or not guest.active):
            attached_to_base = guest is not None and found is None and attached(guest, disk.base) is not None
            if pivot_asked:
                pivoted = await pivot_proved(disk, guest, asked, on_base=attached_to_base)
            if found is None and not pivoted:
                empty = await images.is_empty(disk.overlay, key=await self._hypervisor.passphrase(disk.secret))
        elif found is not None and guest is not None and not guest.active and guest.instance is not None:
            # Somebody has settled it by hand and removed the overlay; only our own memory still names it.
            pivoted = not exists
        return next_action(guest, disk, job, exists=exists, empty=empty, pivoted=pivoted)

    async def act(self, action: Action, uuid: GuestUuid, disk: CapturedDisk) -> None:
        """Do one step; :attr:`Action.WAIT` and :attr:`Action.DONE` are the caller's."""
        if action is Action.START_COMMIT:
            await self._hypervisor.commit_start(uuid, await self._target(uuid, disk), disk.base)
        elif action is Action.PIVOT:
            await self._hypervisor.commit_pivot(uuid, await self._target(uuid, disk))
        elif action is Action.COMMIT_OFFLINE:
            key = await self._hypervisor.passphrase(disk.secret)
            await images.commit_overlay(disk.overlay, disk.base, key=key)
            await self._leave_overlay(uuid, disk)
        elif action is Action.FINISH_PIVOT:
            await self._leave_overlay(uuid, disk)
        elif action is Action.DISCARD:
            await images.remove(disk.overlay)

    async def _target(self, uuid: GuestUuid, disk: CapturedDisk) -> str:
        found = attached(await self.look(uuid), disk.overlay)
        return disk.target if found is None else found.target

    async def _leave_overlay(self, uuid: GuestUuid, disk: CapturedDisk) -> None:
        """Point the shut-off guest's definition at the image, then remove the overlay that it no longer names."""
        guest = await self.look(uuid)
        found = attached(guest, disk.overlay)
        if guest is not None and found is not None:
            await self._hypervisor.redefine_source(uuid, found.target, disk.base, disk.base_format)
            if attached(await self.look(uuid), disk.overlay) is not None:
                return  # it was started meanwhile: the next look decides anew
        await images.remove(disk.overlay)
