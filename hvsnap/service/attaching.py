"""Attaching new disks to guests, through libvirt; a disk is whole before, and stays when that fails.

The journal's entry is opened with the same transaction that tells of the disk, so that a crash in between forgets
nothing: the recovery looks whether the guest has the disk, tries again if not, and tells how it ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container
from typing import Protocol

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Failed, HvsnapError, HypervisorUnreachable, NotFound, Refused
from hvsnap.happenings import EventType
from hvsnap.hypervisor import domain_xml, images
from hvsnap.model import Disk, DiskId, GuestUuid, Layer, Operation, OperationId
from hvsnap.restore import instant
from hvsnap.restore.disk import ATTACH_KIND, Attachment
from hvsnap.restore.target import is_device
from hvsnap.service.inventory import Inventory
from hvsnap.service.requests import CapturesPort
from hvsnap.store.uninterrupted import to_its_end

log = logging.getLogger(__name__)


class Devices(Protocol):
    """Disks of guests: :class:`hvsnap.hypervisor.libvirt_disks.LibvirtDisks`."""

    async def check_attachable(self, uuid: GuestUuid, target: str) -> None:
        """Raise if the guest has a disk there."""
        ...

    async def attach(self, uuid: GuestUuid, target: str, layer: Layer, *, block_device: bool) -> None:
        """Attach a disk, to the running guest and to its definition."""
        ...

    async def attached(self, uuid: GuestUuid, target: str, path: str) -> bool:
        """Whether the guest has this image as that disk."""
        ...


class Attaching:
    """Attaches new disks."""

    def __init__(self, catalog: Catalog, inventory: Inventory, captures: CapturesPort, devices: Devices | None) -> None:
        self._catalog = catalog
        self._inventory = inventory
        self._captures = captures
        self._devices = devices
        self._at_work: set[OperationId] = set()
        self._turn = asyncio.Lock()
        self.serving = False
        """Whether this is a daemon, which serves what instant disks are made of."""

    def at_work(self) -> set[str]:
        """Return the entries of the journal that are being worked on."""
        return set(self._at_work)

    async def check(self, guest_name: str, target: str) -> Attachment:
        """Return where a disk is to be attached. Raises :class:`GuestUnknown`, :class:`BadRequest`, and
        :class:`Refused` for a target that is taken, or a guest that is not libvirt's.
        """
        domain_xml.bus_of(target)
        guest = await self._inventory.guest(guest_name)
        devices = self._libvirt()
        try:
            await devices.check_attachable(guest.uuid, target)
        except NotFound as error:
            hint = "name the image in its launcher"
            raise Refused(f"guest {guest.name} is not one of libvirt's", hint=hint) from error
        return Attachment(guest.uuid, target)

    async def attach(self, operation_id: OperationId, path: str, where: Attachment) -> Disk:
        """Attach the disk of an entry of the journal; return it, known from now on. It comes to its end, whoever waits.

        Raises :class:`Failed`: the disk is there, and is not attached.
        """
        # At once, before anything is awaited: the recovery must not take it for a crash's.
        self._at_work.add(operation_id)
        try:
            return await to_its_end(self._attach(operation_id), name=f"attach {path}")
        except NotFound:
            # A recovery was there first, and has closed the entry.
            if not await self._libvirt().attached(where.guest, where.target, path):
                raise
            return await self._inventory.known_or_attached(f"{where.guest}/{where.target}")

    async def recover(self, only: Container[OperationId] | None = None) -> list[tuple[Operation, HvsnapError | None]]:
        """Attach what a crash kept from it; what libvirt does not answer about stays in the journal."""
        outcome: list[tuple[Operation, HvsnapError | None]] = []
        for operation in await self._catalog.operations(ATTACH_KIND):
            if operation.id in self._at_work or (only is not None and operation.id not in only):
                continue
            if not self.serving and operation.facts["path"] in await self._filling():
                why = f"{operation.facts['path']} is not whole yet: the daemon serves it, then it is attached"
                outcome.append((operation, instant.Awaited(why)))
                continue
            self._at_work.add(operation.id)
            try:
                await self._attach(operation.id)
            except HypervisorUnreachable as error:
                outcome.append((operation, error))
                continue
            except NotFound:
                continue  # it has come to its end by itself
            except HvsnapError as error:
                log.warning("%s", error.message)
            outcome.append((operation, None))
        return outcome

    async def _filling(self) -> set[str]:
        """Return the paths of instant disks that are not whole."""
        return {str(one.facts["target"]) for one in await self._catalog.operations(instant.KIND)}

    # -- inside -----------------------------------------------------------------------------------

    async def _attach(self, operation_id: OperationId) -> Disk:
        try:
            async with self._turn:
                operation = await self._catalog.operation(operation_id)
                error = await self._try(operation)
                if error is not None:
                    await self._tell_failure(operation, error)
                    hint = "it is there: attach it with `virsh attach-disk`, or remove it"
                    why = (
                        f"{operation.facts['path']} was made, but could not be attached as {operation.facts['target']}"
                    )
                    raise Failed(f"{why}: {error.message}", hint=hint)
                return await self._register(operation)
        finally:
            self._at_work.discard(operation_id)

    async def _try(self, operation: Operation) -> HvsnapError | None:
        """Attach it, and return why it is not. Raises :class:`HypervisorUnreachable`: then nobody can tell."""
        devices, uuid = self._libvirt(), GuestUuid(operation.guest_uuid)
        target, path = str(operation.facts["target"]), str(operation.facts["path"])
        layer = Layer(path, str(operation.facts["format"]))
        failure: HvsnapError | None = None
        try:
            if not await devices.attached(uuid, target, path):
                await self._captures.settled(await self._disks_of(uuid))
                await devices.attach(uuid, target, layer, block_device=await asyncio.to_thread(is_device, path))
        except HvsnapError as error:
            failure = error
        # Whatever was answered: what the guest has is what counts.
        try:
            return None if await devices.attached(uuid, target, path) else failure or Failed("the guest lost it again")
        except NotFound as error:
            return error

    async def _disks_of(self, uuid: GuestUuid) -> list[DiskId]:
        """Return the guest's known disks: while they are switched to overlays, a new disk would be taken along."""
        return [disk.id for disk in await self._catalog.disks() if disk.guest_uuid == uuid]

    async def _register(self, operation: Operation) -> Disk:
        """Make the disk one that is known, and close the entry."""
        path, target = str(operation.facts["path"]), str(operation.facts["target"])
        info = await images.image_info(path, str(operation.facts["format"]))
        found = await self._inventory.find_attached(f"{operation.guest_uuid}/{target}")
        disk = await self._inventory.register(found, info.size_bytes)
        async with self._catalog.write() as tx:
            await tx.close_operation(operation.id)
        return disk

    async def _tell_failure(self, operation: Operation, error: HvsnapError) -> None:
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_ATTACH_FAILED, operation.payload | {"error": error.message})
            await tx.close_operation(operation.id)

    def _libvirt(self) -> Devices:
        if self._devices is None:
            hint = "configure hypervisor.libvirt_uri, or attach the disk yourself"
            raise Refused("there is no libvirt to attach a disk with", hint=hint)
        return self._devices
