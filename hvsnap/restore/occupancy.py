"""Whether anybody uses what is to be written over: guests, those that build on it, any program of the host.

What a guest's QEMU has open it goes on writing to, whatever lies under the name; so the answer comes from all sides,
and any of them is enough for a no.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, HypervisorFailed, Refused
from hvsnap.hypervisor import image_lock, images
from hvsnap.ports import Hypervisor

BACKING_DEPTH_MAX = 16

Identity = tuple[str, int, int]


def identity(path: str) -> Identity | None:
    """Return what makes two names mean the same file or device; None if nothing is there. Blocking."""
    try:
        seen = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(seen.st_mode):
        return "device", os.major(seen.st_rdev), os.minor(seen.st_rdev)
    return "file", seen.st_dev, seen.st_ino


class Occupancy:
    """Looks who uses a path."""

    def __init__(self, hypervisor: Hypervisor, catalog: Catalog) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog

    async def check(self, path: str) -> None:
        """Raise :class:`Refused` for what belongs to a guest, :class:`Busy` for what a program has open.

        Guests that are off count, and so do the images beneath theirs.
        """
        wanted = await asyncio.to_thread(identity, path)
        if wanted is None:
            return
        for owner, image in await self._images():
            if await asyncio.to_thread(identity, image) == wanted:
                raise Refused(f"{path} belongs to {owner}", hint="choose another place, or remove that disk first")
        await asyncio.to_thread(_check_unused, path)

    async def check_no_base(self, path: str) -> None:
        """Raise :class:`Refused` for an image that another one builds on: written to, it would ruin that one."""
        wanted = await asyncio.to_thread(identity, path)
        for owner, image in await self._foundations():
            if wanted is not None and await asyncio.to_thread(identity, image) == wanted:
                hint = "make that one independent first (`virsh blockpull`, `qemu-img rebase`), or make a new disk"
                raise Refused(f"{owner} builds on {path}, which must not change beneath it", hint=hint)

    async def check_no_writer(self, path: str) -> None:
        """Raise :class:`Busy` for a block device that a program has open for writing; files have QEMU's locks."""
        pid = await asyncio.to_thread(_written_by, path)
        if pid is not None:
            raise Busy(f"{path} is in use: process {pid} has it open for writing", hint="end its use, and try again")

    @contextlib.asynccontextmanager
    async def held(self, path: str) -> AsyncIterator[None]:
        """Hold a block device: nothing of the host can be mounted from it or built on it as long as this lasts.

        Raises :class:`Busy` where that is so already.
        """
        fd = await asyncio.to_thread(_open_exclusively, path)
        try:
            yield
        finally:
            os.close(fd)

    async def _foundations(self) -> list[tuple[str, str]]:
        """Return ``(who, path)`` of every image that one of a guest's builds on."""
        census = await self._hypervisor.census()
        found: list[tuple[str, str]] = []
        for guest in census.guests:
            for disk in guest.disks:
                who = f"{guest.name}/{disk.target}"
                found += [(who, layer.path) for layer in disk.layers[1:]]
                if disk.layers:
                    found += await _beneath(who, disk.layers[-1].path, disk.layers[-1].format)
        return found

    async def _images(self) -> list[tuple[str, str]]:
        """Return ``(who, path)`` of every image that a guest has, is known to have had, or builds on."""
        census = await self._hypervisor.census()
        found = {
            (f"{guest.name}/{disk.target}", layer.path, layer.format)
            for guest in census.guests
            for disk in guest.disks
            for layer in disk.layers
        }
        # A hypervisor that is silent has guests all the same.
        found |= {(f"{one.guest_name}/{one.target}", one.source, one.format) for one in await self._catalog.disks()}
        for operation in await self._catalog.operations(KIND):
            for disk in CaptureFacts.of(operation).disks:
                found.add((f"guest {operation.guest_uuid}", disk.base, disk.base_format))
        owned = [(owner, path) for owner, path, _format in found]
        return owned + [one for owner, path, kind in found for one in await _beneath(owner, path, kind)]


async def _beneath(owner: str, path: str, image_format: str) -> list[tuple[str, str]]:
    """Return the images that one builds on, as far down as can be read."""
    found: list[tuple[str, str]] = []
    while image_format == "qcow2" and len(found) < BACKING_DEPTH_MAX:
        try:
            info = await images.image_info(path, image_format)
        except HypervisorFailed:
            break  # it is gone, or belongs to a host that is not this one
        if info.backing_path is None:
            break
        path, image_format = info.backing_path, info.backing_format or "raw"
        found.append((owner, path))
    return found


# -- blocking -------------------------------------------------------------------------------------


def _check_unused(path: str) -> None:
    if stat.S_ISBLK(os.stat(path).st_mode):
        os.close(_open_exclusively(path))
        pid = _opened_by(os.stat(path).st_rdev, _processes())
        if pid is not None:
            raise Busy(f"{path} is in use: process {pid} has it open", hint="end its use, or choose another device")
    elif image_lock.in_use(path):
        raise Busy(f"{path} is in use: QEMU, or another program of its kind, has it open", hint="choose another place")


def _open_exclusively(path: str) -> int:
    """Return a device opened so that the kernel lets nobody else claim it: mounts, LVM, RAID, swap."""
    try:
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        hint = "unmount it, or take it out of what is built on it; or choose another device"
        raise Busy(f"{path} cannot be had: {error.strerror}", hint=hint) from error


def _processes() -> Iterable[str]:
    return (name for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid())


def _written_by(path: str) -> str | None:
    """Return a process that has a block device open for writing."""
    with contextlib.suppress(OSError):
        seen = os.stat(path)
        if stat.S_ISBLK(seen.st_mode):
            return _opened_by(seen.st_rdev, _processes(), to_write=True)
    return None


def _opened_by(device: int, processes: Iterable[str], *, to_write: bool = False) -> str | None:
    """Return a process that has a device open, as far as this one may look.

    QEMU's locks do not tell: in the private /dev that libvirt makes for each guest the device is another inode.
    """
    for pid in processes:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    seen = os.stat(entry.path)
                    mine = stat.S_ISBLK(seen.st_mode) and seen.st_rdev == device
                    if mine and (not to_write or _may_write(pid, entry.name)):
                        return pid
    return None


def _may_write(pid: str, number: str) -> bool:
    """Whether a process has opened a file for writing (``flags`` in /proc/PID/fdinfo, octal)."""
    for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False
