"""What `list` shows: guests, their disks, how well each is protected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.model import Bitmap, Disk, DiskId, DiskView, GuestView, Snapshot, State
from hvsnap.ports import Hypervisor
from hvsnap.service.inventory import Inventory
from hvsnap.service.requests import CapturesPort
from hvsnap.service.views import when_or_none

INSPECT_MAX = 4
"""Images and monitors that are looked at side by side; each look is a process or a thread."""

InspectImage = Callable[[str, str], Awaitable[ImageInfo]]
"""``(path, format)`` → what the image is, without taking its lock."""


def health(expected: str | None, bitmaps: list[Bitmap] | None) -> wire.BitmapHealth:
    """Return whether the bitmap that the catalog expects is there; ``bitmaps`` None: nobody could tell."""
    if expected is None:
        return wire.BitmapHealth.NONE
    if bitmaps is None:
        return wire.BitmapHealth.UNKNOWN
    whole = any(b.name == expected and b.recording and not b.inconsistent for b in bitmaps)
    return wire.BitmapHealth.RECORDING if whole else wire.BitmapHealth.LOST


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at a disk's image told; None: nothing."""

    size_bytes: int | None = None
    bitmaps: list[Bitmap] | None = None


class Guests:
    """Lists guests and disks."""

    def __init__(
        self,
        inventory: Inventory,
        hypervisor: Hypervisor,
        catalog: Catalog,
        captures: CapturesPort,
        inspect_image: InspectImage,
    ) -> None:
        self._inventory = inventory
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._captures = captures
        self._inspect_image = inspect_image
        self._turns = asyncio.Semaphore(INSPECT_MAX)

    async def listing(self) -> wire.GuestList:
        """Return all guests, by name. Raises :class:`HypervisorUnreachable`."""
        census = await self._inventory.census()
        chains: dict[DiskId, list[Snapshot]] = {}
        for snapshot in await self._catalog.snapshots(state=State.ACCOMPLISHED):
            chains.setdefault(snapshot.disk, []).append(snapshot)
        busy = self._captures.busy_disks()
        policies: dict[str | None, str] = {one.id: one.name for one in await self._catalog.policies()}
        return wire.GuestList(
            guests=[await self._guest(guest, chains, policies, busy) for guest in census.guests],
            notes=[f"{name}: {error.message}" for name, error in census.silent.items()],
        )

    async def _guest(
        self,
        guest: GuestView,
        chains: dict[DiskId, list[Snapshot]],
        policies: dict[str | None, str],
        busy: set[DiskId],
    ) -> wire.Guest:
        known = [await self._inventory.known(guest, disk) for disk in guest.disks]
        seen = await asyncio.gather(
            *(self._look(guest, disk, row) for disk, row in zip(guest.disks, known, strict=True))
        )
        disks = []
        for disk, row, look in zip(guest.disks, known, seen, strict=True):
            chain = [] if row is None else chains.get(row.id, [])
            one = self._disk(disk, row, look, chain, capturing=row is not None and row.id in busy)
            disks.append(one.model_copy(update={"policy": policies.get(None if row is None else row.policy)}))
        return wire.Guest(name=guest.name, uuid=guest.uuid, state=guest.state, disks=disks)

    async def _look(self, guest: GuestView, disk: DiskView, known: Disk | None) -> _Seen:
        """Look at a disk's image, as far as the listing needs it; one that cannot be read is no error here."""
        if not disk.layers:
            return _Seen()
        expects = known is not None and known.bitmap is not None
        async with self._turns:
            with contextlib.suppress(HvsnapError):
                if guest.active and known is not None:
                    bitmaps = await self._hypervisor.bitmaps(guest.uuid, disk.target) if expects else None
                    return _Seen(known.size_bytes, bitmaps)
                info = await self._inspect_image(disk.top.path, disk.top.format)
                return _Seen(info.size_bytes, list(info.bitmaps))
        return _Seen(None if known is None else known.size_bytes)

    @staticmethod
    def _disk(
        disk: DiskView, known: Disk | None, seen: _Seen, chain: list[Snapshot], *, capturing: bool
    ) -> wire.GuestDisk:  # fmt: skip
        last = max(chain, key=lambda snapshot: snapshot.sequence, default=None)
        protection = wire.Protection.PROTECTED if last else wire.Protection.UNPROTECTED
        return wire.GuestDisk(
            target=disk.target,
            id=None if known is None else known.id,
            bus=disk.bus,
            path=disk.layers[0].path if disk.layers else "",
            format=disk.layers[0].format if disk.layers else "",
            size_bytes=seen.size_bytes,
            system=disk.system,
            protection=wire.Protection.SKIPPED if disk.skip_reason else protection,
            last_snapshot=None if last is None else last.id,
            last_snapshot_at=None if last is None else when_or_none(last.created_at),
            snapshots=len(chain),
            policy=None,
            bitmap=health(None if known is None else known.bitmap, seen.bitmaps),
            capturing=capturing,
            skip_reason=disk.skip_reason,
        )
