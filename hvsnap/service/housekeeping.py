"""What the daemon does by itself: frees space after deletions, reads everything again now and then, forgets old events.

Neither ever fails aloud: what goes wrong is logged, told as an event where it concerns snapshots, and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.happenings import EventType
from hvsnap.model import Event, Snapshot, SnapshotId
from hvsnap.ports import Clock
from hvsnap.service.sampling import Sampler, device_space
from hvsnap.store.blocks import PackedBlocks
from hvsnap.upkeep.check import Checker
from hvsnap.upkeep.images import ImageKeeper
from hvsnap.upkeep.settings import SettingsKeeper
from hvsnap.upkeep.sweep import Sweeper, Swept
from hvsnap.upkeep.verify import Report, Verified, Verifier

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""Deletions that follow each other so closely are swept together."""

SWEEP_S = 3600.0
"""Without a deletion, what failed captures and crashes have left is swept so often."""

RETRY_S = 60.0
VERIFY_LOOK_S = 600.0
DAY_S = 86_400.0
EVENTS_KEPT = 50_000
"""Events that are remembered once they are published: some weeks of a busy host, 20 MiB."""

TRIM_S = 600.0
NEARLY_FULL = 0.05
ROOM_AGAIN = 0.07
TOLD_MAX = 100

FREEING = {
    EventType.SNAPSHOT_DELETED,
    EventType.SNAPSHOT_EXPIRED,
    EventType.SNAPSHOT_EVICTED,
    EventType.SNAPSHOT_FAILED,
}


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """How often, in days (0: never), and how fast, in bytes per second (0: no limit), everything is read again."""

    days: int
    bytes_per_s: int


class Housekeeping:
    """Sweeps, verifies and looks after the space of one store; the loops end with their tasks."""

    def __init__(
        self,
        catalog: Catalog,
        store: PackedBlocks,
        clock: Clock,
        certain: Callable[[], bool],
        verify: VerifySettings,
        directory: Path | None,
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._settings = verify
        self._directory = directory
        self.sweeper = Sweeper(catalog, store, clock, certain)
        self.images = ImageKeeper(catalog, store, certain)
        self.sampler = Sampler(catalog, clock, directory)
        self.checker = Checker(catalog, store, clock)
        self.settings = SettingsKeeper(catalog, store, certain)
        self._verifier = Verifier(catalog, store, self.sweeper, clock)
        self._verifying = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._nearly_full = False
        self.swept_at: float | None = None

    def listen(self, event: Event) -> None:
        """Take note of a committed event: after a deletion there is something to free."""
        if event.type in FREEING:
            self._wanted.set()

    # -- asked for --------------------------------------------------------------------------------

    async def sweep(self) -> Swept:
        """Free what nothing refers to. Raises what the store and the catalog raise."""
        done = await self.sweeper.sweep()
        await self.images.reconcile()
        self.swept_at = self._clock.now()
        return done

    async def verify(self, report: Report) -> Verified:
        """Read everything again, as fast as it goes."""
        async with self._verifying:
            return await self._told(await self._verifier.everything(report))

    async def verify_snapshots(self, rows: Sequence[Snapshot], report: Report) -> Verified:
        """Read every block of some snapshots again, as fast as it goes."""
        return await self._told(await self._verifier.snapshots(rows, report))

    async def _told(self, found: Verified) -> Verified:
        """Tell of damage that was not known before."""
        if found.new:
            await self._tell_damage(list(found.affected), len(found.damaged), next(iter(found.new.values())))
        return found

    async def _tell_damage(self, snapshots: Sequence[SnapshotId], blocks: int, detail: str) -> None:
        log.error("%d stored blocks are damaged (%s); snapshots that do not restore: %s", blocks, detail, snapshots)
        payload = {"snapshots": list(snapshots[:TOLD_MAX]), "blocks": blocks, "detail": detail}
        async with self._catalog.write() as tx:
            await tx.emit(EventType.VERIFICATION_FAILED, payload)

    # -- by itself --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Go on until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep_loop(), name="sweep")
            group.create_task(self._verify_loop(), name="verify")
            group.create_task(self.settings.run(), name="settings")
            group.create_task(self._trim_events(), name="trim-events")
            group.create_task(self.sampler.run(), name="usage")

    async def look_at_start(self) -> None:
        """Look whether the store holds the newest that the catalog knows; if not, find out what is missing."""
        try:
            missing = await self.checker.newest_missing()
            if not missing:
                return
            log.error("the store is older than the catalog, or lacks something: %s", ", ".join(missing[:5]))
            async with self._catalog.write() as tx:
                payload = {"missing": missing[:TOLD_MAX], "count": len(missing)}
                await tx.emit(EventType.STORE_INCOMPLETE, payload)
            found = await self.checker.check()
            if found.affected:
                log.error("snapshots that do not restore: %s", ", ".join(found.affected))
        except HvsnapError as error:
            log.warning("the store cannot be looked at yet: %s", error.message)

    async def _sweep_loop(self) -> None:
        await self.look_at_start()
        wait_s = SETTLE_S  # at the start, for what a crash has left
        while True:
            await self._sleep(wait_s)
            self._wanted.clear()
            wait_s = SWEEP_S
            try:
                done = await self.sweep()
                if done.dropped_blocks or done.orphans:
                    log.info("freed %d blocks of %d bytes", done.dropped_blocks, done.freed_bytes)
                await self._look_at_space()
            except HvsnapError as error:
                log.warning("space could not be freed yet: %s", error.message)
                wait_s = RETRY_S

    async def _sleep(self, seconds: float) -> None:
        """Return after that time, or a moment after the next deletion."""
        try:
            await asyncio.wait_for(self._wanted.wait(), seconds)
            await asyncio.sleep(SETTLE_S)
        except TimeoutError:
            pass

    async def _look_at_space(self) -> None:
        """Tell once when the store's device becomes nearly full."""
        if self._directory is None:
            return
        free_bytes, total_bytes = await asyncio.to_thread(device_space, self._directory)
        share = free_bytes / total_bytes if total_bytes else 1.0
        if share < NEARLY_FULL and not self._nearly_full:
            self._nearly_full = True
            days = await self.sampler.days_to_full()
            async with self._catalog.write() as tx:
                payload = {"free_bytes": free_bytes, "total_bytes": total_bytes, "days_to_full": days}
                await tx.emit(EventType.STORE_NEARLY_FULL, payload)
        elif share > ROOM_AGAIN:
            self._nearly_full = False

    async def _trim_events(self) -> None:
        """Forget the oldest events now and then."""
        while True:
            with contextlib.suppress(HvsnapError):  # a full device: it is tried again
                async with self._catalog.write() as tx:
                    lost = await tx.trim_events(EVENTS_KEPT)
                if lost:
                    log.warning("%d events were forgotten before the broker had them", lost)
            await asyncio.sleep(TRIM_S)

    async def _verify_loop(self) -> None:
        while True:
            await asyncio.sleep(VERIFY_LOOK_S)
            if self._settings.days:
                await self._verify_due()

    async def _verify_due(self) -> None:
        """Read what was not read for longest. Interrupted, it goes on with the next pack."""
        before = self._clock.now() - self._settings.days * DAY_S
        try:
            async with self._verifying:
                await self._told(await self._verifier.due(before, self._settings.bytes_per_s))
        except HvsnapError as error:
            log.warning("the store could not be verified: %s", error.message)
