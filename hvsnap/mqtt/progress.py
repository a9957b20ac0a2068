"""The way of progress: only the latest of each, at most one a second, and none without a connection."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.happenings import EventType
from hvsnap.model import Disk, Event, Progress, SnapshotId
from hvsnap.mqtt.connection import Connection
from hvsnap.mqtt.messages import ProgressReport
from hvsnap.mqtt.topics import Topics
from hvsnap.ports import Clock
from hvsnap.service.views import when

EXPIRY_S = 10
"""A broker forgets a report that it could not deliver so long: there are newer ones."""

REMEMBERED_MAX = 256
"""Snapshots whose disk is remembered."""

_ENDS = {EventType.SNAPSHOT_ACCOMPLISHED, EventType.SNAPSHOT_FAILED}


class ProgressBoard:
    """The latest progress of each snapshot and task that has not been published yet."""

    def __init__(
        self,
        catalog: Catalog,
        clock: Clock,
        host_id: str,
        topics: Topics,
        interval_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._host_id = host_id
        self._topics = topics
        self._interval_s = interval_s
        self._monotonic = monotonic
        self._waiting: dict[str, Progress] = {}
        self._due: dict[str, float] = {}
        self._disks: dict[str, Disk | None] = {}
        self._woken = asyncio.Event()
        self._open = False

    def put(self, progress: Progress) -> None:
        """Take progress, in place of what was waiting of the same thing."""
        if self._open:
            self._waiting[progress.id] = progress
            self._woken.set()

    def drop(self, event: Event) -> None:
        """Forget the progress of what has ended: the event has said all."""
        if event.type in _ENDS:
            name = str(event.payload.get("snapshot"))
            self._waiting.pop(name, None)
            self._disks.pop(name, None)

    async def run(self, connection: Connection) -> None:
        """Publish until cancelled. Raises :class:`BrokerFailed`."""
        self._open = True
        try:
            while True:
                self._woken.clear()
                for progress in self._take():
                    await self._publish(connection, progress)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause_s()):
                        await self._woken.wait()
        finally:
            self._open = False
            self._waiting.clear()

    def _take(self) -> list[Progress]:
        """Return what may be published now."""
        now = self._monotonic()
        self._due = {name: due for name, due in self._due.items() if due > now}
        taken = [progress for name, progress in self._waiting.items() if name not in self._due]
        for progress in taken:
            del self._waiting[progress.id]
            self._due[progress.id] = now + self._interval_s
        return taken

    def _pause_s(self) -> float | None:
        """Return after how long the next one of those that wait is due; None: none waits."""
        due = [self._due.get(name, 0.0) for name in self._waiting]
        # What comes meanwhile wakes us, and finds itself not due yet: so the pause begins anew, and is never too long.
        return max(0.0, min(due) - self._monotonic()) if due else None

    async def _publish(self, connection: Connection, progress: Progress) -> None:
        disk = await self._disk(progress.id)
        report = ProgressReport(
            host=self._host_id,
            at=when(self._clock.now()),
            id=progress.id,
            disk=disk.id if disk else None,
            guest=disk.guest_name if disk else None,
            guest_uuid=disk.guest_uuid if disk else None,
            target=disk.target if disk else None,
            progress=progress.percent,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            rate_bytes_s=progress.rate_bytes_s,
            eta_s=progress.eta_s,
        )
        await connection.publish(self._topics.progress(progress.id), report.to_json(), qos=0, expiry_s=EXPIRY_S)

    async def _disk(self, name: str) -> Disk | None:
        """Return the disk of a snapshot; a task has none."""
        if name not in self._disks:
            disk = None
            if not name.startswith("t-"):
                with contextlib.suppress(HvsnapError):
                    disk = await self._catalog.disk((await self._catalog.snapshot(SnapshotId(name))).disk)
            while len(self._disks) >= REMEMBERED_MAX:
                del self._disks[next(iter(self._disks))]
            self._disks[name] = disk
        return self._disks[name]
