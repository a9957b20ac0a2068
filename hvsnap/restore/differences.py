"""In which blocks a disk, as it is now, is not what a snapshot holds.

Where the dirty bitmap and the chain tell what may differ, only that is looked at: blocks that were written since the
head are read and compared, as a guest writes much that was there before; all others are what the head holds, and
their ids in the two snapshots tell. Without a bitmap the whole disk is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.pipeline import Meter
from hvsnap.capture.plan import Selection, decide, groups
from hvsnap.capture.reader import Chunk, ChunkStream, DiskMap, read_chunks, scan
from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HypervisorFailed, ReadFailed
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import PAGE_BLOCKS, ZERO_BLOCK, Disk, Method, Progress, Snapshot
from hvsnap.ports import NbdExport, UInt64Array
from hvsnap.restore.plan import add_difference
from hvsnap.secret import Passphrase
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.repository import DIGEST_BYTES

Report = Callable[[Progress], None]

VIEWS_MAX = 256
"""Pages whose views are remembered: 8 MiB, for 64 GiB of a disk."""

WORKERS = 2
"""Chunks that are looked at side by side: while the digests of one are computed, another's are fetched."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Blocks that differ; ``method`` is how they were found, ``reason`` why the whole disk had to be read.

    ``data`` are all blocks that may hold something else than zeroes: what is written elsewhere takes new room.
    """

    blocks: BlockSet
    data: BlockSet
    method: Method
    reason: str = ""


class Wanted:
    """What a snapshot holds, page by page, within its own size."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, snapshot: Snapshot, pages: set[int]) -> None:
        self.pages = pages
        self._catalog = catalog
        self._store = store
        self._snapshot = snapshot
        self._views: dict[int, UInt64Array] = {}
        self._last: tuple[int, npt.NDArray[np.uint8]] | None = None
        self._turn = asyncio.Lock()

    @classmethod
    async def of(cls, catalog: Catalog, store: PackedBlocks, snapshot: Snapshot) -> Wanted:
        """Return what ``snapshot`` holds."""
        return cls(catalog, store, snapshot, set(await catalog.page_numbers(snapshot.id)))

    async def view(self, page: int) -> UInt64Array:
        """Return a page's block ids, without entries beyond the snapshot's end, left from when the disk was larger."""
        if page not in self.pages:
            return chain.blank()
        if page in self._views:
            return self._views[page].copy()
        view = await self._catalog.view(self._snapshot.id, page)
        blocks = -(-self._snapshot.size_bytes // self._store.block_size) - page * PAGE_BLOCKS
        view[max(0, blocks) :] = 0
        if len(self._views) < VIEWS_MAX:
            self._views[page] = view.copy()
        return view

    async def digests(self, page: int, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
        """Return digests of blocks of a page, ``uint8[PAGE_BLOCKS, 32]``: of those ``among`` (``bool[PAGE_BLOCKS]``).

        Zeroes for zero blocks and for others. The last page is remembered, and taken to be asked for in the same way.
        """
        async with self._turn:
            if self._last is None or self._last[0] != page:
                self._last = (page, await self._store.digests(np.where(among, await self.view(page), ZERO_BLOCK)))
            return self._last[1]


class Differences:
    """Compares images with snapshots. The caller keeps an image from being written to meanwhile."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, run_dir: str) -> None:
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir

    async def find(
        self, disk: Disk, snapshot: Snapshot, info: ImageInfo, key: Passphrase | None, report: Report
    ) -> Difference:
        """Return in what the disk, whose image is ``info``, differs from the snapshot. Raises :class:`ReadFailed`."""
        head = await self._catalog.snapshot(disk.head) if disk.head else None
        decision = decide(
            disk,
            {bitmap.name: bitmap for bitmap in info.bitmaps},
            size_bytes=info.size_bytes,
            head_size_bytes=None if head is None else head.size_bytes,
            block_size=self._store.block_size,
        )
        reason = decision.reason
        if decision.bitmap is not None and head is not None:
            try:
                return await self._by_bitmap(disk, head, snapshot, info, key, report)
            except HypervisorFailed as error:
                reason = f"the dirty bitmap could not be exported: {error.message}"
        return await self._by_reading(disk, snapshot, info, key, report, reason)

    async def compare(
        self, disk: Disk, snapshot: Snapshot, info: ImageInfo, key: Passphrase | None, report: Report
    ) -> BlockSet:
        """Read the whole disk and return the blocks whose content is not the snapshot's."""
        return (await self._by_reading(disk, snapshot, info, key, report, "")).blocks

    # -- inside -----------------------------------------------------------------------------------

    async def _by_reading(
        self, disk: Disk, snapshot: Snapshot, info: ImageInfo, key: Passphrase | None, report: Report, reason: str
    ) -> Difference:
        async with serve_image(disk.source, disk.format, run_dir=self._run_dir, key=key) as export:
            found = await asyncio.to_thread(scan, export, self._store.block_size)
            blocks = await self._among(export, found, None, snapshot, info, report)
        return Difference(blocks, found.data, Method.RESCAN, reason)

    async def _by_bitmap(
        self, disk: Disk, head: Snapshot, target: Snapshot, info: ImageInfo, key: Passphrase | None, report: Report
    ) -> Difference:
        """Compare what may not be as the head holds it; of the rest return where head and target differ."""
        serving = serve_image(disk.source, disk.format, run_dir=self._run_dir, bitmap=disk.bitmap, key=key)
        async with serving as export:
            found = await asyncio.to_thread(scan, export, self._store.block_size)
            suspects = await self._suspects(disk, found)
            try:
                differs = await self._among(export, found, suspects, target, info, report)
            except ReadFailed:
                differs = suspects  # what cannot be read is not what it should be, and is written
        if head.id == target.id:
            return Difference(differs, found.data, Method.BITMAP)
        present = await Wanted.of(self._catalog, self._store, head)
        wanted = await Wanted.of(self._catalog, self._store, target)
        for page in sorted(present.pages | wanted.pages):
            if page < differs.pages:
                view, known = await wanted.view(page), ~suspects.page(page)
                add_difference(differs, page, np.where(known, await present.view(page), view), view)
        return Difference(differs, found.data, Method.BITMAP)

    async def _suspects(self, disk: Disk, found: DiskMap) -> BlockSet:
        """Return what was written since the head, and what the deletion of heads has carried over."""
        if found.dirty is None:
            raise HypervisorFailed(f"the bitmap {disk.bitmap} was not exported")
        for page, index in (await self._catalog.carry(disk.id)).items():
            if page < found.dirty.pages:
                found.dirty.add_index(page, index)
        return found.dirty

    async def _among(
        self,
        export: NbdExport,
        found: DiskMap,
        suspects: BlockSet | None,
        snapshot: Snapshot,
        info: ImageInfo,
        report: Report,
    ) -> BlockSet:
        """Return which of the suspects (None: of all blocks) are not what the snapshot holds."""
        block_size = self._store.block_size
        differs = BlockSet(-(-info.size_bytes // block_size))
        wanted = await Wanted.of(self._catalog, self._store, snapshot)
        # What holds no data differs where the snapshot has a block; what holds data is read and compared.
        for page in sorted(wanted.pages):
            if page < differs.pages and (suspects is None or suspects.page(page).any()):
                view = await wanted.view(page)
                view[found.data.page(page)] = 0
                if suspects is not None:
                    view[~suspects.page(page)] = 0
                add_difference(differs, page, chain.blank(), view)
        selection = Selection(found.data, suspects)
        meter = Meter(snapshot.id, selection.read_blocks() * block_size, report)
        await self._read(export, selection, wanted, info.size_bytes, differs, meter)
        return differs

    async def _read(
        self,
        export: NbdExport,
        selection: Selection,
        wanted: Wanted,
        size_bytes: int,
        differs: BlockSet,
        meter: Meter,
    ) -> None:
        block_size = self._store.block_size

        async def compare_chunks(stream: ChunkStream) -> None:
            while (chunk := await stream.get()) is not None:
                try:
                    wrong = await self._wrong(chunk, selection, wanted)
                finally:
                    chunk.release()
                differs.add_index(chunk.page, wrong)
                meter.add(len(chunk.data))

        work = (group for page in selection.work() for group in groups(page, block_size))
        async with read_chunks(export, size_bytes, block_size, work) as stream:
            try:
                async with asyncio.TaskGroup() as workers:
                    for number in range(WORKERS):
                        workers.create_task(compare_chunks(stream), name=f"compare {number}")
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from group

    async def _wrong(self, chunk: Chunk, selection: Selection, wanted: Wanted) -> npt.NDArray[np.uint16]:
        """Return which blocks of a chunk are not what the snapshot holds."""
        there = np.zeros((chunk.index.size, DIGEST_BYTES), np.uint8)
        for at, digest in (await self._store.digests_of(chunk.data)).items():
            there[at] = np.frombuffer(digest, np.uint8)
        among = np.zeros(PAGE_BLOCKS, np.bool_)
        among[selection.page_work(chunk.page).read] = True
        digests = await wanted.digests(chunk.page, among)
        wrong: npt.NDArray[np.uint16] = chunk.index[(there != digests[chunk.index]).any(axis=1)]
        return wrong
