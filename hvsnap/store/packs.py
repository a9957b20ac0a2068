"""Packs by themselves, without the catalog: what checking and rebuilding read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hvsnap.errors import Damaged, NotFound
from hvsnap.ports import ObjectInfo, ObjectStore
from hvsnap.store.kinds import is_ours
from hvsnap.store.pack import (
    FOOTER_BYTES,
    HEADER_BYTES,
    PACKS,
    EntryArray,
    Footer,
    is_pack,
    pack_id_of,
    parse_footer,
    parse_index,
)
from hvsnap.store.repository import Repository

TAIL_BYTES = 32 << 10
"""What is read of a pack's end at first: its footer, and the index of most packs in a bucket."""


class Packs:
    """The packs of one repository."""

    def __init__(self, objects: ObjectStore, repository: Repository) -> None:
        self._objects = objects
        self._repository = repository
        self._key = repository.keys.pack

    @property
    def at_once(self) -> int:
        """How many may be read at once, to lose no time in a bucket."""
        return self._objects.reads_at_once

    async def list(self) -> AsyncIterator[ObjectInfo]:
        """Yield names and sizes of all packs, also of those that no index knows; other objects are left out."""
        async for item in self._objects.list(PACKS):
            if is_pack(item.name):
                yield item

    async def beside(self) -> AsyncIterator[ObjectInfo]:
        """Yield all packs, and whatever lies in the store that is no object of a repository."""
        async for item in self._objects.list(""):
            if is_pack(item.name) or not is_ours(item.name):
                yield item

    async def size(self, name: str) -> int | None:
        """Return a pack's size in bytes; None if there is none."""
        try:
            return await self._objects.size(name)
        except NotFound:
            return None

    async def delete(self, name: str) -> None:
        """Remove a pack; one that is not there is no error."""
        await self._objects.delete(name)

    async def index(self, name: str) -> EntryArray:
        """Return a pack's index, ``ENTRY[n]``, authenticated; its blocks are not read.

        Raises :class:`Damaged`, :class:`~hvsnap.errors.FormatUnknown`, :class:`~hvsnap.errors.NotFound`.
        """
        return (await self.read(name))[1]

    async def read(self, name: str) -> tuple[Footer, EntryArray]:
        """Return a pack's footer and index, authenticated; raises as :meth:`index` does."""
        pack = pack_id_of(name, self._repository.id, self._repository.block_size, sealed=self._repository.sealed)
        size_bytes = await self._objects.size(name)
        if size_bytes < HEADER_BYTES + FOOTER_BYTES:
            raise Damaged(f"{name} is too short for a pack")
        tail_at = max(HEADER_BYTES, size_bytes - TAIL_BYTES)
        header, tail = await asyncio.gather(
            self._objects.get_range(name, 0, HEADER_BYTES),
            self._objects.get_range(name, tail_at, size_bytes - tail_at),
        )
        footer = parse_footer(pack, tail[-FOOTER_BYTES:], size_bytes)
        if footer.index_offset >= tail_at:
            body = tail[footer.index_offset - tail_at :][: footer.index_bytes]
        else:
            body = await self._objects.get_range(name, footer.index_offset, footer.index_bytes)
        return footer, await asyncio.to_thread(parse_index, pack, header, footer, body, self._key)
