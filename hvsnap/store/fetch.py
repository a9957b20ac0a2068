"""Blocks on their way out: few large reads, some ahead, every block verified before it is handed out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hvsnap.errors import Damaged, NotFound, StoreFailed
from hvsnap.model import BlockPlace
from hvsnap.ports import BlockIndex, ObjectStore
from hvsnap.store.codec import Codec
from hvsnap.store.intake import Workers
from hvsnap.store.pack import HEADER_BYTES
from hvsnap.store.seal import SEAL_BYTES

IDS_AT_ONCE = 4096
"""Ids that are looked up and sorted together: a page of a block map."""

READ_BYTES_MAX = 2 << 20
"""Stored bytes of one read."""

CONTENT_BYTES_MAX = 4 << 20
"""Bytes of blocks that come of one read, however well they were compressed (but at least one block)."""

GAP_BYTES_MAX = 64 << 10
"""Bytes between two wanted blocks that are read rather than skipped: cheaper than another request."""

MOVES_MAX = 3
"""How often the blocks of a read may turn out to have been moved to another pack before that is called damage."""


@dataclass(slots=True)
class Read:
    """One range of a pack, its blocks in ascending order, and for each of them the positions that want it."""

    pack: str
    start: int
    end: int
    places: list[BlockPlace] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)

    def add(self, position: int, place: BlockPlace) -> None:
        """Take a block that lies behind the last one, or is the last one."""
        if self.places and self.places[-1].id == place.id:
            self.positions[-1].append(position)
            return
        self.places.append(place)
        self.positions.append([position])
        self.end = max(self.end, place.offset + place.length)

    def suits(self, place: BlockPlace, blocks_max: int) -> bool:
        """Whether the range can grow to hold ``place``, too."""
        return (
            self.pack == place.pack
            and place.offset - self.end <= GAP_BYTES_MAX
            and place.offset + place.length - self.start <= READ_BYTES_MAX
            and len(self.places) < blocks_max
        )


def plan_reads(wanted: Iterable[tuple[int, BlockPlace]], block_size: int) -> Iterator[Read]:
    """Yield the reads that fetch ``(position, place)`` pairs, by pack and offset.

    Raises :class:`Damaged` for a place that no pack can have, before anything is read for it.
    """
    blocks_max = max(1, CONTENT_BYTES_MAX // block_size)
    read: Read | None = None
    for position, place in sorted(wanted, key=lambda pair: (pair[1].pack, pair[1].offset, pair[1].id, pair[0])):
        if place.offset < HEADER_BYTES or not 1 <= place.length <= block_size + SEAL_BYTES:
            raise Damaged(f"block {place.id} cannot be at {place.offset}+{place.length} in {place.pack}")
        if read is None or not read.suits(place, blocks_max):
            if read is not None:
                yield read
            read = Read(place.pack, place.offset, place.offset)
        read.add(position, place)
    if read is not None:
        yield read


class Fetcher:
    """Reads blocks by their ids."""

    def __init__(
        self, objects: ObjectStore, index: BlockIndex, codec: Codec, workers: Workers, block_size: int, hint: str = ""
    ) -> None:
        self._hint = hint
        self._objects = objects
        self._index = index
        self._codec = codec
        self._workers = workers
        self._block_size = block_size

    async def fetch(self, ids: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Yield ``(position, block)``; see :meth:`hvsnap.ports.BlockStore.get`."""
        running: deque[asyncio.Task[list[tuple[int, bytes]]]] = deque()
        try:
            async for read in self._reads(ids):
                running.append(asyncio.create_task(self._fetch(read), name=f"read {read.pack}"))
                if len(running) >= self._objects.reads_at_once:
                    for item in await running.popleft():
                        yield item
            while running:
                for item in await running.popleft():
                    yield item
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _reads(self, ids: Sequence[int]) -> AsyncIterator[Read]:
        for start in range(0, len(ids), IDS_AT_ONCE):
            places = await self._index.places([int(block) for block in ids[start : start + IDS_AT_ONCE]])
            for read in plan_reads(enumerate(places, start), self._block_size):
                yield read

    async def _fetch(self, read: Read, moves: int = 0) -> list[tuple[int, bytes]]:
        try:
            data = memoryview(await self._range(read))
            blocks = await self._workers.run(self._codec.restore, data, read.start, read.places)
        except Damaged as error:
            # Unless a sweep has rewritten the pack since we looked: then they are whole, and elsewhere.
            now = await self._index.places([place.id for place in read.places])
            if now == read.places or moves == MOVES_MAX:
                raise Damaged(error.message, hint=self._hint or error.hint) from error
            wanted = [(position, place) for place, many in zip(now, read.positions, strict=True) for position in many]
            again = [await self._fetch(one, moves + 1) for one in plan_reads(wanted, self._block_size)]
            return [item for items in again for item in items]
        return [
            (position, block) for block, positions in zip(blocks, read.positions, strict=True) for position in positions
        ]

    async def _range(self, read: Read) -> bytes:
        """Read a range; a pack that is missing or ends early is damage, not a failing device."""
        blocks = ", ".join(str(place.id) for place in read.places[:3])
        what = f"{read.pack}, which holds block {blocks}{', …' if len(read.places) > 3 else ''}"
        try:
            return await self._objects.get_range(read.pack, read.start, read.end - read.start)
        except NotFound as error:
            raise Damaged(f"{what}, is missing") from error
        except StoreFailed as error:
            try:
                if await self._objects.size(read.pack) < read.end:
                    raise Damaged(f"{what}, was cut short") from error
            except NotFound:  # removed since: perhaps its blocks are elsewhere by now
                raise Damaged(f"{what}, is missing") from error
            raise
