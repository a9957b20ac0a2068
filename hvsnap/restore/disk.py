"""A new disk made of a snapshot: it appears under its name when it is whole and durable, or not at all.

What is written over with leave (a file that is there, an empty volume that libvirt made) is replaced in one step, by
the whole disk. Onto a block device it can only be written in place: one that was not finished is blank.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.transaction import Transaction
from hvsnap.errors import Failed, HvsnapError, Refused
from hvsnap.happenings import EventType
from hvsnap.hypervisor import images
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import GuestUuid, Operation, OperationId, Origin, Progress, Snapshot, SnapshotId, State
from hvsnap.restore import target
from hvsnap.restore.fill import Filler
from hvsnap.restore.occupancy import Occupancy
from hvsnap.restore.plan import PageWrites
from hvsnap.restore.target import Manner
from hvsnap.restore.writer import open_writer
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.uninterrupted import to_its_end

log = logging.getLogger(__name__)

KIND = "disk-create"
ATTACH_KIND = "disk-attach"

EMPTY_BYTES_MAX = 1 << 20
"""What an empty volume takes on disk at most: qcow2's header and tables are 192 KiB."""


class Step(StrEnum):
    """What is done next of a new disk. ``NAMED`` is nothing to do: it is whole, under its own name."""

    VOLUME = "making a volume"
    WRITING = "writing"
    NAMING = "giving it its name"
    NAMED = "named"


class Pools(Protocol):
    """Storage pools: :class:`hvsnap.hypervisor.libvirt_disks.LibvirtDisks`."""

    async def volume_path(self, pool: str, name: str) -> str:
        """Return where a new volume will lie; raises for a pool or name that cannot be."""
        ...

    async def create_volume(self, pool: str, name: str, image_format: str, size_bytes: int) -> str:
        """Create an empty volume, and return its path."""
        ...

    async def delete_volume(self, pool: str, name: str) -> None:
        """Delete a volume; one that is gone is no error."""
        ...

    async def refresh_pool(self, pool: str) -> None:
        """Let the pool see what has become of its files."""
        ...


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where a disk is to be attached once it is whole."""

    guest: GuestUuid
    target: str


@dataclass(frozen=True, slots=True)
class Order:
    """What disk to make, and where: ``path`` is absolute, or with ``pool`` the name of a new volume.

    ``force``: it may be a file that is there, or a block device. ``made_of`` is what the catalog remembers as its
    origin (empty: the snapshot).
    """

    snapshot: SnapshotId
    path: str
    format: str = "qcow2"
    force: bool = False
    pool: str = ""
    made_of: str = ""
    attach: Attachment | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """An order that was checked: what will be written where. ``blocks`` are those that are not zero."""

    snapshot: Snapshot
    path: str
    manner: Manner
    blocks: int


@dataclass(frozen=True, slots=True)
class NewDisk:
    """What was made; ``attaching`` is the journal's entry of what is still to be done with it."""

    path: str
    format: str
    size_bytes: int
    written_bytes: int
    attaching: OperationId | None = None


class DiskMaker:
    """Makes disks, and removes what a crash left of one."""

    def __init__(
        self,
        catalog: Catalog,
        store: PackedBlocks,
        run_dir: str,
        occupancy: Occupancy | None = None,
        pools: Pools | None = None,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir
        self._occupancy = occupancy
        self._volumes = pools

    async def check(self, order: Order) -> Plan:
        """Check an order; nothing is touched.

        Raises :class:`SnapshotUnknown`, :class:`Refused`, :class:`Busy`, :class:`TargetExists`, :class:`BadRequest`,
        :class:`NoSpace`.
        """
        snapshot = await self._catalog.snapshot(order.snapshot)
        if snapshot.state is not State.ACCOMPLISHED:
            hint = "only accomplished snapshots can be restored"
            raise Refused(f"snapshot {snapshot.id} is {snapshot.state}", hint=hint)
        path = await self._pools().volume_path(order.pool, order.path) if order.pool else order.path
        manner = await asyncio.to_thread(target.check_target, path, order.format, force=order.force and not order.pool)
        if manner is not Manner.NEW:
            await self._vacant(path)
        filler = Filler(self._catalog, self._store, snapshot)
        blocks, _zero = await filler.count(filler.stored_writes())
        if manner is Manner.DEVICE:
            raw = order.format == "raw"
            needed = snapshot.size_bytes if raw else await images.largest_size(order.format, snapshot.size_bytes)
            await asyncio.to_thread(target.check_device, path, needed)
        else:
            await asyncio.to_thread(target.check_space, path, blocks * self._store.block_size)
        return Plan(snapshot, path, manner, blocks)

    async def create(self, order: Order, report: Callable[[Progress], None]) -> NewDisk:
        """Make the disk. Raises as :meth:`check` does, and :class:`Damaged`; nothing is left then."""
        plan = await self.check(order)
        operation = await self._begin(order, plan)
        meter = Meter(plan.snapshot.id, plan.blocks * self._store.block_size, report)
        try:
            if order.pool:
                await self._make_volume(order, plan, operation.id)
            await self._write(order, plan, operation, meter)
        except BaseException as error:
            await asyncio.shield(self._give_up(operation.id, str(error) or type(error).__name__))
            raise
        # From here on it comes to its end, even for a caller that is cancelled: a name cannot be half given.
        attaching = await to_its_end(self._end(order, plan, operation), name=f"name {plan.path}")
        written = plan.blocks * self._store.block_size
        return NewDisk(plan.path, order.format, plan.snapshot.size_bytes, written, attaching)

    async def recover(self, operation: Operation) -> bool:
        """Tell of a disk that a crash interrupted: True if it is whole and named; else what is there of it goes."""
        inode, made = operation.facts.get("inode"), False
        if operation.step == Step.NAMING and isinstance(inode, int):
            made = await asyncio.to_thread(target.was_published, str(operation.facts["target"]), inode)
        if made:
            await images.remove(str(operation.facts["temporary"]))  # its other name, where the two were linked
            await self._refresh(operation)
            await self._close(operation)
        else:
            await self._undo(operation)
            await self._tell_failure(operation, "interrupted")
        return made

    # -- the steps --------------------------------------------------------------------------------

    async def _begin(self, order: Order, plan: Plan) -> Operation:
        disk = await self._catalog.disk(plan.snapshot.disk)
        payload = {"snapshot": plan.snapshot.id, "disk": disk.id, "guest": disk.guest_name, "path": plan.path}
        facts: dict[str, Any] = {
            "target": plan.path,
            "snapshot": plan.snapshot.id,
            "payload": payload,
            "manner": plan.manner,
            "format": order.format,
            "made_of": order.made_of or plan.snapshot.id,
            "pool": order.pool,
            "attach": None if order.attach is None else [order.attach.guest, order.attach.target],
        }
        first = Step.VOLUME if order.pool else Step.WRITING
        async with self._catalog.write() as tx:
            operation = await tx.open_operation(KIND, disk.guest_uuid, first, facts)
            if plan.manner is Manner.DEVICE:
                await tx.forget_origin(plan.path)
                return operation
            temporary = target.temporary_beside(plan.path, operation.id)
            await tx.step(operation.id, first, temporary=temporary)
        operation.facts["temporary"] = temporary
        return operation

    async def _make_volume(self, order: Order, plan: Plan, operation: OperationId) -> None:
        """Let libvirt make the volume: it has the owner and the place in the pool that others have."""
        made = await self._pools().create_volume(order.pool, order.path, order.format, plan.snapshot.size_bytes)
        async with self._catalog.write() as tx:
            await tx.step(operation, Step.WRITING)
        if made != plan.path or await asyncio.to_thread(target.inode_of, made) is None:
            hint = "the daemon and libvirt must see the pool's directory at the same place"
            raise Failed(f"libvirt made the volume at {made}, where hvsnap does not see it", hint=hint)

    async def _write(self, order: Order, plan: Plan, operation: Operation, meter: Meter) -> None:
        filler = Filler(self._catalog, self._store, plan.snapshot)
        if plan.manner is Manner.DEVICE:
            await self._write_device(order, plan, filler, meter)
            return
        path, size_bytes = str(operation.facts["temporary"]), plan.snapshot.size_bytes
        like = plan.path if order.pool or plan.manner is Manner.REPLACE else None
        await images.create_image(path, order.format, size_bytes, like=like)
        await self._fill(path, order.format, filler, [filler.stored_writes()], size_bytes, meter)

    async def _write_device(self, order: Order, plan: Plan, filler: Filler, meter: Meter) -> None:
        """Write to a device: every block of it, also those that are zero, as other ones were there before."""
        async with self._vacancy().held(plan.path):
            await asyncio.to_thread(target.blank, plan.path)
            if order.format == "raw":
                size_bytes = await asyncio.to_thread(target.device_bytes, plan.path)
                # The first block last: until then the device is one without a disk on it.
                writes = [filler.all_writes(size_bytes, skip_first=True), filler.first_write()]
            else:
                size_bytes, writes = plan.snapshot.size_bytes, [filler.stored_writes()]
                await images.format_device(plan.path, order.format, size_bytes)
            await self._fill(plan.path, order.format, filler, writes, size_bytes, meter)

    async def _fill(
        self,
        path: str,
        image_format: str,
        filler: Filler,
        parts: list[AsyncIterator[PageWrites]],
        size_bytes: int,
        meter: Meter,
    ) -> None:
        """Write parts one after the other, each durable before the next."""
        async with serve_image(path, image_format, run_dir=self._run_dir, read_only=False) as export:
            for writes in parts:
                async with open_writer(export) as writer:
                    await filler.fill(writes, writer, size_bytes, meter)
                    await writer.finish()

    async def _end(self, order: Order, plan: Plan, operation: Operation) -> OperationId | None:
        """Publish the disk and tell of it. If telling fails, the entry stays for the recovery to tell."""
        if plan.manner is not Manner.DEVICE:
            temporary = str(operation.facts["temporary"])
            replace = bool(order.pool) or plan.manner is Manner.REPLACE
            try:
                inode = await asyncio.to_thread(target.inode_of, temporary)
                async with self._catalog.write() as tx:
                    await tx.step(operation.id, Step.NAMING, inode=inode)
                if replace:
                    await self._vacant(plan.path)
                await asyncio.to_thread(target.publish, temporary, plan.path, replace=replace)
            except HvsnapError as error:
                await self._give_up(operation.id, error.message)
                raise
            await self._refresh(operation)
        return await self._close(await self._catalog.operation(operation.id))

    # -- the ends ---------------------------------------------------------------------------------

    async def _close(self, operation: Operation) -> OperationId | None:
        """Tell of a disk that is whole, remember of what it is made; return the entry for attaching it, if wanted."""
        facts = operation.facts
        path, inode = str(facts["target"]), facts.get("inode")
        made_of = str(facts.get("made_of") or facts["snapshot"])
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_CREATED, operation.payload)
            known = inode if isinstance(inode, int) else None
            await tx.put_origin(Origin(path, known, made_of, operation.created_at))
            attaching = await open_attaching(tx, operation, str(facts["format"]))
            await tx.close_operation(operation.id)
        return attaching

    async def _give_up(self, operation_id: OperationId, error: str) -> None:
        """Undo what there is of a disk. What cannot be undone now stays in the journal, for the recovery."""
        operation = await self._catalog.operation(operation_id)
        try:
            await self._undo(operation)
        except HvsnapError as failure:
            log.warning("%s: what is left of it cannot be removed yet: %s", operation.facts["target"], failure.message)
            return
        await self._tell_failure(operation, error)

    async def _undo(self, operation: Operation) -> None:
        facts, path = operation.facts, str(operation.facts["target"])
        if facts.get("manner") == Manner.DEVICE:
            await self._blank(path)
            return
        await images.remove(str(facts["temporary"]))
        pool = str(facts.get("pool", ""))
        # A crash within libvirt's making it leaves unknown whose volume it is: one that holds nothing is ours.
        if pool and (operation.step != Step.VOLUME or await asyncio.to_thread(_takes_nothing, path)):
            await self._pools().delete_volume(pool, os.path.basename(path))

    async def _blank(self, path: str) -> None:
        """Blank a device that was not finished, unless somebody has begun to use it, or it is gone."""
        if not await asyncio.to_thread(target.is_device, path):
            return
        try:
            await self._vacant(path)
        except HvsnapError as error:
            log.warning("%s holds a disk that was not finished, and is left: %s", path, error.message)
            return
        await asyncio.to_thread(target.blank, path)

    async def _tell_failure(self, operation: Operation, error: str) -> None:
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_CREATE_FAILED, operation.payload | {"error": error})
            await tx.close_operation(operation.id)

    async def _refresh(self, operation: Operation) -> None:
        """Let libvirt see what its volume has become; the disk is whole whether it does or not."""
        if pool := str(operation.facts.get("pool", "")):
            try:
                await self._pools().refresh_pool(pool)
            except HvsnapError as error:
                log.warning("pool %s was not refreshed: %s", pool, error.message)

    async def _vacant(self, path: str) -> None:
        await self._vacancy().check(path)

    def _vacancy(self) -> Occupancy:
        if self._occupancy is None:
            raise Refused("nothing can be written over without a hypervisor to ask", hint="choose another path")
        return self._occupancy

    def _pools(self) -> Pools:
        if self._volumes is None:
            hint = "configure hypervisor.libvirt_uri, or give a path"
            raise Refused("there is no libvirt, and so no storage pool", hint=hint)
        return self._volumes


async def open_attaching(tx: Transaction, operation: Operation, image_format: str) -> OperationId | None:
    """Open the journal's entry for attaching the disk of another entry, if it was ordered to be attached."""
    attach = operation.facts.get("attach")
    if not isinstance(attach, list):
        return None
    guest, name = attach
    facts = {"path": operation.facts["target"], "format": image_format, "target": name, "payload": operation.payload}
    return (await tx.open_operation(ATTACH_KIND, guest, "attaching", facts)).id


def _takes_nothing(path: str) -> bool:
    """Whether a file holds nothing that somebody could have written. Blocking."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_blocks * 512 <= EMPTY_BYTES_MAX
    return False
