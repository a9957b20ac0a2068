"""Rolling a disk back to one of its snapshots: only what differs is written; a crash is resumed, always to the end.

The journal's entry is opened before the first write. Whatever state a crash leaves the disk in, resuming compares all
of it with the snapshot, writes what still differs, and ends as an undisturbed rollback does.

A disk is re-initialised in the same way, to the snapshot of another disk that it was made of (``origin``): then its own
chain goes on where it was, and its bitmap with it, which sees what is written here as any other write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, GuestRunning, HypervisorFailed, NotFound, Refused
from hvsnap.guard import ROLLBACK, Bar, StartGuard
from hvsnap.happenings import EventType, disk_payload
from hvsnap.hypervisor import image_lock, images
from hvsnap.hypervisor.image_lock import images_locked
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import PAGE_BLOCKS, Disk, DiskId, GuestView, Method, Operation, Progress, Snapshot, SnapshotId, State
from hvsnap.ports import Hypervisor
from hvsnap.restore import target
from hvsnap.restore.differences import Difference, Differences
from hvsnap.restore.fill import DifferingWrites, Filler
from hvsnap.restore.kept import Kept, Room
from hvsnap.restore.occupancy import Occupancy
from hvsnap.restore.writer import NbdWriter, open_writer
from hvsnap.secret import Passphrase
from hvsnap.store.blocks import PackedBlocks

log = logging.getLogger(__name__)

KIND = "rollback"

GONE = "its disk is in no guest any more, and its image is gone"
"""Why a rollback is given up that cannot be resumed, ever."""

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """What a rollback would do: ``write_bytes`` from the store, ``zero_bytes`` zeroed; ``method`` is how it was found.

    ``resized``: the disk's size is not the snapshot's, so that the file system must be grown again (SERVICE 6.6).
    """

    snapshot: SnapshotId
    write_bytes: int
    zero_bytes: int
    method: Method
    reason: str
    resized: bool


class Step(StrEnum):
    """Where a rollback is, in the journal."""

    WRITING = "writing"
    WRITTEN = "starting a bitmap"


class Rollback:
    """Rolls disks back. The caller keeps captures away from them, and makes the safety snapshot."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        catalog: Catalog,
        store: PackedBlocks,
        run_dir: str,
        guard: StartGuard,
        occupancy: Occupancy,
    ) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir
        self._guard = guard
        self._occupancy = occupancy
        self._differences = Differences(catalog, store, run_dir)
        self._room = Room()

    async def plan(
        self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report, *, origin: bool = False
    ) -> RollbackPlan:
        """Return what would be written; nothing is touched. Raises as :meth:`run` does."""
        disk, snapshot, guest = await self._check(disk_id, snapshot_id, origin=origin)
        await self._occupancy.check_no_base(disk.source)
        async with images_locked([disk.source]):
            info, key = await self._look(disk, guest)
            differs = await self._differences.find(disk, snapshot, info, key, report)
        writes = DifferingWrites(Filler(self._catalog, self._store, snapshot), differs.blocks)
        return await self._counted(snapshot, info, differs, writes)

    async def run(
        self,
        disk_id: DiskId,
        snapshot_id: SnapshotId,
        report: Report,
        *,
        origin: bool = False,
        begins: Callable[[], None] = lambda: None,
    ) -> RollbackPlan:
        """Bring the disk back to the snapshot; ``begins`` is called when all was looked at and the writing comes.

        Raises :class:`GuestRunning`, :class:`Refused` (another disk's snapshot, one that is not accomplished, an image
        that others build on), :class:`Busy`, :class:`NoSpace`, :class:`Damaged` before anything is written. From the
        first write on a failure leaves the journal's entry open, and :meth:`resume` goes on.
        """
        disk, snapshot, guest = await self._check(disk_id, snapshot_id, origin=origin)
        await self._occupancy.check_no_base(disk.source)
        kept = Kept(self._room)
        filler = Filler(self._catalog, self._store, snapshot, kept)
        try:
            async with images_locked([disk.source]):
                info, key = await self._look(disk, guest)
                differs = await self._differences.find(disk, snapshot, info, key, report)
                writes = DifferingWrites(filler, differs.blocks)
                plan = await self._counted(snapshot, info, differs, writes)
                await self._check_room(disk, info, differs, writes)
                # All of it is read before any of it is written: half of it would leave a broken disk.
                await filler.verify(writes, Meter(snapshot.id, 1, lambda _progress: None))
                begins()
                # Before the lock is let go: a guest that ran for a moment would leave what it wrote.
                await self._guard.bar(Bar.of(disk, ROLLBACK, snapshot=snapshot.id))
            async with self._open(disk, info, key) as writer:
                operation = await self._begin(disk, snapshot)
                meter = Meter(snapshot.id, plan.write_bytes, report)
                await self._write(operation, writer, disk, info, filler, writes, meter)
        except BaseException:
            await asyncio.shield(self._lift_unless_open(disk))
            raise
        finally:
            kept.close()
        await self._finish(operation, disk, snapshot, info, await self._start_bitmap(operation, disk, info, key))
        return plan

    async def resume(self, operation: Operation, report: Report) -> None:
        """Finish a rollback that was interrupted anywhere. Raises as :meth:`run` does; it may be called again.

        Once all was written the guest may have run again: its disk is never written to then. Where the disk itself is
        gone, nothing is left to be set back, and the entry is closed (:data:`GONE`).
        """
        disk_id, snapshot_id = DiskId(str(operation.facts["disk"])), SnapshotId(str(operation.facts["snapshot"]))
        if await self._is_gone(operation, await self._catalog.disk(disk_id)):
            await self._give_up(operation)
            return
        if operation.step == Step.WRITTEN:
            disk, snapshot = await self._catalog.disk(disk_id), await self._catalog.snapshot(snapshot_id)
            info = await images.image_info(disk.source, disk.format)
            own = snapshot.disk == disk.id
            if own and disk.bitmap is not None and info.bitmap(disk.bitmap) is not None:
                with contextlib.suppress(HypervisorFailed, Refused):  # in use: it only takes some memory there
                    key = await self._key(disk, info, await self._guest(disk))
                    await images.bitmap_remove(disk.source, disk.bitmap, key=key)
            # If the bitmap was not started before the crash, its name stays unknown to the image: that means a rescan.
            bitmap = _bitmap_name(operation) if info.holds_bitmaps else None
            await self._finish(operation, disk, snapshot, info, bitmap)
            return
        disk, snapshot, guest = await self._check(disk_id, snapshot_id, origin=bool(operation.facts.get("origin")))
        await self._guard.bar(Bar.of(disk, ROLLBACK, snapshot=snapshot.id))
        async with images_locked([disk.source]):
            info, key = await self._look(disk, guest)
            blocks = await self._differences.compare(disk, snapshot, info, key, report)
        filler = Filler(self._catalog, self._store, snapshot)
        writes = DifferingWrites(filler, blocks)
        stored, _zero = await filler.count(writes)
        async with self._open(disk, info, key) as writer:
            meter = Meter(snapshot.id, stored * self._store.block_size, report)
            await self._write(operation, writer, disk, info, filler, writes, meter)
        await self._finish(operation, disk, snapshot, info, await self._start_bitmap(operation, disk, info, key))

    # -- before -----------------------------------------------------------------------------------

    async def _counted(
        self, snapshot: Snapshot, info: ImageInfo, differs: Difference, writes: DifferingWrites
    ) -> RollbackPlan:
        stored, zero = await Filler(self._catalog, self._store, snapshot).count(writes)
        size, resized = self._store.block_size, info.size_bytes != snapshot.size_bytes
        return RollbackPlan(snapshot.id, stored * size, zero * size, differs.method, differs.reason, resized)

    async def _check_room(self, disk: Disk, info: ImageInfo, differs: Difference, writes: DifferingWrites) -> None:
        """See that there is room for what will be written."""
        new = 0
        async for one in writes:
            if one.blocks.size:
                page = int(one.blocks[0]) // PAGE_BLOCKS
                new += int(np.count_nonzero(~differs.data.page(page)[one.blocks - page * PAGE_BLOCKS]))
        # Data files are elsewhere, and what a device has left for a qcow2 nobody tells.
        if not info.data_file and not await asyncio.to_thread(target.is_device, disk.source):
            held_bytes = differs.data.count() * self._store.block_size
            await asyncio.to_thread(target.check_growth, disk.source, held_bytes, new * self._store.block_size)

    async def _begin(self, disk: Disk, snapshot: Snapshot) -> Operation:
        """Open the journal's entry; the guest is barred already."""
        file = await asyncio.to_thread(target.file_identity, disk.source)
        async with self._catalog.write() as tx:
            facts = {"disk": disk.id, "snapshot": snapshot.id, "origin": snapshot.disk != disk.id, "file": file}
            operation = await tx.open_operation(KIND, disk.guest_uuid, Step.WRITING, facts)
            await tx.emit(EventType.ROLLBACK_STARTED, disk_payload(disk) | {"snapshot": snapshot.id})
        return operation

    async def _lift_unless_open(self, disk: Disk) -> None:
        if all(one.facts.get("disk") != disk.id for one in await self._catalog.operations(KIND)):
            await self._guard.lift(disk.id, ROLLBACK)

    async def _check(
        self, disk_id: DiskId, snapshot_id: SnapshotId, *, origin: bool
    ) -> tuple[Disk, Snapshot, GuestView | None]:
        disk = await self._catalog.disk(disk_id)
        snapshot = await self._catalog.snapshot(snapshot_id)
        if snapshot.disk != disk.id and not origin:
            hint = f"make a new disk of it: `hvsnap disk-create {snapshot.id} TARGET`"
            raise Refused(f"snapshot {snapshot.id} belongs to another disk ({snapshot.disk})", hint=hint)
        if snapshot.state is not State.ACCOMPLISHED:
            hint = "only accomplished snapshots can be restored"
            raise Refused(f"snapshot {snapshot.id} is {snapshot.state}", hint=hint)
        guest = await self._guest(disk)
        if guest is not None and guest.active:
            raise GuestRunning(f"guest {guest.name} is {guest.state}")
        if guest is not None:
            check_not_saved(guest)
        return disk, snapshot, guest

    async def _look(self, disk: Disk, guest: GuestView | None) -> tuple[ImageInfo, Passphrase | None]:
        """Return what the image is, and what opens it: once it is locked, so that nobody resizes it any more."""
        info = await images.image_info(disk.source, disk.format)
        return info, await self._key(disk, info, guest)

    async def _guest(self, disk: Disk) -> GuestView | None:
        try:
            return await self._hypervisor.guest(disk.guest_uuid)
        except NotFound:
            return None

    async def _key(self, disk: Disk, info: ImageInfo, guest: GuestView | None) -> Passphrase | None:
        """Return what opens an encrypted image; raises :class:`Refused` where the guest's definition does not tell."""
        if not info.encrypted:
            return None
        views = () if guest is None else guest.disks
        secret = next((view.secret for view in views if view.layers and view.top.path == disk.source), "")
        key = await self._hypervisor.passphrase(secret)
        if key is None:
            hint = "libvirt must know the guest, with the secret of this disk in its <encryption>"
            raise Refused(f"{disk.source} is encrypted, and no secret is known for it", hint=hint)
        return key

    async def _is_gone(self, operation: Operation, disk: Disk) -> bool:
        """Whether the disk is in no guest any more, and what lies at its path, if anything, is another file.

        That may be somebody else's by now. A guest that still has the path in its definition has its disk.
        """
        guest = await self._guest(disk)
        views = () if guest is None else guest.disks
        if any(view.layers and view.top.path == disk.source for view in views) or (guest is not None and guest.active):
            return False
        known = operation.facts.get("file")  # none for a device, nor in an entry of an earlier release
        seen = await asyncio.to_thread(target.file_identity, disk.source)
        there = await asyncio.to_thread(os.path.exists, disk.source)
        return not there or (bool(known) and seen != known)

    async def _give_up(self, operation: Operation) -> None:
        disk = await self._catalog.disk(DiskId(str(operation.facts["disk"])))
        payload = disk_payload(disk) | {"snapshot": str(operation.facts["snapshot"]), "error": GONE}
        async with self._catalog.write() as tx:
            await tx.emit(EventType.ROLLBACK_FAILED, payload)
            await tx.close_operation(operation.id)
        log.warning("the rollback of disk %s is given up: %s", disk.source, GONE)
        await self._guard.lift(disk.id, ROLLBACK)

    # -- the writing ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _open(self, disk: Disk, info: ImageInfo, key: Passphrase | None) -> AsyncIterator[NbdWriter]:
        """Open a disk for writing: as long as the context lasts, nobody else can.

        Raises :class:`Busy` for what somebody has open, or has resized since it was looked at.
        """
        await self._occupancy.check_no_writer(disk.source)
        async with contextlib.AsyncExitStack() as stack:
            serving = serve_image(disk.source, disk.format, run_dir=self._run_dir, read_only=False, key=key)
            try:
                export = await stack.enter_async_context(serving)
            except HypervisorFailed as error:
                if await asyncio.to_thread(image_lock.in_use, disk.source):
                    hint = "end its use (`fuser -v` tells who has it), and try again"
                    raise Busy(f"{disk.source} is open in another program", hint=hint) from error
                raise
            writer = await stack.enter_async_context(open_writer(export))
            size_bytes = await writer.size_bytes()
            if size_bytes != info.size_bytes:
                was = f"{info.size_bytes} to {size_bytes} bytes"
                raise Busy(f"{disk.source} was resized from {was} while it was looked at", hint="try again")
            yield writer

    async def _write(
        self,
        operation: Operation,
        writer: NbdWriter,
        disk: Disk,
        info: ImageInfo,
        filler: Filler,
        writes: DifferingWrites,
        meter: Meter,
    ) -> None:
        """Write what differs, durably, and then write down that it is done."""
        # What becomes zero first: it makes room for the rest.
        await filler.clear(writes, writer, info.size_bytes)
        await filler.fill(writes, writer, info.size_bytes, meter, cleared=True)
        await writer.finish()
        if await asyncio.to_thread(target.is_device, disk.source):
            await self._check_not_started(disk)
        async with self._catalog.write() as tx:
            await tx.step(operation.id, Step.WRITTEN)

    async def _check_not_started(self, disk: Disk) -> None:
        """Raise if a guest was started onto a device meanwhile: QEMU's locks do not reach it; a hook may lack."""
        guest = await self._guest(disk)
        if guest is not None and guest.active:
            hint = "shut it off: the rollback goes on then; `hvsnap hook-install` keeps guests from starting in one"
            raise GuestRunning(f"guest {guest.name} was started while {disk.source} was written to", hint=hint)

    async def _start_bitmap(
        self, operation: Operation, disk: Disk, info: ImageInfo, key: Passphrase | None
    ) -> str | None:  # fmt: skip
        """Start a bitmap that records from the state rolled back to; the one before is of no use any more.

        Returns the bitmap's name. When the image is in use already, it has none of that name: the next capture rescans.
        """
        if not info.holds_bitmaps or operation.facts.get("origin"):
            return None
        name = _bitmap_name(operation)
        try:
            present = {bitmap.name for bitmap in info.bitmaps}
            for stale in {name, disk.bitmap} & present:
                await images.bitmap_remove(disk.source, str(stale), key=key)
            await images.bitmap_add(disk.source, name, self._store.block_size, key=key)
        except HypervisorFailed as error:
            log.warning("disk %s: no bitmap was started after its rollback: %s", disk.source, error.message)
        return name

    async def _finish(
        self, operation: Operation, disk: Disk, snapshot: Snapshot, info: ImageInfo, bitmap: str | None
    ) -> None:
        async with self._catalog.write() as tx:
            await tx.update_disk(disk.id, size_bytes=info.size_bytes)
            if snapshot.disk == disk.id:
                await tx.update_disk(disk.id, head=snapshot.id, bitmap=bitmap)
                await tx.clear_carry(disk.id)
            await tx.emit(EventType.ROLLBACK_FINISHED, disk_payload(disk) | {"snapshot": snapshot.id})
            await tx.close_operation(operation.id)
        await self._guard.lift(disk.id, ROLLBACK)


def check_not_saved(guest: GuestView) -> None:
    """Refuse a guest whose memory is kept in a file: restored onto another state of its disk, it would destroy that."""
    if guest.saved:
        raise Refused(
            f"guest {guest.name} is saved: its memory goes with its disks as they are now",
            hint="restore or start it, and shut it down",
        )


def _bitmap_name(operation: Operation) -> str:
    return f"hvsnap-{operation.id}"
