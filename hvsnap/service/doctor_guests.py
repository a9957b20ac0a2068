"""How the doctor looks at guests' disks: definitions, images, bitmaps. What cannot be looked at is left out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol

from hvsnap.errors import HvsnapError
from hvsnap.hypervisor.disk_settings import DiskSettings, disk_settings
from hvsnap.model import Bitmap, DiskId, DiskView, GuestUuid, GuestView
from hvsnap.ports import Fleecer
from hvsnap.service import doctor_looks, findings_disks
from hvsnap.service.findings_disks import QCOW2_MAGIC, DiskSeen
from hvsnap.service.guests import INSPECT_MAX, InspectImage
from hvsnap.service.inventory import Inventory
from hvsnap.wire import Finding


class GuestHost(Protocol):
    """What is asked of the hypervisor."""

    async def definition(self, uuid: GuestUuid) -> str:
        """Return what the guest would be started from next: libvirt's XML, or JSON of a bare guest."""
        ...

    async def bitmaps(self, uuid: GuestUuid, target: str) -> list[Bitmap]:
        """Return the bitmaps of the running guest's active image."""
        ...

    async def fleecer(self, uuid: GuestUuid) -> Fleecer:
        """Return who fleeces the guest's disks."""
        ...


class DiskLooks:
    """Looks at the disks of guests."""

    def __init__(self, hypervisor: GuestHost, inventory: Inventory, inspect_image: InspectImage) -> None:
        self._hypervisor = hypervisor
        self._inventory = inventory
        self._inspect_image = inspect_image
        self._turns = asyncio.Semaphore(INSPECT_MAX)

    async def disks(self, guests: Sequence[GuestView], busy: set[DiskId]) -> list[DiskSeen]:
        """Return all disks that can be captured, guest after guest."""
        looks = []
        for guest in guests:
            settings = await self._settings(guest)
            for disk in guest.disks:
                if not disk.skip_reason and disk.layers:
                    looks.append(self._look(guest, disk, settings.get(disk.target), busy))
        return list(await asyncio.gather(*looks))

    async def unfleeceable(self, guests: Sequence[GuestView]) -> list[Finding]:
        """Ask for every running bare guest whether its QEMU can hold an instant; return those that cannot."""
        found = []
        for guest in guests:
            if not (guest.fleece and guest.active):
                continue
            try:
                fleecer = await self._hypervisor.fleecer(guest.uuid)
                await fleecer.fleece_check(guest.uuid, [disk.target for disk in guest.disks if not disk.skip_reason])
            except HvsnapError as error:
                found.append(findings_disks.fleece(guest.name, error))
        return found

    async def _settings(self, guest: GuestView) -> dict[str, DiskSettings]:
        with contextlib.suppress(HvsnapError):
            definition = await self._hypervisor.definition(guest.uuid)
            if definition.lstrip().startswith("<"):
                return {one.target: one for one in disk_settings(definition)}
        return {}

    async def _look(
        self, guest: GuestView, disk: DiskView, settings: DiskSettings | None, busy: set[DiskId]
    ) -> DiskSeen:  # fmt: skip
        known = await self._inventory.known(guest, disk)
        bottom = disk.layers[-1]
        bitmaps: Sequence[Bitmap] = ()
        unnamed = ""
        async with self._turns:
            with contextlib.suppress(HvsnapError):
                info = await self._inspect_image(disk.top.path, disk.top.format)
                bitmaps = info.bitmaps
                unnamed = info.backing_path if info.backing_path and not info.backing_format else ""
            with contextlib.suppress(HvsnapError):
                if guest.active:
                    bitmaps = await self._hypervisor.bitmaps(guest.uuid, disk.target)
            raw = bottom.format == "raw"
            head = await asyncio.to_thread(doctor_looks.head, bottom.path, len(QCOW2_MAGIC)) if raw else b""
        return DiskSeen(
            guest=guest.name,
            target=disk.target,
            path=disk.top.path,
            format=bottom.format,
            cache="" if settings is None else settings.cache,
            discard=None if settings is None else settings.discard,
            head=head,
            backing_unnamed=unnamed,
            bitmaps=tuple(bitmaps),
            expected=None if known is None else known.bitmap,
            capturing=known is not None and known.id in busy,
        )
