"""Disks that hvsnap knows: what holds for each, whether it is still there, and its release (SERVICE 5.6, 8).

A disk that is gone from its guest, or whose guest is gone, is not released for that alone: guests are undefined and
defined anew to be changed, and a disk may come back. It is released when its owner says so, or when it has been gone
for so many days without a break.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from hvsnap import policy as rules
from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, Busy, CaptureRunning, GuestUnknown, HvsnapError, Refused
from hvsnap.happenings import EventType, disk_payload
from hvsnap.model import Disk, GuestView, Snapshot, SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.service.freeing import plan_deletion
from hvsnap.service.inventory import Inventory, is_overlay
from hvsnap.service.requests import CapturesPort
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.uses import Uses
from hvsnap.service.views import when_or_none

log = logging.getLogger(__name__)


def is_gone(disk: Disk, guest: GuestView) -> bool | None:
    """Whether a guest, as it is shown, does not have a known disk; None where that cannot be told."""
    # An overlay that nobody knows may lie on any disk; a guest without disks is one whose disks are not known.
    if not guest.disks or any(is_overlay(view) for view in guest.disks):
        return None
    shown = {(view.serial, "" if view.serial else view.target, view.top.path) for view in guest.disks if view.layers}
    return (disk.serial, "" if disk.serial else disk.target, disk.source) not in shown


class KnownDisks:
    """Changes, watches and releases disks. ``release_days``: how long one must be gone; 0: no matter how long."""

    def __init__(
        self,
        catalog: Catalog,
        inventory: Inventory,
        snapshots: Snapshots,
        captures: CapturesPort,
        uses: Uses,
        clock: Clock,
        *,
        sealed: bool,
        release_days: int,
    ) -> None:
        self._catalog = catalog
        self._inventory = inventory
        self._snapshots = snapshots
        self._captures = captures
        self._uses = uses
        self._clock = clock
        self._sealed = sealed
        self._release_days = release_days

    # -- what holds for a disk --------------------------------------------------------------------

    async def edit(self, name: str, body: wire.DiskEdit) -> wire.Disk:
        """Change what holds for a disk; one that is attached and not known yet becomes known.

        Raises :class:`DiskUnknown`, :class:`BadRequest`, :class:`Refused`.
        """
        changes = {key: value for key, value in body.model_dump(exclude_unset=True).items() if value is not None}
        if not changes:
            raise BadRequest("nothing was said to change", hint="give --delete-auto-with-disk, --encrypted, …")
        disk = await self._inventory.known_or_attached(name)
        if disk.released:
            raise Refused(f"disk {disk.id} is released", hint="`hvsnap snapshot-delete` deletes its snapshots")
        if changes.get("encrypted", disk.encrypted) != disk.encrypted:
            await self._check_encryption(disk, wanted=changes["encrypted"])
        async with self._catalog.write() as tx:
            await tx.update_disk(disk.id, **changes)
        return await self.view(replace(disk, **changes))

    async def _check_encryption(self, disk: Disk, *, wanted: bool) -> None:
        """Keep a chain from being partly plain and partly encrypted (SERVICE 8)."""
        where = f"disk {disk.guest_name}/{disk.target}"
        rows = [row for row in await self._catalog.snapshots(disk.id) if row.state is not State.FAILED]
        if wanted and rows and not self._sealed:
            hint = "delete them first; without a key for the store there will be no others then"
            raise Refused(f"{where} has {len(rows)} snapshots that are stored in plain", hint=hint)
        if not wanted and rows:
            raise Refused(f"{where} has {len(rows)} encrypted snapshots", hint="delete them first")

    async def view(self, disk: Disk) -> wire.Disk:
        """Return a disk as it is told."""
        policies = {str(one.id): one.name for one in await self._catalog.policies()}
        origin = await self._catalog.origin(disk.source)
        return wire.Disk(
            id=disk.id,
            guest=disk.guest_name,
            guest_uuid=disk.guest_uuid,
            target=disk.target,
            path=disk.source,
            format=disk.format,
            size_bytes=disk.size_bytes,
            system=disk.system,
            released=disk.released,
            gone_since=when_or_none(disk.gone_since),
            policy=policies.get(str(disk.policy)),
            delete_auto_with_disk=disk.delete_auto_with_disk,
            encrypted=disk.encrypted,
            origin=None if origin is None else origin.made_of,
        )

    # -- release ----------------------------------------------------------------------------------

    async def release(self, name: str, *, dry_run: bool) -> wire.DiskReleased:
        """Forget a disk that is gone from its guest. Raises :class:`Refused` for one that is there, :class:`Busy`."""
        disk = await self._inventory.disk(name)
        where = f"disk {disk.guest_name}/{disk.target}"
        if disk.released:
            raise Refused(f"disk {disk.id} is released already", hint="`hvsnap chain-list` shows what is left of it")
        if await self._is_attached(disk):
            hint = f"remove it from its guest first: `virsh detach-disk {disk.guest_name} {disk.target} --config`"
            raise Refused(f"{where} is attached to its guest", hint=hint)
        await self._check_free(disk, where)
        rows = [row for row in await self._catalog.snapshots(disk.id) if row.state is not State.FAILED]
        doomed = self._doomed(disk, rows)
        freed = (await plan_deletion(self._catalog, doomed)).together if doomed else 0
        if not dry_run:
            disk, doomed = await self._release(disk, doomed)
        return wire.DiskReleased(
            dry_run=dry_run,
            disk=await self.view(disk),
            deleted=list(doomed),
            freed_bytes=freed,
            kept=len(rows) - len(doomed),
        )

    async def release_due(self, now: float) -> None:
        """Release what has been gone for long enough; whether it still is, is looked up."""
        for disk in await self._catalog.disks():
            gone_s = 0.0 if disk.gone_since is None else now - disk.gone_since
            if not self._release_days or gone_s < self._release_days * rules.DAY_S:
                continue
            try:
                if not await self._is_attached(disk):
                    await self._check_free(disk, disk.id)
                    rows = await self._catalog.snapshots(disk.id)
                    await self._release(disk, self._doomed(disk, rows))
            except HvsnapError as error:
                log.info("disk %s stays for now: %s", disk.id, error.message)

    async def _check_free(self, disk: Disk, where: str) -> None:
        self._uses.check_disk(disk.id)
        if disk.id in self._captures.busy_disks():
            raise CaptureRunning(f"{where} is being captured")
        for operation in await self._catalog.operations():
            if operation.facts.get("disk") == disk.id:
                raise Refused(f"a {operation.kind} of {where} is not finished", hint="`hvsnap recover` finishes it")

    def _doomed(self, disk: Disk, rows: Sequence[Snapshot]) -> list[SnapshotId]:
        """Return the snapshots that go with a disk; a locked one goes later: the schedule sees to it."""
        if not disk.delete_auto_with_disk:
            return []
        return [row.id for row in rules.evictable(rows, self._clock.now())]

    async def _release(self, disk: Disk, doomed: Sequence[SnapshotId]) -> tuple[Disk, list[SnapshotId]]:
        """Release a disk, and delete what goes with it; what is in use the schedule deletes later."""
        with self._uses.hold_disk(disk.id, "being released"):
            async with self._catalog.write() as tx:
                await tx.update_disk(disk.id, released=True, policy=None)
                await tx.emit(EventType.DISK_RELEASED, disk_payload(disk))
        gone = []
        for snapshot in doomed:
            try:
                await self._snapshots.delete([snapshot], dry_run=False)
                gone.append(snapshot)
            except HvsnapError as error:
                log.info("%s stays for now: %s", snapshot, error.message)
        return replace(disk, released=True, policy=None), gone

    # -- whether disks are there ------------------------------------------------------------------

    async def look(self) -> None:
        """Look which known disks are gone from their guests, and which are back; tell both."""
        census = await self._inventory.census()
        guests = {guest.uuid: guest for guest in census.guests}
        for shown in census.guests:
            for view in shown.disks:
                await self._inventory.known(shown, view)  # a disk's row follows it to another image
        changed: list[tuple[Disk, bool]] = []
        for disk in await self._catalog.disks():
            guest = guests.get(disk.guest_uuid)
            if guest is None and census.silent:
                continue  # it may belong to whoever does not answer
            gone = True if guest is None else is_gone(disk, guest)
            if gone is not None and gone != (disk.gone_since is not None):
                changed.append((disk, gone))
        if not changed:
            return
        async with self._catalog.write() as tx:
            for disk, gone in changed:
                await tx.update_disk(disk.id, gone_since=self._clock.now() if gone else None)
                await tx.emit(EventType.DISK_DETACHED if gone else EventType.DISK_ATTACHED, disk_payload(disk))

    async def _is_attached(self, disk: Disk) -> bool:
        """Whether a disk is there now. Raises where that cannot be told."""
        try:
            guest = await self._inventory.guest(disk.guest_uuid)
        except GuestUnknown:
            return False
        gone = is_gone(disk, guest)
        if gone is None:
            hint = "`hvsnap recover`, or start the guest, and try again"
            raise Busy(f"the disks of guest {guest.name} are not known at present", hint=hint)
        return not gone
