"""A new disk made of a snapshot: it appears under its name when it is whole and durable, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, Failed, HvsnapError, NoSpace, Refused, TargetExists
from hvsnap.happenings import EventType
from hvsnap.hypervisor import images
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import Operation, OperationId, Progress, Snapshot, SnapshotId, State
from hvsnap.restore.fill import Filler
from hvsnap.restore.writer import open_writer
from hvsnap.store.blocks import PackedBlocks

KIND = "disk-create"
FORMATS = ("qcow2", "raw")


class Step(StrEnum):
    """What is done next of a new disk. ``NAMED`` is nothing to do: it is whole, under its own name."""

    WRITING = "writing"
    NAMING = "giving it its name"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class NewDisk:
    """What was made."""

    path: str
    format: str
    size_bytes: int
    written_bytes: int


def check_target(path: str, image_format: str) -> None:
    """Refuse a target that is there or cannot be made, before anything is touched. Blocking."""
    if image_format not in FORMATS:
        raise BadRequest(f"the format {image_format[:32]} is not known", hint=f"choose {' or '.join(FORMATS)}")
    if not os.path.isabs(path) or os.path.basename(path) in ("", ".", ".."):
        raise BadRequest(f"{path[:256]} is not an absolute path of a file", hint="give the target's whole path")
    # lexists: a dangling symbolic link is there, too, and would lead elsewhere.
    if os.path.lexists(path):
        raise TargetExists(f"{path} exists")
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise BadRequest(f"there is no directory {directory}", hint="create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"the directory {directory} is not writable for the daemon", hint="choose another place")


def check_space(path: str, needed_bytes: int) -> None:
    """Refuse a target that plainly does not fit. Blocking."""
    seen = os.statvfs(os.path.dirname(path))
    free_bytes = seen.f_bavail * seen.f_frsize
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"{os.path.dirname(path)} has {free_bytes} bytes free, the disk needs {needed_bytes}",
            hint="free some space there, or choose another place",
        )


def _publish(temporary: str, path: str) -> None:
    """Make a finished file durable under its name, never over another one. Blocking."""
    try:
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError as error:
        raise TargetExists(f"{path} was created by somebody else meanwhile") from error
    except OSError as error:
        raise Failed(f"{path} cannot be created: {error.strerror}") from error
    try:
        os.unlink(temporary)
        _sync_directory(path)
    except OSError as error:
        # Nobody may take for durable what is not.
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise Failed(f"{path} cannot be made durable: {error.strerror}") from error


def _sync_directory(path: str) -> None:
    """Make a file's name durable. Blocking."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _was_published(temporary: str, path: str) -> bool:
    """Whether a file that was about to get its name has it; the name is durable then. Blocking.

    The temporary name goes last: without it the file has its own, with it both may name the same file.
    """
    try:
        published = os.path.samestat(os.lstat(temporary), os.lstat(path))
    except FileNotFoundError:
        published = not os.path.lexists(temporary) and os.path.lexists(path)
    if published:
        _sync_directory(path)
    return published


class DiskMaker:
    """Makes disks, and removes what a crash left of one."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, run_dir: str) -> None:
        self._catalog = catalog
        self._store = store
        self._run_dir = run_dir

    async def check(self, snapshot_id: SnapshotId, path: str, image_format: str) -> tuple[Snapshot, int]:
        """Check a request; returns the snapshot and how many of its blocks will be written. Nothing is touched.

        Raises :class:`SnapshotUnknown`, :class:`Refused`, :class:`TargetExists`, :class:`BadRequest`, :class:`NoSpace`.
        """
        snapshot = await self._catalog.snapshot(snapshot_id)
        if snapshot.state is not State.ACCOMPLISHED:
            hint = "only accomplished snapshots can be restored"
            raise Refused(f"snapshot {snapshot_id} is {snapshot.state}", hint=hint)
        await asyncio.to_thread(check_target, path, image_format)
        filler = Filler(self._catalog, self._store, snapshot)
        blocks, _zero = await filler.count(filler.stored_writes())
        await asyncio.to_thread(check_space, path, blocks * self._store.block_size)
        return snapshot, blocks

    async def create(
        self, snapshot_id: SnapshotId, path: str, image_format: str, report: Callable[[Progress], None]
    ) -> NewDisk:
        """Make the disk. Raises as :meth:`check` does, and :class:`Damaged`; nothing is left then."""
        snapshot, blocks = await self.check(snapshot_id, path, image_format)
        directory, name = os.path.split(path)
        disk = await self._catalog.disk(snapshot.disk)
        payload = {"snapshot": snapshot.id, "disk": disk.id, "guest": disk.guest_name, "path": path}
        async with self._catalog.write() as tx:
            facts = {"target": path, "snapshot": snapshot.id, "payload": payload}
            operation = await tx.open_operation(KIND, disk.guest_uuid, Step.WRITING, facts)
            temporary = os.path.join(directory, f".{name[:200]}.{operation.id}.hvsnap")
            await tx.step(operation.id, Step.WRITING, temporary=temporary)
        meter = Meter(snapshot.id, blocks * self._store.block_size, report)
        try:
            await self._write(snapshot, temporary, image_format, meter)
        except BaseException as error:
            await asyncio.shield(self._give_up(operation.id, temporary, payload, str(error) or type(error).__name__))
            raise
        # From here on it comes to its end, even for a caller that is cancelled: a name cannot be half given.
        naming = asyncio.ensure_future(self._name(operation.id, temporary, path, payload))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(naming)
        await asyncio.wait([naming])
        naming.result()
        return NewDisk(path, image_format, snapshot.size_bytes, blocks * self._store.block_size)

    async def _name(self, operation: OperationId, temporary: str, path: str, payload: dict[str, str]) -> None:
        """Publish the disk and tell of it. If telling fails, the entry stays for the recovery to tell."""
        try:
            async with self._catalog.write() as tx:
                await tx.step(operation, Step.NAMING)
            await asyncio.to_thread(_publish, temporary, path)
        except HvsnapError as error:
            await self._give_up(operation, temporary, payload, error.message)
            raise
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_CREATED, payload)
            await tx.close_operation(operation)

    async def _write(self, snapshot: Snapshot, temporary: str, image_format: str, meter: Meter) -> None:
        await images.create_image(temporary, image_format, snapshot.size_bytes)
        filler = Filler(self._catalog, self._store, snapshot)
        serving = serve_image(temporary, image_format, run_dir=self._run_dir, read_only=False)
        async with serving as export, open_writer(export) as writer:
            await filler.fill(filler.stored_writes(), writer, snapshot.size_bytes, meter)
            await writer.finish()

    async def _give_up(self, operation: OperationId, temporary: str, payload: dict[str, str], error: str) -> None:
        await images.remove(temporary)
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_CREATE_FAILED, payload | {"error": error})
            await tx.close_operation(operation)

    async def recover(self, operation: Operation) -> bool:
        """Tell of a disk that a crash interrupted: True if it is whole and named; else what is there of it goes."""
        path, temporary = str(operation.facts["target"]), str(operation.facts["temporary"])
        made = operation.step == Step.NAMING and await asyncio.to_thread(_was_published, temporary, path)
        await images.remove(temporary)
        payload = dict(operation.facts["payload"])  # type: ignore[call-overload]
        async with self._catalog.write() as tx:
            if made:
                await tx.emit(EventType.DISK_CREATED, payload)
            else:
                await tx.emit(EventType.DISK_CREATE_FAILED, payload | {"error": "interrupted"})
            await tx.close_operation(operation.id)
        return made
