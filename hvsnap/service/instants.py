"""Instant disks (SERVICE 7.2): given at once, filled by a task, whatever happens to the daemon in between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, Busy, HvsnapError
from hvsnap.model import Operation, OperationId, Progress, SnapshotId
from hvsnap.restore.disk import Order, Plan
from hvsnap.restore.instant import KIND, Awaited
from hvsnap.restore.target import Manner
from hvsnap.service.attaching import Attaching
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.uses import Uses

log = logging.getLogger(__name__)

OPEN_MAX = 16
"""Each is a task, a process, and a guest that depends on the store until it is filled."""

TASK = "disk-create"


class Filler(Protocol):
    """Makes and fills instant disks: :class:`hvsnap.restore.instant.InstantDisks`."""

    async def make(self, order: Order, plan: Plan) -> tuple[Operation, OperationId | None]:
        """Make the disk: it can be used on return."""
        ...

    async def settle(self, operation: Operation) -> bool:
        """Settle what needs no serving; True if nothing is left to do."""
        ...

    async def serve(self, operation: Operation) -> None:
        """Let what a disk is made of be served (again)."""
        ...

    async def fill(
        self, operation_id: OperationId, say: Callable[[str], None], report: Callable[[Progress], None]
    ) -> int:
        """Fill the disk until it stands alone; return its bytes."""
        ...


def check(order: Order, plan: Plan) -> None:
    """Refuse what cannot be had at once."""
    if order.format != "qcow2":
        raise BadRequest(f"an instant disk is a qcow2, not {order.format}", hint="leave --format or --instant out")
    if order.pool or plan.manner is not Manner.NEW:
        raise BadRequest("an instant disk is a new file at a path", hint="leave --pool, --force or --instant out")


class Instants:
    """Makes instant disks, as tasks that a restart of the daemon begins again."""

    def __init__(self, catalog: Catalog, filler: Filler, attaching: Attaching, tasks: Tasks, uses: Uses) -> None:
        self._catalog = catalog
        self._filler = filler
        self._attaching = attaching
        self._tasks = tasks
        self._uses = uses
        self._at_work: set[str] = set()
        self._waiting: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._serving = False

    def start_serving(self) -> None:
        """Take note that this is a daemon, which serves what disks are made of: `recover` without one does not."""
        self._serving = self._attaching.serving = True

    def at_work(self) -> set[str]:
        """Return the paths of the disks that are being made or filled."""
        return set(self._at_work)

    async def create(self, order: Order, plan: Plan) -> TaskView:
        """Make a disk that can be used on return, and start to fill it; with ``attach`` its guest has it on return.

        Nothing was touched if this raises, but for :class:`Failed` of attaching: the disk stays, and is filled.
        """
        check(order, plan)
        async with self._turn:
            open_now = await self._catalog.operations(KIND)
            if len(open_now) >= OPEN_MAX:
                raise Busy(f"{len(open_now)} instant disks are being filled", hint="wait until one is whole")
            self._tasks.check_room()
            self._at_work.add(plan.path)
            try:
                with self._uses.hold_snapshot(plan.snapshot.id, f"being given as {plan.path}"):
                    with self._uses.hold_path(plan.path, "being made"):
                        operation, attaching = await self._filler.make(order, plan)
                    attached: list[str] = []
                    view = self._start(operation, attached)
            except BaseException:
                self._at_work.discard(plan.path)
                raise
        if attaching is not None and order.attach is not None:
            disk = await self._attaching.attach(attaching, plan.path, order.attach)
            attached.append(f"{disk.guest_name}/{disk.target}")
        return view

    async def recover(self, only: Container[OperationId] | None = None) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle what has ended, and begin to fill what nobody fills; without serving that waits for the daemon."""
        outcome: list[tuple[Operation, HvsnapError | None]] = []
        async with self._turn:
            for operation in await self._catalog.operations(KIND):
                path = str(operation.facts["target"])
                if path in self._at_work or (only is not None and operation.id not in only):
                    continue
                try:
                    if await self._filler.settle(operation):
                        outcome.append((operation, None))
                    elif self._serving:
                        self._at_work.add(path)
                        # Before anything else is settled: a disk cannot be attached whose source is not there.
                        await self._filler.serve(operation)
                        self._start(await self._catalog.operation(operation.id))
                    else:
                        why = Awaited(f"{path} is not whole yet: the daemon fills it once it runs")
                        outcome.append((operation, why))
                except HvsnapError as error:
                    self._at_work.discard(path)
                    outcome.append((operation, error))
        return outcome

    def _start(self, operation: Operation, attached: Sequence[str] = ()) -> TaskView:
        """Start to fill a disk; ``attached`` names it in its guest, by the end of that."""
        path, snapshot = str(operation.facts["target"]), SnapshotId(str(operation.facts["snapshot"]))

        async def work(run: TaskRun) -> wire.DiskCreated:
            run.final("the disk is there and in use: it is filled to its end, unless it is removed")
            use = f"what {path} is being filled from"
            with self._uses.hold_snapshot(snapshot, use), self._uses.hold_path(path, "being filled"):
                size_bytes = await self._filler.fill(operation.id, run.step, run.progress)
            return wire.DiskCreated(
                snapshot=snapshot,
                made_of=str(operation.facts["made_of"]),
                path=path,
                format="qcow2",
                size_bytes=size_bytes,
                written_bytes=size_bytes,
                attached=next(iter(attached), None),
                disk=None,
            )

        subject = f"{operation.facts['made_of']} to {path}"
        view = self._tasks.start(TASK, subject, work, guest=operation.guest_uuid)
        waiting = asyncio.create_task(self._ended(view.id, path), name=f"end of {view.id}")
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)
        return view

    async def _ended(self, task: str, path: str) -> None:
        """Let the recovery see what a task has left, should it have failed."""
        try:
            await self._tasks.wait(task)
        finally:
            self._at_work.discard(path)
