"""Listing snapshots, looking at one, deleting them (SERVICE 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.images import promoted
from hvsnap.drill import Drill
from hvsnap.errors import BadRequest, Refused, SnapshotInUse, SnapshotLocked, SnapshotUnknown
from hvsnap.happenings import EventType, snapshot_payload
from hvsnap.model import Disk, Operation, Snapshot, SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.restore import instant, rollback
from hvsnap.service import views
from hvsnap.service.descendants import disks_made_of
from hvsnap.service.freeing import plan_deletion
from hvsnap.service.inventory import Inventory
from hvsnap.service.names import check_description, check_name, check_tags
from hvsnap.service.requests import CapturesPort
from hvsnap.service.uses import Uses

LIST_MAX = 10_000
ID_LENGTH_MAX = 64

Rule = Callable[[Sequence[Snapshot]], Sequence[SnapshotId]]
"""Which of a disk's snapshots come to their end, in that order."""


def check_unused(ids: Sequence[SnapshotId], progressing: Sequence[Snapshot], journal: Sequence[Operation]) -> None:
    """Refuse a deletion that a running capture, an open rollback or an instant disk stands in the way of.

    SERVICE 4.6.
    """
    for operation in journal:
        if operation.kind == rollback.KIND and operation.facts.get("snapshot") in ids:
            why = f"disk {operation.facts.get('disk')} is being rolled back to {operation.facts['snapshot']}"
            raise SnapshotInUse(
                why, hint="try again when that has ended; `hvsnap recover` goes on with an interrupted one"
            )
        if operation.kind == instant.KIND and operation.facts.get("snapshot") in ids:
            why = f"{operation.facts.get('target')} is still being filled from {operation.facts['snapshot']}"
            raise SnapshotInUse(why, hint="wait until it is whole (`hvsnap watch`), or remove that disk")
    for snapshot in progressing:
        if snapshot.id in ids:
            hint = "wait for it, or end it with Ctrl-C where it was asked for"
            raise SnapshotInUse(f"snapshot {snapshot.id} is still being made", hint=hint)
        if snapshot.parent in ids:
            why = f"snapshot {snapshot.parent} is the base of {snapshot.id}, which is being made"
            raise SnapshotInUse(why, hint="try again when that one has ended")


class Snapshots:
    """Lists, shows and deletes snapshots."""

    def __init__(
        self, catalog: Catalog, inventory: Inventory, captures: CapturesPort, uses: Uses, clock: Clock
    ) -> None:
        self._clock = clock
        self._catalog = catalog
        self._inventory = inventory
        self._captures = captures
        self._uses = uses

    async def listing(
        self, *, guest: str = "", disk: str = "", state: State | None = None, limit: int = LIST_MAX
    ) -> wire.SnapshotList:
        """Return snapshots, newest first: all, of one guest's disks, or of one disk.

        Raises :class:`GuestUnknown`, :class:`DiskUnknown`, :class:`BadRequest` for a name that means several disks.
        """
        disks = await self._catalog.disks(include_released=True)
        if disk:
            wanted = {(await self._inventory.disk(disk, guest=guest)).id}
        elif guest:
            wanted = {known.id for known in disks if guest in (known.guest_name, known.guest_uuid)}
            if not wanted:
                await self._inventory.guest(guest)  # raises unless there is such a guest, without snapshots
        else:
            wanted = {known.id for known in disks}
        rows = [row for row in await self._catalog.snapshots(state=state) if row.disk in wanted]
        rows.sort(key=lambda row: (row.created_at, row.sequence), reverse=True)
        by_id = {known.id: known for known in disks}
        drills = await self._catalog.drills.of_snapshots()
        return wire.SnapshotList(
            snapshots=[self._view(row, by_id[row.disk], drills.get(row.id)) for row in rows[:limit]]
        )

    async def views(self, rows: Sequence[Snapshot]) -> wire.SnapshotList:
        """Return these snapshots in their order."""
        return wire.SnapshotList(
            snapshots=[self._view(row, await self._catalog.disk(row.disk)) for row in rows],
        )

    async def info(self, snapshot_id: str) -> wire.Snapshot:
        """Return one snapshot; raises :class:`SnapshotUnknown`."""
        row = await self.row(snapshot_id)
        drills = await self._catalog.drills.of_snapshots()
        return self._view(row, await self._catalog.disk(row.disk), drills.get(row.id))

    async def row(self, snapshot_id: str) -> Snapshot:
        """Return one snapshot's row; raises :class:`SnapshotUnknown` with a bounded form of what was asked."""
        if len(snapshot_id) > ID_LENGTH_MAX:
            raise SnapshotUnknown(f"there is no snapshot {snapshot_id[:ID_LENGTH_MAX]}…")
        return await self._catalog.snapshot(SnapshotId(snapshot_id))

    async def cancel(self, snapshot_id: str) -> wire.Snapshot:
        """Give a running capture up. Raises :class:`Refused` when it has ended already."""
        row = await self.row(snapshot_id)
        if row.state is not State.PROGRESSING:
            raise Refused(f"snapshot {row.id} is {row.state} already", hint="nothing is left to cancel")
        await self._captures.cancel(row.id)
        return await self.info(row.id)

    async def delete(
        self,
        ids: Sequence[str],
        *,
        dry_run: bool,
        told_as: EventType = EventType.SNAPSHOT_DELETED,
        rule: Rule | None = None,
    ) -> wire.Deletion:
        """Delete snapshots, all of them or none, or tell what that would free (SERVICE 4).

        ``told_as`` is the event that each becomes. Where a ``rule`` asks for it, it is asked once more at the last
        moment, and :class:`Refused` raised if it would keep one now. Raises :class:`SnapshotUnknown`,
        :class:`SnapshotInUse`, :class:`SnapshotLocked`, :class:`SnapshotPromoted`.
        """
        rows = [await self.row(name) for name in dict.fromkeys(ids)]
        for row in rows:
            self._check_unlocked(row)
        wanted = [row.id for row in rows]
        with self._uses.hold_for_deletion(wanted):
            await self._check_unused(wanted)
            plan = await plan_deletion(self._catalog, wanted)
            made = await disks_made_of(self._catalog, wanted)
            if not dry_run:
                await self._delete(rows, told_as, rule)
        freed = [wire.Freed(id=name, freed_bytes=plan.alone[name], disks=made.get(name, [])) for name in wanted]
        return wire.Deletion(dry_run=dry_run, snapshots=freed, freed_bytes=plan.together)

    async def lock(self, snapshot_id: str, until: float) -> wire.Snapshot:
        """Lock a snapshot against deletion, by anybody, until an instant; a lock is never made shorter.

        Raises :class:`SnapshotUnknown`, :class:`Refused`.
        """
        row = await self.row(snapshot_id)
        if row.state is not State.ACCOMPLISHED:
            raise Refused(f"snapshot {row.id} is {row.state}", hint="only accomplished snapshots can be locked")
        if until <= self._clock.now():
            raise BadRequest("the lock would end in the past", hint="give a later time, for example 2027-01-31")
        if row.locked_until is not None and row.locked_until > until:
            hint = "that is what a lock is for; it can be made longer"
            raise SnapshotLocked(f"snapshot {row.id} is locked until {_shown(row.locked_until)} already", hint=hint)
        async with self._catalog.write() as tx:
            await tx.update_snapshot(row.id, locked_until=until)
        return await self.info(row.id)

    async def edit(
        self,
        snapshot_id: str,
        *,
        name: str | None,
        description: str | None,
        tags: dict[str, str] | None,
        usual: bool = False,
    ) -> wire.Snapshot:
        """Change what people call a snapshot; None leaves a thing as it is. ``usual``: the alarm about it is over.

        Raises :class:`BadRequest`, :class:`Refused` where there is no alarm.
        """
        row = await self.row(snapshot_id)
        if usual and row.alarm is None:
            raise Refused(f"nothing is unusual about snapshot {row.id}", hint="`hvsnap doctor` names those that are")
        changes: dict[str, object] = {}
        if name is not None:
            changes["name"] = check_name(name)
        if description is not None:
            changes["description"] = check_description(description)
        if tags is not None:
            changes["tags"] = check_tags(tags)
        if changes:
            async with self._catalog.write() as tx:
                await tx.update_snapshot(row.id, **changes)
        if usual:
            await self._acknowledge(row.id)
        return await self.info(row.id)

    async def _acknowledge(self, snapshot_id: SnapshotId) -> None:
        """Say that all is well with an unusual snapshot. After the last alarm of its disk nothing is held any more."""
        async with self._catalog.write() as tx:
            row = await self._catalog.snapshot(snapshot_id)
            if row.alarm is None or not row.alarm.open:
                return
            await tx.update_snapshot(row.id, alarm=replace(row.alarm, acknowledged_at=self._clock.now()))
            others = [one for one in await self._catalog.snapshots(row.disk) if one.id != row.id]
            if not any(one.alarm is not None and one.alarm.open for one in others):
                for one in [*others, row]:
                    if one.held_until is not None:
                        await tx.update_snapshot(one.id, held_until=None)
            await tx.emit(EventType.SNAPSHOT_ACKNOWLEDGED, snapshot_payload(await self._catalog.disk(row.disk), row))

    def _check_unlocked(self, row: Snapshot) -> None:
        if row.locked_until is not None and row.locked_until > self._clock.now():
            raise SnapshotLocked(f"snapshot {row.id} is locked until {_shown(row.locked_until)}")

    async def _delete(self, rows: Sequence[Snapshot], told_as: EventType, rule: Rule | None) -> None:
        wanted = [row.id for row in rows]
        disks = {row.disk: await self._catalog.disk(row.disk) for row in rows}
        async with self._catalog.write() as tx:
            # Again, now that no capture can begin or end: one that began since the first look has its row by now.
            await self._check_unused(wanted)
            for row in rows:
                self._check_unlocked(await self._catalog.snapshot(row.id))
                if rule is not None and row.id not in rule(await self._catalog.snapshots(row.disk)):
                    # Telling what it frees takes a while: an alarm holds it since, or it is the last one now.
                    raise Refused(f"snapshot {row.id} is kept by now", hint="it is looked at again")
                await tx.delete_snapshot(row.id)
                await tx.emit(told_as, snapshot_payload(disks[row.disk], row))

    async def _check_unused(self, ids: Sequence[SnapshotId]) -> None:
        images = await self._catalog.images()
        for name in ids:
            if behind := [image for image in images if image.snapshot == name]:
                raise promoted(name, behind)
        check_unused(ids, await self._catalog.snapshots(state=State.PROGRESSING), await self._catalog.operations())

    def _view(self, row: Snapshot, disk: Disk, drill: Drill | None = None) -> wire.Snapshot:
        return views.snapshot(row, disk, self._captures.progress(row.id), drill)


def _shown(moment: float) -> str:
    return f"{views.when(moment):%Y-%m-%d %H:%M} UTC"
