"""Reading a restored image back, as a guest would, and comparing every block of it with what it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import numpy.typing as npt

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.pipeline import Meter
from hvsnap.capture.plan import Group, Selection, groups
from hvsnap.capture.reader import Chunk, read_chunks, scan
from hvsnap.errors import Damaged
from hvsnap.model import PAGE_BLOCKS
from hvsnap.ports import NbdExport
from hvsnap.restore.expected import DigestArray, Expected
from hvsnap.store.blocks import PackedBlocks

Pace = Callable[[int], Awaitable[None]]
"""Returns when so many bytes may be written or read."""

NAMED_MAX = 5
"""Blocks that an error names."""


class ReadBack:
    """Compares one image, served by a server of NBD, with the digests of its blocks."""

    def __init__(self, store: PackedBlocks, expected: Expected) -> None:
        self._store = store
        self._expected = expected
        self._open: dict[int, tuple[DigestArray, int]] = {}
        self._wrong: list[int] = []

    async def compare(self, export: NbdExport, size_bytes: int, meter: Meter, pace: Pace) -> int:
        """Return how many blocks were read; blocks that hold no data are compared with zeroes unread.

        Raises :class:`Damaged`, naming blocks by their numbers from the start of the disk, and :class:`ReadFailed`.
        """
        block_size = self._store.block_size
        found = await asyncio.to_thread(scan, export, block_size)
        if found.data.blocks != self._expected.blocks and found.size_bytes < size_bytes:
            raise Damaged(f"the restored disk has {found.size_bytes} bytes, the snapshot {size_bytes}")
        await self._check_unread(found.data)
        read = 0
        async with read_chunks(export, size_bytes, block_size, self._work(found.data)) as stream:
            while (chunk := await stream.get()) is not None:
                try:
                    await self._check(chunk, found.data)
                finally:
                    chunk.release()
                read += chunk.index.size
                meter.add(chunk.index.size * block_size)
                await pace(chunk.index.size * block_size)
        self._raise()
        return read

    def _work(self, data: BlockSet) -> Iterator[Group]:
        for work in Selection(data, None).work():
            yield from groups(work, self._store.block_size)

    async def _check_unread(self, data: BlockSet) -> None:
        """Look for blocks that must hold something, and of which the image says that they are zeroes."""
        for page in range(self._expected.pages):
            want = await self._expected.page(page)
            self._note(page, np.flatnonzero(want.any(axis=1) & ~data.page(page)))

    async def _check(self, chunk: Chunk, data: BlockSet) -> None:
        if chunk.page not in self._open:
            self._open[chunk.page] = (await self._expected.page(chunk.page), int(data.page(chunk.page).sum()))
        want, left = self._open.pop(chunk.page)
        if left > chunk.index.size:
            self._open[chunk.page] = (want, left - chunk.index.size)
        there = np.zeros((chunk.index.size, want.shape[1]), np.uint8)
        for position, digest in (await self._store.digests_of(chunk.data)).items():
            there[position] = np.frombuffer(digest, np.uint8)
        self._note(chunk.page, chunk.index[(there != want[chunk.index]).any(axis=1)])

    def _note(self, page: int, index: npt.NDArray[np.integer]) -> None:
        self._wrong += [page * PAGE_BLOCKS + int(one) for one in index]

    def _raise(self) -> None:
        if self._wrong:
            wrong = sorted(self._wrong)
            named = ", ".join(str(one) for one in wrong[:NAMED_MAX]) + (", …" if wrong[NAMED_MAX:] else "")
            what = f"{len(wrong)} blocks of the restored disk are not what the manifests say: {named}"
            raise Damaged(what, hint="`hvsnap snapshot-verify` tells whether the store is damaged")
