"""From a frozen disk's blocks to the snapshot's pages: read, store, compare with the parent, stage.

Readers run ahead in their threads; a few workers hand chunks to the store, which hashes and compresses in its own.
A page is staged in the catalog as soon as its last block is stored; its rows belong to a snapshot that is
still ``progressing`` and so are visible to nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hvsnap.capture.plan import Group, Selection, groups
from hvsnap.capture.reader import ChunkStream, Pace, read_chunks
from hvsnap.model import ZERO_BLOCK, Progress, SnapshotId
from hvsnap.ports import BlockStore, NbdExport, UInt64Array

WORKERS = 4
"""Chunks under way in the store at once: two per core of a small host keep its hashing threads busy."""

STAGE_PAGES = 32
"""Finished pages that are committed together: a commit is an fsync."""


@dataclass(slots=True)
class Totals:
    """What a capture has done so far."""

    read_bytes: int = 0
    changed_blocks: int = 0
    data_blocks: int = 0
    """Those of the changed ones that are not zero."""
    new_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StagedPage:
    """Entries of one page that differ from the parent: ``index uint16[n]`` ascending, ``block uint64[n]``."""

    page: int
    index: npt.NDArray[np.uint16]
    block: UInt64Array


class PageStage(Protocol):
    """Where finished pages go: the catalog, seen from here."""

    async def compare(self, page: int, index: npt.NDArray[np.uint16], block: UInt64Array) -> StagedPage | None:
        """Return the entries that differ from the parent's view; None if there are none."""
        ...

    async def stage(self, pages: list[StagedPage]) -> None:
        """Write finished pages of the progressing snapshot."""
        ...


@dataclass(slots=True)
class _OpenPage:
    """A page whose blocks are still coming in, in any order."""

    missing: int
    index: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    block: list[UInt64Array] = field(default_factory=list)

    def add(self, index: npt.NDArray[np.uint16], block: UInt64Array) -> bool:
        """Take blocks; True when none is missing."""
        self.index.append(index)
        self.block.append(block)
        self.missing -= index.size
        return self.missing == 0

    def merged(self) -> tuple[npt.NDArray[np.uint16], UInt64Array]:
        """Return all entries in ascending order."""
        index, block = np.concatenate(self.index), np.concatenate(self.block)
        order = np.argsort(index)
        return index[order], block[order]


class Meter:
    """Turns bytes done into :class:`Progress`, at most a few times a second."""

    INTERVAL_S = 0.25

    def __init__(self, progress_id: str, total_bytes: int, report: Callable[[Progress], None]) -> None:
        self._id = progress_id
        self._total = total_bytes
        self._report = report
        self._started = time.monotonic()
        self._last = 0.0
        self._done = 0

    def add(self, done_bytes: int) -> None:
        """Count bytes that have been dealt with."""
        self._done += done_bytes
        now = time.monotonic()
        if now - self._last >= self.INTERVAL_S or self._done >= self._total:
            self._last = now
            elapsed_s = max(now - self._started, 1e-6)
            rate = self._done / elapsed_s
            eta_s = (self._total - self._done) / rate if self._done else None
            self._report(Progress(self._id, self._done, self._total, rate, eta_s))


class Pipeline:
    """One disk's way into the store. :meth:`run` returns when every page is staged (not yet durable blocks)."""

    def __init__(self, snapshot: SnapshotId, store: BlockStore, stage: PageStage,
                 report: Callable[[Progress], None], pace: Pace | None = None) -> None:  # fmt: skip
        self._snapshot = snapshot
        self._store = store
        self._stage = stage
        self._report = report
        self._pace = pace
        self._open: dict[int, _OpenPage] = {}
        self._finished: list[StagedPage] = []
        self.totals = Totals()

    async def run(self, export: NbdExport, size_bytes: int, selection: Selection) -> Totals:
        """Read and store what ``selection`` names. Raises what reading and storing raise; nothing is left running."""
        block_size = self._store.block_size
        meter = Meter(self._snapshot, selection.read_blocks() * block_size, self._report)
        idle: list[int] = []
        reading = read_chunks(export, size_bytes, block_size, self._walk(selection, idle), self._pace)
        async with reading as stream:
            try:
                async with asyncio.TaskGroup() as workers:
                    for number in range(WORKERS):
                        workers.create_task(self._work(stream, meter), name=f"store-{self._snapshot}-{number}")
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from group
        for number in idle:
            zero = selection.page_work(number).zero
            await self._finish(number, zero, np.zeros(zero.size, np.uint64))
        await self._flush_stage()
        meter.add(0)
        return self.totals

    def _walk(self, selection: Selection, idle: list[int]) -> Iterator[Group]:
        """Yield what is to be read, opening each page before its first block is; runs in the readers' threads.

        The numbers of pages with nothing to read, only zeroes to record, are put aside in ``idle``.
        """
        for work in selection.work():
            if work.read.size == 0:
                idle.append(work.page)
                continue
            page = _OpenPage(missing=work.read.size + work.zero.size)
            if work.zero.size:
                page.add(work.zero, np.zeros(work.zero.size, np.uint64))
            self._open[work.page] = page
            yield from groups(work, self._store.block_size)

    async def _work(self, stream: ChunkStream, meter: Meter) -> None:
        while (chunk := await stream.get()) is not None:
            try:
                stored = await self._store.put(chunk.data)
            finally:
                chunk.release()
            done_bytes = len(chunk.data)
            self.totals.read_bytes += done_bytes
            self.totals.new_bytes += stored.new_bytes
            if self._open[chunk.page].add(chunk.index, stored.ids):
                page = self._open.pop(chunk.page)
                await self._finish(chunk.page, *page.merged())
            meter.add(done_bytes)

    async def _finish(self, page: int, index: npt.NDArray[np.uint16], block: UInt64Array) -> None:
        staged = await self._stage.compare(page, index, block)
        if staged is None:
            return
        self.totals.changed_blocks += staged.index.size
        self.totals.data_blocks += int(np.count_nonzero(staged.block != ZERO_BLOCK))
        self._finished.append(staged)
        if len(self._finished) >= STAGE_PAGES:
            await self._flush_stage()

    async def _flush_stage(self) -> None:
        pages, self._finished = self._finished, []
        if pages:
            await self._stage.stage(pages)
