"""Decoded blocks that several readers of snapshots share: each fetched once, the last used ones kept, so many bytes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing

from hvsnap.store.blocks import PackedBlocks

CACHE_BYTES = 64 << 20
"""For all snapshots that are served together. Blocks go by their ids: what snapshots share is kept once."""

FETCHES_MAX = 6
"""Fetches under way at once; each is for at most 4 MiB of blocks."""


class BlockCache:
    """Gives blocks by their ids, verified by the store on their way in."""

    def __init__(self, store: PackedBlocks, bytes_max: int = CACHE_BYTES) -> None:
        self._store = store
        self._blocks_max = max(1, bytes_max // store.block_size)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._coming: dict[int, asyncio.Future[bytes]] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(FETCHES_MAX)

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self._store.block_size

    async def get(self, ids: Sequence[int]) -> list[bytes]:
        """Return blocks in the order asked for; ids are not 0. Raises what the store raises, :class:`Damaged` too.

        They are in memory for this call, whatever the cache keeps: ask for a few MiB at a time.
        """
        self.fetch(ids)
        found: list[bytes] = []
        for block_id in ids:
            kept = self._kept.get(block_id)
            if kept is None:
                found.append(await self._await(block_id))
            else:
                self._kept.move_to_end(block_id)
                found.append(kept)
        return found

    async def _await(self, block_id: int) -> bytes:
        while (kept := self._kept.get(block_id)) is None:
            coming = self._coming.get(block_id)
            if coming is None:  # it came, and had to leave again, while another one was waited for
                self.fetch([block_id])
                coming = self._coming[block_id]
            # Shielded: others wait for the same block.
            return await asyncio.shield(coming)
        return kept

    def fetch(self, ids: Sequence[int]) -> None:
        """Begin to fetch those blocks that are neither here nor on their way."""
        missing = [one for one in dict.fromkeys(ids) if one not in self._kept and one not in self._coming]
        if not missing:
            return
        loop = asyncio.get_running_loop()
        mine = {block_id: loop.create_future() for block_id in missing}
        self._coming.update(mine)
        task = asyncio.create_task(self._fetch(mine), name=f"fetch {len(missing)} blocks")
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in list(self._fetches):
            task.cancel()
        await asyncio.gather(*self._fetches, return_exceptions=True)
        self._kept.clear()

    async def _fetch(self, mine: dict[int, asyncio.Future[bytes]]) -> None:
        ids = list(mine)
        try:
            async with self._turn, aclosing(self._store.get(ids)) as blocks:  # type: ignore[type-var]
                async for position, block in blocks:
                    self._keep(ids[position], block)
        except Exception as error:
            self._fail(mine, error)
        finally:
            self._fail(mine, asyncio.CancelledError())

    def _keep(self, block_id: int, block: bytes) -> None:
        self._kept[block_id] = block
        while len(self._kept) > self._blocks_max:
            self._kept.popitem(last=False)
        coming = self._coming.pop(block_id, None)
        if coming is not None and not coming.done():
            coming.set_result(block)

    def _fail(self, mine: dict[int, asyncio.Future[bytes]], error: BaseException) -> None:
        """Tell those that wait for what did not come; nothing of it is remembered: it may be asked for again."""
        for block_id, coming in mine.items():
            # What came may have left the cache again, and be on its way by another fetch.
            if self._coming.get(block_id) is coming:
                del self._coming[block_id]
            if coming.done():
                continue
            if isinstance(error, asyncio.CancelledError):
                coming.cancel()
                continue
            coming.set_exception(error)
            coming.exception()  # nobody may be waiting: what was read ahead is asked for again
