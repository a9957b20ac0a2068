"""Restore drills: asked for, or by themselves once in so many days for each disk (SERVICE 12).

A sibling of the verification in :mod:`hvsnap.service.housekeeping`: it looks as often, goes as slowly, and what it
finds is told as an event. What came of each drill is in the catalog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.drill import Drill, Outcome
from hvsnap.errors import BadRequest, Busy, Damaged, HvsnapError, Refused, Stopping
from hvsnap.happenings import EventType, disk_payload
from hvsnap.model import Disk, Operation, Snapshot, State
from hvsnap.ports import Clock
from hvsnap.restore.drill import KIND, Drilled, Teller, at_once
from hvsnap.restore.readback import Pace
from hvsnap.service.inventory import Inventory
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.tasks import TaskRun, Tasks, TaskView
from hvsnap.service.uses import Uses
from hvsnap.upkeep.verify import Pace as PaceOf

log = logging.getLogger(__name__)

LOOK_S = 600.0
DAY_S = 86_400.0
ERROR_LENGTH_MAX = 500


class DrillerPort(Protocol):
    """Restores for trial: :class:`hvsnap.restore.drill.Driller`."""

    def place(self, snapshot: Snapshot) -> str:
        """Return where it will be restored to."""
        ...

    async def check(self, snapshot: Snapshot) -> int:
        """Return how many bytes will be written; nothing is touched."""
        ...

    async def run(self, snapshot: Snapshot, tell: Teller, pace: Pace = at_once) -> Drilled:
        """Restore a snapshot for trial; nothing of it stays."""
        ...

    async def recover(self, operation: Operation) -> bool:
        """Remove what a crash left."""
        ...


@dataclass(frozen=True, slots=True)
class DrillSettings:
    """Once in how many days each disk has its drill (0: only when asked for), and how fast, in bytes per second."""

    every_days: int
    bytes_per_s: int


def newest_due(
    disks: Sequence[Disk], snapshots: Sequence[Snapshot], drills: dict[str, Drill], now: float, every_s: float
) -> Snapshot | None:
    """Return the snapshot whose drill is due: the newest of the disk whose last drill is the longest ago. Pure.

    A drill that could not be carried out is tried again the next day. One that is yet to come was noted by a clock that
    was wrong.
    """
    newest = {row.disk: row for row in snapshots if row.state is State.ACCOMPLISHED}  # they come oldest first
    waiting: list[tuple[float, Snapshot]] = []
    for disk in disks:
        row, last = newest.get(disk.id), drills.get(disk.id)
        if row is None:
            continue
        again_s = every_s if last is None or last.outcome is not Outcome.FAILED else min(every_s, DAY_S)
        at = 0.0 if last is None else last.began_at
        if last is None or not 0 <= now - at < again_s:
            waiting.append((at, row))
    return min(waiting, key=lambda one: (one[0], one[1].created_at), default=(0.0, None))[1]


class Drills:
    """Makes drills, one at a time, and remembers what came of them."""

    def __init__(
        self,
        catalog: Catalog,
        inventory: Inventory,
        snapshots: Snapshots,
        driller: DrillerPort,
        tasks: Tasks,
        uses: Uses,
        clock: Clock,
        settings: DrillSettings,
        verify: Callable[[Sequence[Snapshot]], Awaitable[object]],
    ) -> None:
        """``verify`` reads all blocks of snapshots again, after damage was met: it finds all of it, and tells."""
        self._catalog = catalog
        self._inventory = inventory
        self._snapshots = snapshots
        self._driller = driller
        self._tasks = tasks
        self._uses = uses
        self._clock = clock
        self._settings = settings
        self._verify = verify
        self._turn = asyncio.Lock()

    async def start(self, body: wire.SnapshotDrill) -> TaskView:
        """Start the drill of a snapshot, or of a disk's newest one. Raises what can be told beforehand.

        That is :class:`BadRequest`, :class:`SnapshotUnknown`, :class:`DiskUnknown`, :class:`Refused`, :class:`NoSpace`,
        :class:`SnapshotInUse`.
        """
        if bool(body.snapshot) == bool(body.disk):
            raise BadRequest("which snapshot?", hint="name one, or a disk, whose newest one it will be")
        row = await (self._snapshots.row(body.snapshot) if body.snapshot else self._newest(body.disk))
        await self._driller.check(row)
        return self._launch(row, at_once)

    async def run(self) -> None:
        """Make the drills that are due, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._settings.every_days:
                await self.look()

    async def look(self) -> None:
        """Make the drill that is due for longest, if one is."""
        try:
            row = newest_due(
                await self._catalog.disks(),
                await self._catalog.snapshots(),
                await self._catalog.drills.newest(),
                self._clock.now(),
                self._settings.every_days * DAY_S,
            )
            if row is not None:
                task = self._launch(row, PaceOf(self._settings.bytes_per_s))
                await self._tasks.wait(task.id)
        except (Busy, Stopping) as error:
            log.info("no drill now: %s", error.message)
        except HvsnapError as error:
            log.warning("drills cannot be looked at: %s", error.message)

    # -- inside -----------------------------------------------------------------------------------

    async def _newest(self, name: str) -> Snapshot:
        disk = await self._inventory.disk(name)
        rows = await self._catalog.snapshots(disk.id, State.ACCOMPLISHED)
        if not rows:
            raise Refused(f"disk {disk.target} of {disk.guest_name} has no snapshot", hint="`hvsnap snapshot-create`")
        return rows[-1]

    def _launch(self, row: Snapshot, pace: Pace) -> TaskView:
        async def work(run: TaskRun) -> wire.SnapshotDrilled:
            with self._uses.hold_snapshot(row.id, "being restored for trial, by a drill"):
                run.step("waiting for another drill")
                async with self._turn:
                    with self._uses.hold_path(self._driller.place(row), "being restored for trial"):
                        return await self._drill(row, run, pace)

        return self._tasks.start(KIND, row.id, work)

    async def _drill(self, row: Snapshot, run: TaskRun, pace: Pace) -> wire.SnapshotDrilled:
        disk = await self._catalog.disk(row.disk)
        began_at = self._clock.now()
        try:
            done = await self._driller.run(row, run, pace)
        except Damaged as error:
            await self._tell(disk, self._ended(row, began_at, Outcome.DAMAGED, error=error))
            run.step("looking for all that is damaged")
            with contextlib.suppress(HvsnapError):
                await self._verify([row])
            raise
        except HvsnapError as error:
            await self._tell(disk, self._ended(row, began_at, Outcome.FAILED, error=error))
            raise
        drill = self._ended(row, began_at, Outcome.PASSED, done.written_bytes)
        await self._tell(disk, drill)
        return wire.SnapshotDrilled(
            snapshot=row.id,
            disk=disk.id,
            guest=disk.guest_name,
            target=disk.target,
            size_bytes=row.size_bytes,
            written_bytes=done.written_bytes,
            compared_blocks=done.compared_blocks,
            duration_s=drill.ended_at - drill.began_at,
        )

    def _ended(
        self, row: Snapshot, began_at: float, outcome: Outcome, written: int = 0, error: HvsnapError | None = None
    ) -> Drill:
        text = "" if error is None else error.message[:ERROR_LENGTH_MAX]
        return Drill(row.disk, row.id, began_at, self._clock.now(), outcome, written, text)

    async def _tell(self, disk: Disk, drill: Drill) -> None:
        passed = drill.outcome is Outcome.PASSED
        if not passed:
            log.error("the drill of %s of %s/%s: %s", drill.snapshot, disk.guest_name, disk.target, drill.error)
        payload = disk_payload(disk) | {
            "snapshot": drill.snapshot,
            "outcome": drill.outcome,
            "written_bytes": drill.written_bytes,
            "duration_s": drill.ended_at - drill.began_at,
            "error": drill.error,
        }
        async with self._catalog.write() as tx:
            await tx.add_drill(drill)
            await tx.emit(EventType.DRILL_PASSED if passed else EventType.DRILL_FAILED, payload)
