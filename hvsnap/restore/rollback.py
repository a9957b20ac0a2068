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
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.pipeline import Meter
from hvsnap.capture.plan import Selection, decide, groups
from hvsnap.capture.reader import read_chunks, scan
from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import GuestRunning, HypervisorFailed, NotFound, Refused
from hvsnap.guard import ROLLBACK, Bar, StartGuard
from hvsnap.happenings import EventType, disk_payload
from hvsnap.hypervisor import images
from hvsnap.hypervisor.image_lock import images_locked
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import PAGE_BLOCKS, Disk, DiskId, GuestView, Method, Operation, Progress, Snapshot, SnapshotId, State
from hvsnap.ports import Hypervisor, NbdExport, UInt64Array
from hvsnap.restore.fill import Filler
from hvsnap.restore.plan import add_difference
from hvsnap.restore.writer import NbdWriter, open_writer
from hvsnap.secret import Passphrase
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.codec import digest_blocks

log = logging.getLogger(__name__)

KIND = "rollback"

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


class Wanted:
    """What a snapshot holds, page by page, within its own size."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, snapshot: Snapshot, pages: set[int]) -> None:
        self.pages = pages
        self._catalog = catalog
        self._store = store
        self._snapshot = snapshot
        self._last: tuple[int, npt.NDArray[np.uint8]] | None = None

    @classmethod
    async def of(cls, catalog: Catalog, store: PackedBlocks, snapshot: Snapshot) -> Wanted:
        """Return what ``snapshot`` holds."""
        return cls(catalog, store, snapshot, set(await catalog.page_numbers(snapshot.id)))

    async def view(self, page: int) -> UInt64Array:
        """Return a page's block ids, without entries beyond the snapshot's end, left from when the disk was larger."""
        if page not in self.pages:
            return chain.blank()
        view = await self._catalog.view(self._snapshot.id, page)
        blocks = -(-self._snapshot.size_bytes // self._store.block_size) - page * PAGE_BLOCKS
        view[max(0, blocks) :] = 0
        return view

    async def digests(self, page: int) -> npt.NDArray[np.uint8]:
        """Return a page's digests, ``uint8[PAGE_BLOCKS, 32]``, zeroes for zero blocks; the last page is remembered."""
        if self._last is None or self._last[0] != page:
            self._last = (page, await self._store.digests(await self.view(page)))
        return self._last[1]


class Rollback:
    """Rolls disks back. The caller keeps captures away from them, and makes the safety snapshot."""

    def __init__(
        self, hypervisor: Hypervisor, catalog: Catalog, store: PackedBlocks, run_dir: str, guard: StartGuard
    ) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir
        self._guard = guard

    async def plan(
        self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report, *, origin: bool = False
    ) -> RollbackPlan:
        """Return what would be written; nothing is touched. Raises as :meth:`run` does."""
        disk, snapshot, info, key = await self._check(disk_id, snapshot_id, origin=origin)
        differs, method, reason = await self._differs(disk, snapshot, info, key, report)
        filler = Filler(self._catalog, self._store, snapshot)
        stored, zero = await filler.count(filler.differing_writes(differs))
        size = self._store.block_size
        resized = info.size_bytes != snapshot.size_bytes
        return RollbackPlan(snapshot.id, stored * size, zero * size, method, reason, resized)

    async def run(
        self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report, *, origin: bool = False
    ) -> RollbackPlan:
        """Bring the disk back to the snapshot.

        Raises :class:`GuestRunning`, :class:`Refused` (another disk's snapshot, one that is not accomplished),
        :class:`Damaged` before anything is written. From the first write on a failure leaves the journal's entry
        open, and :meth:`resume` goes on.
        """
        disk, snapshot, info, key = await self._check(disk_id, snapshot_id, origin=origin)
        filler = Filler(self._catalog, self._store, snapshot)
        size = self._store.block_size
        # A guest that ran for a while between the look at its disk and the writing would leave what it wrote.
        async with images_locked([disk.source]):
            differs, method, reason = await self._differs(disk, snapshot, info, key, report)
            stored, zero = await filler.count(filler.differing_writes(differs))
            verified = Meter(snapshot.id, stored * size, lambda _progress: None)
            await filler.verify(filler.differing_writes(differs), verified)
        async with self._open(disk, key) as writer:
            operation = await self._begin(disk, snapshot)
            await self._write(operation, writer, snapshot, info, differs, report)
        await self._finish(operation, disk, snapshot, info, await self._start_bitmap(operation, disk, info, key))
        return RollbackPlan(
            snapshot.id, stored * size, zero * size, method, reason, info.size_bytes != snapshot.size_bytes
        )

    async def resume(self, operation: Operation, report: Report) -> None:
        """Finish a rollback that was interrupted anywhere. Raises as :meth:`run` does; it may be called again.

        Once all was written the guest may have run again: its disk is never written to then.
        """
        disk_id, snapshot_id = DiskId(str(operation.facts["disk"])), SnapshotId(str(operation.facts["snapshot"]))
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
        disk, snapshot, info, key = await self._check(disk_id, snapshot_id, origin=bool(operation.facts.get("origin")))
        await self._guard.bar(Bar.of(disk, ROLLBACK, snapshot=snapshot.id))
        async with images_locked([disk.source]):
            differs = await self._compare(disk, snapshot, info, key, report)
        async with self._open(disk, key) as writer:
            await self._write(operation, writer, snapshot, info, differs, report)
        await self._finish(operation, disk, snapshot, info, await self._start_bitmap(operation, disk, info, key))

    # -- before -----------------------------------------------------------------------------------

    async def _begin(self, disk: Disk, snapshot: Snapshot) -> Operation:
        """Bar the guest, then open the journal's entry: a guest that ran in between would lose what it wrote."""
        await self._guard.bar(Bar.of(disk, ROLLBACK, snapshot=snapshot.id))
        try:
            async with self._catalog.write() as tx:
                facts = {"disk": disk.id, "snapshot": snapshot.id, "origin": snapshot.disk != disk.id}
                operation = await tx.open_operation(KIND, disk.guest_uuid, Step.WRITING, facts)
                await tx.emit(EventType.ROLLBACK_STARTED, disk_payload(disk) | {"snapshot": snapshot.id})
        except BaseException:
            # Whether it was committed is unknown: look.
            await asyncio.shield(self._lift_unless_open(disk))
            raise
        return operation

    async def _lift_unless_open(self, disk: Disk) -> None:
        if all(one.facts.get("disk") != disk.id for one in await self._catalog.operations(KIND)):
            await self._guard.lift(disk.id, ROLLBACK)

    async def _check(
        self, disk_id: DiskId, snapshot_id: SnapshotId, *, origin: bool
    ) -> tuple[Disk, Snapshot, ImageInfo, Passphrase | None]:
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
        info = await images.image_info(disk.source, disk.format)
        return disk, snapshot, info, await self._key(disk, info, guest)

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

    async def _differs(
        self, disk: Disk, snapshot: Snapshot, info: ImageInfo, key: Passphrase | None, report: Report
    ) -> tuple[BlockSet, Method, str]:
        """Return the blocks in which the disk may differ from the snapshot, and how that was found."""
        head = await self._catalog.snapshot(disk.head) if disk.head else None
        decision = decide(
            disk,
            {bitmap.name: bitmap for bitmap in info.bitmaps},
            size_bytes=info.size_bytes,
            head_size_bytes=None if head is None else head.size_bytes,
            block_size=self._store.block_size,
        )
        if decision.bitmap is not None and head is not None:
            try:
                return await self._from_bitmap(disk, head, snapshot, decision.bitmap, key), Method.BITMAP, ""
            except HypervisorFailed as error:
                reason = f"the dirty bitmap could not be exported: {error.message}"
                return await self._compare(disk, snapshot, info, key, report), Method.RESCAN, reason
        return await self._compare(disk, snapshot, info, key, report), Method.RESCAN, decision.reason

    async def _from_bitmap(
        self, disk: Disk, head: Snapshot, target: Snapshot, bitmap: str, key: Passphrase | None
    ) -> BlockSet:  # fmt: skip
        """Return what was written since the head, what its deletion carried over, and where head and target differ."""
        async with serve_image(disk.source, disk.format, run_dir=self._run_dir, bitmap=bitmap, key=key) as export:
            found = await asyncio.to_thread(scan, export, self._store.block_size)
        differs = found.dirty
        if differs is None:
            raise HypervisorFailed(f"the bitmap {bitmap} was not exported")
        for page, index in (await self._catalog.carry(disk.id)).items():
            if page < differs.pages:
                differs.add_index(page, index)
        present = await Wanted.of(self._catalog, self._store, head)
        wanted = await Wanted.of(self._catalog, self._store, target)
        for page in sorted(present.pages | wanted.pages):
            add_difference(differs, page, await present.view(page), await wanted.view(page))
        return differs

    async def _compare(
        self, disk: Disk, snapshot: Snapshot, info: ImageInfo, key: Passphrase | None, report: Report
    ) -> BlockSet:  # fmt: skip
        """Read the whole disk and return the blocks whose content is not the snapshot's."""
        block_size = self._store.block_size
        differs = BlockSet(-(-info.size_bytes // block_size))
        wanted = await Wanted.of(self._catalog, self._store, snapshot)
        async with serve_image(disk.source, disk.format, run_dir=self._run_dir, key=key) as export:
            found = await asyncio.to_thread(scan, export, block_size)
            # What holds no data differs where the snapshot has a block; what holds data is read and compared.
            for page in sorted(wanted.pages):
                if page < differs.pages:
                    view = await wanted.view(page)
                    view[found.data.page(page)] = 0
                    add_difference(differs, page, chain.blank(), view)
            meter = Meter(snapshot.id, found.data.count() * block_size, report)
            await self._compare_data(export, found.data, wanted, info.size_bytes, differs, meter)
        return differs

    async def _compare_data(
        self, export: NbdExport, data: BlockSet, wanted: Wanted, size_bytes: int, differs: BlockSet, meter: Meter
    ) -> None:
        key = self._store.repository.keys.block
        block_size = self._store.block_size
        work = (group for page in Selection(data, None).work() for group in groups(page, block_size))
        async with read_chunks(export, size_bytes, block_size, work) as stream:
            while (chunk := await stream.get()) is not None:
                try:
                    present = await asyncio.to_thread(digest_blocks, chunk.data, block_size, key)
                finally:
                    chunk.release()
                digests = (await wanted.digests(chunk.page))[chunk.index]
                zero = bytes(digests.shape[1])
                wrong = [at for at in range(chunk.index.size) if present.get(at, zero) != digests[at].tobytes()]
                differs.add_index(chunk.page, chunk.index[wrong])
                meter.add(len(chunk.data))

    # -- the writing ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _open(self, disk: Disk, key: Passphrase | None) -> AsyncIterator[NbdWriter]:
        """Open a disk for writing: as long as the context lasts, nobody else can."""
        serving = serve_image(disk.source, disk.format, run_dir=self._run_dir, read_only=False, key=key)
        async with serving as export, open_writer(export) as writer:
            yield writer

    async def _write(
        self,
        operation: Operation,
        writer: NbdWriter,
        snapshot: Snapshot,
        info: ImageInfo,
        differs: BlockSet,
        report: Report,
    ) -> None:
        """Write what differs, durably, and then write down that it is done."""
        filler = Filler(self._catalog, self._store, snapshot)
        stored, _zero = await filler.count(filler.differing_writes(differs))
        meter = Meter(snapshot.id, stored * self._store.block_size, report)
        await filler.fill(filler.differing_writes(differs), writer, info.size_bytes, meter)
        await writer.finish()
        async with self._catalog.write() as tx:
            await tx.step(operation.id, Step.WRITTEN)

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
            present = {bitmap.name for bitmap in (await images.image_info(disk.source, disk.format)).bitmaps}
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
