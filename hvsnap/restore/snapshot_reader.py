"""Reading a snapshot anywhere, as a disk is read: its view from the catalog, its blocks from the store, verified."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest
from hvsnap.model import PAGE_BLOCKS, ZERO_BLOCK, Snapshot
from hvsnap.ports import UInt64Array
from hvsnap.restore.block_cache import BlockCache

PAGES_KEPT = 128
"""Pages of the snapshot's view that are remembered, 32 KiB each: 32 GiB of disk. A snapshot never changes."""

AHEAD_BYTES_MAX = 8 << 20
"""Who reads on where a read has ended gets as much fetched ahead as was read in one go so far, up to this. A guest that
starts reads thousands of small files: more than what each has shown to need costs decoding what nobody asks for."""

RUN_BYTES = 512 << 10
"""A first read of so many bytes is taken for the beginning of a long one."""

ENDS_REMEMBERED = 128
"""Ends of the last reads: those of some sequential readers with their requests in flight side by side."""

EXTENTS_MAX = 4096


@dataclass(slots=True)
class _Run:
    """What was read in one go, up to some offset: how many bytes, and up to which block more was fetched ahead."""

    read_bytes: int = 0
    ahead: int = 0


class SnapshotReader:
    """One snapshot as bytes. The caller keeps it from being deleted."""

    def __init__(self, catalog: Catalog, cache: BlockCache, snapshot: Snapshot) -> None:
        self.size_bytes = snapshot.size_bytes
        self._catalog = catalog
        self._cache = cache
        self._snapshot = snapshot
        self._block_size = cache.block_size
        self._zeroes = bytes(self._block_size)
        self._held: frozenset[int] | None = None
        self._pages: OrderedDict[int, UInt64Array] = OrderedDict()
        self._runs: OrderedDict[int, _Run] = OrderedDict()

    async def read(self, offset: int, length: int) -> list[memoryview]:
        """Return ``length`` bytes from ``offset`` in pieces. Raises :class:`Damaged`, :class:`BadRequest`."""
        self._check(offset, length)
        first, last = offset // self._block_size, (offset + length - 1) // self._block_size
        wanted = await self._ids(first, last + 1)
        stored = [int(one) for one in wanted[wanted != ZERO_BLOCK]]
        self._cache.fetch(stored)
        await self._read_ahead(offset, length)
        blocks = iter(await self._cache.get(stored))
        pieces = [memoryview(self._zeroes if one == ZERO_BLOCK else next(blocks)) for one in wanted.tolist()]
        end = offset + length - last * self._block_size
        pieces[-1] = pieces[-1][:end]
        pieces[0] = pieces[0][offset - first * self._block_size :]
        return pieces

    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Return ``(bytes, whether they are zeroes)`` from ``offset`` on, at most :data:`EXTENTS_MAX` of them.

        They may end early; data and zeroes alternate.
        """
        self._check(offset, length)
        end = offset + length
        found: list[tuple[int, bool]] = []
        while offset < end and len(found) < EXTENTS_MAX:
            page = offset // (self._block_size * PAGE_BLOCKS)
            page_end = min(end, (page + 1) * PAGE_BLOCKS * self._block_size)
            for run_bytes, is_zero in await self._page_runs(page, offset, page_end):
                if found and found[-1][1] == is_zero:
                    found[-1] = (found[-1][0] + run_bytes, is_zero)
                else:
                    found.append((run_bytes, is_zero))
                offset += run_bytes
        return found[:EXTENTS_MAX]

    def _check(self, offset: int, length: int) -> None:
        if length < 1 or offset < 0 or offset + length > self.size_bytes:
            raise BadRequest(f"{offset}+{length} is not within the snapshot's {self.size_bytes} bytes", hint="")

    async def _page_runs(self, page: int, offset: int, end: int) -> list[tuple[int, bool]]:
        """Return the runs of a page between two offsets within it."""
        first, last = offset // self._block_size, (end - 1) // self._block_size
        zero = await self._ids(first, last + 1) == ZERO_BLOCK
        changes = np.flatnonzero(zero[1:] != zero[:-1]) + 1
        borders = [offset, *((first + int(one)) * self._block_size for one in changes), end]
        kinds = [bool(zero[0]), *(bool(zero[one]) for one in changes)]
        return [(until - since, kind) for since, until, kind in zip(borders, borders[1:], kinds, strict=False)]

    # -- the view -----------------------------------------------------------------------------------

    async def _ids(self, first: int, end: int) -> UInt64Array:
        """Return the ids of the blocks from ``first`` up to ``end``, 0 for zeroes."""
        parts = []
        for page in range(first // PAGE_BLOCKS, (end - 1) // PAGE_BLOCKS + 1):
            start, stop = max(first, page * PAGE_BLOCKS), min(end, (page + 1) * PAGE_BLOCKS)
            view = await self._page(page)
            if view is None:
                parts.append(np.zeros(stop - start, np.uint64))
            else:
                parts.append(view[start - page * PAGE_BLOCKS : stop - page * PAGE_BLOCKS])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    async def _page(self, page: int) -> UInt64Array | None:
        """Return a page's view; None if nothing was ever written there."""
        if self._held is None:
            self._held = frozenset(await self._catalog.page_numbers(self._snapshot.id))
        if page not in self._held:
            return None
        view = self._pages.get(page)
        if view is None:
            view = self._pages[page] = await self._catalog.view(self._snapshot.id, page)
            while len(self._pages) > PAGES_KEPT:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(page)
        return view

    # -- reading ahead ------------------------------------------------------------------------------

    async def _read_ahead(self, offset: int, length: int) -> None:
        """Fetch ahead for a read that goes on where another one ended, a little while ago."""
        run = self._runs.pop(offset, None)
        goes_on = run is not None or length >= RUN_BYTES
        run = run or _Run()
        run.read_bytes += length
        end = offset + length
        self._runs[end] = run
        while len(self._runs) > ENDS_REMEMBERED:
            self._runs.popitem(last=False)
        window = min(run.read_bytes, AHEAD_BYTES_MAX)
        # In halves of the window: a fetch for each block alone would cost more than the blocks.
        if not goes_on or run.ahead * self._block_size > end + window // 2:
            return
        blocks = -(-self.size_bytes // self._block_size)
        first = max(run.ahead, -(-end // self._block_size))
        run.ahead = min(blocks, -(-(end + window) // self._block_size))
        if first < run.ahead:
            self._fetch(await self._ids(first, run.ahead))

    def _fetch(self, ids: Sequence[int] | UInt64Array) -> None:
        self._cache.fetch([int(one) for one in ids if one != ZERO_BLOCK])
