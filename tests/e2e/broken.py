"""Faults of the product, each of a class that has bitten somebody: other tests show that they would be seen.

A fault is put in by replacing one function of the product in the daemon's own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from hvsnap.capture import capture, plan, record
from hvsnap.capture.blockset import BlockSet
from hvsnap.catalog.catalog import Catalog
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.model import PAGE_BLOCKS, BlockPlace
from hvsnap.restore.differences import Difference, Differences
from hvsnap.store.codec import Codec
from hvsnap.store.pack import FLAG_ZSTD

FAULTS: dict[str, Callable[[], None]] = {}


def fault(install: Callable[[], None]) -> Callable[[], None]:
    FAULTS[install.__name__] = install
    return install


@fault
def zero_skipped() -> None:
    """What is dirty and holds no data is passed over."""
    page_work = plan.Selection.page_work

    def broken(self: plan.Selection, number: int) -> plan.PageWork:
        return dataclasses.replace(page_work(self, number), zero=np.array([], np.uint16))

    plan.Selection.page_work = broken  # type: ignore[method-assign]


@fault
def dirty_bit_dropped() -> None:
    """One dirty block of each capture is lost."""
    scan = record.scan

    def broken(export: Any, block_size: int) -> record.DiskMap:
        found = scan(export, block_size)
        if found.dirty is None:
            return found
        dirty, lost = BlockSet(found.dirty.blocks), False
        for page in range(found.dirty.pages):
            members = found.dirty.page(page)
            if members.any() and not lost:
                members[np.flatnonzero(members)[-1]] = False
                lost = True
            dirty.add_page(page, members)
        return dataclasses.replace(found, dirty=dirty)

    record.scan = broken


@fault
def short_block_dropped() -> None:
    """The part of a block at a disk's end is taken for no block."""
    scan = record.scan

    def broken(export: Any, block_size: int) -> record.DiskMap:
        found = scan(export, block_size)
        data = BlockSet(found.data.blocks)
        for page in range(data.pages):
            members = found.data.page(page)
            members[max(0, found.size_bytes // block_size - page * PAGE_BLOCKS) :] = False
            data.add_page(page, members)
        return dataclasses.replace(found, data=data)

    record.scan = broken


@fault
def bitmap_after_switch() -> None:
    """The bitmap that records what comes after the instant is added when the image is read, to the overlay."""
    add, init, read = LibvirtHypervisor.bitmap_add, LibvirtHypervisor.__init__, record.Recorder.record
    late: list[tuple[Any, ...]] = []
    made: list[LibvirtHypervisor] = []

    def remember(self: LibvirtHypervisor, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    async def later(_self: LibvirtHypervisor, *arguments: Any) -> None:
        late.append(arguments)

    async def late_record(self: record.Recorder, disk_plan: record.DiskPlan) -> Any:
        while late:
            await add(made[0], *late.pop())
        return await read(self, disk_plan)

    LibvirtHypervisor.__init__ = remember  # type: ignore[method-assign]
    LibvirtHypervisor.bitmap_add = later  # type: ignore[method-assign]
    record.Recorder.record = late_record  # type: ignore[method-assign]


@fault
def commit_while_reading() -> None:
    """The overlay is merged back before the image underneath has been read."""
    init, read = LibvirtHypervisor.__init__, record.Recorder.record
    made: list[LibvirtHypervisor] = []

    def remember(self: LibvirtHypervisor, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    async def after_commit(self: record.Recorder, disk_plan: record.DiskPlan) -> Any:
        disk = disk_plan.disk
        await made[0].commit_start(disk.guest_uuid, disk.target, disk.source)
        while not (job := await made[0].job(disk.guest_uuid, disk.target)) or not job.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return await read(self, disk_plan)

    LibvirtHypervisor.__init__ = remember  # type: ignore[method-assign]
    record.Recorder.record = after_commit  # type: ignore[method-assign]


@fault
def commit_into_lowest() -> None:
    """The merge names no base, so that libvirt takes the lowest image: the template."""
    start = LibvirtHypervisor.commit_start

    async def broken(self: LibvirtHypervisor, uuid: Any, target: str, _base: str) -> None:
        await start(self, uuid, target, None)  # type: ignore[arg-type]

    LibvirtHypervisor.commit_start = broken  # type: ignore[method-assign]


@fault
def carry_forgotten() -> None:
    """What a deleted head held is not looked at again."""

    async def broken(self: Catalog, disk: Any) -> dict[int, Any]:
        return {}

    Catalog.carry = broken  # type: ignore[method-assign]


@fault
def bitmap_ignored_in_rollback() -> None:
    """A rollback writes where snapshots differ, and not what the guest wrote since."""
    whole = Differences._by_bitmap

    async def broken(self: Differences, *arguments: Any) -> Difference:
        found = await whole(self, *arguments)
        return dataclasses.replace(found, blocks=BlockSet(found.blocks.blocks))

    Differences._by_bitmap = broken  # type: ignore[method-assign]


@fault
def offline_lock_missing() -> None:
    """Images are read offline without keeping their guest from starting."""

    @contextlib.asynccontextmanager
    async def broken(_paths: Any) -> AsyncIterator[None]:
        yield

    capture.images_locked = broken


@fault
def digest_unchecked() -> None:
    """Blocks are handed out as they are found."""

    def broken(self: Codec, stored: memoryview, place: BlockPlace) -> bytes:
        return self._decompress(stored, "") if place.flags & FLAG_ZSTD else bytes(stored)

    Codec._restore_one = broken  # type: ignore[method-assign]
