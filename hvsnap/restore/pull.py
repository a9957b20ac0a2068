"""Letting a guest's own QEMU fill its instant disk: nobody else may write to an image that it has open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

from hvsnap.errors import Busy, Failed, NoSpace
from hvsnap.model import GuestState, GuestUuid, Progress
from hvsnap.ports import Hypervisor

RESERVE_BYTES = 64 << 20
"""Left to the guest: filled up by its own disk, the device would stop it at its next write."""

JOBS = ("pull", "stream")
"""What libvirt, and what QEMU calls it."""

Report = Callable[[Progress], None]


class Pulling(Hypervisor, Protocol):
    """A hypervisor whose guests can fill their disks themselves."""

    async def pull_start(self, uuid: GuestUuid, target: str) -> None:
        """Let QEMU copy what lies below a disk's image into it, until it stands alone."""
        ...

    async def pull_stop(self, uuid: GuestUuid, target: str) -> None:
        """Give that up; what was copied stays."""
        ...


class Puller:
    """Fills one disk, a look at a time."""

    def __init__(self, hypervisor: Pulling, path: str) -> None:
        self._hypervisor = hypervisor
        self._path = path
        self._started: tuple[GuestUuid, str] | None = None

    async def look(self, report: Report) -> None:
        """Start the job where none is, tell how far it is; let a guest go on that its disk has stopped.

        Raises :class:`Busy` for an image that others have open, :class:`NoSpace`, :class:`Failed` for a job that ended
        before the disk was whole, and what the hypervisor raises.
        """
        uuid, target, state = await self._find()
        free_bytes = await asyncio.to_thread(_free_bytes, self._path)
        job = await self._hypervisor.job(uuid, target)
        if job is not None and job.type not in JOBS:
            raise Busy(f"another job ({job.type}) is at work on the disk", hint="it is filled after that")
        if free_bytes < RESERVE_BYTES:
            if job is not None:
                await self._hypervisor.pull_stop(uuid, target)
            self._started = None
            directory = os.path.dirname(self._path)
            raise NoSpace(
                f"{directory} has {free_bytes} bytes free, which are left to the guest", hint="free some space"
            )
        if state is GuestState.PAUSED:
            # Only what an I/O error has stopped goes on: with error_policy='stop' its source was away for a moment.
            await self._hypervisor.resume_after_error(uuid)
        if job is not None:
            self._started = uuid, target
            if job.total_bytes:
                report(Progress("", job.done_bytes, job.total_bytes, 0.0, None))
        elif self._started == (uuid, target):
            self._started = None
            raise Failed("QEMU gave up filling it", hint="its log and the daemon's say why")
        else:
            await self._hypervisor.pull_start(uuid, target)
            self._started = uuid, target

    async def _find(self) -> tuple[GuestUuid, str, GuestState]:
        """Return the running guest's disk whose image it is."""
        for guest in await self._hypervisor.guests():
            for disk in guest.disks if guest.active else ():
                if not disk.layers:
                    continue
                if await asyncio.to_thread(_is_same, disk.top.path, self._path):
                    return guest.uuid, disk.target, guest.state
        why = f"{self._path} is open in a program that hvsnap does not know"
        raise Busy(why, hint="it is filled once that has ended")


def _is_same(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _free_bytes(path: str) -> int:
    seen = os.statvfs(os.path.dirname(path))
    return seen.f_bavail * seen.f_frsize
