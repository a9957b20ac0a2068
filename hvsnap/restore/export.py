"""An image as a file that anybody can boot: a compressed qcow2, whole and durable under its name, or not there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Refused
from hvsnap.hypervisor import compressed, images
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import Image, Operation, Progress, Snapshot, State
from hvsnap.restore import target
from hvsnap.restore.fill import Filler
from hvsnap.restore.writer import open_writer
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.uninterrupted import to_its_end

KIND = "image-export"


class Step(StrEnum):
    """What is done next of a file. ``NAMED`` is nothing to do: it is whole, under its own name."""

    WRITING = "writing"
    NAMING = "giving it its name"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made: ``written_bytes`` of the disk are in ``file_bytes`` of a file."""

    size_bytes: int
    written_bytes: int
    file_bytes: int


class ImageExporter:
    """Writes images to files, and removes what a crash left of one."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, run_dir: str) -> None:
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir

    async def check(self, image: Image, path: str) -> tuple[Snapshot, int]:
        """Check a request; return the snapshot and how many of its blocks will be written. Nothing is touched.

        Raises :class:`TargetExists`, :class:`BadRequest`, :class:`Refused`, :class:`NoSpace`. How much room a file
        needs is not known before it is compressed: what the blocks take in the store is the nearest that there is.
        """
        snapshot = await self._catalog.snapshot(image.snapshot)
        if snapshot.state is not State.ACCOMPLISHED:
            raise Refused(f"snapshot {snapshot.id} is {snapshot.state}", hint="only accomplished ones can be exported")
        await asyncio.to_thread(target.check_target, path, "qcow2")
        filler = Filler(self._catalog, self._store, snapshot)
        blocks, _zero = await filler.count(filler.stored_writes())
        return snapshot, blocks

    async def create(self, image: Image, path: str, report: Callable[[Progress], None]) -> Exported:
        """Write the file. Raises as :meth:`check` does, and :class:`Damaged`; nothing is left then."""
        snapshot, blocks = await self.check(image, path)
        disk = await self._catalog.disk(snapshot.disk)
        async with self._catalog.write() as tx:
            facts = {"target": path, "snapshot": snapshot.id, "image": image.id}
            operation = await tx.open_operation(KIND, disk.guest_uuid, Step.WRITING, facts)
            temporary = target.temporary_beside(path, operation.id)
            await tx.step(operation.id, Step.WRITING, temporary=temporary)
        written = blocks * self._store.block_size
        try:
            await self._write(snapshot, temporary, Meter(image.id, written, report))
        except BaseException:
            await asyncio.shield(self._give_up(operation, temporary))
            raise
        # From here on it comes to its end, even for a caller that is cancelled: a name cannot be half given.
        file_bytes = await to_its_end(self._name(operation, temporary, path), name=f"name {path}")
        return Exported(snapshot.size_bytes, written, file_bytes)

    async def _write(self, snapshot: Snapshot, temporary: str, meter: Meter) -> None:
        size_bytes = compressed.rounded(snapshot.size_bytes)
        await images.create_image(temporary, "qcow2", size_bytes)
        filler = Filler(self._catalog, self._store, snapshot)
        place = compressed.filtered(temporary)
        serving = serve_image(place, compressed.FILTER, run_dir=self._run_dir, read_only=False)
        async with serving as export, open_writer(export) as writer:
            await filler.fill(filler.stored_writes(), writer, size_bytes, meter)
            await writer.finish()
        if size_bytes != snapshot.size_bytes:
            await compressed.cut(temporary, snapshot.size_bytes)

    async def _name(self, operation: Operation, temporary: str, path: str) -> int:
        """Give the file its name, and return its size in bytes."""
        try:
            inode = await asyncio.to_thread(target.inode_of, temporary)
            file_bytes = (await asyncio.to_thread(os.stat, temporary)).st_size
            async with self._catalog.write() as tx:
                await tx.step(operation.id, Step.NAMING, inode=inode)
            await asyncio.to_thread(target.publish, temporary, path)
        except Exception:
            await self._give_up(operation, temporary)
            raise
        async with self._catalog.write() as tx:
            await tx.close_operation(operation.id)
        return file_bytes

    async def _give_up(self, operation: Operation, temporary: str) -> None:
        await images.remove(temporary)
        async with self._catalog.write() as tx:
            await tx.close_operation(operation.id)

    async def recover(self, operation: Operation) -> bool:
        """Tell of a file that a crash interrupted: True if it is whole and named; else what is there of it goes."""
        path, temporary = str(operation.facts["target"]), str(operation.facts["temporary"])
        inode = operation.facts.get("inode")
        made = isinstance(inode, int) and await asyncio.to_thread(target.was_published, path, inode)
        await self._give_up(operation, temporary)
        return made
