"""An alarm's life: the mark, the event, what is held for it and what lets go of that, who is told, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvsnap.alarm import Alarm, Level
from hvsnap.capture.alarms import DAY_S, HELD_MAX, Alarms
from hvsnap.capture.unusual import Rules
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.migrations import APPLICATION_ID, MIGRATIONS
from hvsnap.catalog.rows import to_column
from hvsnap.cli import render
from hvsnap.errors import Refused
from hvsnap.model import Disk, Snapshot, SnapshotId
from hvsnap.mqtt.messages import Health
from hvsnap.mqtt.states import disk_state
from hvsnap.policy import evictable, expired
from hvsnap.service import views
from hvsnap.service.findings_snapshots import unusual
from hvsnap.service.inventory import Inventory
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.uses import Uses
from hvsnap.wire import Severity
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot
from tests.service_kit import FakeCaptures, FakeHypervisor, a_catalog

HOUR_S = 3600.0
GIB = 1 << 30
RULES = Rules(history_min=3, min_bytes=1 << 20, hold_days=14)


@dataclass
class Chain:
    """A disk whose snapshots are accomplished one an hour, and judged."""

    catalog: Catalog
    clock: StoppedClock
    disk: Disk
    alarms: Alarms
    snapshots: Snapshots

    async def take(self, data_bytes: int = GIB, share: float = 0.3, *, automatic: bool = True) -> Snapshot:
        self.clock.at += HOUR_S
        disk = await self.catalog.disk(self.disk.id)
        async with self.catalog.write() as tx:
            one = a_snapshot(
                disk.id,
                await tx.next_sequence(disk.id),
                disk.head,
                automatic=automatic,
                created_at=self.clock.at,
                expires_at=self.clock.at + HOUR_S,
                changed_bytes=data_bytes,
                stored_bytes=int(data_bytes * share),
            )
            await tx.add_snapshot(one)
            await tx.update_disk(disk.id, head=one.id)
            await self.alarms.look(tx, disk, one, data_bytes)
        return await self.catalog.snapshot(one.id)

    async def row(self, snapshot: Snapshot) -> Snapshot:
        return await self.catalog.snapshot(snapshot.id)

    async def told(self) -> list[tuple[str, object]]:
        events = await self.catalog.events(0)
        return [(one.type.removeprefix("snapshot."), one.payload["snapshot"]) for one in events]


@pytest.fixture
async def chain(workdir: Path) -> AsyncIterator[Chain]:
    clock = StoppedClock(1_800_000_000.0)
    async with a_catalog(workdir, clock) as catalog:
        disk = a_disk()
        async with catalog.write() as tx:
            await tx.add_disk(disk)
        inventory = Inventory(FakeHypervisor(), catalog, clock)
        snapshots = Snapshots(catalog, inventory, FakeCaptures(catalog), Uses(), clock)
        yield Chain(catalog, clock, disk, Alarms(catalog, RULES), snapshots)


async def test_s12_an_attack_is_marked_told_and_holds_the_last_good_snapshot(chain: Chain) -> None:
    usual = [await chain.take() for _ in range(6)]
    assert [one.alarm for one in usual] == [None] * 6
    attack = await chain.take(50 * GIB, 0.99)
    assert attack.alarm is not None
    assert attack.alarm.level is Level.SEVERE
    good = await chain.row(usual[-1])
    assert good.held_until == chain.clock.at + 14 * DAY_S
    (event,) = await chain.catalog.events(0)
    assert event.type == "snapshot.unusual"
    assert (event.payload["snapshot"], event.payload["last_good"]) == (attack.id, good.id)
    assert (event.payload["level"], event.payload["faster"], event.payload["denser"]) == ("severe", True, True)
    assert str(event.payload["held_until"]).startswith("2027-01-29T")
    # It goes on being encrypted: marked, but told once; the one before it is still the last good one.
    again = await chain.take(50 * GIB, 0.99)
    assert again.alarm is not None
    assert await chain.told() == [("unusual", attack.id)]
    assert (await chain.row(good)).held_until == chain.clock.at + 14 * DAY_S
    assert (await chain.row(attack)).held_until is None
    assert [change.data_bytes for change in await chain.catalog.changes.of(chain.disk.id)][-2:] == [50 * GIB] * 2


async def test_s12_no_rule_lets_a_held_snapshot_go_and_its_owner_may(chain: Chain) -> None:
    usual = [await chain.take() for _ in range(6)]
    await chain.take(50 * GIB, 0.99)
    rows = await chain.catalog.snapshots(chain.disk.id)
    later = chain.clock.at + 5 * DAY_S
    assert expired(rows, later, active=False) == [one.id for one in rows if one.id != usual[-1].id]
    assert usual[-1].id not in {one.id for one in evictable(rows, later)}
    assert usual[-1].id in expired(rows, chain.clock.at + 14 * DAY_S, active=False)
    await chain.snapshots.delete([usual[-1].id], dry_run=False)
    assert len(await chain.catalog.snapshots(chain.disk.id)) == 6


async def test_s12_alarms_without_end_hold_no_more_than_a_few_and_never_give_up_the_first(chain: Chain) -> None:
    """A guest that sets off alarm after alarm neither fills its chain nor drives out what was held first."""
    for _ in range(6):
        first = await chain.take()
    size = 8 * GIB
    for _ in range(2 * HELD_MAX):
        await chain.take(size, 0.99)
        await chain.take()
        size *= 5
    held = [one for one in await chain.catalog.snapshots(chain.disk.id) if one.held_until]
    assert len(held) == HELD_MAX
    assert held[0].id == first.id


async def test_s12_manual_snapshots_are_named_and_not_held(chain: Chain) -> None:
    for _ in range(6):
        good = await chain.take(automatic=False)
    await chain.take(50 * GIB, 0.99)
    (event,) = await chain.catalog.events(0)
    assert (event.payload["last_good"], event.payload["held_until"]) == (good.id, None)
    assert (await chain.row(good)).held_until is None


async def test_s12_an_alarm_that_is_acknowledged_is_over(chain: Chain) -> None:
    usual = [await chain.take() for _ in range(6)]
    first, second = await chain.take(50 * GIB, 0.99), await chain.take(50 * GIB, 0.99)
    with pytest.raises(Refused, match="nothing is unusual"):
        await _acknowledge(chain, usual[0].id)
    await _acknowledge(chain, first.id)
    assert (await chain.row(usual[-1])).held_until is not None  # the other alarm is open still
    await _acknowledge(chain, second.id)
    await _acknowledge(chain, second.id)
    assert [one.held_until for one in await chain.catalog.snapshots(chain.disk.id)] == [None] * 8
    assert (await chain.told())[1:] == [("acknowledged", first.id), ("acknowledged", second.id)]
    shown = await chain.snapshots.info(second.id)
    assert shown.alarm is not None
    assert shown.alarm.acknowledged_at is not None
    assert "acknowledged" in render.snapshot(shown)
    assert await _seen(chain) == ([], Health.OK, 0)


async def _acknowledge(chain: Chain, snapshot: SnapshotId) -> None:
    await chain.snapshots.edit(snapshot, name=None, description=None, tags=None, usual=True)


async def _seen(chain: Chain) -> tuple[list[Severity], Health, int]:
    """Return what the doctor, the retained state and the metrics say."""
    rows = await chain.catalog.snapshots()
    found = unusual({chain.disk.id: chain.disk}, rows)
    state = disk_state("kvm1", chain.clock.at, chain.disk, rows, 0)
    (figures,) = (await chain.catalog.figures()).disks
    level = {None: 0, Level.WARNING: 1, Level.SEVERE: 2}[None if figures.alarm is None else Level(figures.alarm)]
    assert (state.alarm is None) == (state.health is Health.OK)
    return [one.severity for one in found], state.health, level


async def test_everybody_who_looks_is_told_until_it_is_acknowledged(chain: Chain) -> None:
    usual = [await chain.take() for _ in range(6)]
    assert await _seen(chain) == ([], Health.OK, 0)
    warned = await chain.take(50 * GIB, 0.3)
    assert await _seen(chain) == ([Severity.WARNING], Health.UNUSUAL, 1)
    severe = await chain.take(500 * GIB, 0.99)
    assert await _seen(chain) == ([Severity.ERROR], Health.UNUSUAL, 2)
    assert await chain.told() == [("unusual", warned.id), ("unusual", severe.id)]
    await chain.take()  # quiet again: the alarm stays
    assert await _seen(chain) == ([Severity.ERROR], Health.UNUSUAL, 2)
    (finding,) = unusual({chain.disk.id: chain.disk}, await chain.catalog.snapshots())
    assert f"snapshot-lock {usual[-1].id}" in finding.remedy
    assert f"snapshot-edit {severe.id} --usual" in finding.remedy
    shown = views.snapshot(await chain.row(severe), chain.disk)
    assert "accomplished, unusual" in render.snapshots([shown])
    assert "severe: 500 GiB changed an hour (usually up to 1.0 GiB)" in render.snapshot(shown)
    assert "Held until" in render.snapshot(views.snapshot(await chain.row(usual[-1]), chain.disk))


async def test_the_past_outlives_its_snapshots_and_a_deleted_heads_changes_count_from_its_parent(chain: Chain) -> None:
    for _ in range(6):
        one = await chain.take()
        async with chain.catalog.write() as tx:
            await tx.delete_snapshot(one.id)
    # Every one of them was a first one again, so nothing is known of hours.
    assert [change.hours for change in await chain.catalog.changes.of(chain.disk.id)] == [None] * 6
    base = await chain.take()
    for hour in range(1, 5):
        gone = await chain.take()
        async with chain.catalog.write() as tx:
            await tx.delete_snapshot(gone.id)
        changes = await chain.catalog.changes.of(chain.disk.id)
        assert changes[-1].hours == pytest.approx(hour)
    assert [one.id for one in await chain.catalog.snapshots()] == [base.id]
    assert (await chain.take(500 * GIB, 0.99)).alarm is not None


async def test_switched_off_nothing_is_judged_and_the_past_is_remembered(chain: Chain) -> None:
    chain.alarms = Alarms(chain.catalog, Rules(enabled=False, history_min=3, min_bytes=1))
    for _ in range(6):
        await chain.take()
    assert (await chain.take(500 * GIB, 1.0)).alarm is None
    assert len(await chain.catalog.changes.of(chain.disk.id)) == 7
    chain.alarms = Alarms(chain.catalog, Rules(history_min=3, min_bytes=1, hold_days=0))
    assert isinstance((await chain.take(5000 * GIB, 1.0)).alarm, Alarm)
    assert [one.held_until for one in await chain.catalog.snapshots()] == [None] * 8


async def test_a_catalog_of_before_begins_with_what_its_snapshots_tell(workdir: Path) -> None:
    number = next(at for at, script in enumerate(MIGRATIONS) if "CREATE TABLE changes" in script)
    disk = a_disk()
    first = a_snapshot(disk.id, 1, created_at=0.0, changed_bytes=70, stored_bytes=30)
    second = a_snapshot(disk.id, 2, first.id, created_at=7200.0, changed_bytes=7, stored_bytes=3)
    with contextlib.closing(sqlite3.connect(workdir / "catalog.db")) as old:
        old.executescript("\n".join(MIGRATIONS[:number]))
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        old.execute(f"PRAGMA user_version = {number}")
        for table, value in (("disks", disk), ("snapshots", first), ("snapshots", second)):
            known = {row[1] for row in old.execute(f"PRAGMA table_info({table})")}
            fields = [field.name for field in dataclasses.fields(value) if field.name in known]
            columns = ", ".join(f'"{name}"' for name in fields)
            values = [to_column(name, getattr(value, name)) for name in fields]
            old.execute(f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(fields))})", values)
        old.commit()
    async with a_catalog(workdir) as catalog:
        changes = [(one.hours, one.data_bytes, one.stored_bytes) for one in await catalog.changes.of(disk.id)]
        assert [one.id for one in await catalog.snapshots()] == [first.id, second.id]
    assert changes == [(None, 70, 30), (2.0, 7, 3)]
