"""What the schedule does when the clock, a time zone or a decision of a moment ago is not what it was."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from hvsnap import policy as rules
from hvsnap.drill import Drill, Outcome
from hvsnap.errors import Refused
from hvsnap.model import DiskId, Snapshot, SnapshotId
from hvsnap.policy import DAY_S
from hvsnap.service.drills import newest_due
from hvsnap.service.scheduler import ScheduleSettings
from tests.catalog_kit import a_disk, a_snapshot
from tests.unit.test_service_policies import HOUR_S, START, Office, a_policy, office

__all__ = ["office"]

LOST_ZONE = "Mars/Olympus_Mons"


async def test_s5_7_a_restart_under_a_wrong_clock_does_not_end_the_hold(office: Office) -> None:
    """FAULTS 22."""
    (disk,) = await office.add(a_policy(), a_disk())
    await office.hours(24 * 10)
    before = await office.names(disk)
    office.clock.at += 5 * 365 * DAY_S
    for _ in range(3):
        office.clock.passed = 0.0  # the host, too, was started again
        office = office.restarted()
        await office.hours(2)
    assert (await office.names(disk))[: len(before)] == before
    await office.hours(24)  # and the hold ends, though there were restarts in it
    assert (await office.events())["snapshot.expired"] >= len(before)


async def test_s5_7_a_catalog_that_was_made_anew_waits_a_day_before_anything_expires(office: Office) -> None:
    (disk,) = await office.add(a_policy(retain_days=1), a_disk())
    async with office.catalog.write() as tx:
        for _ in range(3):
            one = a_snapshot(disk.id, await tx.next_sequence(disk.id), automatic=True, expires_at=START - DAY_S)
            await tx.add_snapshot(one)
    await office.hours(20)
    assert (await office.events())["snapshot.expired"] == 0
    await office.hours(8)
    assert (await office.events())["snapshot.expired"] == 3


async def test_a_clock_that_is_not_believed_ends_no_lock(office: Office) -> None:
    (disk,) = await office.add(a_policy(hours=tuple(range(24)), retain_days=None), a_disk())
    office.settings = ScheduleSettings(HOUR_S, 2, 3)
    office = office.restarted()
    await office.hours(3)
    first = (await office.catalog.snapshots(disk.id))[0]
    await office.snapshots.lock(first.id, office.clock.now() + 30 * DAY_S)
    office.clock.at += 365 * DAY_S
    await office.hours(3)
    assert (await office.events())["snapshot.evicted"] > 0
    assert first.id in {one.id for one in await office.catalog.snapshots(disk.id)}


async def test_what_could_be_evicted_stays_where_that_would_not_make_room(office: Office) -> None:
    """The limit was lowered: with all automatic snapshots gone the chain would still be full."""
    (disk,) = await office.add(a_policy(), a_disk())
    async with office.catalog.write() as tx:
        for number in range(6):
            await tx.add_snapshot(a_snapshot(disk.id, await tx.next_sequence(disk.id), automatic=number < 2))
    office.settings = ScheduleSettings(HOUR_S, 2, 3)
    office = office.restarted()
    await office.hours(24)
    assert (await office.events())["snapshot.evicted"] == 0


async def test_an_alarm_holds_a_snapshot_whose_expiry_was_decided_a_moment_ago(office: Office) -> None:
    (disk,) = await office.add(a_policy(retain_days=1), a_disk())
    await office.hours(24)
    (row,) = await office.catalog.snapshots(disk.id)
    now = office.clock.now() + 2 * DAY_S

    def rule(rows: list[Snapshot]) -> list[SnapshotId]:
        return rules.expired(rows, now, active=False)

    assert rule([row]) == [row.id]
    async with office.catalog.write() as tx:
        await tx.update_snapshot(row.id, held_until=now + DAY_S)
    with pytest.raises(Refused, match="kept"):
        await office.snapshots.delete([row.id], dry_run=False, rule=rule)  # type: ignore[arg-type]
    async with office.catalog.write() as tx:
        await tx.update_snapshot(row.id, held_until=None)
    await office.snapshots.delete([row.id], dry_run=False, rule=rule)  # type: ignore[arg-type]


async def test_a_time_zone_that_is_no_longer_known_stops_nothing(office: Office) -> None:
    """Neither that policy's runs, nor any other's, nor what its snapshots' rule lets go."""
    keep = rules.Keep(daily=2)
    lost = a_policy("lost", timezone=LOST_ZONE, retain_days=None, keep=keep)
    (one,) = await office.add(lost, a_disk())
    (two,) = await office.add(a_policy("other"), a_disk(target="vdb"))
    await office.hours(24 * 5)
    assert len(await office.names(one)) == 2
    assert len(await office.names(two)) == 5
    assert 0 < await office.scheduler._pause_s() <= 60
    shown = {one.name: one.next_run for one in (await office.policies.listing()).policies}
    assert all(shown.values())


def test_a_drill_that_a_wrong_clock_noted_is_due() -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
    disk = a_disk()
    row = a_snapshot(disk.id, 1)
    last = Drill(disk.id, row.id, now - DAY_S, now - DAY_S, Outcome.PASSED, 0, "")
    assert newest_due([disk], [row], {DiskId(disk.id): last}, now, 7 * DAY_S) is None
    ahead = replace(last, began_at=now + 9 * 365 * DAY_S)
    assert newest_due([disk], [row], {DiskId(disk.id): ahead}, now, 7 * DAY_S) == row
