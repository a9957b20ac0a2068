"""Who captures which disk: the runs that wait and that run, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvsnap.model import Consistency, Disk, DiskId, GuestUuid, Snapshot, SnapshotId
from hvsnap.service.inventory import Found


@dataclass(slots=True, eq=False)
class Run:
    """One capture of one guest or several, from its request to its end. ``settling``: they are accomplished."""

    found: list[Found]
    disks: list[Disk]
    snapshots: list[Snapshot]
    consistency: Consistency
    task: asyncio.Task[None] | None = None
    settling: bool = False
    cancelled: bool = False
    ahead: list[asyncio.Task[None]] = field(default_factory=list)

    def by_guest(self) -> dict[GuestUuid, list[tuple[Disk, Snapshot]]]:
        """Return disks and their snapshots, guest by guest, in the order of the request."""
        parts: dict[GuestUuid, list[tuple[Disk, Snapshot]]] = {}
        for found, disk, snapshot in zip(self.found, self.disks, self.snapshots, strict=True):
            parts.setdefault(found.guest.uuid, []).append((disk, snapshot))
        return parts


class Lanes:
    """One lane for each disk: a run goes when all that were before it in its disks' lanes have ended.

    A run enters all its lanes at one moment. So of two runs one is behind the other in every lane that they share, and
    no two wait for each other. It is about this process alone; nothing here waits, so a look and what is decided by it
    happen at one moment.
    """

    def __init__(self) -> None:
        self._lanes: dict[DiskId, list[Run]] = {}
        self._runs: dict[SnapshotId, Run] = {}

    def enter(self, run: Run) -> None:
        """Put a run at the end of its disks' lanes; :attr:`Run.ahead` names whom it waits for."""
        for disk, snapshot in zip(run.disks, run.snapshots, strict=True):
            lane = self._lanes.setdefault(disk.id, [])
            run.ahead += [other.task for other in lane if other.task is not None]
            lane.append(run)
            self._runs[snapshot.id] = run

    def leave(self, run: Run) -> None:
        """Take a run that has ended out."""
        for disk, snapshot in zip(run.disks, run.snapshots, strict=True):
            self._lanes[disk.id].remove(run)
            if not self._lanes[disk.id]:
                del self._lanes[disk.id]
            self._runs.pop(snapshot.id, None)

    def of_disk(self, disk: DiskId) -> Sequence[Run]:
        """Return the runs of a disk, the oldest first."""
        return self._lanes.get(disk, ())

    def of_snapshot(self, snapshot: SnapshotId) -> Run | None:
        """Return the run that makes a snapshot; None when it has ended."""
        return self._runs.get(snapshot)

    def runs(self) -> list[Run]:
        """Return every run once."""
        return list({id(run): run for run in self._runs.values()}.values())

    def disks(self) -> set[DiskId]:
        """Return the disks that are being captured, or wait for it."""
        return set(self._lanes)

    def snapshots(self) -> set[SnapshotId]:
        """Return the snapshots that are being made, or wait for it."""
        return set(self._runs)
