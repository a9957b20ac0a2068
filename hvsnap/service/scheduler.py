"""The schedule: runs policies when they are due, lets go what has come to its end, makes room (SERVICE 3.2, 5).

What is due is decided purely (:mod:`hvsnap.policy`); this looks at the clock, and acts. Disks that are due at the same
hour wait in one queue for a few workers, so that a host is not overrun at full hours.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hvsnap import policy as rules
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError, NotFound, SnapshotPromoted
from hvsnap.happenings import EventType, disk_payload
from hvsnap.model import Disk, DiskId, Snapshot, SnapshotId, State
from hvsnap.policy import Policy
from hvsnap.ports import Clock
from hvsnap.service.requests import Automatic, CapturesPort, SnapshotRequest
from hvsnap.service.snapshots import Rule, Snapshots
from hvsnap.service.views import when

log = logging.getLogger(__name__)

LOOK_S = 60.0
"""Longest time between two looks: a changed clock, or policy, is seen within it."""

EXPIRE_S = 300.0
JUMP_S = 3600.0
"""A clock that differs by more than this from the time that has passed was changed."""

ABSENT_S = 2 * rules.DAY_S
HOLD_S = rules.DAY_S
"""How long nothing expires after a clock was changed, or the daemon was away for long: time to notice (SERVICE 5.7)."""

HELD = "expiry-held"


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """``late_max_s``: how late a missed hour is still caught up; ``workers``: disks captured side by side."""

    late_max_s: float
    workers: int
    snapshots_per_disk: int


class ClockGuard:
    """Tells whether the clock can be believed enough to let things go by it.

    ``last_checked`` is what the clock said when the last daemon looked; None: nobody knows, which is no reason to doubt
    it unless ``doubted``. ``held_until`` is what that daemon noted of a hold, by the same clock.
    """

    def __init__(
        self,
        now: float,
        monotonic: float,
        last_checked: float | None,
        *,
        doubted: bool = False,
        held_until: float = 0.0,
    ) -> None:
        self._offset = now - monotonic
        if last_checked is not None:
            doubted = doubted or abs(now - last_checked) > ABSENT_S
        # A restart ends no hold: the clock that was changed is the one that was looked at last.
        self._held_until = monotonic + (HOLD_S if doubted else min(HOLD_S, max(0.0, held_until - now)))

    def trusted(self, now: float, monotonic: float) -> bool:
        """Whether the clock has run like a clock for long enough."""
        if abs(now - monotonic - self._offset) > JUMP_S:
            self._held_until = monotonic + HOLD_S
        self._offset = now - monotonic
        return monotonic >= self._held_until

    def held_until(self, now: float, monotonic: float) -> float:
        """Return until when nothing goes by the clock, by that very clock; what the next daemon is to know."""
        return now + max(0.0, self._held_until - monotonic)


class Scheduler:
    """Runs until cancelled; :meth:`look` is one look, for whoever has a clock of his own."""

    def __init__(
        self,
        catalog: Catalog,
        captures: CapturesPort,
        snapshots: Snapshots,
        clock: Clock,
        settings: ScheduleSettings,
    ) -> None:
        self._catalog = catalog
        self._captures = captures
        self._snapshots = snapshots
        self._clock = clock
        self._settings = settings
        self._guard: ClockGuard | None = None
        self._trusted = False
        self._expired_at: float | None = None
        self._waiting: OrderedDict[DiskId, Policy] = OrderedDict()
        self._woken = asyncio.Event()
        self.also_expire: list[Callable[[float], Awaitable[None]]] = []
        """What else comes to its end by the clock, while that can be believed; given the present time."""

    async def run(self) -> None:
        """Look whenever something may be due, and work what is."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._settings.workers):
                group.create_task(self._work(), name=f"policy-worker-{number}")
            while True:
                try:
                    await self.look()
                except HvsnapError as error:
                    log.warning("the schedule cannot be looked at: %s", error.message)
                await asyncio.sleep(await self._pause_s())

    async def look(self) -> None:
        """Queue what is due, tell what was missed, and let go what has come to its end."""
        now = self._clock.now()
        last = await self._catalog.schedule_checked()
        if self._guard is None:
            self._guard = await self._new_guard(now, last)
        self._trusted = self._guard.trusted(now, self._clock.monotonic())
        if not self._trusted:
            await self._catalog.upkeep.set_note(HELD, self._guard.held_until(now, self._clock.monotonic()))
        await self._queue_due(now if last is None else last, now)
        if self._trusted and (self._expired_at is None or self._clock.monotonic() - self._expired_at >= EXPIRE_S):
            self._expired_at = self._clock.monotonic()
            await self._expire(now)
            for also in self.also_expire:
                await also(now)

    async def _new_guard(self, now: float, last: float | None) -> ClockGuard:
        # Snapshots that no schedule has ever looked at are those of a catalog that was made anew, on whatever host.
        doubted = last is None and bool(await self._catalog.snapshots())
        held_until = await self._catalog.upkeep.note(HELD)
        return ClockGuard(now, self._clock.monotonic(), last, doubted=doubted, held_until=held_until)

    async def drain(self) -> None:
        """Work what is queued, and return when nothing is."""
        while self._waiting:
            disk, policy = self._waiting.popitem(last=False)
            await self._run(disk, policy)

    # -- what is due ------------------------------------------------------------------------------

    async def _queue_due(self, last: float, now: float) -> None:
        disks = await self._catalog.disks()
        missed: list[tuple[Policy, tuple[float, ...]]] = []
        for policy in await self._catalog.policies():
            mine = [disk for disk in disks if disk.policy == policy.id]
            # Hours before a policy was made, or while it had no disk, are nobody's.
            due = rules.decide_due(policy, max(last, policy.created_at), now, self._settings.late_max_s)
            if due.missed and mine:
                missed.append((policy, due.missed))
            if due.run is not None:
                for disk in mine:
                    self._waiting[disk.id] = policy
        async with self._catalog.write() as tx:
            await tx.schedule_checked(now)
            for policy, times in missed:
                payload = {"policy": policy.name, "missed": len(times), "last": _zulu(times[-1])}
                await tx.emit(EventType.POLICY_MISSED, payload)
        if self._waiting:
            self._woken.set()

    async def _pause_s(self) -> float:
        now = self._clock.now()
        try:
            policies = await self._catalog.policies()
        except HvsnapError:
            return LOOK_S
        first = min((rules.next_due(policy, now) for policy in policies), default=now + LOOK_S)
        return min(LOOK_S, max(0.1, first - now + 0.05))

    # -- a run ------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            while self._waiting:
                disk, policy = self._waiting.popitem(last=False)
                try:
                    await self._run(disk, policy)
                except HvsnapError as error:
                    log.warning("policy %s on %s: %s", policy.name, disk, error.message)
                except Exception:
                    log.exception("policy %s on %s failed", policy.name, disk)
            self._woken.clear()
            await self._woken.wait()

    async def _run(self, disk_id: DiskId, policy: Policy) -> None:
        """Make one automatic snapshot; whatever goes wrong is told."""
        try:
            disk = await self._catalog.disk(disk_id)
        except NotFound:
            return
        if disk.policy != policy.id:
            return  # cancelled, or another one applied, while it waited
        try:
            await self._make_room(disk)
            (made,) = await self._captures.create(await self._request(disk, policy))
            async with self._catalog.write() as tx:
                payload = disk_payload(disk) | {"policy": policy.name, "snapshot": made.id, "name": made.name}
                await tx.emit(EventType.POLICY_RUN, payload)
            (ended,) = await self._captures.wait([made.id])
            if ended.state is State.FAILED:
                await self._tell_failure(disk, policy, ended.error)
        except HvsnapError as error:
            text = f"{error.message} ({error.hint})" if error.hint else error.message
            await self._tell_failure(disk, policy, text)

    async def _request(self, disk: Disk, policy: Policy) -> SnapshotRequest:
        now = self._clock.now()
        names = [row.name for row in await self._catalog.snapshots(disk.id)]
        return SnapshotRequest(
            guest=disk.guest_uuid,
            disks=(disk.id,),
            name=rules.automatic_name(policy, now, names),
            description=f"made by policy {policy.name}",
            wait=True,
            automatic=Automatic(rules.expires_at(policy, now), rules.retention(policy)),
        )

    async def _make_room(self, disk: Disk) -> None:
        """Delete the oldest automatic snapshots while the chain is at its limit (SERVICE 3.2)."""
        rows = [row for row in await self._catalog.snapshots(disk.id) if row.state is not State.FAILED]
        surplus = len(rows) - self._settings.snapshots_per_disk + 1
        # By a clock that cannot be believed no lock has ended.
        now = self._clock.now() if self._trusted else 0.0
        evictable = rules.evictable(rows, now)
        if surplus > len(evictable):
            return  # the limit was lowered: what could go would go for nothing
        for row in evictable:
            if surplus <= 0:
                return
            if await self._let_go(row.id, EventType.SNAPSHOT_EVICTED, lambda rows: _evictable(rows, now)):
                surplus -= 1

    async def _tell_failure(self, disk: Disk, policy: Policy, error: str) -> None:
        log.warning("policy %s on %s/%s: %s", policy.name, disk.guest_name, disk.target, error)
        async with self._catalog.write() as tx:
            await tx.emit(EventType.POLICY_FAILED, disk_payload(disk) | {"policy": policy.name, "error": error})

    # -- what is let go ---------------------------------------------------------------------------

    async def _expire(self, now: float) -> None:
        for disk in await self._catalog.disks(include_released=True):
            if disk.released and disk.delete_auto_with_disk:
                # What its release could not delete: in use, locked, or the daemon ended before (SERVICE 5.6).
                await self._let_all_go(disk, EventType.SNAPSHOT_DELETED, lambda rows: _evictable(rows, now))
                continue
            rule = partial(rules.expired, now=now, active=disk.policy is not None and not disk.released)
            await self._let_all_go(disk, EventType.SNAPSHOT_EXPIRED, rule)

    async def _let_all_go(self, disk: Disk, told_as: EventType, rule: Rule) -> None:
        for snapshot in rule(await self._catalog.snapshots(disk.id)):
            await self._let_go(snapshot, told_as, rule)

    async def _let_go(self, snapshot: SnapshotId, told_as: EventType, rule: Rule) -> bool:
        """Delete an automatic snapshot; one that is in use, or that its rule keeps by now, is looked at again later."""
        try:
            await self._snapshots.delete([snapshot], dry_run=False, told_as=told_as, rule=rule)
        except SnapshotPromoted:
            return False  # as long as its image is there, which nobody needs to be told every few minutes
        except HvsnapError as error:
            log.info("%s stays for now: %s", snapshot, error.message)
            return False
        return True


def _evictable(rows: Sequence[Snapshot], now: float) -> list[SnapshotId]:
    return [row.id for row in rules.evictable(rows, now)]


def _zulu(moment: float) -> str:
    """Return an instant as all times of events are written."""
    return when(moment).isoformat().replace("+00:00", "Z")
