"""Whether catalog and store belong together: before anything is written to either.

A catalog that is newer than its store would hand out blocks that are not there; a store that its catalog knows nothing
of would be swept empty. The lease tells which is newer: its number only ever grows, and the catalog notes it.
"""

from __future__ import annotations

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, StoreFailed
from hvsnap.model import State
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.lease import WriterLease

NEWEST_PACKS = 3
"""Packs that are looked for: one that is missing is damage, all of them, and a manifest, is an old copy."""

REPOSITORY, LEASE = "repository", "lease"
WAY_OUT = "put the right one back, or let `hvsnap store-rebuild --force` make a catalog of what the store holds"


class Bond:
    """Catalog and store of one daemon; the lease is held."""

    def __init__(self, catalog: Catalog, lease: WriterLease) -> None:
        self._catalog = catalog
        self._lease = lease

    async def is_new(self) -> bool:
        """Whether the catalog has never been used with any store: then a repository may be created."""
        return not await self._catalog.upkeep.text(REPOSITORY)

    async def check(self, store: PackedBlocks) -> None:
        """Return once it is certain that they belong together, and note it.

        Raises :class:`StoreFailed` for a store that is older or another one, :class:`CatalogFailed` for a catalog
        that knows nothing of what the store holds.
        """
        known = await self._catalog.upkeep.text(REPOSITORY)
        if not known:
            await self._check_new(store)
        elif known != store.repository.id.hex():
            raise StoreFailed(
                f"the store is another one: repository {store.repository.id.hex()}, not {known}", hint=WAY_OUT
            )
        else:
            noted = int(await self._catalog.upkeep.text(LEASE) or 0)
            if noted >= self._lease.number or await self._newest_is_missing(store):
                raise StoreFailed("the store is older than the catalog: an old copy was put back", hint=WAY_OUT)
        await self.note(store)

    @staticmethod
    async def check_read(catalog: Catalog, store: PackedBlocks) -> None:
        """Return if the catalog was made of this store, which another host writes to. Raises :class:`CatalogFailed`."""
        if await catalog.upkeep.text(REPOSITORY) != store.repository.id.hex():
            hint = "run `hvsnap store-rebuild` first: it reads what there is, and changes nothing of the store"
            raise CatalogFailed("the catalog was not made of this store, which is another host's", hint=hint)

    @staticmethod
    async def note_read(catalog: Catalog, store: PackedBlocks) -> None:
        """Note in the catalog that it was made of a store that another host writes to."""
        await catalog.upkeep.set_text(REPOSITORY, store.repository.id.hex())

    async def note(self, store: PackedBlocks) -> None:
        """Note in the catalog that it belongs to this store as it is now."""
        await self._catalog.upkeep.set_text(REPOSITORY, store.repository.id.hex())
        await self._catalog.upkeep.set_text(LEASE, str(self._lease.number))

    async def release(self) -> None:
        """Give the lease back, and note its last number: a copy of the store made before this is older."""
        number = await self._lease.release()
        if number and not await self.is_new():
            await self._catalog.upkeep.set_text(LEASE, str(number))

    async def _check_new(self, store: PackedBlocks) -> None:
        if await self._catalog.snapshots():
            return
        async for name in store.manifests.all():
            hint = "`hvsnap store-rebuild` makes a catalog from the store; nothing was changed"
            raise CatalogFailed(f"the store holds snapshots ({name}), and the catalog knows nothing of it", hint=hint)

    async def _newest_is_missing(self, store: PackedBlocks) -> bool:
        """Whether the newest packs and the newest manifest are gone."""
        packs = [pack for pack in await self._catalog.upkeep.packs() if pack.live_blocks][-NEWEST_PACKS:]
        for pack in packs:
            if await store.packs.size(pack.name) is not None:
                return False
        if not packs:
            return False
        newest = (await self._catalog.snapshots(state=State.ACCOMPLISHED))[-1:]
        for snapshot in newest:
            async for name in store.manifests.all(snapshot.disk):
                if name.snapshot == snapshot.id:
                    return False
        return bool(newest)
