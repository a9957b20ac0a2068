"""Policies, what is set for disks, and what they were made of, kept in the store, too: a rebuild brings them back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Damaged, FormatUnknown, HvsnapError
from hvsnap.policy import PolicyId
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.settings import DiskSettings, HostSettings

log = logging.getLogger(__name__)

LOOK_S = 30.0
"""How long a change is in the catalog alone, at most."""


async def present(catalog: Catalog) -> HostSettings:
    """Return what is set now."""
    policies = sorted(await catalog.policies(), key=lambda policy: policy.id)
    disks = [
        DiskSettings(
            disk.id,
            None if disk.policy is None else PolicyId(disk.policy),
            disk.delete_auto_with_disk,
            disk.released,
        )
        for disk in await catalog.disks(include_released=True)
    ]
    told = [one for one in disks if one != DiskSettings(one.id)]
    # Of a block device nothing tells later whether it is still the same one.
    origins = [origin for origin in await catalog.origins() if origin.inode is not None]
    return HostSettings(tuple(policies), tuple(sorted(told, key=lambda one: one.id)), tuple(origins))


class SettingsKeeper:
    """Writes the store's settings when they have changed. ``certain``: this process is still the only writer."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, certain: Callable[[], bool] = lambda: True) -> None:
        self._catalog = catalog
        self._store = store
        self._certain = certain
        self._known: HostSettings | None = None
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Look now and then until cancelled; what fails is logged and tried again."""
        while True:
            try:
                await self.reconcile()
            except HvsnapError as error:
                log.warning("policies and settings could not be kept in the store yet: %s", error.message)
            await asyncio.sleep(LOOK_S)

    async def reconcile(self) -> bool:
        """Let the store say what is set; return whether something was written. Raises what store and catalog raise."""
        async with self._turn:
            now = await present(self._catalog)
            if now == self._known or not self._certain():
                return False
            try:
                told: HostSettings | None = await self._store.settings.newest()
            except FormatUnknown:
                return False  # a later release's: it will want them again
            except Damaged:
                told = None
            if told != now:
                kept = await self._store.settings.put(now) if now != HostSettings() else ""
                if not self._certain():
                    return True  # the older ones do no harm, and another writer's would be among them
                await self._store.settings.remove(but=kept)
            self._known = now
            return told != now


async def bring_back(catalog: Catalog, store: PackedBlocks) -> int:
    """Enter what the store says into a catalog that has its disks; return how many policies there are.

    Raises :class:`Damaged`, :class:`FormatUnknown`.
    """
    settings = await store.settings.newest()
    disks = {disk.id: disk for disk in await catalog.disks(include_released=True)}
    policies = {policy.id for policy in settings.policies}
    async with catalog.write() as tx:
        for policy in settings.policies:
            await tx.put_policy(policy)
        for origin in settings.origins:
            await tx.put_origin(origin)
        for one in settings.disks:
            if one.id in disks:
                await tx.update_disk(
                    one.id,
                    policy=one.policy if one.policy in policies else None,
                    delete_auto_with_disk=one.delete_auto_with_disk,
                    released=one.released or disks[one.id].released,
                )
    return len(policies)
