"""What disks are made of: a snapshot, or an image, which stands for the snapshot behind it."""

from __future__ import annotations

import asyncio

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import ImageUnknown, NotFound, Refused
from hvsnap.model import Disk, Snapshot
from hvsnap.restore.target import inode_of
from hvsnap.service.snapshots import ID_LENGTH_MAX, Snapshots


class Origins:
    """Looks up what a disk is to be made of, and what one was made of."""

    def __init__(self, catalog: Catalog, snapshots: Snapshots) -> None:
        self._catalog = catalog
        self._snapshots = snapshots

    async def find(self, name: str) -> tuple[str, Snapshot]:
        """Return the id of a snapshot or image, and the snapshot. Images go by id or name, too.

        Raises :class:`SnapshotUnknown`, :class:`ImageUnknown`.
        """
        for image in await self._catalog.images():
            if name in (image.id, image.name):
                return image.id, await self._catalog.snapshot(image.snapshot)
        if name.startswith("i-"):
            raise ImageUnknown(f"there is no image {name[:ID_LENGTH_MAX]}")
        snapshot = await self._snapshots.row(name)
        return snapshot.id, snapshot

    async def of_disk(self, disk: Disk) -> tuple[str, Snapshot]:
        """Return what a disk was made of. Raises :class:`Refused` where that is not known, or gone (SERVICE 4.5)."""
        where = f"disk {disk.guest_name}/{disk.target}"
        known = await self._catalog.origin(disk.source)
        if known is None:
            hint = "only disks that `hvsnap disk-create` made have an origin; roll it back to a snapshot instead"
            raise Refused(f"{where} was not made of a snapshot or image by hvsnap", hint=hint)
        if known.inode is not None and known.inode != await asyncio.to_thread(inode_of, disk.source):
            hint = "make a new disk of the origin: `hvsnap disk-create`"
            raise Refused(f"{where}: the file that was made of {known.made_of} was replaced by another one", hint=hint)
        try:
            return await self.find(known.made_of)
        except NotFound as error:
            why = f"{where} was made of {known.made_of}, which is deleted: it can no longer be re-initialised"
            raise Refused(why, hint="roll it back to a snapshot of its own instead") from error
