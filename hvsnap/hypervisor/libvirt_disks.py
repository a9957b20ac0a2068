"""What libvirt does for new disks: volumes in its storage pools, and attaching disks to its guests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt

from hvsnap.errors import BadRequest, NotFound, Refused, TargetExists
from hvsnap.hypervisor import domain_xml
from hvsnap.hypervisor.libvirt_connection import LibvirtConnection
from hvsnap.model import GuestUuid, Layer

T = TypeVar("T")

POOLS_OF_FILES = ("dir", "fs", "netfs")


def _pool(connection: Any, name: str) -> Any:
    try:
        pool = connection.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        raise NotFound(f"there is no storage pool {name[:64]}", hint="`virsh pool-list --all` shows them") from error
    if not pool.isActive():
        raise Refused(f"the storage pool {name} is not active", hint=f"start it: `virsh pool-start {name}`")
    return pool


def _volume(pool: Any, name: str) -> Any | None:
    try:
        return pool.storageVolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
            raise
        return None


class LibvirtDisks:
    """Makes and removes volumes, attaches disks. Raises as :class:`hvsnap.ports.Hypervisor` does."""

    def __init__(self, connection: LibvirtConnection) -> None:
        self._connection = connection

    # -- volumes ----------------------------------------------------------------------------------

    async def volume_path(self, pool: str, name: str) -> str:
        """Return where a new volume of a pool will lie.

        Raises :class:`NotFound`, :class:`Refused` for a pool that is not active, or whose volumes are no files,
        :class:`TargetExists`, :class:`BadRequest` for a name that is none.
        """
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise BadRequest(f"{name[:128]!a} is not the name of a volume", hint="with --pool, TARGET is a plain name")

        def work(connection: Any) -> str:
            found = _pool(connection, pool)
            kind, directory = domain_xml.pool_place(domain_xml.parse(found.XMLDesc(0)))
            if kind not in POOLS_OF_FILES or not directory:
                raise Refused(
                    f"the storage pool {pool} is of type {kind}, whose volumes are no files",
                    hint="make a volume there with `virsh vol-create-as`, and name its device, with --force",
                )
            found.refresh(0)
            if _volume(found, name) is not None:
                raise TargetExists(f"there is a volume {name} in pool {pool} already", hint="choose another name")
            return f"{directory.rstrip('/')}/{name}"

        return await self._connection.call(work)

    async def create_volume(self, pool: str, name: str, image_format: str, size_bytes: int) -> str:
        """Create an empty volume, and return its path. libvirt refuses a name that is taken."""
        xml = domain_xml.volume_xml(name, image_format, size_bytes)
        return await self._connection.call(lambda connection: str(_pool(connection, pool).createXML(xml, 0).path()))

    async def delete_volume(self, pool: str, name: str) -> None:
        """Delete a volume; one that is gone is no error."""

        def work(connection: Any) -> None:
            with contextlib.suppress(NotFound):
                volume = _volume(_pool(connection, pool), name)
                if volume is not None:
                    volume.delete(0)

        await self._connection.call(work)

    async def refresh_pool(self, pool: str) -> None:
        """Let libvirt look at the files of a pool anew."""
        await self._connection.call(lambda connection: _pool(connection, pool).refresh(0))

    # -- guests -----------------------------------------------------------------------------------

    async def check_attachable(self, uuid: GuestUuid, target: str) -> None:
        """Raise :class:`TargetExists` if a guest has a disk there, now or from its next start on."""
        await self._on(uuid, lambda domain: _check_free(domain, target))

    async def attach(self, uuid: GuestUuid, target: str, layer: Layer, *, block_device: bool) -> None:
        """Attach a disk: to the running guest, and to its definition, where it has one."""

        def work(domain: Any) -> None:
            _check_free(domain, target)
            flags = libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
            if domain.isPersistent():
                flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
            domain.attachDeviceFlags(domain_xml.disk_xml(target, layer, block_device=block_device), flags)

        await self._on(uuid, work)

    async def attached(self, uuid: GuestUuid, target: str, path: str) -> bool:
        """Whether a guest has this image as that disk."""

        def work(domain: Any) -> bool:
            return any(path == found for name, found in _targets(domain) if name == target)

        return await self._on(uuid, work)

    async def _on(self, uuid: GuestUuid, function: Callable[[Any], T]) -> T:
        return await self._connection.call(lambda connection: function(connection.lookupByUUIDString(uuid)))


def _targets(domain: Any) -> list[tuple[str, str]]:
    """Return targets and images of a domain's disks, as it runs and as it is defined."""
    found = domain_xml.targets(domain_xml.parse(domain.XMLDesc(0)))
    if domain.isPersistent():
        found += domain_xml.targets(domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
    return found


def _check_free(domain: Any, target: str) -> None:
    if any(name == target for name, _path in _targets(domain)):
        raise TargetExists(f"guest {domain.name()} has a disk {target} already", hint="choose another target")
