"""Disks that are on another image than before, and the same all the same: others put overlays on them, or merge them.

``virsh snapshot-create --disk-only`` gives a disk a new image that builds on the old one; ``blockcommit --pivot``
brings it back to that, ``blockpull`` makes it independent. The disk's content goes on where it was through all of it,
and so does its chain. What shows it is the backing chain on the way up, and on the way down what the disk's images were
before.

Its bitmap is not believed any more: libvirt puts an empty one of the same name into every overlay that it makes, which
misses what was written since the last snapshot and before. The next capture reads the whole disk, once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor import images
from hvsnap.model import Disk, DiskView, GuestView

log = logging.getLogger(__name__)

FORMER_MAX = 16
DEPTH_MAX = 16


class Followed:
    """Finds known disks by the images below theirs, and by those that they had; a found one's row follows."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def find(self, guest: GuestView, view: DiskView) -> Disk | None:
        """Return the row of a disk whose topmost image is not known, its row brought up to date; None if it is new."""
        mine = [disk for disk in await self._catalog.disks() if _same_place(disk, guest, view)]
        if not mine:
            return None
        below = await _below(view)
        for disk in sorted(mine, key=lambda disk: disk.created_at, reverse=True):
            former = await self._former(disk)
            if disk.source in below or view.top.path in former:
                return await self._follow(disk, view, former)
        return None

    async def _former(self, disk: Disk) -> list[str]:
        try:
            told = json.loads(await self._catalog.upkeep.text(f"former/{disk.id}") or "[]")
        except ValueError:
            return []
        return [one for one in told if isinstance(one, str)] if isinstance(told, list) else []

    async def _follow(self, disk: Disk, view: DiskView, former: Sequence[str]) -> Disk:
        kept = [one for one in former if one not in (disk.source, view.top.path)]
        # First what it was: a crash in between leaves one name too many, and never one too few.
        await self._catalog.upkeep.set_text(f"former/{disk.id}", json.dumps([*kept, disk.source][-FORMER_MAX:]))
        async with self._catalog.write() as tx:
            await tx.update_disk(disk.id, source=view.top.path, format=view.top.format, bitmap=None)
        log.info("disk %s of %s is on %s now, and was on %s", disk.id, disk.guest_name, view.top.path, disk.source)
        return replace(disk, source=view.top.path, format=view.top.format, bitmap=None)


def _same_place(disk: Disk, guest: GuestView, view: DiskView) -> bool:
    mine = disk.guest_uuid == guest.uuid and disk.serial == view.serial
    return mine and (bool(view.serial) or disk.target == view.target)


async def _below(view: DiskView) -> set[str]:
    """Return the images that a disk's topmost one builds on; of a guest that is off its image has to be asked."""
    if len(view.layers) > 1:
        return {layer.path for layer in view.layers[1:]}
    found: set[str] = set()
    path, image_format = view.top.path, view.top.format
    while image_format == "qcow2" and len(found) < DEPTH_MAX:
        try:
            info = await images.image_info(path, image_format)
        except HypervisorFailed:
            break  # it is not there, or cannot be read: then nothing shows that it is the same disk
        if info.backing_path is None or info.backing_path in found:
            break
        path, image_format = info.backing_path, info.backing_format or "raw"
        found.add(path)
    return found
