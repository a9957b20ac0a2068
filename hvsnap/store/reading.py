"""Another host's repository, read and never written: no object is made or removed, and nobody is kept away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn

from hvsnap.errors import Refused
from hvsnap.ports import ObjectInfo, ObjectStore, ObjectWriter

STALE = (
    "the store's writer may have deleted the snapshot, or moved its blocks, since the catalog was made: end the "
    "daemon, run `hvsnap store-rebuild`, start it, and try again"
)
"""What to do where something is missing in a store that another host writes to."""


class ReadOnlyObjects:
    """Objects that are only looked at; whatever would change them raises :class:`Refused`."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.object_bytes_best = inner.object_bytes_best
        self.reads_at_once = inner.reads_at_once

    async def get(self, name: str) -> bytes:
        """Return a whole object."""
        return await self._inner.get(name)

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return a part of an object."""
        return await self._inner.get_range(name, start, length)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Yield the objects below ``prefix``."""
        return self._inner.list(prefix)

    async def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return await self._inner.size(name)

    async def put(self, name: str, data: bytes) -> None:
        """Refuse."""
        _refuse(f"{name} is not written")

    async def writer(self, name: str) -> ObjectWriter:
        """Refuse."""
        _refuse(f"{name} is not written")

    async def delete(self, name: str) -> None:
        """Refuse."""
        _refuse(f"{name} is not removed")

    async def clean_temporaries(self) -> int:
        """Leave what its writer has under way."""
        return 0


class NoLease:
    """In the place of the writer's lease: it is never held, and nobody is kept away."""

    number = 0
    certain = False

    async def keep(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()


def _refuse(what: str) -> NoReturn:
    hint = "store.read_only is set; its own daemon, on the host that writes to it, can do that"
    raise Refused(f"the store is another host's, and only read here: {what}", hint=hint)
