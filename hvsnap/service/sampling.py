"""Noting every few minutes what is stored, of each chain and of the host (SERVICE 9.2)."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.usage import DEVICE, HOST
from hvsnap.errors import HvsnapError
from hvsnap.metering import days_to_full
from hvsnap.model import SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.service.freeing import chain_blocks, stored_bytes

log = logging.getLogger(__name__)

SAMPLE_S = 300.0
THIN_S = 3600.0


def device_space(directory: Path) -> tuple[int, int]:
    """Return the free and all bytes of a directory's device, both 0 if it is not there. Blocking."""
    try:
        device = os.statvfs(directory)
    except OSError:
        return 0, 0
    return device.f_bavail * device.f_frsize, device.f_blocks * device.f_frsize


class Sampler:
    """Takes the samples. ``directory`` is the store's; None where it is a bucket, of which nobody knows how full it is.

    A chain is counted anew only when other snapshots make it up, and noted only when its bytes differ.
    """

    def __init__(self, catalog: Catalog, clock: Clock, directory: Path | None) -> None:
        self._catalog = catalog
        self._clock = clock
        self._directory = directory
        self._counted: dict[str, tuple[tuple[SnapshotId, ...], int]] = {}
        self._noted: dict[str, int] | None = None
        self._thinned_at: float | None = None
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Go on until cancelled; what fails is tried again the next time."""
        while True:
            try:
                await self.sample()
            except HvsnapError as error:
                log.warning("what is stored cannot be noted now: %s", error.message)
            await asyncio.sleep(SAMPLE_S)

    async def sample(self) -> None:
        """Note what is stored now, as far as it has changed. Raises what the catalog raises."""
        async with self._turn:
            await self._sample()

    async def _sample(self) -> None:
        if self._noted is None:
            before = await self._catalog.usage.series()
            self._noted = {subject: series[-1].value for subject, series in before.items()}
        values = await self._chains()
        values[HOST] = (await self._catalog.figures()).store.live_bytes
        used = await self._used()
        if used is not None:
            values[DEVICE] = used
        changed = {subject: value for subject, value in values.items() if self._noted.get(subject) != value}
        if changed:
            await self._catalog.usage.add(self._clock.now(), changed)
            self._noted |= changed
        moment = self._clock.monotonic()
        if self._thinned_at is None or moment - self._thinned_at >= THIN_S:
            self._thinned_at = moment
            await self._catalog.usage.thin(self._clock.now())

    async def days_to_full(self) -> float | None:
        """Return in how many days the store's device is full at the pace of the last week; None: not to be told."""
        if self._directory is None:
            return None
        free_bytes, total_bytes = await asyncio.to_thread(device_space, self._directory)
        if not total_bytes:
            return None
        return days_to_full(await self._catalog.usage.of(DEVICE), free_bytes, self._clock.now())

    async def _chains(self) -> dict[str, int]:
        """Return what the store holds for each chain; 0 for one that was noted and has no snapshot any more."""
        nodes: dict[str, list[SnapshotId]] = {}
        for row in await self._catalog.snapshots(state=State.ACCOMPLISHED):
            nodes.setdefault(row.disk, []).append(row.id)
        values = {subject: 0 for subject in self._noted or () if subject not in (HOST, DEVICE)}
        for disk, names in nodes.items():
            try:
                values[disk] = await self._count(disk, tuple(names))
            except HvsnapError as error:  # a snapshot was deleted meanwhile: the next sample tells
                log.info("what disk %s takes in the store is not counted: %s", disk, error.message)
                values.pop(disk, None)
        return values

    async def _count(self, disk: str, names: tuple[SnapshotId, ...]) -> int:
        known = self._counted.get(disk)
        if known is None or known[0] != names:
            counted = await stored_bytes(self._catalog, await chain_blocks(self._catalog, names))
            self._counted[disk] = known = (names, counted)
        return known[1]

    async def _used(self) -> int | None:
        if self._directory is None:
            return None
        free_bytes, total_bytes = await asyncio.to_thread(device_space, self._directory)
        return total_bytes - free_bytes if total_bytes else None
