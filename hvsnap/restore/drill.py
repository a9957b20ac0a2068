"""A restore drill: a snapshot is restored for trial, on the same way as in earnest, and what came out is compared.

What tells it from a verification: that reads stored blocks. This writes an image, through the same reader, plan and
writer as a restore does, lets qemu-img check it, reads all of it back through a QEMU of its own, and compares every
block with the manifests in the store. The image is in a directory of its own, and is gone in the end, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, Damaged, Failed, HypervisorFailed, NoSpace, Refused
from hvsnap.hypervisor import images
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import Operation, Progress, Snapshot, SnapshotId, State
from hvsnap.ports import NbdExport
from hvsnap.restore import target
from hvsnap.restore.expected import Expected
from hvsnap.restore.fill import Filler
from hvsnap.restore.readback import Pace, ReadBack
from hvsnap.restore.writer import NbdWriter
from hvsnap.secret import Passphrase
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.identity import ManifestName
from hvsnap.store.repository import DIGEST_BYTES

KIND = "snapshot-drill"
RESTORING = "restoring for trial"

RESERVE_BYTES = 256 << 20
"""What is left free on the file system of a drill: the catalog may be on it, too."""

SETTLES_MAX = 3


class Teller(Protocol):
    """Who is told what is being done: :class:`hvsnap.service.tasks.TaskRun`."""

    def step(self, text: str) -> None:
        """Take note of what is done now."""
        ...

    def progress(self, progress: Progress) -> None:
        """Take note of how far it is."""
        ...


@dataclass(frozen=True, slots=True)
class Drilled:
    """What a drill has done: so many bytes were written, so many blocks read back; all others are zeroes."""

    written_bytes: int
    compared_blocks: int


async def at_once(_size_bytes: int) -> None:
    """Let bytes pass as fast as they come."""


class PacedWriter(NbdWriter):
    """A writer that writes at a pace."""

    def __init__(self, export: NbdExport, pace: Pace) -> None:
        super().__init__(export)
        self._pace = pace

    async def write(self, offset: int, data: memoryview) -> None:
        """See :meth:`NbdWriter.write`."""
        await self._pace(len(data))
        await super().write(offset, data)


class Driller:
    """Restores snapshots for trial into ``directory``, at most ``max_bytes`` of each (0: as much as there is room for).

    ``settle`` makes the manifests in the store say what the catalog says.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: PackedBlocks,
        run_dir: str,
        directory: str,
        max_bytes: int,
        settle: Callable[[], Awaitable[object]],
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir
        self._directory = directory
        self._max_bytes = max_bytes
        self._settle = settle

    def place(self, snapshot: Snapshot) -> str:
        """Return where a snapshot will be restored to; whoever lets it be keeps the place for himself."""
        return os.path.join(self._directory, f"{snapshot.id}.qcow2")

    async def check(self, snapshot: Snapshot) -> int:
        """Return how many bytes will be written. Nothing is touched but the directory, which is made.

        Raises :class:`Refused` for a snapshot that is not accomplished, :class:`NoSpace`.
        """
        if snapshot.state is not State.ACCOMPLISHED:
            raise Refused(f"snapshot {snapshot.id} is {snapshot.state}", hint="only accomplished ones can be restored")
        filler = Filler(self._catalog, self._store, snapshot)
        blocks, _zero = await filler.count(filler.stored_writes())
        needed = blocks * self._store.block_size
        if self._max_bytes and needed > self._max_bytes:
            what = f"a drill of {snapshot.id} writes {needed} bytes, and drill.max_bytes allows {self._max_bytes}"
            raise NoSpace(what, hint="raise drill.max_bytes, or drill another disk")
        await asyncio.to_thread(self._make_directory)
        digests = -(-snapshot.size_bytes // self._store.block_size) * DIGEST_BYTES
        try:
            await asyncio.to_thread(target.check_space, self.place(snapshot), needed + digests + RESERVE_BYTES)
        except NoSpace as error:
            raise NoSpace(error.message, hint="free some space there, or choose another place: drill.dir") from error
        return needed

    async def run(self, snapshot: Snapshot, tell: Teller, pace: Pace = at_once) -> Drilled:
        """Restore a snapshot for trial; the caller keeps it, and what it builds on, from being deleted.

        Raises as :meth:`check` does, and :class:`Damaged` if it does not restore, with what is wrong.
        """
        needed = await self.check(snapshot)
        async with self._scratch(snapshot) as path:
            expected = await self._expected(snapshot, f"{path}.digests")
            key = await self._key(snapshot)
            tell.step("restoring")
            await self._restore(snapshot, path, key, Meter(snapshot.id, needed, tell.progress), pace)
            tell.step("checking the image")
            await self._check_image(path, key)
            tell.step("comparing every block")
            meter = Meter(snapshot.id, needed, tell.progress)
            async with serve_image(path, "qcow2", run_dir=self._run_dir, idle_priority=True, key=key) as export:
                compared = await ReadBack(self._store, expected).compare(export, snapshot.size_bytes, meter, pace)
        return Drilled(needed, compared)

    async def recover(self, operation: Operation) -> bool:
        """Remove what a crash left of a drill. False: nothing of it stays."""
        await self._remove(operation)
        return False

    # -- the steps --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _scratch(self, snapshot: Snapshot) -> AsyncIterator[str]:
        """Give the path of an image that is gone in the end; after a crash the journal says what is to be removed."""
        disk = await self._catalog.disk(snapshot.disk)
        path = self.place(snapshot)
        async with self._catalog.write() as tx:
            facts = {"snapshot": snapshot.id, "target": path}
            operation = await tx.open_operation(KIND, disk.guest_uuid, RESTORING, facts)
        try:
            yield path
        finally:
            await asyncio.shield(self._remove(operation))

    async def _remove(self, operation: Operation) -> None:
        path = str(operation.facts["target"])
        for one in (path, f"{path}.digests"):
            await images.remove(one)
        async with self._catalog.write() as tx:
            await tx.close_operation(operation.id)

    async def _expected(self, snapshot: Snapshot, path: str) -> Expected:
        """Read the manifests of a snapshot and of all that it builds on.

        Those of ancestors that are deleted meanwhile go; what the others say then is looked up anew.
        """
        lineage = await self._lineage(snapshot)
        for _ in range(SETTLES_MAX):
            await asyncio.to_thread(_create_empty, path)
            expected = Expected(path, -(-snapshot.size_bytes // self._store.block_size))
            try:
                await expected.lay_over(self._store.manifests, lineage)
            except Damaged:
                before, lineage = lineage, await self._lineage(snapshot)
                if lineage == before:
                    raise
            else:
                return expected
        raise _restless(snapshot)

    async def _lineage(self, snapshot: Snapshot) -> list[ManifestName]:
        """Return the names of the manifests, the oldest first, once they say what the catalog says."""
        for _ in range(SETTLES_MAX):
            rows = {row.id: row for row in await self._catalog.snapshots(snapshot.disk)}
            states = await self._catalog.upkeep.manifests()
            names: list[ManifestName] = []
            at: SnapshotId | None = snapshot.id
            while at is not None and at in rows and at in states and not states[at].changes:
                row = rows[at]
                names.append(ManifestName(row.disk, row.sequence, row.id, states[at].revision))
                at = row.parent
            if at is None:
                return names[::-1]
            await self._settle()
        raise _restless(snapshot)

    async def _key(self, snapshot: Snapshot) -> Passphrase | None:
        """Return a key that is forgotten with the drill, where nothing may be in plain (SERVICE 8)."""
        disk = await self._catalog.disk(snapshot.disk)
        if not disk.encrypted and not self._store.repository.sealed:
            return None
        return Passphrase(secrets.token_hex(32).encode())

    async def _restore(self, snapshot: Snapshot, path: str, key: Passphrase | None, meter: Meter, pace: Pace) -> None:
        await images.create_image(path, "qcow2", snapshot.size_bytes, key=key)
        filler = Filler(self._catalog, self._store, snapshot)
        serving = serve_image(path, "qcow2", run_dir=self._run_dir, read_only=False, idle_priority=True, key=key)
        async with serving as export:
            writer = PacedWriter(export, pace)
            try:
                await filler.fill(filler.stored_writes(), writer, snapshot.size_bytes, meter)
                await writer.finish()
            finally:
                await asyncio.shield(writer.stop())

    async def _check_image(self, path: str, key: Passphrase | None) -> None:
        try:
            await images.check_image(path, key=key)
        except HypervisorFailed as error:
            raise Damaged(f"qemu-img finds fault with the restored image: {error.message}") from error

    def _make_directory(self) -> None:
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise Failed(f"{self._directory} cannot be made: {error.strerror}", hint="check drill.dir") from error


def _restless(snapshot: Snapshot) -> Busy:
    return Busy(f"the chain of {snapshot.id} changes all the while", hint="try again in a moment")


def _create_empty(path: str) -> None:
    Path(path).unlink(missing_ok=True)
    Path(path).touch(mode=0o600, exist_ok=False)
