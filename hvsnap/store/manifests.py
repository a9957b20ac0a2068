"""Manifests in the repository: written before a snapshot is accomplished, read when only the store is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator

from hvsnap.errors import Damaged
from hvsnap.ports import ObjectStore
from hvsnap.store.identity import MANIFESTS, ManifestHead, ManifestName
from hvsnap.store.manifest import ManifestDecoder, ManifestEncoder, ManifestPage
from hvsnap.store.repository import Repository

PIECE_BYTES = 1 << 20
"""Bytes that are gathered before they are written, or read at once."""


class Manifests:
    """The manifests of one repository. Disks and snapshots are named by :class:`ManifestName`."""

    def __init__(self, objects: ObjectStore, repository: Repository) -> None:
        self._objects = objects
        self._repository = repository
        self._key = repository.keys.manifest
        self._seal = repository.seal

    async def put(self, head: ManifestHead, pages: AsyncIterable[ManifestPage]) -> ManifestName:
        """Write a manifest, durable on return; its pages ascend by number. The blocks must be durable before.

        Raises :class:`~hvsnap.errors.ObjectExists`, :class:`~hvsnap.errors.NoSpace`,
        :class:`~hvsnap.errors.StoreFailed`, :class:`~hvsnap.errors.Damaged` for pages that no reader would accept.
        """
        name = ManifestName.parse(head.name)
        encoder = ManifestEncoder(head, self._repository.id, self._key, self._seal)
        writer = await self._objects.writer(head.name)
        try:
            piece = bytearray(encoder.start())
            async for page in pages:
                piece += await asyncio.to_thread(encoder.page, page)
                if len(piece) >= PIECE_BYTES:
                    await writer.write(bytes(piece))
                    piece.clear()
            await writer.write(bytes(piece + encoder.finish()))
            await writer.commit()
        finally:
            await writer.abort()
        return name

    async def head(self, name: ManifestName) -> ManifestHead:
        """Return a manifest's head, authenticated.

        Raises :class:`~hvsnap.errors.NotFound`, :class:`~hvsnap.errors.Damaged`.
        """
        size_bytes = await self._objects.size(str(name))
        decoder = self._decoder(name, size_bytes)
        async for piece in self._pieces(name, size_bytes):
            await asyncio.to_thread(decoder.feed, piece)
            if decoder.head is not None:
                return decoder.head
        return decoder.finish()

    async def pages(self, name: ManifestName) -> AsyncIterator[ManifestPage]:
        """Yield a manifest's pages, each one authenticated, in ascending order.

        That none is missing is certain only when the iterator has ended without raising
        :class:`~hvsnap.errors.Damaged`: act on them then.
        """
        size_bytes = await self._objects.size(str(name))
        decoder = self._decoder(name, size_bytes)
        async for piece in self._pieces(name, size_bytes):
            for page in await asyncio.to_thread(decoder.feed, piece):
                yield page
        decoder.finish()

    async def all(self, disk: str = "") -> AsyncIterator[ManifestName]:
        """Yield every revision of the manifests of a disk, or of all, in order; objects of other names are left out."""
        async for item in self._objects.list(f"{MANIFESTS}/{disk}"):
            with contextlib.suppress(Damaged):
                yield ManifestName.parse(item.name)

    async def names(self, disk: str = "") -> AsyncIterator[ManifestName]:
        """Yield the manifests of a disk, or of all; of several revisions only the highest.

        Raises :class:`~hvsnap.errors.Damaged` for an object that is no manifest.
        """
        last: ManifestName | None = None
        async for item in self._objects.list(f"{MANIFESTS}/{disk}"):
            name = ManifestName.parse(item.name)
            if last is not None and last.snapshot != name.snapshot:
                yield last
            last = name
        if last is not None:
            yield last

    async def delete(self, name: ManifestName) -> None:
        """Remove a manifest; one that is not there is no error."""
        await self._objects.delete(str(name))

    def _decoder(self, name: ManifestName, size_bytes: int) -> ManifestDecoder:
        repository = self._repository
        return ManifestDecoder(str(name), size_bytes, repository.id, repository.block_size, self._key, self._seal)

    async def _pieces(self, name: ManifestName, size_bytes: int) -> AsyncIterator[bytes]:
        for start in range(0, size_bytes, PIECE_BYTES):
            yield await self._objects.get_range(str(name), start, min(PIECE_BYTES, size_bytes - start))
