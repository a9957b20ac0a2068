"""New disks of snapshots (SERVICE 7.1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest
from hvsnap.model import Progress, Snapshot, SnapshotId
from hvsnap.restore.disk import NewDisk
from hvsnap.service.requests import DiskRequest
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.uses import Uses

KIND_CREATE = "disk-create"

_NEVER_BELOW = ("/dev", "/proc", "/sys")

Report = Callable[[Progress], None]


class Maker(Protocol):
    """Makes new disks: :class:`hvsnap.restore.disk.DiskMaker`."""

    async def check(self, snapshot_id: SnapshotId, path: str, image_format: str) -> tuple[Snapshot, int]:
        """Check a request; nothing is touched."""
        ...

    async def create(self, snapshot_id: SnapshotId, path: str, image_format: str, report: Report) -> NewDisk:
        """Make the disk, or leave nothing of it."""
        ...


def check_place(path: str, forbidden: Sequence[str]) -> str:
    """Return the path of a disk to be made, without dots and doubled slashes; refuse places that no disk belongs in.

    Symbolic links on the way are the owner's own; the file itself is created exclusively.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise BadRequest(f"{path[:256]!a} is not an absolute path", hint="give the target's whole path")
    path = os.path.normpath(path)
    for directory in forbidden:
        if path == directory or path.startswith(directory.rstrip("/") + "/"):
            raise BadRequest(f"{path[:256]} lies below {directory}", hint="choose a place for disk images")
    return path


class Disks:
    """Makes disks, as tasks."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: Snapshots,
        tasks: Tasks,
        uses: Uses,
        maker: Maker,
        *,
        own_directories: Sequence[str],
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._tasks = tasks
        self._uses = uses
        self._maker = maker
        self._forbidden = (*_NEVER_BELOW, *own_directories)

    async def create(self, request: DiskRequest) -> TaskView:
        """Start making a disk. Raises what can be told beforehand: nothing was touched then."""
        path = check_place(request.path, self._forbidden)
        row = await self._snapshots.row(request.snapshot)
        await self._maker.check(row.id, path, request.format)
        disk = await self._catalog.disk(row.disk)

        async def work(run: TaskRun) -> wire.DiskCreated:
            with (
                self._uses.hold_snapshot(row.id, f"being restored to {path}"),
                self._uses.hold_path(path, "being made"),
            ):
                run.step("writing the disk")
                made = await self._maker.create(row.id, path, request.format, run.progress)
            return wire.DiskCreated(
                snapshot=row.id,
                path=made.path,
                format=made.format,
                size_bytes=made.size_bytes,
                written_bytes=made.written_bytes,
            )

        return self._tasks.start(KIND_CREATE, f"{row.id} to {path}", work, guest=disk.guest_uuid)
