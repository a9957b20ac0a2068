"""Carrying blocks of the store into an image, every one verified on its way (the store does that)."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing

import numpy as np

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.pipeline import Meter
from hvsnap.catalog import chain
from hvsnap.catalog.catalog import Catalog
from hvsnap.model import PAGE_BLOCKS, Snapshot
from hvsnap.restore.kept import Kept
from hvsnap.restore.plan import PageWrites, page_writes, ranges
from hvsnap.restore.writer import NbdWriter
from hvsnap.store.blocks import PackedBlocks

WINDOW_BLOCKS = 4 * PAGE_BLOCKS
"""Blocks that are asked for together, and somewhat more: neighbours in the store are then read in one go."""

REMEMBERED_BLOCKS_MAX = 1 << 20
"""Blocks whose writes are remembered: 16 MiB of numbers and ids."""


class Filler:
    """Writes blocks of one snapshot. What :meth:`verify` has read is ``kept``, where that has room, and read once."""

    def __init__(
        self, catalog: Catalog, store: PackedBlocks, snapshot: Snapshot, kept: Kept | None = None
    ) -> None:  # fmt: skip
        self._catalog = catalog
        self._store = store
        self._snapshot = snapshot
        self._kept = kept
        self._snapshot_blocks = -(-snapshot.size_bytes // store.block_size)

    async def stored_writes(self) -> AsyncIterator[PageWrites]:
        """Yield what a new disk needs: every block that is not zero."""
        async for page, view in self._catalog.views(self._snapshot.id):
            wanted = view != 0
            wanted[max(0, self._snapshot_blocks - page * PAGE_BLOCKS) :] = False
            yield page_writes(page, wanted, view, self._snapshot_blocks)

    async def all_writes(self, size_bytes: int, *, skip_first: bool = False) -> AsyncIterator[PageWrites]:
        """Yield what a disk of this size needs that may hold anything: every block, also those that are zero."""
        blocks = -(-size_bytes // self._store.block_size)
        wanted = BlockSet(blocks)
        for page in range(wanted.pages):
            members = np.arange(page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS) < blocks
            members[0] &= page > 0 or not skip_first
            wanted.add_page(page, members)
        async for one in self.differing_writes(wanted):
            yield one

    async def first_write(self) -> AsyncIterator[PageWrites]:
        """Yield the first block alone."""
        wanted = BlockSet(1)
        wanted.add_index(0, np.zeros(1, np.uint16))
        async for one in self.differing_writes(wanted):
            yield one

    async def differing_writes(self, differs: BlockSet) -> AsyncIterator[PageWrites]:
        """Yield what a disk needs that differs from the snapshot in these blocks."""
        held = set(await self._catalog.page_numbers(self._snapshot.id))
        for page in range(differs.pages):
            wanted = differs.page(page)
            if wanted.any():
                view = await self._catalog.view(self._snapshot.id, page) if page in held else chain.blank()
                yield page_writes(page, wanted, view, self._snapshot_blocks)

    async def count(self, writes: AsyncIterable[PageWrites]) -> tuple[int, int]:
        """Return how many blocks would be written, and how many zeroed."""
        stored = zero = 0
        async for one in writes:
            stored += one.ids.size
            zero += one.zero.size
        return stored, zero

    async def verify(self, writes: AsyncIterable[PageWrites], meter: Meter) -> None:
        """Read every block that would be written; raises :class:`Damaged` before any target is touched."""
        async for window in _windows(writes):
            ids = np.unique(np.concatenate([one.ids for one in window])).tolist()
            async with aclosing(self._store.get(ids)) as blocks:  # type: ignore[type-var]
                async for position, block in blocks:
                    if self._kept is not None:
                        self._kept.keep(ids[position], block)
                    meter.add(len(block))

    async def clear(self, writes: AsyncIterable[PageWrites], writer: NbdWriter, size_bytes: int) -> None:
        """Write only the zeroes, to a disk of ``size_bytes``."""
        async for one in writes:
            await self._clear(one, writer, size_bytes)

    async def _clear(self, one: PageWrites, writer: NbdWriter, size_bytes: int) -> None:
        block_size = self._store.block_size
        for first, count in ranges(one.zero):
            offset = first * block_size
            await writer.zero(offset, min(count * block_size, size_bytes - offset))

    async def fill(
        self,
        writes: AsyncIterable[PageWrites],
        writer: NbdWriter,
        size_bytes: int,
        meter: Meter,
        *,
        cleared: bool = False,
    ) -> None:
        """Write to a disk of ``size_bytes``, whose last block may be short; ``cleared``: zeroes are there already."""
        async for window in _windows(writes):
            if not cleared:
                for one in window:
                    await self._clear(one, writer, size_bytes)
            await self._write_window(window, writer, size_bytes, meter)

    async def _write_window(self, window: list[PageWrites], writer: NbdWriter, size_bytes: int, meter: Meter) -> None:
        numbers = np.concatenate([one.blocks for one in window]).tolist()
        ids = np.concatenate([one.ids for one in window]).tolist()
        block_size = self._store.block_size

        async def write(number: int, block: bytes) -> None:
            offset = number * block_size
            await writer.write(offset, memoryview(block)[: size_bytes - offset])
            meter.add(len(block))

        missing = []
        for position, block_id in enumerate(ids):
            block = None if self._kept is None else self._kept.get(block_id)
            if block is None:
                missing.append(position)
            else:
                await write(numbers[position], block)
        if self._kept is not None:
            self._kept.forget(ids)
        async with aclosing(self._store.get([ids[one] for one in missing])) as blocks:  # type: ignore[type-var]
            async for at, block in blocks:
                await write(numbers[missing[at]], block)


class DifferingWrites:
    """:meth:`Filler.differing_writes`, to be gone through again and again: the catalog is asked once for a few."""

    def __init__(self, filler: Filler, differs: BlockSet) -> None:
        self._filler = filler
        self._differs = differs
        self._few = differs.count() <= REMEMBERED_BLOCKS_MAX
        self._remembered: list[PageWrites] | None = None

    async def __aiter__(self) -> AsyncIterator[PageWrites]:
        """Yield the writes of each page, ascending."""
        if self._remembered is not None:
            for one in self._remembered:
                yield one
            return
        found: list[PageWrites] = []
        async for one in self._filler.differing_writes(self._differs):
            if self._few:
                found.append(one)
            yield one
        if self._few:
            self._remembered = found


async def _windows(writes: AsyncIterable[PageWrites]) -> AsyncIterator[list[PageWrites]]:
    """Yield pages that are dealt with together."""
    window: list[PageWrites] = []
    blocks = 0
    async for one in writes:
        window.append(one)
        blocks += one.blocks.size + one.zero.size
        if blocks >= WINDOW_BLOCKS:
            yield window
            window, blocks = [], 0
    if window:
        yield window
