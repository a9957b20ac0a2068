"""Packs by their blocks: checking each one, giving the space of dead ones back, moving live ones to another pack.

What is live is told by the catalog's places; this module only reads and writes objects. Blocks are moved as they are
stored, and verified on the way: damage is never carried into a new pack.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence

from hvsnap.errors import Damaged, FormatUnknown, NotFound, StoreFailed
from hvsnap.model import BlockPlace
from hvsnap.ports import ObjectStore, PackIndex, Punching
from hvsnap.store.codec import Codec, StoredBatch
from hvsnap.store.fetch import Read, plan_reads
from hvsnap.store.intake import Workers
from hvsnap.store.pack import HEADER_BYTES, PackId
from hvsnap.store.packer import Packer
from hvsnap.store.packs import Packs
from hvsnap.store.repository import Repository
from hvsnap.store.uninterrupted import uninterrupted

HOLE_BYTES_MIN = 4096
"""A smaller hole gives nothing back."""


def holes(places: Sequence[BlockPlace], index_offset: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, length)`` of all that lies between the live blocks of a pack, its header and its index."""
    at = HEADER_BYTES
    for place in sorted(places, key=lambda place: place.offset):
        if place.offset - at >= HOLE_BYTES_MIN:
            yield at, place.offset - at
        at = max(at, place.offset + place.length)
    if index_offset - at >= HOLE_BYTES_MIN:
        yield at, index_offset - at


class Rewriting:
    """Works on the packs of one repository."""

    def __init__(
        self, objects: ObjectStore, repository: Repository, codec: Codec, workers: Workers, packs: Packs
    ) -> None:
        self._objects = objects
        self._repository = repository
        self._codec = codec
        self._workers = workers
        self._packs = packs

    @property
    def can_punch(self) -> bool:
        """Whether holes may be had at all; a single file system may still refuse them."""
        return isinstance(self._objects, Punching)

    async def check(
        self, pack: str, places: Sequence[BlockPlace], read: Callable[[int], Awaitable[None]] | None = None
    ) -> dict[int, str]:
        """Read blocks of one pack, and return those that are damaged, with the reason, by their ids.

        Several parts are read at once; ``read`` is told the bytes of each before, and may take its time (a rate limit).
        Raises :class:`StoreFailed` when the store cannot be read: that says nothing about the blocks.
        """
        damaged: dict[int, str] = {}
        running: deque[asyncio.Task[dict[int, str]]] = deque()
        try:
            for part in plan_reads(enumerate(places), self._repository.block_size):
                if len(running) >= self._objects.reads_at_once:
                    damaged |= await running.popleft()
                if read is not None:
                    await read(part.end - part.start)
                running.append(asyncio.create_task(self._check(pack, part), name=f"check {pack}"))
            while running:
                damaged |= await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return damaged

    async def _check(self, pack: str, part: Read) -> dict[int, str]:
        data = await self._read(pack, part.start, part.end)
        if data is None:
            return {place.id: f"{pack} is missing" for place in part.places}
        return await self._workers.run(self._codec.check, memoryview(data), part.start, part.places)

    async def check_index(self, pack: str) -> str:
        """Return what is wrong with a pack's header, index and footer; empty if nothing is."""
        try:
            await self._packs.index(pack)
        except (Damaged, NotFound, FormatUnknown) as error:
            return error.message
        return ""

    async def punch(self, pack: str, places: Sequence[BlockPlace]) -> bool:
        """Give back the space of everything in a pack but these blocks, header and index; False if it cannot be done.

        Raises :class:`Damaged` for a pack whose index cannot be read: then it is not known where that begins.
        """
        if not isinstance(self._objects, Punching):
            return False
        footer, _index = await self._packs.read(pack)
        return await self._objects.punch(pack, list(holes(places, footer.index_offset)))

    async def rewrite(self, old: Sequence[tuple[str, Sequence[BlockPlace]]], index: PackIndex) -> dict[int, str]:
        """Copy the live blocks of packs into new ones, and let ``index`` take each of these into the catalog.

        The old packs stay. Blocks that are damaged are left behind, and returned with the reason, by their ids.
        Raises what writing a pack and ``index`` raise; new packs that were entered before are not undone.
        """
        damaged: dict[int, str] = {}
        async with _NewPacks(self._objects, self._repository, index) as new:
            for name, places in old:
                for part in plan_reads(enumerate(places), self._repository.block_size):
                    damaged |= await self._copy(name, part, new)
        return damaged

    async def _copy(self, name: str, part: Read, new: _NewPacks) -> dict[int, str]:
        data = await self._read(name, part.start, part.end)
        if data is None:
            return {place.id: f"{name} is missing" for place in part.places}
        damaged = await self._workers.run(self._codec.check, memoryview(data), part.start, part.places)
        whole = [place for place in part.places if place.id not in damaged]
        if whole:
            stored = [data[place.offset - part.start :][: place.length] for place in whole]
            await new.take(whole, b"".join(stored))
        return damaged

    async def _read(self, pack: str, start: int, end: int) -> bytes | None:
        """Return a range, shorter where the pack ends early; None if there is no pack."""
        try:
            return await self._objects.get_range(pack, start, end - start)
        except NotFound:
            return None
        except StoreFailed:
            size_bytes = await self._objects.size(pack)
            if size_bytes >= end:
                raise
            return b"" if size_bytes <= start else await self._objects.get_range(pack, start, size_bytes - start)


class _NewPacks:
    """Packs that are filled one after the other. On leaving, the last one is finished; after an error, given up."""

    def __init__(self, objects: ObjectStore, repository: Repository, index: PackIndex) -> None:
        self._objects = objects
        self._repository = repository
        self._index = index
        self._packer: Packer | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _NewPacks:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _error: object, _traceback: object) -> None:
        if kind is None:
            await self._finish()
        elif self._packer is not None and self._task is not None:
            self._packer.fail(StoreFailed("the rewriting of a pack was interrupted"))
            await uninterrupted(_ended(self._task), name="give up a pack")

    async def take(self, places: Sequence[BlockPlace], stored: bytes) -> None:
        """Take blocks as they are stored, one after the other in ``stored``."""
        claims = {place.digest: place.id for place in places}
        if self._packer is not None and not (
            self._packer.claims.keys().isdisjoint(claims) and self._packer.claim(claims)
        ):
            await self._finish()
        if self._packer is None:
            pack = PackId.new(self._repository.id, self._repository.block_size, sealed=self._repository.sealed)
            self._packer = Packer(pack, self._repository.keys.pack, self._objects, self._index, lambda _packer: None)
            self._task = asyncio.create_task(self._packer.run(), name=pack.name)
            self._packer.claim(claims)
        await self._packer.room()
        batch = StoredBatch([stored], [place.length for place in places], [place.flags for place in places])
        self._packer.append([place.digest for place in places], batch)

    async def _finish(self) -> None:
        if self._packer is not None:
            self._packer.seal()
            await self._packer.wait()
        self._packer = self._task = None


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})
