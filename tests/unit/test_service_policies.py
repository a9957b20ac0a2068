"""Policies and the schedule, rule by rule of SERVICE 5 and 3.2, on a clock that the test turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hvsnap import policy as rules
from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, PolicyUnknown, Refused, SnapshotLocked
from hvsnap.model import Disk, DiskId, Image, ImageId, Snapshot, SnapshotId, State
from hvsnap.policy import DAY_S, Policy, PolicyId
from hvsnap.service.inventory import Inventory
from hvsnap.service.policies import Policies
from hvsnap.service.requests import SnapshotRequest
from hvsnap.service.scheduler import ClockGuard, Scheduler, ScheduleSettings
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.uses import Uses
from tests.catalog_kit import a_disk, a_snapshot
from tests.service_kit import DoneCaptures, FakeHypervisor, a_catalog, a_guest, a_view

HOUR_S = 3600.0
START = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()
LIMIT = 64


class TurnedClock:
    """Two hands that the test turns: the time of day, and the time that has passed."""

    def __init__(self, now: float) -> None:
        self.at = now
        self.passed = 0.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.passed

    def turn(self, seconds: float) -> None:
        self.at += seconds
        self.passed += seconds


class InstantCaptures(DoneCaptures):
    """Snapshots that are accomplished the moment they are asked for, in the real catalog."""

    def __init__(self, catalog: Catalog, clock: TurnedClock) -> None:
        super().__init__(catalog)
        self.clock = clock
        self.fails: set[DiskId] = set()
        self.made = 0

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        disk = await self.catalog.disk(DiskId(request.disks[0]))
        automatic = request.automatic
        assert automatic is not None
        self.made += 1
        async with self.catalog.write() as tx:
            one = a_snapshot(
                disk.id,
                await tx.next_sequence(disk.id),
                disk.head,
                id=SnapshotId(f"s-{self.made:012d}"),
                name=request.name,
                created_at=self.clock.now(),
                automatic=True,
                expires_at=automatic.expires_at,
                retention=automatic.retention,
                state=State.FAILED if disk.id in self.fails else State.ACCOMPLISHED,
                error="no space" if disk.id in self.fails else "",
            )
            await tx.add_snapshot(one)
            if one.state is State.ACCOMPLISHED:
                await tx.update_disk(disk.id, head=one.id)
        return [one]


@dataclass
class Office:
    catalog: Catalog
    clock: TurnedClock
    captures: InstantCaptures
    snapshots: Snapshots
    policies: Policies
    scheduler: Scheduler
    settings: ScheduleSettings

    async def hours(self, count: float, step: float = 1.0) -> None:
        """Let time pass, with a look each hour."""
        passed = 0.0
        while passed < count:
            self.clock.turn(step * HOUR_S)
            passed += step
            await self.scheduler.look()
            await self.scheduler.drain()

    def restarted(self) -> Office:
        scheduler = Scheduler(self.catalog, self.captures, self.snapshots, self.clock, self.settings)
        return replace(self, scheduler=scheduler)

    async def add(self, policy: Policy, *disks: Disk) -> list[Disk]:
        async with self.catalog.write() as tx:
            await tx.put_policy(policy)
            for disk in disks:
                await tx.add_disk(replace(disk, policy=policy.id))
        return list(disks)

    async def names(self, disk: Disk) -> list[str]:
        return [one.name for one in await self.catalog.snapshots(disk.id)]

    async def events(self) -> Counter[str]:
        found: Counter[str] = Counter()
        sequence = 0
        while batch := await self.catalog.events(sequence):
            sequence = batch[-1].sequence
            found.update(event.type for event in batch)
        return found


@pytest.fixture
async def office(workdir: Path) -> AsyncIterator[Office]:
    clock = TurnedClock(START)
    async with a_catalog(workdir, clock) as catalog:  # type: ignore[arg-type]
        captures = InstantCaptures(catalog, clock)
        hypervisor = FakeHypervisor(a_guest(a_view(), a_view("vdb", "/images/b.qcow2")))
        inventory = Inventory(hypervisor, catalog, clock)
        snapshots = Snapshots(catalog, inventory, captures, Uses(), clock)
        settings = ScheduleSettings(HOUR_S, 2, LIMIT)
        scheduler = Scheduler(catalog, captures, snapshots, clock, settings)
        policies = Policies(catalog, inventory, clock, policies_max=3)
        yield Office(catalog, clock, captures, snapshots, policies, scheduler, settings)


def a_policy(name: str = "nightly", **changes: Any) -> Policy:
    return replace(Policy(PolicyId(f"p-{name}"), name, hours=(2,), timezone="UTC", created_at=START), **changes)


# -- runs -----------------------------------------------------------------------------------------


async def test_s5_4_automatic_snapshots_are_named_by_day_and_number(office: Office) -> None:
    (disk,) = await office.add(a_policy(hours=(2, 14)), a_disk())
    await office.hours(36)
    assert await office.names(disk) == ["auto_20260601_1", "auto_20260602_1", "auto_20260602_2"]
    made = (await office.catalog.snapshots(disk.id))[0]
    assert made.automatic
    assert made.expires_at == made.created_at + 30 * DAY_S


async def test_s5_7_downtime_is_caught_up_within_the_hour_and_else_reported(office: Office) -> None:
    (disk,) = await office.add(a_policy(hours=(2, 3, 4)), a_disk())
    await office.hours(1)
    office.clock.turn(15.5 * HOUR_S)  # 04:30: the last run is half an hour late, the others more
    office = office.restarted()
    await office.scheduler.look()
    await office.scheduler.drain()
    assert await office.names(disk) == ["auto_20260602_1"]
    assert (await office.events())["policy.missed"] == 1
    office.clock.turn(25 * HOUR_S)
    office = office.restarted()
    await office.scheduler.look()
    await office.scheduler.drain()
    assert len(await office.names(disk)) == 1
    assert (await office.events())["policy.missed"] == 2


async def test_s5_7_a_clock_that_jumps_makes_no_storm_and_deletes_nothing_in_bulk(office: Office) -> None:
    """FAULTS 22."""
    (disk,) = await office.add(a_policy(), a_disk())
    await office.hours(24 * 10)
    before = await office.names(disk)
    office.clock.at += 365 * DAY_S  # by itself: no time has passed
    await office.hours(20)
    names = await office.names(disk)
    assert names[: len(before)] == before, "something was deleted by the clock alone"
    assert len(names) <= len(before) + 1
    office.clock.at -= 365 * DAY_S  # set right again
    await office.hours(48)
    assert set(before) <= set(await office.names(disk))
    assert (await office.events())["snapshot.expired"] == 0
    assert (await office.names(disk))[-1].startswith("auto_202606")


async def test_s5_7_a_daemon_that_was_long_away_waits_a_day_before_anything_expires(office: Office) -> None:
    """FAULTS 22."""
    (disk,) = await office.add(a_policy(retain_days=1), a_disk())
    await office.hours(24 * 3)
    count = len(await office.names(disk))
    office.clock.turn(30 * DAY_S)
    office = office.restarted()
    await office.hours(20)
    assert len(await office.names(disk)) >= count
    await office.hours(24)
    assert len(await office.names(disk)) < count + 2


async def test_s5_8_the_last_snapshot_of_a_protected_disk_stays(office: Office) -> None:
    (disk,) = await office.add(a_policy(retain_days=1), a_disk())
    await office.hours(24 * 2)
    office.captures.fails.add(disk.id)
    await office.hours(24 * 20)
    alive = [one for one in await office.catalog.snapshots(disk.id) if one.state is State.ACCOMPLISHED]
    assert len(alive) == 1
    assert (await office.events())["policy.failed"] == 20


async def test_s5_5_a_disk_that_is_cancelled_or_whose_policy_goes_runs_no_more(office: Office) -> None:
    one, two = await office.add(a_policy(), a_disk(), a_disk(target="vdb"))
    await office.hours(24)
    async with office.catalog.write() as tx:
        await tx.update_disk(one.id, policy=None)
    await office.hours(24)
    await office.policies.delete("nightly")
    await office.hours(24)
    assert len(await office.names(one)) == 1
    assert len(await office.names(two)) == 2
    assert (await office.catalog.disk(two.id)).policy is None


async def test_s3_2_at_the_limit_the_oldest_automatic_one_makes_room_and_manual_ones_stay(office: Office) -> None:
    (disk,) = await office.add(a_policy(hours=tuple(range(24)), retain_days=None), a_disk())
    manual: list[SnapshotId] = []
    for number in range(200):
        await office.hours(1)
        if number % 20 == 10:
            head = (await office.catalog.disk(disk.id)).head
            async with office.catalog.write() as tx:
                one = a_snapshot(disk.id, await tx.next_sequence(disk.id), head)
                await tx.add_snapshot(one)
                await tx.update_disk(disk.id, head=one.id)
            manual.append(one.id)
    left = await office.catalog.snapshots(disk.id)
    assert len(left) == LIMIT
    assert {one.id for one in left if not one.automatic} == set(manual)
    newest = sorted((one for one in left if one.automatic), key=lambda one: one.sequence)
    assert [one.name for one in newest][-1] == (await office.names(disk))[-1]
    evicted = (await office.events())["snapshot.evicted"]
    assert evicted == office.captures.made - (LIMIT - len(manual))


async def test_s3_2_a_chain_full_of_manual_ones_fails_with_an_event(office: Office) -> None:
    policy = a_policy()
    (disk,) = await office.add(policy, a_disk())
    for _ in range(LIMIT):
        async with office.catalog.write() as tx:
            await tx.add_snapshot(a_snapshot(disk.id, await tx.next_sequence(disk.id)))

    async def full(request: SnapshotRequest) -> list[Snapshot]:
        raise Refused("the chain holds 64 snapshots already", hint="delete one")

    office.captures.create = full  # type: ignore[method-assign]
    await office.hours(24)
    events = await office.events()
    assert events["policy.failed"] == 1
    assert events["snapshot.evicted"] == 0
    assert len(await office.names(disk)) == LIMIT


async def test_s3_2_a_chain_full_of_manual_and_held_ones_fails_with_an_event_until_the_hold_has_ended(
    office: Office,
) -> None:
    (disk,) = await office.add(a_policy(), a_disk())
    until = office.clock.now() + 3 * DAY_S
    async with office.catalog.write() as tx:
        for number in range(LIMIT):
            held = {"automatic": True, "held_until": until} if number < 2 else {}
            await tx.add_snapshot(a_snapshot(disk.id, await tx.next_sequence(disk.id), **held))
    real = office.captures.create

    async def limited(request: SnapshotRequest) -> list[Snapshot]:
        if len(await office.catalog.snapshots(disk.id)) >= LIMIT:
            raise Refused("the chain holds 64 snapshots already", hint="delete one")
        return await real(request)

    office.captures.create = limited  # type: ignore[method-assign]
    await office.hours(48)
    events = await office.events()
    assert (events["policy.failed"], events["snapshot.evicted"], events["policy.run"]) == (2, 0, 0)
    await office.hours(48)
    events = await office.events()
    assert (events["policy.failed"], events["snapshot.evicted"], events["policy.run"]) == (3, 1, 1)
    assert len(await office.names(disk)) == LIMIT


async def test_a_locked_snapshot_outlives_its_policy_and_nobody_deletes_it(office: Office) -> None:
    (disk,) = await office.add(a_policy(retain_days=1), a_disk())
    await office.hours(24)
    (first,) = await office.catalog.snapshots(disk.id)
    until = office.clock.now() + 10 * DAY_S
    await office.snapshots.lock(first.id, until)
    with pytest.raises(SnapshotLocked):
        await office.snapshots.delete([first.id], dry_run=False)
    with pytest.raises(SnapshotLocked):
        await office.snapshots.lock(first.id, until - DAY_S)
    with pytest.raises(BadRequest):
        await office.snapshots.lock(first.id, office.clock.now() - 1)
    await office.hours(24 * 8)
    assert first.id in {one.id for one in await office.catalog.snapshots(disk.id)}
    await office.hours(24 * 3)
    assert first.id not in {one.id for one in await office.catalog.snapshots(disk.id)}


async def test_s4_5_expiry_and_eviction_pass_over_a_snapshot_behind_an_image(office: Office) -> None:
    aging, full = a_policy("aging", retain_days=1), a_policy("full", hours=tuple(range(24)), retain_days=None)
    (short,) = await office.add(aging, a_disk())
    (long,) = await office.add(full, a_disk(target="vdb"))
    await office.hours(24)
    kept = [(await office.catalog.snapshots(disk.id))[0] for disk in (short, long)]
    async with office.catalog.write() as tx:
        for number, row in enumerate(kept):
            await tx.add_image(Image(ImageId(f"i-{number}"), f"image {number}", "", row.id, 1.0))
    await office.hours(24 * 5)
    for disk, row in zip((short, long), kept, strict=True):
        left = [one.id for one in await office.catalog.snapshots(disk.id)]
        assert left[0] == row.id
        assert len(left) == (2 if disk is short else LIMIT)
    events = await office.events()
    assert events["snapshot.expired"] == 4
    assert events["snapshot.evicted"] > 24
    async with office.catalog.write() as tx:
        await tx.remove_image(ImageId("i-0"))
    await office.hours(1)
    assert kept[0].id not in {one.id for one in await office.catalog.snapshots(short.id)}


async def test_ten_days_of_ten_policies_leave_what_the_rules_say(office: Office) -> None:
    """What must be left is worked out from the rules alone, without the schedule's memory of what it did."""
    plans = [
        a_policy(
            f"policy-{n}", hours=tuple({(n * 5) % 24, (n * 5 + 12) % 24} if n % 2 else {n * 2}), retain_days=1 + n % 4
        )
        for n in range(10)
    ]
    disks = [(await office.add(plan, a_disk(guest_name=plan.name)))[0] for plan in plans]
    await office.hours(24 * 10)
    end = office.clock.now()
    for plan, disk in zip(plans, disks, strict=True):
        expected = [
            moment
            for moment in rules.due_times(plan, START, end)
            if moment + DAY_S * int(plan.retain_days or 0) > end - HOUR_S
        ]
        alive = await office.catalog.snapshots(disk.id)
        assert abs(len(alive) - len(expected)) <= 1, plan.name
        assert (await office.catalog.disk(disk.id)).head == alive[-1].id


# -- keeping policies -----------------------------------------------------------------------------


def a_body(**changes: Any) -> wire.PolicyCreate:
    return wire.PolicyCreate(**{"name": "nightly", "hours": [2], **changes})


async def test_s5_1_and_s5_2_policies_are_checked_counted_and_unique(office: Office) -> None:
    made = await office.policies.create(a_body())
    assert made.retain_days == 30
    with pytest.raises(Refused, match="nightly already"):
        await office.policies.create(a_body())
    for wrong in ({"name": "1"}, {"hours": []}, {"hours": [24]}, {"weekdays": [8]}, {"retain_days": 0}):
        with pytest.raises(BadRequest):
            await office.policies.create(a_body(**wrong))
    await office.policies.create(a_body(name="two"))
    await office.policies.create(a_body(name="three"))
    with pytest.raises(Refused, match="3 policies"):
        await office.policies.create(a_body(name="four"))


async def test_s5_3_an_edit_changes_only_what_is_made_from_then_on(office: Office) -> None:
    (disk,) = await office.add(a_policy(), a_disk())
    await office.hours(24)
    await office.policies.edit("nightly", wire.PolicyEdit(retain_days=1))
    await office.hours(24)
    first, second = await office.catalog.snapshots(disk.id)
    assert first.expires_at == first.created_at + 30 * DAY_S
    assert second.expires_at == second.created_at + DAY_S
    edited = await office.policies.edit("nightly", wire.PolicyEdit(retain_days=None))
    assert edited.retain_days is None
    assert edited.hours == [2]
    with pytest.raises(BadRequest, match="nothing"):
        await office.policies.edit("nightly", wire.PolicyEdit())


async def test_s5_5_a_listing_shows_the_disks_of_each_policy(office: Office) -> None:
    await office.add(a_policy(), a_disk(), a_disk(target="vdb"))
    (shown,) = (await office.policies.listing()).policies
    assert [disk.target for disk in shown.disks] == ["vda", "vdb"]
    assert shown.next_run == datetime(2026, 6, 2, 2, tzinfo=UTC)
    with pytest.raises(PolicyUnknown):
        await office.policies.delete("nobody")


def test_the_clock_is_believed_while_it_runs_like_one() -> None:
    """FAULTS 22."""
    guard = ClockGuard(1000.0, 0.0, 900.0)
    assert guard.trusted(1000.0, 0.0)
    assert guard.trusted(1000.0 + 7200, 7200.0)
    assert not guard.trusted(1000.0 + 9 * DAY_S, 7201.0)
    assert not guard.trusted(1000.0 + 9 * DAY_S + 1000, 8201.0)
    assert guard.trusted(1000.0 + 11 * DAY_S, 7201.0 + 2 * DAY_S)
    assert not ClockGuard(1000.0 + 9 * DAY_S, 0.0, 1000.0).trusted(1000.0 + 9 * DAY_S, 0.0)
