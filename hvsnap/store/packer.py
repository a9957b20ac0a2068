"""A pack on its way into the store: it takes stored blocks, streams them out, becomes durable and enters the index.

Its life is its own task's, not that of any put: a cancelled capture leaves nothing half-written in what it shares.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence

from hvsnap.errors import HvsnapError, StoreFailed
from hvsnap.model import BlockPlace
from hvsnap.ports import ObjectStore, PackIndex
from hvsnap.store.codec import StoredBatch
from hvsnap.store.pack import (
    ENTRIES_MAX,
    ENTRY,
    FOOTER_BYTES,
    HEADER_BYTES,
    PackId,
    encode_header,
    encode_tail,
    index_entries,
)

PACK_BYTES = 64 << 20
"""Size that a pack stays below, index aside, or below what its object store takes best."""

WRITE_BYTES = 4 << 20
"""Bytes that are gathered before they are written."""

BUFFERED_BYTES_MAX = 8 << 20
"""Bytes that wait for a slow device before the puts have to."""


class Packer:
    """One pack from its first block to its end, good or bad. All methods belong to one event loop.

    Three states: *open*, blocks can be claimed for it; *sealed*, it waits for the blocks that were claimed and then
    finishes; *over*, it is durable and in the index, or has failed. ``on_over`` is called once, however it ends.
    """

    def __init__(
        self, pack: PackId, key: bytes, objects: ObjectStore, index: PackIndex, on_over: Callable[[Packer], None]
    ) -> None:
        self.pack = pack
        self.claims: dict[bytes, int] = {}
        """Digests and ids of the blocks that are, or are about to be, in this pack."""

        self._key = key
        self._objects = objects
        self._index = index
        self._on_over = on_over
        self._error: HvsnapError | None = None
        self._sealed = False
        self._over = asyncio.Event()
        self._work = asyncio.Event()
        self._drained = asyncio.Event()
        self._pieces: list[bytes | memoryview] = [encode_header(pack)]
        self._buffered_bytes = HEADER_BYTES
        self._end = HEADER_BYTES
        self._digests: list[bytes] = []
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._flags: list[int] = []

    # -- the puts' side ---------------------------------------------------------------------------

    @property
    def durable(self) -> bool:
        """Whether its blocks are durable and in the index."""
        return self._over.is_set() and self._error is None

    @property
    def sealed(self) -> bool:
        """Whether somebody has asked for its end."""
        return self._sealed

    def claim(self, blocks: dict[bytes, int]) -> bool:
        """Announce new blocks, digest to id; False if there is no room, and another pack must take them.

        Whoever has announced blocks must :meth:`append` them, or :meth:`fail` the pack, which waits for them.
        """
        coming = len(self.claims) - len(self._digests) + len(blocks)
        limit = min(PACK_BYTES, self._objects.object_bytes_best)
        full = self._end + coming * self.pack.block_size > limit or len(self.claims) + len(blocks) > ENTRIES_MAX
        if self._sealed or self._error is not None or (full and self.claims):
            return False
        self.claims |= blocks
        return True

    async def room(self) -> None:
        """Wait until little is left to be written; raise if the pack has failed."""
        while self._buffered_bytes >= BUFFERED_BYTES_MAX and self._error is None:
            self._drained.clear()
            await self._drained.wait()
        self.raise_error()

    def append(self, digests: Sequence[bytes], batch: StoredBatch) -> None:
        """Take blocks that were claimed; raise if the pack has failed."""
        self.raise_error()
        self._digests += digests
        self._lengths += batch.lengths
        self._flags += batch.flags
        for length in batch.lengths:
            self._offsets.append(self._end)
            self._end += length
        self._pieces += batch.pieces
        self._buffered_bytes += batch.size_bytes
        self._work.set()

    def seal(self) -> None:
        """Take no more claims, and finish when those there are have been met."""
        self._sealed = True
        self._work.set()

    def fail(self, error: Exception) -> None:
        """Give the pack up: what was claimed will not come, or the store closes. The first error stays."""
        if self._error is None and not self._over.is_set():
            self._error = error if isinstance(error, HvsnapError) else _wrapped(error)
        self._work.set()
        self._drained.set()

    async def wait(self) -> None:
        """Return when all its blocks are durable and in the index. Raises what went wrong."""
        await self._over.wait()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what went wrong, if something did: a new exception each time, for each of those who ask."""
        if self._error is not None:
            raise copy.copy(self._error) from self._error

    # -- the task's side --------------------------------------------------------------------------

    async def run(self) -> None:
        """Write what comes until the end. Raises nothing but its own cancellation; :meth:`wait` tells the rest."""
        try:
            await self._write()
            places = await asyncio.to_thread(self._places)
            # From here on the pack stays, whatever the index says: if it took the blocks and could not tell, they are
            # used one day; if it did not, the next sweep finds a pack that nothing knows.
            await self._index.add_pack(self.pack.name, self._size_bytes, places)
        except Exception as error:
            self.fail(error)
        except BaseException:
            self.fail(StoreFailed("the store was closed before the blocks were durable"))
            raise
        finally:
            self._over.set()
            self._on_over(self)

    async def _write(self) -> None:
        writer = await self._objects.writer(self.pack.name)
        try:
            while pieces := await self._next_pieces():
                await writer.write(*pieces)
            await writer.write(await asyncio.to_thread(self._tail))
            self.raise_error()
            await writer.commit()
        finally:
            await writer.abort()

    async def _next_pieces(self) -> list[bytes | memoryview]:
        """Return what has gathered, once it is worth a write; nothing at the end."""
        while True:
            self.raise_error()
            complete = self._sealed and len(self._digests) == len(self.claims)
            if complete or self._buffered_bytes >= WRITE_BYTES:
                pieces, self._pieces = self._pieces, []
                self._buffered_bytes = 0
                self._drained.set()
                return pieces
            self._work.clear()
            await self._work.wait()

    @property
    def _size_bytes(self) -> int:
        return self._end + ENTRY.itemsize * len(self._digests) + FOOTER_BYTES

    def _tail(self) -> bytes:
        index = index_entries(self._digests, self._offsets, self._lengths, self._flags)
        return encode_tail(self.pack, self._end, index, self._key)

    def _places(self) -> list[BlockPlace]:
        return [
            BlockPlace(self.claims[digest], digest, self.pack.name, offset, length, flags)
            for digest, offset, length, flags in zip(
                self._digests, self._offsets, self._lengths, self._flags, strict=True
            )
        ]


def _wrapped(error: Exception) -> StoreFailed:
    wrapped = StoreFailed(f"a pack could not be stored: {error!r}")
    wrapped.__cause__ = error
    return wrapped
