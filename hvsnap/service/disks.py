"""New disks of snapshots (SERVICE 7.1)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, TargetExists
from hvsnap.model import Progress
from hvsnap.restore.disk import NewDisk, Order, Plan
from hvsnap.restore.target import is_device
from hvsnap.service.attaching import Attaching
from hvsnap.service.instants import Instants
from hvsnap.service.origins import Origins
from hvsnap.service.requests import DiskRequest
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.uses import Uses

KIND_CREATE = "disk-create"

_NEVER_BELOW = ("/dev", "/proc", "/sys")

Report = Callable[[Progress], None]


class Maker(Protocol):
    """Makes new disks: :class:`hvsnap.restore.disk.DiskMaker`."""

    async def check(self, order: Order) -> Plan:
        """Check an order; nothing is touched."""
        ...

    async def create(self, order: Order, report: Report) -> NewDisk:
        """Make the disk, or leave nothing of it."""
        ...


def check_place(path: str, forbidden: Sequence[str], *, force: bool = False) -> str:
    """Return the path of a disk to be made, without dots and doubled slashes; refuse places that no disk belongs in.

    Symbolic links on the way are the owner's own; the file itself is created exclusively. A block device may be below
    /dev: it is refused later, without ``force``. Blocking.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise BadRequest(f"{path[:256]!a} is not an absolute path", hint="give the target's whole path")
    path = os.path.normpath(path)
    if is_device(path):
        if not force:
            raise TargetExists(f"{path} is a block device", hint="with --force what is on it is lost")
        return path
    for directory in forbidden:
        if path == directory or path.startswith(directory.rstrip("/") + "/"):
            raise BadRequest(f"{path[:256]} lies below {directory}", hint="choose a place for disk images")
    return path


class Disks:
    """Makes disks, as tasks."""

    def __init__(
        self,
        catalog: Catalog,
        origins: Origins,
        attaching: Attaching,
        tasks: Tasks,
        uses: Uses,
        maker: Maker,
        instants: Instants,
        *,
        own_directories: Sequence[str],
    ) -> None:
        self._catalog = catalog
        self._origins = origins
        self._attaching = attaching
        self._tasks = tasks
        self._uses = uses
        self._maker = maker
        self._instants = instants
        self._forbidden = (*_NEVER_BELOW, *own_directories)

    async def create(self, request: DiskRequest) -> TaskView:
        """Start making a disk. Raises what can be told beforehand: nothing was touched then."""
        path = request.path
        if not request.pool:
            path = await asyncio.to_thread(check_place, path, self._forbidden, force=request.force)
        elif request.force:
            raise BadRequest("a volume of a pool is always a new one", hint="leave --force or --pool out")
        made_of, row = await self._origins.find(request.snapshot)
        attach = None if request.attach is None else await self._attaching.check(*request.attach)
        order = Order(row.id, path, request.format, request.force, request.pool, made_of, attach)
        plan = await self._maker.check(order)
        if request.instant:
            return await self._instants.create(order, plan)
        disk = await self._catalog.disk(row.disk)

        async def work(run: TaskRun) -> wire.DiskCreated:
            with (
                self._uses.hold_snapshot(row.id, f"being restored to {plan.path}"),
                self._uses.hold_path(plan.path, "being made"),
            ):
                run.step("writing the disk")
                made = await self._maker.create(order, run.progress)
            attached = None
            if made.attaching is not None and attach is not None:
                run.step("attaching the disk")
                attached = await self._attaching.attach(made.attaching, made.path, attach)
            return wire.DiskCreated(
                snapshot=row.id,
                made_of=made_of,
                path=made.path,
                format=made.format,
                size_bytes=made.size_bytes,
                written_bytes=made.written_bytes,
                attached=None if attached is None else f"{attached.guest_name}/{attached.target}",
                disk=None if attached is None else attached.id,
            )

        return self._tasks.start(KIND_CREATE, f"{made_of} to {plan.path}", work, guest=disk.guest_uuid)
